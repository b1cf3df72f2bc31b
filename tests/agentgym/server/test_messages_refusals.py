"""What the Messages API refuses: by its name, with what to do instead, in Anthropic's shape, and before anything is
sampled."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import anthropic
import httpx
import pytest

from agentgym.engine.protocol import Engine
from agentgym.errors import EngineError
from agentgym.render import load_renderer
from agentgym.server.door import Limits
from agentgym.server.settings import ServiceConfig
from agentgym.testing.scripted_engine import ScriptedEngine, hashed_logits

USER: Any = {"role": "user", "content": "1 up"}
MOVE: Any = {"name": "move", "input_schema": {"type": "object"}}
USE: Any = {"type": "tool_use", "id": "c", "name": "move", "input": {}}
RESULT: Any = {"type": "tool_result", "tool_use_id": "c", "content": "1 left"}
CALLED: Any = {"role": "assistant", "content": [USE]}
ANSWERED: Any = {"role": "user", "content": [RESULT]}
BODY: Any = {"model": "small", "messages": [USER], "max_tokens": 2}


def turn(*blocks: Any, role: str = "user") -> Any:
    return {"role": role, "content": list(blocks)}


def refused(server: Any, change: dict[str, Any]) -> str:
    before = server.service.policy.engine._sampled
    response = httpx.post(f"{server.url}/v1/messages", json=BODY | change, timeout=60)
    assert response.status_code == 400, response.text
    body = response.json()
    assert (body["type"], set(body), body["error"]["type"]) == ("error", {"type", "error"}, "invalid_request_error")
    assert server.service.policy.engine._sampled == before
    return body["error"]["message"]


@pytest.mark.parametrize(
    ("change", "says_what"),
    [
        (
            {"thinking": {"type": "enabled", "budget_tokens": 1024}},
            "thinking={'type': 'enabled', 'budget_tokens': 1024}",
        ),
        ({"thinking": {"type": "adaptive"}}, "send {'type': 'disabled'}: the policy's replies are text and calls"),
        ({"output_config": {"effort": "high"}}, "the policy has no effort to set"),
        ({"context_management": {"edits": []}}, "shorten `messages` yourself"),
        ({"mcp_servers": [{"type": "url"}]}, "send their tools in `tools`"),
        ({"container": "c_1"}, "container='c_1' is not supported here; leave it out: tools run where"),
        ({"container": {"skills": []}}, "container={'skills': []} is not supported here"),
        ({"inference_geo": "eu"}, "inference_geo='eu' is not supported here"),
        ({"diagnostics": {"previous_message_id": "m"}}, "what a cache held is not reported"),
        ({"compaction": {"type": "x"}}, "begin again from a summary of your own"),
        ({"billing_policy": {"type": "x"}}, "billing_policy={'type': 'x'} is not supported here; leave it out"),
        ({"thread": {"type": "create"}}, "nothing is stored: send the whole history in `messages`"),
        ({"thread": True}, "thread=True is not supported here"),
        ({"fallbacks": [{"model": "x"}]}, "leave it out: one model is served"),
        ({"fallback_credit_token": "x"}, "fallback_credit_token='x' is not supported here"),
        ({"service_tier": "priority"}, "service_tier='priority' is not supported here"),
        ({"speed": "fast"}, "speed='fast' is not supported here"),
        ({"temperature": 0.001}, "temperature must be 0 or >= 0.01"),
        ({"temperature": 2.5}, "temperature"),
        ({"top_p": 0.9}, "top_p=0.9 is not supported here; leave it out or send 1.0"),
        ({"top_k": 5}, "top_k=5 is not supported here"),
        ({"max_tokens": 0}, "max_tokens: Input should be greater than or equal to 1"),
        ({"max_tokens": None}, "max_tokens: Input should be a valid integer"),
        ({"stop": ["x"]}, "unknown parameter 'stop'"),
        ({"n": 2}, "unknown parameter 'n'"),
        ({"stop_sequences": ["x"] * 17}, "stop_sequences: List should have at most 16 items"),
        ({"stop_sequences": [""]}, "stop_sequences[0]"),
        ({"stop_token_ids": [10**6]}, "stop_token_ids: 1000000 is not in the vocabulary of"),
        ({"timeout_s": 61}, "timeout_s may be at most 60"),
        ({"metadata": {"user": "me"}}, "unknown parameter 'metadata.user'"),
        ({"metadata": {"user_id": 1}}, "metadata.user_id"),
        ({"system": 3}, "system"),
        ({"system": [{"type": "image"}]}, "system[0]: a block of type 'image' is not supported here; send text alone"),
        ({"tool_choice": {"type": "any"}}, "tool_choice={'type': 'any'} is not supported here; leave it out or send"),
        ({"tool_choice": {"type": "tool", "name": "move"}}, "a call is sampled, never forced or forbidden"),
        ({"tool_choice": {"type": "auto", "disable_parallel_tool_use": True}}, "tool_choice"),
        (
            {"tools": [{"type": "web_search_20250305", "name": "web_search"}]},
            "tools[0]: a tool of type 'web_search_2025",
        ),
        ({"tools": [{"type": "bash_20250124", "name": "bash"}]}, "send it as a client tool, by name, description and"),
        ({"tools": [MOVE | {"name": ""}]}, "tools[0].name must be text that is not empty"),
        ({"tools": [MOVE | {"description": 3}]}, "tools[0].description must be text"),
        ({"tools": [{"name": "move"}]}, "tools[0].input_schema must be the JSON schema of an object, got None"),
        ({"tools": [MOVE | {"input_schema": {"properties": 3}}]}, "tools[0].input_schema must be the JSON schema"),
        ({"tools": [MOVE | {"strict": True}]}, "tools[0].strict=True is not supported here; send strict=false"),
        ({"tools": [MOVE | {"defer_loading": True}]}, "unknown parameter 'tools[0].defer_loading'"),
        ({"tools": [MOVE | {"input_examples": [{}]}]}, "unknown parameter 'tools[0].input_examples'"),
        ({"tools": [MOVE | {"allowed_callers": ["code_execution_20250825"]}]}, "'tools[0].allowed_callers'"),
        ({"tools": [MOVE, MOVE]}, "tools[1] has the name of another tool"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(server: Any, change: dict[str, Any], says_what: str) -> None:
    assert says_what in refused(server, change)


@pytest.mark.parametrize(
    ("turns", "says_what"),
    [
        ([], "messages: List should have at least 1 item"),
        (3, "messages"),
        ([3], "messages[0]"),
        ([{}], "messages[0].role must be user, assistant or system, got None"),
        ([{"role": ["user"], "content": "x"}], "messages[0].role must be user, assistant or system, got ['user']"),
        ([{"role": "tool", "content": "x"}], "send a result of a tool as a tool_result block of the user"),
        ([USER | {"name": "me"}], "unknown parameter 'messages[0].name'"),
        ([{"role": "user"}], "messages[0].content must be text or a list of blocks, got None"),
        ([turn()], "messages[0].content must have at least one block"),
        ([turn("x")], "messages[0].content[0]: a block of type None is not supported here; send a text block"),
        ([turn({"type": ["text"]})], "a block of type ['text'] is not supported here"),
        ([turn({"type": "image", "source": {}})], "a block of type 'image' is not supported here; send text alone"),
        ([turn({"type": "document", "source": {}})], "'document' is not supported here; send its text"),
        ([turn({"type": "text", "text": None})], "messages[0].content[0].text must be text, got None"),
        (
            [turn({"type": "text", "text": "x", "citations": [1]})],
            "unknown parameter 'messages[0].content[0].citations'",
        ),
        ([turn(USE)], "messages[0].content[0]: a tool_use is the assistant's"),
        ([{"role": "system", "content": [USE]}], "a block of type 'tool_use' is not supported here"),
        ([USER, {"role": "assistant", "content": "x"}], "the last of messages must not be the assistant's"),
        ([USER, {"role": "assistant", "content": []}], "the last of messages must not be the assistant's"),
        ([USER, turn({"type": "thinking", "thinking": "x"}, role="assistant"), USER], "replies have no such blocks"),
        ([USER, turn(RESULT, role="assistant"), USER], "messages[1].content[0]: a tool_result is the user's"),
        ([USER, turn(USE, {"type": "text", "text": "x"}, role="assistant"), USER], "text behind a tool_use"),
        ([USER, CALLED, {"role": "assistant", "content": "x"}, USER], "messages[2].content: text behind a tool_use"),
        ([USER, turn({"type": "server_tool_use"}, role="assistant"), USER], "type 'server_tool_use' is not supported"),
        ([USER, ANSWERED], "messages[1].content[0]: no tool_use before it has the id 'c'"),
        ([USER, ANSWERED, CALLED], "messages[1].content[0]: no tool_use before it has the id 'c'"),
        ([USER, CALLED, ANSWERED, CALLED, ANSWERED], "messages[3].content[0].id 'c' is that of an earlier tool_use"),
        ([USER, CALLED, ANSWERED, ANSWERED], "messages[3].content[0]: the tool_use 'c' has a result already"),
        ([USER, turn(USE | {"id": ""}, role="assistant"), USER], "messages[1].content[0].id must be text"),
        ([USER, turn(USE | {"name": None}, role="assistant"), USER], "messages[1].content[0].name must be text"),
        ([USER, turn(USE | {"input": "{}"}, role="assistant"), USER], "content[0].input must be an object, got '{}'"),
        ([USER, turn(USE | {"caller": {"type": "x"}}, role="assistant"), USER], "'messages[1].content[0].caller'"),
        ([USER, CALLED, turn(RESULT | {"content": 3})], "content[0].content must be text or a list of blocks, got 3"),
        ([USER, CALLED, turn(RESULT | {"content": [{"type": "image"}]})], "content[0].content[0]: a block of type"),
        ([USER, CALLED, turn(RESULT | {"is_error": "yes"})], "content[0].is_error must be true or false, got 'yes'"),
        (
            [USER, CALLED, turn(RESULT | {"toolset_name": "x"})],
            "unknown parameter 'messages[2].content[0].toolset_name'",
        ),
    ],
)
def test_turns_that_are_no_history_are_refused_by_their_place(server: Any, turns: Any, says_what: str) -> None:
    assert says_what in refused(server, {"messages": turns})


def test_what_says_nothing_is_taken(server: Any) -> None:
    nothing = (
        "system",
        "tools",
        "thinking",
        "container",
        "metadata",
        "stop_sequences",
        "cache_control",
        "stream",
        "seed",
    )
    cache = {"cache_control": {"type": "ephemeral", "ttl": "1h"}}
    said = {
        "thinking": {"type": "disabled"}, "output_config": {"effort": None}, "mcp_servers": [], "top_p": 1, "top_k": 0,
        "tool_choice": {"type": "auto", "disable_parallel_tool_use": False}, "service_tier": "standard_only",
        "metadata": {"user_id": None}, "speed": "standard", "thread": False, "fallbacks": [], **cache,
        "tools": [MOVE | {"type": "custom", "strict": False, "description": None, "eager_input_streaming": True,
                          "allowed_callers": ["direct"], "input_examples": [], **cache}],
    }  # fmt: skip
    history = [
        USER,
        turn({"type": "text", "text": "", "citations": None, **cache}, USE | {"toolset_name": None}, role="assistant"),
        turn(RESULT | {"is_error": None} | cache, {"type": "text", "text": "go on"}),
        {"role": "system", "content": "1 up"},
        {"role": "assistant", "content": []},
        USER,
    ]
    for change in (dict.fromkeys(nothing), said, {"messages": history}):
        answer = httpx.post(
            f"{server.url}/v1/messages",
            json=BODY | change,
            headers={"anthropic-version": "1999-01-01", "anthropic-beta": "x"},
            timeout=60,
        )
        assert answer.status_code == 200, answer.text


def test_many_turns_of_one_reply_are_read_at_once(server: Any) -> None:
    calls = [turn(USE | {"id": str(number)}, role="assistant") for number in range(500)]
    assert refused(server, {"messages": [USER, *calls, USER]}).startswith("prompt is too long: ")


# ---------------------------------------------------------------------------------------------------- other statuses


class Broken(ScriptedEngine):
    """An engine that samples nothing."""

    async def sample(self, *args: Any, **options: Any) -> Any:
        raise EngineError("it is broken")


async def broken(config: ServiceConfig, folder: Path) -> Engine:
    size = max(load_renderer(folder).encoder.control_ids) + 1
    return Broken(hashed_logits(size), max_context=config.max_context)


def fails(url: str, key: str = "unused", path: str = "", **body: Any) -> anthropic.APIStatusError:
    with (
        anthropic.Anthropic(base_url=url + path, api_key=key, max_retries=0) as client,
        pytest.raises(anthropic.APIStatusError) as failed,
    ):
        client.messages.create(**BODY | body)
    error = failed.value
    shape: Any = error.body
    assert (shape["type"], error.request_id) == ("error", error.response.headers["x-request-id"])
    assert error.type == shape["error"]["type"]
    return error


def test_the_clients_agent_loop_is_told_that_there_are_no_threads(server: Any) -> None:
    error = fails(server.url, extra_body={"thread": {"type": "create"}})
    assert (error.status_code, error.error_code) == (400, "thread_unsupported_request")


def test_every_failure_has_the_clients_own_class(start: Callable[..., Any], limits: Limits) -> None:
    locked = start(openai_key="the-acting-key").url
    for key in ("wrong", "the-trainers-key-of-this-test", "ags-nobody"):
        error = fails(locked, key)
        assert isinstance(error, anthropic.AuthenticationError)
        assert (error.type, error.error_code) == ("authentication_error", "invalid_api_key")
        assert "or 'x-api-key: KEY'" in error.message
    server = start(limits=replace(limits, max_body_bytes=5_000))
    missing = fails(server.url, model="another")
    assert (type(missing), missing.type) == (anthropic.NotFoundError, "not_found_error")
    assert isinstance(fails(server.url, path="/v1/sessions/ses-1"), anthropic.NotFoundError)
    with httpx.Client(base_url=server.url, trust_env=False, timeout=60) as http:
        answers = [
            http.get("/v1/messages/batches"),
            http.get("/v1/messages"),
            http.post("/v1/messages", content=b"{}", headers={"content-type": "text/plain"}),
            http.post("/v1/messages", json=BODY, headers={"host": "evil.example"}),
            http.post("/v1/messages", content=b"{", headers={"content-type": "application/json"}),
        ]
    assert [(answer.status_code, answer.json()["error"]["type"]) for answer in answers] == [
        (404, "not_found_error"), (405, "invalid_request_error"), (415, "invalid_request_error"),
        (403, "permission_error"), (400, "invalid_request_error"),
    ]  # fmt: skip
    big = fails(server.url, messages=[{"role": "user", "content": "x" * 6_000}])
    assert (big.status_code, big.type, big.error_code) == (413, "request_too_large", "body_too_large")
    server.door.draining = True
    ending = fails(server.url)
    assert (type(ending), ending.type) == (anthropic.OverloadedError, "overloaded_error")
    assert (ending.error_code, ending.response.headers["retry-after"]) == ("draining", "1")
    many = fails(start(limits=replace(limits, max_requests=0)).url)
    assert (type(many), many.type) == (anthropic.RateLimitError, "rate_limit_error")
    assert many.response.headers["retry-after"] == "1"
    failed = fails(start(engine_factory=broken).url)
    assert (failed.status_code, failed.type) == (500, "api_error")
