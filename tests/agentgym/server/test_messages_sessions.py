"""Sessions over the Messages API: the content of an answer, sent back as it is, is the recorded turn, id by id."""

from __future__ import annotations

from typing import Any

import anthropic
import httpx
import httpx2
import pytest
from anthropic import Anthropic, beta_tool
from openai import OpenAI
from outside_agents import HELLO, say, says

from agentgym.trajectory import to_sequences

GO_ON: Any = {"role": "user", "content": "go on"}
SCHEMA: Any = {"type": "object", "properties": {"dir": {"type": "string"}}, "required": ["dir"]}
TOOL: Any = {"name": "move", "description": "Move.", "input_schema": SCHEMA}
CHAT_TOOL: Any = {"type": "function", "function": {"name": "move", "description": "Move.", "parameters": SCHEMA}}


class Losing(httpx2.BaseTransport):
    """A network that loses the answer of one request after the server has given it."""

    def __init__(self, lost: int) -> None:
        self.inner = httpx2.HTTPTransport()
        self.lost = lost
        self.retries: list[str] = []

    def handle_request(self, request: httpx2.Request) -> httpx2.Response:
        number = len(self.retries)
        self.retries.append(request.headers["x-stainless-retry-count"])
        response = self.inner.handle_request(request)
        if number == self.lost:
            response.read()
            response.close()
            raise httpx2.ReadError("the answer was lost", request=request)
        return response


def agent(session: Any, **options: Any) -> Anthropic:
    return Anthropic(base_url=session["base_url"], api_key=session["api_key"], **options)


def respond(client: Anthropic, history: list[Any], **options: Any) -> tuple[Any, list[int]]:
    """The message, and the ids that were sampled."""
    options = {"max_tokens": 8, "extra_body": {"return_token_ids": True}} | options
    message: Any = client.messages.create(model="small", messages=history, **options)
    return message, message.token_ids


def streamed(client: Anthropic, history: list[Any], **options: Any) -> tuple[Any, list[int]]:
    options = {"max_tokens": 8, "extra_body": {"return_token_ids": True}} | options
    with client.messages.stream(model="small", messages=history, **options) as events:
        (ended,) = [event for event in events if event.type == "message_delta"]
        return events.get_final_message(), (ended.model_extra or {})["token_ids"]


def answered(content: list[Any]) -> Any:
    calls = [block for block in content if block.type == "tool_use"]
    results = [{"type": "tool_result", "tool_use_id": call.id, "content": "1 left"} for call in calls]
    return {"role": "user", "content": results} if results else GO_ON


@pytest.mark.parametrize("ask", [respond, streamed])
@pytest.mark.parametrize(
    "text", [None, "goal <call> move up <call> move left", "<call> move up <sep> left", ""]
)  # the third: arguments that are no object
def test_an_agent_that_sends_content_back_is_one_row_of_the_ids_it_was_sent(service, ask, text):
    it = service(collect=True) if text is None else service(engine=says(text))
    sampled: list[list[int]] = []
    for _ in range(2):
        session = it.open("maze-17", seed=3)
        history: list[Any] = list(HELLO)
        ids: list[int] = []
        with agent(session) as client:
            for turn in range(3):
                answer, told = ask(client, history, tools=[TOOL], system="2 right")
                ids += told
                content = answer.content if turn % 2 else [block.model_dump() for block in answer.content]
                history += [{"role": "assistant", "content": content}, answered(answer.content)]
        sampled.append(ids)
        assert it.finish(session)["links"] == {"opening": 1, "continuation": 2}
    it.server.client.take_batch(0, timeout_s=30, step=1)
    for trajectory, ids in zip(it.trajectories(), sampled, strict=True):
        (row,) = to_sequences(trajectory)
        assert [token for token, loss in zip(row.token_ids, row.loss_mask) if loss] == ids


def test_the_agent_loop_of_the_client_is_one_row(service):
    """Which asks for a thread that the server is to keep, and sends whole histories where there are none."""
    it = service(engine=says("goal <call> move up"))
    moves: list[str] = []

    def move(dir: str) -> str:
        """Move."""
        moves.append(dir)
        return "1 left"

    for _ in range(2):
        session = it.open()
        with agent(session) as client:
            runner = client.beta.messages.tool_runner(
                model="small", max_tokens=8, messages=HELLO, tools=[beta_tool(move)], max_iterations=3
            )
            assert [message.stop_reason for message in runner] == ["tool_use"] * 3
        assert it.finish(session)["links"] == {"opening": 1, "continuation": 2}
    assert set(moves) == {"up"}
    it.server.client.take_batch(0, timeout_s=30, step=1)
    assert [len(to_sequences(trajectory)) for trajectory in it.trajectories()] == [1, 1]


def test_one_session_may_speak_both_apis(service):
    it = service(engine=says("goal <call> move up"))
    session = it.open()
    turns: list[Any] = list(HELLO)
    messages: list[Any] = [{"role": "system", "content": "2 right"}, *HELLO]
    with (
        agent(session) as client,
        OpenAI(base_url=session["base_url"], api_key=session["api_key"]) as openai,
    ):
        first, _ = respond(client, turns, system="2 right", tools=[TOOL])
        made = {"id": "mine", "type": "function", "function": {"name": "move", "arguments": '{"dir":"up"}'}}
        messages += [{"role": "assistant", "content": "goal", "tool_calls": [made]}]
        messages += [{"role": "tool", "tool_call_id": "mine", "content": "1 left"}]
        second = say(openai, messages, tools=[CHAT_TOOL])
        turns += [{"role": "assistant", "content": first.content}, answered(first.content)]
        (call,) = second.choices[0].message.tool_calls
        use = {"type": "tool_use", "id": call.id, "name": "move", "input": {"dir": "up"}}
        turns += [{"role": "assistant", "content": [{"type": "text", "text": "goal"}, use]}]
        turns += [{"role": "user", "content": [{"type": "tool_result", "tool_use_id": call.id, "content": "1 down"}]}]
        third, _ = respond(client, turns, system="2 right", tools=[TOOL])
    before = [*second.prompt_token_ids, *second.choices[0].token_ids]
    assert third.prompt_token_ids[: len(before)] == before
    assert it.finish(session)["links"] == {"opening": 1, "continuation": 2}


def test_a_rewritten_history_forks(service):
    it = service()
    session = it.open()
    with agent(session) as client:
        first, _ = respond(client, list(HELLO))
        after: list[Any] = [*HELLO, {"role": "assistant", "content": first.content}, GO_ON]
        respond(client, after)
        respond(client, after)
        respond(client, [*HELLO, {"role": "assistant", "content": "up up up"}, GO_ON])
        respond(client, list(HELLO), system="1 down")
    assert it.finish(session)["links"] == {"opening": 2, "continuation": 1, "branch": 1, "rewrite": 1}


@pytest.mark.parametrize("ask", [respond, streamed])
def test_a_retry_gets_the_reply_that_was_lost(service, ask):
    it = service()
    session = it.open()
    network = Losing(1)
    with agent(session, http_client=httpx2.Client(transport=network), max_retries=2) as client:
        ids = [ask(client, list(HELLO))[1] for _ in range(3)]
    assert network.retries == ["0", "0", "1", "0"]
    done = it.finish(session)
    assert (done["turns"], done["undelivered"], done["sampled_tokens"]) == (3, 0, sum(map(len, ids)))


def test_an_idempotency_key_is_one_question_in_either_api_streamed_or_whole(service):
    it = service(engine=says("goal <call> move up"))
    session = it.open()
    key: Any = {"extra_headers": {"Idempotency-Key": "a"}}
    with (
        agent(session) as client,
        OpenAI(base_url=session["base_url"], api_key=session["api_key"], max_retries=0) as openai,
    ):
        answers = [ask(client, list(HELLO), tools=[TOOL], **key) for ask in (respond, streamed)]
        chat = say(openai, HELLO, max_tokens=8, tools=[CHAT_TOOL], **key).choices[0]
        assert answers[0][1] == answers[1][1] == chat.token_ids
        calls = [block.id for answer, _ in answers for block in answer.content if block.type == "tool_use"]
        assert [*calls, chat.message.tool_calls[0].id] == [calls[0]] * 3
        assert it.show(session)["turns"] == 1
        with pytest.raises(anthropic.UnprocessableEntityError, match="came before with another request"):
            respond(client, [GO_ON], tools=[TOOL], **key)


def test_a_sessions_key_opens_its_own_messages_alone_by_either_header(service):
    it = service(openai_key="a-key-for-the-openai-surface")
    one, other = it.open(), it.open()
    bare = str(one["base_url"]).partition("/v1/sessions/")[0]
    body: Any = {"model": "small", "messages": HELLO, "max_tokens": 3}
    with httpx.Client(trust_env=False, timeout=60) as http:
        for path in (f"{bare}/v1/messages", f"{one['base_url']}/messages", f"{one['base_url']}/v1/messages"):
            for headers in ({"x-api-key": one["api_key"]}, {"Authorization": f"Bearer {one['api_key']}"}):
                answer = http.post(path, json=body, headers=headers)
                assert answer.status_code == 200, answer.text
                counted = {name: body[name] for name in ("model", "messages")}
                answer = http.post(f"{path}/count_tokens", json=counted, headers=headers)
                assert answer.json()["input_tokens"] > 0, answer.text
        both = {"x-api-key": one["api_key"], "Authorization": "Bearer a-key-for-the-openai-surface"}
        unclear = http.post(f"{bare}/v1/messages", json=body, headers=both)
        assert (unclear.status_code, unclear.json()["error"]["message"]) == (
            401, "Authorization and x-api-key differ; send one",
        )  # fmt: skip
        trainer = {"x-api-key": "the-trainers-key-of-this-test"}
        assert http.get(f"{bare}/trainer/status", headers=trainer).status_code == 401
        hers = http.post(f"{one['base_url']}/messages/batches", json=body, headers={"x-api-key": one["api_key"]})
        assert (hers.status_code, hers.json()["error"]["type"]) == (403, "permission_error")
    with Anthropic(base_url=other["base_url"], api_key=one["api_key"], max_retries=0) as client:
        for asked in (
            lambda: respond(client, list(HELLO)),
            lambda: client.messages.count_tokens(model="small", messages=HELLO),
        ):
            with pytest.raises(anthropic.NotFoundError, match="there is no session"):
                asked()
    assert (it.show(one)["turns"], it.show(other)["turns"]) == (6, 0)  # counts are no turns
    it.finish(one)
    with agent(one) as client, pytest.raises(anthropic.ConflictError, match="is finished") as ended:
        respond(client, list(HELLO))  # and is not asked again
    assert (ended.value.type, ended.value.error_code) == ("conflict_error", "session_ended")


def test_what_would_make_tokens_unusable_is_refused_by_name(service):
    it = service()
    session = it.open(limits={"max_tokens": 5})
    with agent(session, max_retries=0) as client:
        for name, value in (("temperature", 0.5), ("top_p", 0.9), ("stop_sequences", ["up"])):
            with pytest.raises(anthropic.BadRequestError, match=name):
                respond(client, list(HELLO), extra_body={name: value})
        assert it.show(session)["turns"] == 0
        answer, ids = respond(client, list(HELLO), max_tokens=1000)
        assert (len(ids), answer.stop_reason) in {(5, "max_tokens"), (len(ids), "end_turn")}
        if len(ids) == 5:
            with pytest.raises(anthropic.BadRequestError, match="has sampled 5 tokens of 5") as refused:
                respond(client, list(HELLO))
            assert refused.value.error_code == "session_limit_reached"


def test_a_session_samples_to_the_end_of_the_context_at_most(service):
    it = service(engine=says("up down left up " * 40))
    with agent(it.open(), max_retries=0) as client:
        answer, ids = respond(client, list(HELLO), max_tokens=10_000)
    assert answer.stop_reason == "model_context_window_exceeded"
    assert answer.usage.input_tokens + len(ids) == 120
