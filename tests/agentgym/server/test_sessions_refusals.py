"""What a session refuses, by name; and whose bearer opens what."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from outside_agents import HELLO, Pace, agent, say, sessions_config

from agentgym.engine.protocol import Engine
from agentgym.server.sessions_api import AGENTS_OWN
from agentgym.server.settings import ServiceConfig
from agentgym.testing.scripted_engine import ScriptedEngine, forced_logits

# ----------------------------------------------------------------------------------------------------- what is refused


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


def lasting(pace: Pace) -> Any:
    """An engine whose replies end at their limit."""

    async def factory(config: ServiceConfig, folder: Path) -> Engine:
        logits = forced_logits(64, lambda prefix: 5)
        return ScriptedEngine(logits, max_context=config.max_context, latency_s=pace)

    return factory


def test_a_session_samples_no_more_tokens_than_it_may(service):
    it = service(engine=lasting(Pace(0.0)))
    session = it.open(limits={"max_tokens": 9})
    with agent(session) as client:
        first = say(client, HELLO, max_tokens=50, n=2)
        assert [choice.finish_reason for choice in first.choices] == ["length", "length"]
        assert it.show(session)["sampled_tokens"] == 8, "four for each of two replies"
        with pytest.raises(openai.BadRequestError, match="has sampled 8 tokens of 9; finish it"):
            say(client, HELLO, n=2)
        assert say(client, HELLO, max_tokens=None).choices[0].finish_reason == "length"
    assert it.show(session)["sampled_tokens"] == 9


def test_no_session_takes_the_places_of_the_others(start, limits):
    pace = Pace(0.5)
    server = start(config=sessions_config(), engine_factory=lasting(pace), limits=replace(limits, max_requests=4))
    server.client.collect(True)
    chat = {"model": "small", "messages": HELLO, "max_tokens": 80}
    with httpx.Client(base_url=server.url, trust_env=False, timeout=60) as http, ThreadPoolExecutor(1) as thread:
        one, other = (http.post("/v1/sessions", json={"task": "t"}).json() for _ in range(2))
        own, others = ({"Authorization": f"Bearer {session['api_key']}"} for session in (one, other))
        long = thread.submit(http.post, "/v1/chat/completions", json=chat, headers=own)
        while not list(server.service.policy.in_flight()):
            time.sleep(0.005)
        refused = http.post("/v1/chat/completions", json=chat, headers=own)
        assert refused.status_code == 429, refused.text
        assert refused.headers["retry-after"] == "1"
        assert "1 requests of this session run" in refused.json()["error"]["message"]
        assert http.post("/v1/chat/completions", json=chat | {"max_tokens": 1}, headers=others).status_code == 200
        assert not long.done()
        pace.token_s = 0.0
        assert long.result().status_code == 200
        assert http.post("/v1/chat/completions", json=chat | {"max_tokens": 1}, headers=own).status_code == 200


def test_sessions_open_only_while_the_trainer_collects_and_has_room(service):
    it = service(collect=False, max_staleness=0)
    assert "collecting is paused" in it.open(expect=429)["error"]["message"]
    it.server.client.collect(True)
    it.open("one")
    assert "as many as rollout.max_staleness allows" in it.open("two", expect=429)["error"]["message"]
    it.open("one")


# ------------------------------------------------------------------------------------------------------------- secrets


def test_a_session_s_bearer_opens_nothing_else(service):
    key = "the-acting-key-of-this-test"
    it = service(openai_key=key)
    mine, other = it.open("mine"), it.open("the secret task")
    bearer = {"Authorization": f"Bearer {mine['api_key']}"}
    with httpx.Client(base_url=it.server.url, headers=bearer, trust_env=False) as http:
        own = http.get(f"/v1/sessions/{mine['id']}")
        assert own.status_code == 200
        assert set(own.json()) == set(AGENTS_OWN)  # and so neither its task, which may be the answer, nor its score
        assert {"task", "seed", "group", "score", "api_key"}.isdisjoint(AGENTS_OWN)
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
