"""The HTTP surface under requests that its own schema describes, under ones that nearly fit it, and under bytes that
are no request at all: no 5xx, no hang, and every refusal names what it refuses."""

from __future__ import annotations

import copy
import json
import re
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schema_values import from_schema, hostile_values, json_values, places

from agentgym.server.door import Limits
from agentgym.server.messages_requests import MessagesRequest
from agentgym.server.messages_turns import TURN_SCHEMA
from agentgym.server.responses_items import ITEM_SCHEMA

MODEL = "small"
CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "1 up"}], "max_tokens": 3}
TOOL = {"type": "function", "function": {"name": "move", "description": "", "parameters": {"type": "object"}}}
FULL_CHAT = CHAT | {
    "tools": [TOOL], "tool_choice": "auto", "temperature": 0.5, "seed": 3, "n": 2, "stop": ["x"], "logprobs": True,
    "stop_token_ids": [3], "stream": True, "stream_options": {"include_usage": True}, "timeout_s": 20.0,
    "return_token_ids": True, "return_policy_versions": True, "metadata": {"a": "b"}, "user": "me", "top_p": 1.0,
}  # fmt: skip
FULL_COMPLETION = {"model": MODEL, "prompt": [3, 4, 5], "max_tokens": 3, "logprobs": 0, "echo": False, "stop": "x"}
FLAT_TOOL = {"type": "function", "name": "move", "description": "", "parameters": {"type": "object"}, "strict": False}
RESPONSE = {"model": MODEL, "input": [{"role": "user", "content": "1 up"}], "max_output_tokens": 3}
FULL_RESPONSE = {
    "model": MODEL, "instructions": "1 up", "max_output_tokens": 3, "tools": [FLAT_TOOL], "tool_choice": "auto",
    "input": [
        {"role": "user", "content": "1 up"},
        {"type": "message", "id": "msg_1", "role": "assistant", "status": "completed",
         "content": [{"type": "output_text", "text": "1 down", "annotations": [], "logprobs": []}]},
        {"type": "function_call", "id": "fc_1", "call_id": "c1", "name": "move", "arguments": "{}", "status": "x"},
        {"type": "function_call_output", "call_id": "c1", "output": "1 left"},
        {"role": "user", "content": [{"type": "input_text", "text": "go on"}]},
    ],
    "temperature": 0.5, "seed": 3, "stop": ["x"], "stop_token_ids": [3], "stream": True, "timeout_s": 20.0,
    "stream_options": {"include_obfuscation": False}, "include": ["message.output_text.logprobs"], "store": False,
    "return_token_ids": True, "return_policy_versions": True, "metadata": {"a": "b"}, "user": "me", "top_p": 1.0,
    "text": {"format": {"type": "text"}}, "reasoning": {"effort": None}, "truncation": "disabled",
}  # fmt: skip
MESSAGES = {"model": MODEL, "messages": [{"role": "user", "content": "1 up"}], "max_tokens": 3}
CLIENT_TOOL = {"name": "move", "description": "", "input_schema": {"type": "object"}, "strict": False}
FULL_MESSAGES = {
    "model": MODEL, "system": [{"type": "text", "text": "1 up"}], "max_tokens": 3, "tools": [CLIENT_TOOL],
    "messages": [
        {"role": "user", "content": "1 up"},
        {"role": "assistant", "content": [
            {"type": "text", "text": "1 down"},
            {"type": "tool_use", "id": "c1", "name": "move", "input": {"dir": "up"}}]},
        {"role": "user", "content": [
            {"type": "tool_result", "tool_use_id": "c1", "is_error": True,
             "content": [{"type": "text", "text": "1 left"}]},
            {"type": "text", "text": "go on", "cache_control": {"type": "ephemeral"}}]},
    ],
    "temperature": 0.5, "seed": 3, "stop_sequences": ["x"], "stop_token_ids": [3], "stream": True, "timeout_s": 20.0,
    "return_token_ids": True, "return_policy_versions": True, "metadata": {"user_id": "me"}, "top_p": 1.0,
    "tool_choice": {"type": "auto"}, "thinking": {"type": "disabled"}, "cache_control": {"type": "ephemeral"},
}  # fmt: skip
COUNTED = {name: FULL_MESSAGES[name] for name in ("model", "system", "tools", "messages", "tool_choice", "thinking")}
BASES = {
    "/v1/chat/completions": FULL_CHAT,
    "/v1/completions": FULL_COMPLETION,
    "/v1/responses": FULL_RESPONSE,
    "/v1/messages": FULL_MESSAGES,
    "/v1/messages/count_tokens": COUNTED,
    "/v1/sessions": {"task": "t", "seed": 1},
}
TIME_LIMIT_S = 60.0

calm = settings(suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large])


@pytest.fixture(scope="module")
def http(server: Any) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=TIME_LIMIT_S, trust_env=False) as client:
        yield client


@pytest.fixture(scope="module")
def operations(http: httpx.Client) -> dict[str, st.SearchStrategy[Any]]:
    """What the application says that it takes, by path."""
    document = http.get("/openapi.json").json()
    found = {}
    for path, item in document["paths"].items():
        body = item.get("post", {}).get("requestBody")
        if body is not None:
            found[path] = body["content"]["application/json"]["schema"]
    components = document["components"]["schemas"]
    assert set(BASES) | {"/v1/sessions/{session_id}/finish", "/v1/sessions/{session_id}/responses"} <= set(found)
    assert found["/v1/sessions/{session_id}/responses"] == found["/v1/responses"]
    for within in ("/v1/sessions/{session_id}/messages", "/v1/sessions/{session_id}/v1/messages"):
        for count in ("", "/count_tokens"):
            assert found[within + count] == found[f"/v1/messages{count}"]
    return {path: from_schema(schema, components) for path, schema in found.items()}


def check(answer: httpx.Response, body: Any = None) -> None:
    """An answer, or a refusal in its API's shape that names a parameter which was sent or is missing."""
    assert answer.headers["x-request-id"].startswith("req-")
    assert answer.elapsed.total_seconds() < TIME_LIMIT_S
    if answer.status_code < 300:
        if answer.headers["content-type"].startswith("text/event-stream"):
            *_, last, rest = answer.text.split("\n\n")
            ends = ("response.completed", "response.incomplete", "message_stop")
            typed = last.startswith(tuple(f"event: {end}\n" for end in ends))
            assert rest == ""
            assert typed or last == "data: [DONE]"
            assert typed or '"error"' not in answer.text
        return
    assert 400 <= answer.status_code < 500, (answer.text, body)
    error = openai_error(answer)
    assert set(error) == {"message", "type", "param", "code"}, answer.text
    assert error["message"]
    assert isinstance(error["type"], str)
    if answer.status_code == 400 and isinstance(body, dict) and error["code"] is None:
        assert error["param"], (error, body)
        assert error["param"] in error["message"], error


def openai_error(answer: httpx.Response) -> dict[str, Any]:
    """A refusal's error. One in Anthropic's shape has no place for the parameter but its message."""
    body = answer.json()
    error = body["error"]
    if "/messages" not in answer.request.url.path:
        return error
    assert answer.headers["request-id"] == answer.headers["x-request-id"]
    assert set(body) == {"type", "error"}, answer.text
    assert body["type"] == "error"
    assert set(error) - {"details"} == {"type", "message"}, answer.text
    unknown = re.match(r"unknown parameter '(.*)'", error["message"], re.DOTALL)
    named = [word for word in re.findall(r"\w+", error["message"]) if word in MessagesRequest.model_fields]
    param = unknown[1] if unknown else next(iter(named), None)
    code = error.get("details", {}).get("error_code")
    return {"message": error["message"], "type": error["type"], "param": param, "code": code}


def bounded(body: Any) -> Any:
    """The same request of a size that a test can wait for, with the time that this takes: what does not arrive in its
    own time is status 504, and rightly so."""
    if isinstance(body, dict):
        if isinstance(body.get("n"), int):
            body["n"] = min(body["n"], 4)
        seconds = body.get("timeout_s")
        if isinstance(seconds, int | float) and not isinstance(seconds, bool) and seconds > 0:
            body["timeout_s"] = max(seconds, TIME_LIMIT_S)
    return body


@given(data=st.data())
@calm
def test_whatever_the_schema_allows(http: httpx.Client, operations: Any, data: st.DataObject) -> None:
    path = data.draw(st.sampled_from(sorted(BASES)))
    body = data.draw(operations[path])
    if path != "/v1/sessions":
        body = bounded(body) | {"model": MODEL}
    check(http.post(path, json=body), body)


@given(data=st.data())
@calm
def test_requests_that_nearly_fit(http: httpx.Client, data: st.DataObject) -> None:
    path = data.draw(st.sampled_from(sorted(BASES)))
    body = copy.deepcopy(BASES[path])
    for _ in range(data.draw(st.integers(1, 2))):
        place = data.draw(st.sampled_from([place for place in places(body) if place]))
        parent: Any = body
        for key in place[:-1]:
            parent = parent[key]
        kind = data.draw(st.sampled_from(["replace", "delete", "add"]))
        if kind == "replace":
            parent[place[-1]] = copy.deepcopy(data.draw(hostile_values | json_values))  # it is changed further
        elif kind == "delete":
            del parent[place[-1]]
        elif isinstance(parent, dict):
            parent[data.draw(st.text(min_size=1, max_size=8))] = data.draw(json_values)
    check(http.post(path, json=bounded(body)), body)


@pytest.mark.parametrize("path", sorted(BASES))
def test_each_parameter_that_is_wrong_is_named(http: httpx.Client, path: str) -> None:
    document = http.get("/openapi.json").json()
    reference = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]["$ref"]
    for name in document["components"]["schemas"][reference.rpartition("/")[2]]["properties"]:
        if name == "cache_control":  # which has no effect, whatever it says
            continue
        refused = http.post(path, json=BASES[path] | {name: {"no": {"such": ["value"]}}})
        assert refused.status_code == 400, (name, refused.text)
        assert re.split(r"[.\[]", openai_error(refused)["param"])[0] == name, refused.text
        assert name in refused.json()["error"]["message"]
    refused = http.post(path, json=BASES[path] | {"unheard": 1})
    assert refused.json()["error"]["message"] == "unknown parameter 'unheard'"


@given(data=st.data())
@calm
def test_histories_of_items(http: httpx.Client, data: st.DataObject) -> None:
    """Items that fit their schema, of few call ids, so that some answer each other."""
    one = from_schema(ITEM_SCHEMA, {})
    items = data.draw(st.lists(one, min_size=1, max_size=6))
    for item in items:
        if "call_id" in item:
            item["call_id"] = data.draw(st.sampled_from("ab"))
    body = RESPONSE | {"input": [*items, {"role": "user", "content": "up"}], "stream": data.draw(st.booleans())}
    check(http.post("/v1/responses", json=body), body)


@given(data=st.data())
@settings(calm, max_examples=50)
def test_histories_of_turns(http: httpx.Client, data: st.DataObject) -> None:
    """Turns that fit their schema, of few ids, so that some results have their call."""
    turns = data.draw(st.lists(from_schema(TURN_SCHEMA, {}), min_size=1, max_size=6))
    for block in [block for turn in turns if isinstance(turn["content"], list) for block in turn["content"]]:
        for key in {"id", "tool_use_id"} & set(block):
            block[key] = data.draw(st.sampled_from("ab"))
    asked = MESSAGES | {"messages": [*turns, {"role": "user", "content": "up"}], "stream": data.draw(st.booleans())}
    check(http.post("/v1/messages", json=asked), asked)


@given(
    path=st.text(alphabet=st.characters(codec="utf-8"), max_size=12),
    method=st.sampled_from(["GET", "POST", "PUT", "DELETE", "PATCH", "OPTIONS", "HEAD"]),
)
@calm
def test_any_path_and_method(http: httpx.Client, method: str, path: str) -> None:
    from urllib.parse import quote

    for prefix in ("/v1/", "/v1/models/", "/v1/sessions/", "/"):
        answer = http.request(method, prefix + quote(path, safe=""))
        assert answer.status_code < 500, answer.text
        assert answer.headers["x-request-id"]


# ------------------------------------------------------------------------------------------------ bodies that are none


def bodies(asked: dict[str, Any] = CHAT, most: bytes = b'"max_tokens": 3') -> dict[str, bytes]:
    body = json.dumps(asked).encode()
    assert most in body
    return {
        "empty": b"",
        "cut": body[:-3],
        "trailing": body + b"x",
        "two": body + body,
        "not utf-8": body.replace(b"1 up", b"\xff\xfe"),
        "utf-16": json.dumps(asked).encode("utf-16"),
        "bom": b"\xef\xbb\xbf" + body,
        "lone surrogate": body.replace(b"1 up", b"\\ud800"),
        "NaN": body.replace(most, b'"temperature": NaN'),
        "Infinity": body.replace(most, b'"temperature": -Infinity'),
        "1e999": body.replace(most, b'"temperature": 1e999'),
        "5000 digits": body.replace(most, most[:-1] + b"9" * 5000),
        "deep lists": b'{"model": ' + b"[" * 20000 + b"]" * 20000 + b"}",
        "deep objects": b'{"a":' * 8000 + b"1" + b"}" * 8000,
        "nul": body + b"\x00",
        "a list": b"[" + body + b"]",
        "a number": b"3",
        "null": b"null",
        "a string": b'"x"',
    }


@pytest.mark.parametrize("name", bodies())
@pytest.mark.parametrize("path", sorted(BASES))
def test_a_body_that_is_no_request(http: httpx.Client, path: str, name: str) -> None:
    asked: dict[str, Any] = {"/v1/messages": MESSAGES, "/v1/messages/count_tokens": COUNTED}.get(path, CHAT)
    sent = bodies(asked, b'"model": "small"' if asked is COUNTED else b'"max_tokens": 3')
    if path == "/v1/responses":
        sent = bodies(RESPONSE, b'"max_output_tokens": 3')
    answer = http.post(path, content=sent[name], headers={"content-type": "application/json"})
    assert answer.status_code == 400, answer.text
    check(answer)


def test_nul_in_a_text_is_text(http: httpx.Client) -> None:
    body = CHAT | {"messages": [{"role": "user", "content": "\x00 1 up \x00"}]}
    assert http.post("/v1/chat/completions", json=body).status_code == 200


def nested(depth: int) -> Any:
    value: Any = {"type": "object"}
    for _ in range(depth):
        value = {"type": "object", "properties": {"a": value}}
    return value


@pytest.mark.parametrize("depth", [10, 100, 300, 450])
def test_tools_may_nest_as_deep_as_json_does(http: httpx.Client, depth: int) -> None:
    tool = {"type": "function", "function": {"name": "move", "parameters": nested(depth)}}
    for change in (
        {"tools": [tool]},
        {"tools": [nested(depth)]},
        {"messages": [nested(depth)]},
        {"stop": nested(depth)},
    ):
        check(http.post("/v1/chat/completions", json=CHAT | change))
    flat = {"type": "function", "name": "move", "parameters": nested(depth)}
    for change in ({"tools": [flat]}, {"tools": [flat], "stream": True}, {"input": [nested(depth)]}):
        check(http.post("/v1/responses", json=RESPONSE | change))
    use = {"type": "tool_use", "id": "a", "name": "move", "input": nested(depth)}
    called: list[Any] = [{"role": "assistant", "content": [use]}, {"role": "user", "content": "1 up"}]
    client_tool = {"name": "move", "input_schema": nested(depth)}
    for change in ({"tools": [client_tool]}, {"tools": [client_tool], "stream": True}, {"messages": called}):
        check(http.post("/v1/messages", json=MESSAGES | change))


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "", "json"])
def test_a_body_of_another_kind(http: httpx.Client, kind: str) -> None:
    answer = http.post("/v1/chat/completions", content=json.dumps(CHAT), headers={"content-type": kind})
    assert answer.status_code == 415
    assert "application/json" in answer.json()["error"]["message"]
    check(answer)


# --------------------------------------------------------------------------------------------------- raw connections


PATIENCE_S = 60.0


def raw(url: str, sent: bytes, wait_s: float = PATIENCE_S, enough: bytes | None = None) -> bytes:
    """Sends bytes, and reads until the server closes, has said `enough`, or has said nothing for `wait_s`."""
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=wait_s) as connection:
        answer = b""
        try:
            connection.sendall(sent)
            while (enough is None or enough not in answer) and (part := connection.recv(65536)):
                answer += part
        except OSError:  # reset, timed out: what came before is the answer
            pass
        return answer


def request(body: bytes, *headers: bytes, length: int | None = None) -> bytes:
    size = len(body) if length is None else length
    lines = [b"POST /v1/chat/completions HTTP/1.1", b"Host: x", b"Content-Type: application/json", *headers]
    return b"\r\n".join([*lines, b"Content-Length: %d" % size, b"", b""]) + body


BODY = json.dumps(CHAT).encode()
RAW: dict[str, tuple[bytes, tuple[bytes, ...]]] = {
    "garbage": (b"\x16\x03\x01\x00\xa5\x01\x00\x00", (b"400",)),
    "http/0.9": (b"GET /v1/models\r\n\r\n", (b"400",)),
    "negative length": (request(BODY).replace(b"Content-Length: ", b"Content-Length: -"), (b"400",)),
    "length in words": (request(BODY).replace(b"Content-Length: ", b"Content-Length: x"), (b"400",)),
    "two lengths": (request(BODY, b"Content-Length: 1"), (b"400",)),
    "length and chunks": (request(BODY, b"Transfer-Encoding: chunked"), (b"", b"400")),  # or just hung up on
    "a huge length": (request(BODY, length=10**18), (b"413",)),
    "short of its length": (request(BODY[:10], length=len(BODY)), (b"",)),
    "longer than its length": (request(BODY, length=10), (b"400",)),
    "a chunk without end": (
        request(BODY, b"Transfer-Encoding: chunked").replace(b"Content-Length", b"X-Length"), (b"", b"400")),
    "no host": (request(BODY).replace(b"Host: x\r\n", b""), (b"400",)),
    "nul in a header": (request(BODY, b"X-A: a\x00b"), (b"400",)),
    "a header of 1 MB": (request(BODY, b"X-A: " + b"a" * 1_000_000), (b"", b"400", b"431")),
    "50000 headers": (request(BODY, *(b"X-%d: aaaaaaaaaaaaaaaaaaaa" % i for i in range(50000))), (b"", b"400", b"431")),
    "a path of 1 MB": (b"GET /" + b"a" * 1_000_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n", (b"", b"400", b"414")),
    "no such method": (b"\x01\x02 / HTTP/1.1\r\nHost: x\r\n\r\n", (b"400",)),
    "a websocket": (
        b"GET /v1/models HTTP/1.1\r\nHost: x\r\nConnection: upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Key: a\r\n"
        b"Sec-WebSocket-Version: 13\r\n\r\n", (b"200", b"400", b"426")),
    "half a request line": (b"POST /v1/chat", (b"", b"400")),
}  # fmt: skip


@pytest.mark.parametrize("name", RAW)
def test_bytes_that_are_no_request(server: Any, http: httpx.Client, name: str) -> None:
    sent, expected = RAW[name]
    answer = raw(server.url, sent, 1.0 if b"" in expected else PATIENCE_S, b"\r\n\r\n")
    status = answer.split(b" ", 2)[1] if answer else b""
    assert status in expected, answer[:300]
    assert http.get("/health/ready").status_code == 200
    deadline = time.monotonic() + PATIENCE_S
    while server.door.running:  # it has yet to see that the caller hung up
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_body_that_never_arrives_is_given_up(start: Callable[..., Any], limits: Limits) -> None:
    server = start(limits=replace(limits, max_body_s=0.3, max_requests=2))
    answer = raw(server.url, request(b"abc", length=100))
    assert answer.startswith(b"HTTP/1.1 408")
    assert b"did not arrive within 0.3 s" in answer
    assert b"connection: close" in answer.lower()
    whole = raw(server.url, request(BODY), enough=b"\r\n\r\n")  # at once: head and body, however slow we are
    assert whole.startswith(b"HTTP/1.1 200")
