"""Sessions over HTTP, with OpenAI's own client: what an outside agent does becomes one trajectory, id by id."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai import OpenAI

from agentgym.engine.protocol import Engine
from agentgym.render import load_renderer
from agentgym.rollout.store import OTHERS, read_trajectories, step_file
from agentgym.server.settings import ServiceConfig
from agentgym.testing.scripted_engine import ScriptedEngine, hashed_logits
from agentgym.trajectory import EpisodeStatus, Trajectory, to_sequences

MOVE = {
    "type": "function",
    "function": {
        "name": "move",
        "description": "Move.",
        "parameters": {"type": "object", "properties": {"dir": {"type": "string"}}, "required": ["dir"]},
    },
}
HELLO: list[Any] = [{"role": "user", "content": "1 up 2 right"}]


@dataclass
class Service:
    """A service that trains on sessions, as whoever holds the acting key sees it."""

    server: Any
    http: httpx.Client

    def open(self, task: str = "t", expect: int = 201, **body: Any) -> Any:
        answer = self.http.post("/v1/sessions", json={"task": task, **body})
        assert answer.status_code == expect, answer.text
        return answer.json()

    def finish(self, session: Any, expect: int = 200, **body: Any) -> Any:
        answer = self.http.post(f"/v1/sessions/{session['id']}/finish", json=body or {"components": {"r": 1.0}})
        assert answer.status_code == expect, answer.text
        return answer.json()

    def show(self, session: Any) -> Any:
        return self.http.get(f"/v1/sessions/{session['id']}").raise_for_status().json()

    def trajectories(self, step: int = 1) -> list[Trajectory]:
        return list(read_trajectories(step_file(self.server.run_dir, step)))


def agent(session: Any, **options: Any) -> OpenAI:
    return OpenAI(base_url=session["base_url"], api_key=session["api_key"], **options)


def say(client: OpenAI, messages: list[Any], **options: Any) -> Any:
    options = {"max_tokens": 5, "extra_body": {"return_token_ids": True}} | options
    return client.chat.completions.create(model="small", messages=messages, **options)


@pytest.fixture
def service(start: Callable[..., Any]) -> Iterator[Callable[..., Service]]:
    clients: list[httpx.Client] = []

    def begin(
        openai_key: str | None = None, collect: bool = True, sessions: Any = None, engine: Any = None, **rollout: Any
    ):  # type: ignore[no-untyped-def]
        config = config_of(**rollout)
        if sessions:
            config = config.model_copy(update={"sessions": config.sessions.model_copy(update=sessions)})
        options = {} if engine is None else {"engine_factory": engine}
        server = start(config=config, openai_key=openai_key, **options)
        if collect:
            server.client.collect(True)
        headers = {"Authorization": f"Bearer {openai_key}"} if openai_key else {}
        clients.append(httpx.Client(base_url=server.url, headers=headers, timeout=20, trust_env=False))
        return Service(server, clients[-1])

    yield begin
    for client in clients:
        client.close()


def config_of(**rollout: Any) -> ServiceConfig:
    from agentgym.config import parse_config

    small = {"source": "sessions", "group_size": 2, "groups_per_step": 1, "max_tokens_per_turn": 5}
    values = {
        "env": {"id": "maze"},
        "model": {"name": "small"},
        "rollout": small | {"max_episode_tokens": 120} | rollout,
    }
    return parse_config(ServiceConfig, values)


# -------------------------------------------------------------------------------------------- what is recorded


@pytest.mark.parametrize("stream", [False, True])
def test_what_an_agent_says_is_one_row_of_exactly_the_ids_it_was_sent(service, stream):
    it = service()
    sampled: list[list[int]] = []
    for _ in range(2):
        session = it.open("maze-17", seed=3)
        messages = list(HELLO)
        ids: list[int] = []
        with agent(session) as client:
            for turn in range(3):
                if stream:
                    with client.chat.completions.stream(
                        model="small", messages=messages, tools=[MOVE], max_tokens=5,
                        extra_body={"return_token_ids": True},
                    ) as events:  # fmt: skip
                        for _ in events:
                            pass
                        reply = events.current_completion_snapshot.choices[0].message
                else:
                    answer = say(client, messages, tools=[MOVE])
                    ids += answer.choices[0].token_ids
                    reply = answer.choices[0].message
                messages.append(reply if turn % 2 else reply.to_dict())
                calls = reply.tool_calls or []
                messages += [{"role": "tool", "tool_call_id": call.id, "content": "1 left"} for call in calls]
                messages += [] if calls else [{"role": "user", "content": "go on"}]
        sampled.append(ids)
        done = it.finish(session, components={"reached": 0.5, "short": 0.25})
        assert (done["status"], done["turns"], done["links"]) == ("finished", 3, {"opening": 1, "continuation": 2})
        assert done["score"] == {"value": 0.75, "components": {"reached": 0.5, "short": 0.25}, "valid": True}
    batch = it.server.client.take_batch(0, timeout_s=10, step=1)
    (group,) = batch.groups
    assert (group.task_id, group.seed) == ("maze-17", 3)
    assert batch.metrics["delivered_fraction"] == 1.0
    for member, ids in zip(group.members, sampled, strict=True):
        (row,) = member.sequences
        trained = [t for t, loss in zip(row.token_ids, row.loss_mask) if loss]
        assert len(trained) == member.num_sampled_tokens
        assert stream or trained == ids
        assert member.score == 0.75


def test_sub_agents_of_one_session_run_beside_each_other(service):
    it = service()
    session = it.open()

    def work(number: int) -> None:
        messages: list[Any] = [{"role": "user", "content": f"{number} up"}]
        with agent(session) as client:
            for _ in range(3):
                messages += [say(client, messages).choices[0].message, {"role": "user", "content": "go on"}]

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(work, range(1, 4)))
    done = it.finish(session)
    assert done["links"] == {"opening": 3, "continuation": 6}
    other = it.open()
    with agent(other) as client:
        say(client, HELLO)
    it.finish(other)
    it.server.client.take_batch(0, timeout_s=10, step=1)
    first = it.trajectories()[0]
    assert len(first.turns) == 9
    assert len(to_sequences(first)) == 3


def test_a_rewritten_history_forks_over_http(service):
    it = service()
    session = it.open()
    with agent(session) as client:
        first = say(client, HELLO).choices[0].message
        say(client, [*HELLO, first, {"role": "user", "content": "go on"}])
        edited = {"role": "assistant", "content": "up up up"}
        say(client, [*HELLO, edited, {"role": "user", "content": "go on"}])
    assert it.finish(session)["links"] == {"opening": 1, "continuation": 1, "rewrite": 1}


def test_several_replies_at_once_are_branches_and_what_follows_knows_which(service):
    it = service()
    session = it.open()
    with agent(session) as client:
        answer = say(client, HELLO, n=3, seed=1)
        chosen = answer.choices[1]
        after = say(client, [*HELLO, chosen.message, {"role": "user", "content": "go on"}])
    assert after.prompt_token_ids[: len(answer.prompt_token_ids)] == answer.prompt_token_ids
    rest = after.prompt_token_ids[len(answer.prompt_token_ids) :]
    assert rest[: len(chosen.token_ids)] == chosen.token_ids
    assert it.finish(session)["links"] == {"opening": 1, "branch": 2, "continuation": 1}


# ------------------------------------------------------------------------------------------------------ retries


class Losing(httpx.BaseTransport):
    """A network that loses the answers of the numbered requests after the server has given them."""

    def __init__(self, *lost: int) -> None:
        self.inner = httpx.HTTPTransport()
        self.lost = lost
        self.retries: list[str] = []

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        number = len(self.retries)
        self.retries.append(request.headers["x-stainless-retry-count"])
        response = self.inner.handle_request(request)
        if number in self.lost:
            response.read()
            response.close()
            raise httpx.ReadError("the answer was lost", request=request)
        return response


@pytest.mark.parametrize("stream", [False, True])
def test_a_retry_of_the_official_client_gets_the_reply_that_was_lost(service, stream):
    it = service()
    session = it.open()
    network = Losing(1)
    with agent(session, http_client=httpx.Client(transport=network), max_retries=2) as client:
        texts = []
        for _ in range(3):  # equal content: three requests, of which the second is sent twice
            if stream:
                events = client.chat.completions.create(model="small", messages=HELLO, max_tokens=5, stream=True)
                texts.append("".join(c.choices[0].delta.content or "" for c in events if c.choices))
            else:
                texts.append(say(client, HELLO).choices[0].message.content)
    assert network.retries == ["0", "0", "1", "0"]
    done = it.finish(session)
    assert (done["turns"], done["undelivered"]) == (3, 0)


def test_an_idempotency_key_is_one_request_however_often_it_is_sent(service):
    it = service(engine=slow(0.02))
    session = it.open()
    with agent(session) as client, ThreadPoolExecutor(4) as pool:

        def ask(key: str, messages: list[Any] = HELLO) -> Any:
            return say(client, messages, extra_headers={"Idempotency-Key": key})

        answers = list(pool.map(ask, ["a"] * 4))  # together: the first is joined
        assert len({tuple(answer.choices[0].token_ids) for answer in answers}) == 1
        assert ask("a").choices[0].token_ids == answers[0].choices[0].token_ids
        assert it.show(session)["turns"] == 1
        ask("b")
        assert it.show(session)["turns"] == 2
        with pytest.raises(openai.UnprocessableEntityError, match="came before with another request"):
            ask("a", [{"role": "user", "content": "2 left"}])


def slow(seconds: float) -> Any:
    async def factory(config: ServiceConfig, folder: Path) -> Engine:
        size = max(load_renderer(folder).encoder.control_ids) + 1
        return ScriptedEngine(
            hashed_logits(size, scale=0.1), max_context=config.max_context, latency_s=lambda: seconds
        )  # fmt: skip

    return factory


def test_an_agent_that_hangs_up_leaves_no_trace_and_does_not_hold_up_the_end(service):
    it = service(engine=slow(0.2))
    session = it.open()
    with agent(session, max_retries=0, timeout=0.3) as client, pytest.raises(openai.APITimeoutError):
        say(client, HELLO, max_tokens=50)
    with agent(session) as client:
        say(client, HELLO, max_tokens=1)
    assert it.finish(session)["turns"] == 1


# ------------------------------------------------------------------------------------------------ how sessions end


def test_a_session_ends_once(service):
    it = service()
    session = it.open()
    with agent(session) as client:
        say(client, HELLO)
        it.finish(session)
        assert "is finished" in it.finish(session, 409)["error"]["message"]
        assert it.http.delete(f"/v1/sessions/{session['id']}").status_code == 409
        with pytest.raises(openai.ConflictError) as refused:
            say(client, HELLO)
    assert refused.value.code == "session_ended"
    assert it.http.get("/v1/sessions/nothing").status_code == 404


NO_REWARDS = (
    '{"components": {"r": NaN}}', '{"components": {"r": Infinity}}', '{"components": {"r": 1e999}}',
    '{"components": {"r": 1e308, "s": 1e308}}', '{"components": {}}', '{"components": {"r": "1"}}',
    '{"components": {"r": null}}', '{"components": {"r": true}}', '{"reward": 1}', "[]", "",
    '{"components": {"": 1.0}}', '{"components": {"r": 1.0}, "status": "won"}',
)  # fmt: skip


def test_what_is_no_reward_is_refused_and_the_session_stays_open(service):
    it = service()
    session = it.open()
    with agent(session) as client:
        say(client, HELLO)
    for body in NO_REWARDS:
        url = f"/v1/sessions/{session['id']}/finish"
        answer = it.http.post(url, content=body, headers={"Content-Type": "application/json"})
        assert answer.status_code == 400, (body, answer.text)
        assert answer.json()["error"]["type"] == "invalid_request_error"
        assert it.show(session)["status"] == "open"


def test_an_unknown_reward_is_said_to_be_unknown(service):
    it = service()
    for invalid in ("the grader crashed", None):
        session = it.open()
        with agent(session) as client:
            say(client, HELLO)
        it.finish(session, **({"invalid": invalid} if invalid else {"components": {"r": 1.0}}))
    status = it.server.client.status()
    assert (status.ready_groups, status.discarded_groups) == (0, 1)  # one valid sibling is no baseline


def test_nothing_sampled_is_nothing_to_finish(service):
    it = service()
    session = it.open()
    assert "no turns" in it.finish(session, 400)["error"]["message"]
    done = it.http.delete(f"/v1/sessions/{session['id']}").json()
    assert (done["status"], done["score"]) == ("abandoned", None)


def test_a_session_that_nobody_finishes_expires_typed_and_counted(service):
    it = service()
    lost = it.open(ttl_s=0.3)
    with agent(lost) as client:
        say(client, HELLO)
        deadline = time.monotonic() + 10
        while it.show(lost)["status"] == "open" and time.monotonic() < deadline:
            time.sleep(0.05)
        assert it.show(lost)["status"] == "expired"
        assert it.show(lost)["score"] is None
        with pytest.raises(openai.ConflictError, match="expired"):
            say(client, HELLO)
    assert "expired" in it.finish(lost, 409)["error"]["message"]
    for _ in range(2):
        session = it.open()
        with agent(session) as client:
            say(client, HELLO)
        it.finish(session)
    batch = it.server.client.take_batch(0, timeout_s=10, step=1)
    assert batch.metrics["failed"] == 1
    assert [member.score for member in batch.groups[0].members] == [1.0, 1.0]
    expired = [t for t in it.trajectories() if t.status is EpisodeStatus.FAILED]
    assert [(t.trajectory_id, t.score) for t in expired] == [(lost["id"], None)]
    assert expired[0].error is not None
    assert expired[0].error.startswith("SessionExpired")
    assert it.server.client.status().failed == 1


def test_a_session_whose_agent_asks_nothing_expires_before_its_time(service):
    it = service(sessions={"idle_s": 0.5}, engine=slow(0.1))
    session, silent = it.open(), it.open()
    with agent(session) as client:
        say(client, HELLO, max_tokens=8, seed=3)  # longer than idle_s perhaps, and no silence
        assert it.show(session)["status"] == "open"
    deadline = time.monotonic() + 10
    while it.show(silent)["status"] == "open" and time.monotonic() < deadline:
        time.sleep(0.05)
    assert it.show(silent)["status"] == "expired"


# ------------------------------------------------------------------------------------------------- what is refused


UNUSABLE: tuple[dict[str, Any], ...] = (
    {"temperature": 0.5}, {"stop": ["up"]}, {"top_p": 0.9}, {"logit_bias": {"5": 1}}, {"presence_penalty": 0.5},
)  # fmt: skip


def test_what_would_make_tokens_unusable_is_refused_by_name(service):
    it = service()
    session = it.open()
    with agent(session) as client:
        for options in UNUSABLE:
            with pytest.raises(openai.BadRequestError) as refused:
                say(client, HELLO, **options)
            assert refused.value.param == next(iter(options))
        with pytest.raises(openai.NotFoundError):
            client.chat.completions.create(model="another", messages=HELLO)
    assert it.show(session)["turns"] == 0


def test_another_temperature_where_it_is_allowed(service):
    it = service(sessions={"any_temperature": True})
    with agent(it.open()) as client:
        say(client, HELLO, temperature=0.5)


def test_limits_of_a_session_are_told_by_name_and_not_retried(service):
    it = service(sessions={"max_open": 3, "max_turns": 2})
    turns, tokens = it.open(limits={"max_turns": 100}), it.open(limits={"max_tokens": 1})
    with agent(turns) as client:
        say(client, HELLO)
        say(client, HELLO)
        with pytest.raises(openai.BadRequestError, match="used its 2 turns") as refused:
            say(client, HELLO)
    assert refused.value.code == "session_limit_reached"
    with agent(tokens) as client:
        say(client, HELLO)
        with pytest.raises(openai.BadRequestError, match="of 1; finish it"):
            say(client, HELLO)
    it.open("other")
    assert "3 sessions are open" in it.open(expect=429)["error"]["message"]
    it.finish(turns)
    it.open()
    for body in ({"ttl_s": 0}, {"ttl_s": -1}, {"limits": {"max_turns": 0}}, {"seed": 2**70}, {"task": ""}, {"x": 1}):
        it.open(expect=400, **body)  # type: ignore[arg-type]


def test_sessions_open_only_while_the_trainer_collects_and_has_room(service):
    it = service(collect=False, max_staleness=0)
    assert "collecting is paused" in it.open(expect=429)["error"]["message"]
    it.server.client.collect(True)
    it.open("one")
    assert "as many as rollout.max_staleness allows" in it.open("two", expect=429)["error"]["message"]
    it.open("one")


# ------------------------------------------------------------------------------------------------------- secrets


def test_a_session_s_bearer_opens_nothing_else(service):
    key = "the-acting-key-of-this-test"
    it = service(openai_key=key)
    mine, other = it.open("mine"), it.open("the secret task")
    bearer = {"Authorization": f"Bearer {mine['api_key']}"}
    with httpx.Client(base_url=it.server.url, headers=bearer, trust_env=False) as http:
        own = http.get(f"/v1/sessions/{mine['id']}")
        assert own.status_code == 200
        assert "api_key" not in own.json()
        for answer in (
            http.get(f"/v1/sessions/{other['id']}"),
            http.post(f"/v1/sessions/{other['id']}/chat/completions", json={"model": "small", "messages": HELLO}),
        ):
            missing = "ses-999999-00000000"
            path = answer.request.url.path.replace(other["id"], missing)
            same = http.request(
                answer.request.method,
                path,
                content=answer.request.content,
                headers={"Content-Type": "application/json"},
            )
            assert answer.status_code == same.status_code == 404
            assert answer.text.replace(other["id"], missing) == same.text  # not even that it is there
        finish = {"components": {"r": 1.0}}
        for answer in (
            http.post(f"/v1/sessions/{mine['id']}/finish", json=finish),  # nobody rewards itself
            http.post(f"/v1/sessions/{other['id']}/finish", json=finish),
            http.delete(f"/v1/sessions/{mine['id']}"),
            http.post("/v1/sessions", json={"task": "t"}),
            http.post("/v1/completions", json={"model": "small", "prompt": "up"}),
        ):
            assert answer.status_code == 403
        for path in ("/trainer/status", "/trainer/batch"):
            assert http.get(path).status_code in (401, 403)
        assert http.get("/v1/models").status_code == 200
    assert it.show(mine)["status"] == "open"
    wrong = {"Authorization": f"Bearer {mine['api_key'][:-1]}x"}
    assert httpx.get(f"{it.server.url}/v1/sessions/{mine['id']}", headers=wrong).status_code == 401


def test_no_bearer_is_kept_or_shown(service):
    it = service()
    session = it.open()
    with agent(session) as client:
        say(client, HELLO)
    for path in [f"/v1/sessions/{session['id']}", "/metrics", "/health", "/openapi.json"]:
        assert session["api_key"] not in it.http.get(path).text
    keyring = it.server.door._keyring
    assert session["api_key"] not in repr(vars(keyring))


# ------------------------------------------------------------------------------ beside a run on its environment


def test_sessions_of_a_run_on_its_environment_are_recorded_and_not_trained_on(service):
    it = service(source="environment", group_size=3, groups_per_step=2, in_flight=6)
    session = it.open()
    assert session["trains"] is False
    with agent(session) as client:
        say(client, HELLO, temperature=0.0)
    it.finish(session)
    batch = it.server.client.take_batch(0, timeout_s=20, step=1)
    assert session["id"] not in {member.trajectory_id for group in batch.groups for member in group.members}
    (kept,) = read_trajectories(it.server.run_dir / "trajectories" / OTHERS)
    assert (kept.trajectory_id, len(kept.turns)) == (session["id"], 1)


def test_versions_that_open_sessions_hold_stay_alive(service):
    it = service(max_staleness=3)
    session = it.open()
    with agent(session) as client:
        say(client, HELLO)
        it.server.client.publish(1, it.server.weights(1))
        assert it.server.client.status().live_versions == (0, 1)
        say(client, HELLO)
        it.server.client.publish(2, it.server.weights(2))
    assert it.server.client.status().live_versions == (0, 1, 2)
    it.http.delete(f"/v1/sessions/{session['id']}")
    assert it.server.client.status().live_versions == (2,)
