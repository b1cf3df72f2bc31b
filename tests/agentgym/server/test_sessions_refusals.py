"""What a session refuses, by name; and whose bearer opens what."""

from __future__ import annotations

from typing import Any

import httpx
import openai
import pytest
from outside_agents import HELLO, agent, say

from agentgym.server.sessions_api import AGENTS_OWN

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
