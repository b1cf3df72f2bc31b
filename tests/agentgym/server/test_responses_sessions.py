"""Sessions over the Responses API: the items of an answer, sent back as they are, are the recorded turn, id by id."""

from __future__ import annotations

from typing import Any

import httpx
import openai
import pytest
from openai import OpenAI
from outside_agents import HELLO, Losing, agent, say, says

from agentgym.trajectory import to_sequences

GO_ON: Any = {"role": "user", "content": "go on"}
FLAT: Any = {
    "type": "function",
    "name": "move",
    "description": "Move.",
    "parameters": {"type": "object", "properties": {"dir": {"type": "string"}}, "required": ["dir"]},
}
NESTED: Any = {"type": "function", "function": {name: FLAT[name] for name in ("name", "description", "parameters")}}


def respond(client: OpenAI, history: list[Any], **options: Any) -> Any:
    options = {"max_output_tokens": 8, "extra_body": {"return_token_ids": True}} | options
    return client.responses.create(model="small", input=history, **options)


def streamed(client: OpenAI, history: list[Any], **options: Any) -> Any:
    """The same, put together from the items that are done and the last event."""
    options = {"max_output_tokens": 8, "extra_body": {"return_token_ids": True}} | options
    with client.responses.stream(model="small", input=history, **options) as events:
        *_, last = events
    assert last.type in ("response.completed", "response.incomplete")
    return last.response


def answered(output: list[Any]) -> list[Any]:
    calls = [item for item in output if item.type == "function_call"]
    return [{"type": "function_call_output", "call_id": call.call_id, "output": "1 left"} for call in calls] or [GO_ON]


@pytest.mark.parametrize("ask", [respond, streamed])
@pytest.mark.parametrize("text", [None, "goal <call> move up <call> move left", "<call> move up", ""])
def test_an_agent_that_sends_items_back_is_one_row_of_the_ids_it_was_sent(service, ask, text):
    it = service(collect=True) if text is None else service(engine=says(text))
    sampled: list[list[int]] = []
    for _ in range(2):
        session = it.open("maze-17", seed=3)
        history: list[Any] = list(HELLO)
        ids: list[int] = []
        with agent(session) as client:
            for turn in range(3):
                answer = ask(client, history, tools=[FLAT], instructions="2 right")
                ids += answer.token_ids
                history += answer.output if turn % 2 else [item.to_dict() for item in answer.output]
                history += answered(answer.output)
        sampled.append(ids)
        assert it.finish(session)["links"] == {"opening": 1, "continuation": 2}
    it.server.client.take_batch(0, timeout_s=60, step=1)
    for trajectory, ids in zip(it.trajectories(), sampled, strict=True):
        (row,) = to_sequences(trajectory)
        assert [token for token, loss in zip(row.token_ids, row.loss_mask) if loss] == ids


def test_one_session_may_speak_both_dialects(service):
    it = service(engine=says("goal <call> move up"))
    session = it.open()
    items: list[Any] = list(HELLO)
    messages: list[Any] = [{"role": "system", "content": "2 right"}, *HELLO]
    with agent(session) as client:
        first = respond(client, items, instructions="2 right", tools=[FLAT])
        call = next(item for item in first.output if item.type == "function_call")
        made = {"id": "mine", "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
        messages += [{"role": "assistant", "content": first.output_text, "tool_calls": [made]}]
        messages += [{"role": "tool", "tool_call_id": "mine", "content": "1 left"}]
        second = say(client, messages, tools=[NESTED])
        items += [*first.output, *answered(first.output), {"role": "assistant", "content": "goal"}]
        (call,) = second.choices[0].message.tool_calls
        function = call.function
        items.append(
            {"type": "function_call", "call_id": call.id, "name": function.name, "arguments": function.arguments}
        )
        items.append({"type": "function_call_output", "call_id": call.id, "output": "1 down"})
        third = respond(client, items, instructions="2 right", tools=[FLAT])
    before = [*second.prompt_token_ids, *second.choices[0].token_ids]
    assert third.prompt_token_ids[: len(before)] == before
    assert it.finish(session)["links"] == {"opening": 1, "continuation": 2}


def test_a_rewritten_history_forks(service):
    it = service()
    session = it.open()
    with agent(session) as client:
        first = respond(client, list(HELLO))
        respond(client, [*HELLO, *first.output, GO_ON])
        respond(client, [*HELLO, *first.output, GO_ON])
        edited = first.output[0].to_dict() | {"content": [{"type": "output_text", "text": "up up up"}]}
        respond(client, [*HELLO, edited, GO_ON])
        respond(client, list(HELLO), instructions="1 down")
    assert it.finish(session)["links"] == {"opening": 2, "continuation": 1, "branch": 1, "rewrite": 1}


@pytest.mark.parametrize("stream", [False, True])
def test_a_retry_gets_the_reply_that_was_lost(service, stream):
    it = service()
    session = it.open()
    network = Losing(1)
    with agent(session, http_client=httpx.Client(transport=network), max_retries=2) as client:
        ask = streamed if stream else respond
        ids = [ask(client, list(HELLO)).token_ids for _ in range(3)]
    assert network.retries == ["0", "0", "1", "0"]
    done = it.finish(session)
    assert (done["turns"], done["undelivered"], done["sampled_tokens"]) == (3, 0, sum(map(len, ids)))


def test_an_idempotency_key_is_one_question_in_either_dialect_streamed_or_whole(service):
    it = service(engine=says("goal <call> move up"))
    session = it.open()
    with agent(session) as client:
        key: Any = {"extra_headers": {"Idempotency-Key": "a"}, "tools": [FLAT]}
        answers = [respond(client, list(HELLO), **key), streamed(client, list(HELLO), **key)]
        key["tools"] = [NESTED]
        chat = say(client, HELLO, max_tokens=8, **key).choices[0]
        assert answers[0].token_ids == answers[1].token_ids == chat.token_ids
        calls = [item.call_id for answer in answers for item in answer.output if item.type == "function_call"]
        assert [*calls, chat.message.tool_calls[0].id] == [calls[0]] * 3
        assert it.show(session)["turns"] == 1
        with pytest.raises(openai.UnprocessableEntityError, match="came before with another request"):
            respond(client, [GO_ON], **key | {"tools": [FLAT]})


def test_a_sessions_key_opens_its_own_responses_alone(service):
    it = service(openai_key="a-key-for-the-openai-surface")
    one, other = it.open(), it.open()
    bare = str(one["base_url"]).partition("/sessions/")[0]
    with OpenAI(base_url=bare, api_key=one["api_key"], max_retries=0) as client:
        respond(client, list(HELLO))  # the bearer alone says which session it is
    with OpenAI(base_url=other["base_url"], api_key=one["api_key"], max_retries=0) as client:
        with pytest.raises(openai.NotFoundError, match="there is no session"):
            respond(client, list(HELLO))
        with pytest.raises(openai.PermissionDeniedError):
            client.responses.retrieve("resp_1")
    with (
        OpenAI(base_url=one["base_url"], api_key="wrong", max_retries=0) as client,
        pytest.raises(openai.AuthenticationError),
    ):
        respond(client, list(HELLO))
    assert (it.show(one)["turns"], it.show(other)["turns"]) == (1, 0)


def test_what_would_make_tokens_unusable_is_refused_by_name(service):
    it = service()
    session = it.open()
    with agent(session) as client:
        for options in ({"temperature": 0.5}, {"top_p": 0.9}, {"extra_body": {"stop": ["up"]}}):
            with pytest.raises(openai.BadRequestError) as refused:
                respond(client, list(HELLO), **options)
            assert refused.value.param in ("temperature", "top_p", "stop")
    assert it.show(session)["turns"] == 0
