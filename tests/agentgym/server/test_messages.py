"""The Messages API, asked by Anthropic's client: what a stream says is what the whole answer says, and both are what
the client's own types take."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from typing import Any

import anthropic
import httpx
import pytest
from anthropic.types import Message as Said
from anthropic.types import RawMessageStreamEvent
from openai import OpenAI
from outside_agents import Pace, says
from pydantic import TypeAdapter

from agentgym.messages import Message, ToolCall
from agentgym.policy import Completion
from agentgym.server.messages_answers import MessagesAnswer
from agentgym.server.messages_inputs import arguments_of, input_of
from agentgym.server.messages_requests import MessagesRequest
from agentgym.server.replies import Reply
from agentgym.server.text_stream import ContentStream

QUESTION: Any = "1 up 2 left U. D. L. R#"
SCHEMA: Any = {"type": "object", "properties": {"dir": {"type": "string"}}, "required": ["dir"]}
MOVE: Any = {"name": "move", "description": "Move.", "input_schema": SCHEMA}
CHAT_MOVE: Any = {"type": "function", "function": {"name": "move", "description": "Move.", "parameters": SCHEMA}}
OURS = {"return_token_ids": True, "return_policy_versions": True}
NAMES = ("token_ids", "policy_versions", "kv_versions")
EVENT: TypeAdapter[Any] = TypeAdapter(RawMessageStreamEvent)


@pytest.fixture(scope="module")
def client(server: Any) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=server.url, api_key="unused", max_retries=0) as client:
        yield client


def ask(client: Any, text: str = QUESTION, **options: Any) -> Any:
    asked = {"model": "small", "max_tokens": 20, "messages": [{"role": "user", "content": text}]}
    return client.messages.create(**asked | options)


def user(text: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}], "model": "small", "max_tokens": 20}


def events_of(url: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    """The events of a stream as they were sent, each of the name that its data has."""
    answer = httpx.post(f"{url}/v1/messages", json=user(QUESTION) | {"stream": True} | body, timeout=60)
    assert answer.headers["content-type"].startswith("text/event-stream"), answer.text
    sent = [part.split("\n") for part in answer.text.split("\n\n") if part]
    events = [json.loads(data.removeprefix("data: ")) for _, data in sent]
    assert [name for name, _ in sent] == [f"event: {event['type']}" for event in events]
    return events


def joined(events: list[dict[str, Any]]) -> dict[str, Any]:
    """What events say, put together; an error for one that is out of its place."""
    assert [event["type"] for event in events[:2]] == ["message_start", "ping"]
    assert [event["type"] for event in events[-2:]] == ["message_delta", "message_stop"]
    message = dict(events[0]["message"])
    assert (message["content"], message["stop_reason"], message["usage"]["output_tokens"]) == ([], None, 0)
    blocks: list[dict[str, Any]] = []
    is_open = False
    for event in events[2:-2]:
        if event["type"] == "content_block_start":
            assert (is_open, event["index"]) == (False, len(blocks))
            blocks.append(event["content_block"] | {"parts": []})
            is_open = True
            continue
        assert (is_open, event["index"]) == (True, len(blocks) - 1)
        if event["type"] == "content_block_delta":
            blocks[-1]["parts"].append(event["delta"])
        else:
            assert event["type"] == "content_block_stop"
            is_open = False
    assert not is_open
    for block in blocks:
        parts = block.pop("parts")
        if block["type"] == "text":
            assert all(part["type"] == "text_delta" and part["text"] for part in parts)
            block["text"] += "".join(part["text"] for part in parts)
        else:
            assert {part["type"] for part in parts} == {"input_json_delta"}
            block["input"] = json.loads("".join(part["partial_json"] for part in parts))
    last = {name: value for name, value in events[-2].items() if name not in ("type", "delta")}
    return message | {"content": blocks} | events[-2]["delta"] | last


def plain(message: dict[str, Any]) -> dict[str, Any]:
    """Without what is another one in each answer."""
    return message | {"id": None, "content": [{**block, "id": None} for block in message["content"]]}


# ------------------------------------------------------------------------------------------------- whole and in parts


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"max_tokens": 12, "seed": 4}, "max_tokens"),
        ({"system": "1 left", "temperature": 0.5, "seed": 4, "max_tokens": 10**9}, None),
        ({"temperature": 0, "metadata": {"user_id": "me"}, "service_tier": "auto"}, None),
        ({"max_tokens": 30, "tools": [MOVE], "seed": 5}, "tool_use"),  # two calls
        ({"max_tokens": 30, "tools": [MOVE], "seed": 13}, None),  # cut in a call
        ({"max_tokens": 30, "seed": 9, "stop_sequences": ["up", " down"]}, "stop_sequence"),
    ],
)
def test_a_stream_put_together_is_the_whole_answer(server: Any, options: dict[str, Any], reason: str | None) -> None:
    body = OURS | options
    whole = httpx.post(f"{server.url}/v1/messages", json=user(QUESTION) | body, timeout=60).raise_for_status().json()
    Said.model_validate(whole)  # every field that Anthropic requires, each of its type
    events = events_of(server.url, body)
    for event in events:
        assert event["type"] == "ping" or EVENT.validate_python(event).type == event["type"]
    assert plain(joined(events)) == plain(whole)
    assert whole["stop_reason"] == reason or reason is None
    usage = whole["usage"]
    assert [len(whole[name]) for name in NAMES] == [usage["output_tokens"]] * 3
    assert events[0]["message"]["prompt_token_ids"] == whole["prompt_token_ids"]
    assert len(whole["prompt_token_ids"]) == usage["input_tokens"]


def test_what_is_sampled_is_what_chat_samples(server: Any, client: anthropic.Anthropic) -> None:
    ours: Any = OURS | {"seed": 5, "temperature": 0.5}
    blocks: Any = [
        {"type": "text", "text": "1 "},
        {"type": "text", "text": "left", "cache_control": {"type": "ephemeral"}},
    ]
    for system in ("1 left", blocks):
        answer = ask(client, system=system, tools=[MOVE], extra_body=ours, cache_control={"type": "ephemeral"})
        with OpenAI(base_url=f"{server.url}/v1", api_key="unused") as openai:
            messages: Any = [{"role": "system", "content": "1 left"}, {"role": "user", "content": QUESTION}]
            chat = openai.chat.completions.create(
                model="small", messages=messages, max_tokens=20, tools=[CHAT_MOVE], extra_body=ours
            )
        told, (choice,) = answer.model_extra, chat.choices
        assert told["prompt_token_ids"] == (chat.model_extra or {})["prompt_token_ids"]
        for name in NAMES:
            assert told[name] == (choice.model_extra or {})[name]
        called = [block for block in answer.content if block.type == "tool_use"]
        chats: Any = choice.message.tool_calls or []
        assert [(block.name, block.input) for block in called] == [
            (call.function.name, json.loads(call.function.arguments)) for call in chats
        ]
        assert "".join(block.text for block in answer.content if block.type == "text") == (choice.message.content or "")


def test_a_message_without_our_fields_has_none(client: anthropic.Anthropic) -> None:
    answer = ask(client, max_tokens=3)
    assert (answer.type, answer.role, answer.model) == ("message", "assistant", "small")
    assert answer.id.startswith("msg_")
    assert answer.id != ask(client, max_tokens=3).id
    assert answer._request_id.startswith("req-")
    assert not answer.model_extra
    assert ask(client, system="", max_tokens=3).usage.input_tokens == answer.usage.input_tokens
    assert ask(client, system=[], max_tokens=3).usage.input_tokens == answer.usage.input_tokens


def test_the_beta_client_and_its_headers_are_answered(client: anthropic.Anthropic) -> None:
    answer = client.beta.messages.create(**user("1 up"), betas=["token-counting-2024-11-01", "no-such-beta"])
    assert answer.type == "message"


def test_tokens_of_a_prompt_are_counted(client: anthropic.Anthropic, server: Any) -> None:
    asked: Any = {"messages": [{"role": "user", "content": QUESTION}], "system": "1 left", "tools": [MOVE]}
    before = server.service.policy.engine._sampled
    counted = client.messages.count_tokens(model="small", **asked).input_tokens
    without = client.messages.count_tokens(model="small", **asked, tool_choice={"type": "none"}).input_tokens
    assert server.service.policy.engine._sampled == before
    assert counted == client.messages.create(model="small", max_tokens=1, **asked).usage.input_tokens > without
    with pytest.raises(anthropic.NotFoundError, match="another"):
        client.messages.count_tokens(model="another", **asked)
    with pytest.raises(anthropic.BadRequestError, match=r"messages\[0\].content\[0\]: a block of type 'image'"):
        client.messages.count_tokens(model="small", messages=[{"role": "user", "content": [{"type": "image"}]}])  # type: ignore[typeddict-item]
    with pytest.raises(anthropic.BadRequestError, match="prompt is too long: "):
        client.messages.count_tokens(model="small", messages=[{"role": "user", "content": "x" * 40_000}])


# ------------------------------------------------------------------------------------------------------ chosen replies


def asking(start: Callable[..., Any], text: str, latency_s: float = 0.0) -> tuple[str, anthropic.Anthropic]:
    server = start(engine_factory=says(text, latency_s))
    return server.url, anthropic.Anthropic(base_url=server.url, api_key="unused", max_retries=0)


def test_text_and_calls_in_their_order_there_and_back(start: Callable[..., Any]) -> None:
    url, client = asking(start, "goal <call> move up <call> move left")
    block = ["content_block_start", "content_block_delta", "content_block_stop"]
    events = events_of(url, {"tools": [MOVE], "temperature": 0})
    kinds = [event["type"] for event in events]
    assert kinds == ["message_start", "ping", *block * 3, "message_delta", "message_stop"]
    inputs = [event["delta"]["partial_json"] for event in events[2:-2] if event.get("index") and "delta" in event]
    assert [json.loads(text) for text in inputs] == [{"dir": "up"}, {"dir": "left"}]
    asked: Any = user(QUESTION) | {"tools": [MOVE], "extra_body": OURS | {"temperature": 0}}
    whole = client.messages.create(**asked)
    assert [block.type for block in whole.content] == ["text", "tool_use", "tool_use"]
    with client.messages.stream(**asked) as stream:
        assert "".join(stream.text_stream) == "goal"
        final = stream.get_final_message()
    shown = [block.model_dump(exclude={"id"}, exclude_unset=True) for block in whole.content]
    assert [block.model_dump(exclude={"id"}, exclude_unset=True) for block in final.content] == shown
    assert (final.stop_reason, final.usage) == (whole.stop_reason, whole.usage) == ("tool_use", whole.usage)
    without = client.messages.create(**asked | {"tool_choice": {"type": "none"}})  # no tools, no calls: it is text
    assert [block.type for block in without.content] == ["text"]
    assert without.usage.input_tokens < whole.usage.input_tokens

    calls: Any = [block for block in final.content if block.type == "tool_use"]
    results: list[Any] = [
        {"type": "tool_result", "tool_use_id": calls[0].id, "content": [{"type": "text", "text": "1 left"}]},
        {"type": "tool_result", "tool_use_id": calls[1].id, "content": "1 down", "is_error": True},
        {"type": "text", "text": "go on"},
    ]
    history = [
        *asked["messages"],
        {"role": "assistant", "content": final.content},
        {"role": "user", "content": results},
    ]
    second = client.messages.create(**asked | {"messages": history})
    made = [
        {"id": call.id, "type": "function", "function": {"name": "move", "arguments": json.dumps(call.input)}}
        for call in calls
    ]
    messages: Any = [
        *asked["messages"],
        {"role": "assistant", "content": "goal", "tool_calls": made},
        {"role": "tool", "tool_call_id": calls[0].id, "content": "1 left"},
        {"role": "tool", "tool_call_id": calls[1].id, "content": "Error: 1 down"},
        {"role": "user", "content": "go on"},
    ]
    with OpenAI(base_url=f"{url}/v1", api_key="unused") as openai:
        chat: Any = openai.chat.completions.create(model="small", messages=messages, tools=[CHAT_MOVE], extra_body=OURS)
    assert (second.model_extra or {})["prompt_token_ids"] == chat.model_extra["prompt_token_ids"]
    assert {call.id for call in calls}.isdisjoint(x.id for x in second.content if x.type == "tool_use")


def test_turns_of_the_assistant_in_a_row_are_one_reply(client: anthropic.Anthropic) -> None:
    use: Any = {"type": "tool_use", "id": "a", "name": "move", "input": {"dir": "up"}, "caller": {"type": "direct"}}
    result: Any = {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "a"}]}
    question: Any = {"role": "user", "content": QUESTION}
    one: Any = [question, {"role": "assistant", "content": [{"type": "text", "text": "goal"}, use]}, result]
    two: Any = [question, {"role": "assistant", "content": "goal"}, {"role": "assistant", "content": [use]}, result]
    ids = [
        ask(client, messages=turns, max_tokens=1, tools=[MOVE], extra_body=OURS).model_extra["prompt_token_ids"]
        for turns in (one, two)
    ]
    assert ids[0] == ids[1]


def test_a_call_that_cannot_be_read_is_text_and_calls_alone_are_no_text(start: Callable[..., Any]) -> None:
    url, _ = asking(start, "goal <call> <sep> up")
    message = joined(events_of(url, {"tools": [MOVE], "temperature": 0}))
    assert (message["content"], message["stop_reason"]) == ([{"type": "text", "text": "goal<sep> up"}], "end_turn")
    url, client = asking(start, "<call> move up")
    assert [block["type"] for block in joined(events_of(url, {"tools": [MOVE]}))["content"]] == ["tool_use"]
    assert [block.type for block in ask(client, tools=[MOVE]).content] == ["tool_use"]


def test_a_reply_that_says_nothing_is_an_empty_text(start: Callable[..., Any]) -> None:
    url, client = asking(start, "")
    options: Any
    for options in ({}, {"tools": [MOVE]}):
        answer = ask(client, **options)
        assert [block.to_dict() for block in answer.content] == [{"type": "text", "text": ""}]
        assert (answer.stop_reason, answer.usage.output_tokens) == ("end_turn", 1)
        assert joined(events_of(url, options))["content"] == [{"type": "text", "text": ""}]


def test_why_a_reply_ended(start: Callable[..., Any]) -> None:
    url, client = asking(start, "up down left up " * 40)
    options: Any
    for options, reason, text in (
        ({"max_tokens": 3}, "max_tokens", "up down left"),
        ({"stop_sequences": ["no", " left"]}, "stop_sequence", "up down"),
        ({"max_tokens": 10_000}, "model_context_window_exceeded", None),
    ):
        message = ask(client, **options)
        assert (message.stop_reason, message.stop_sequence) == (reason, " left" if text == "up down" else None)
        assert message.content[0].text == text or text is None
        assert plain(joined(events_of(url, options)))["stop_sequence"] == message.stop_sequence
    usage = message.usage
    assert usage.input_tokens + usage.output_tokens == 120  # the context
    exact = ask(client, max_tokens=usage.output_tokens)  # both: what was asked for was given
    assert (exact.stop_reason, exact.usage) == ("max_tokens", usage)


def test_a_stream_that_fails_ends_with_an_error(start: Callable[..., Any]) -> None:
    url, client = asking(start, "up " * 90, 0.05)
    events = events_of(url, {"timeout_s": 0.5, "max_tokens": 90})
    assert [event["type"] for event in events[:2]] == ["message_start", "ping"]
    error = events[-1]["error"]
    assert (events[-1]["type"], error["type"]) == ("error", "timeout_error")
    assert error["details"] == {"error_code": "deadline_exceeded"}
    asked: Any = user(QUESTION) | {"extra_body": {"timeout_s": 0.5}, "max_tokens": 90}
    with (
        client.messages.stream(**asked) as stream,
        pytest.raises(anthropic.APIStatusError, match="not sampled to the end within 0"),
    ):
        for _ in stream:
            pass
    with pytest.raises(anthropic.GatewayTimeoutError, match="not sampled to the end within 0"):
        client.messages.create(**asked)


def test_quiet_times_are_pings(start: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agentgym.server.openai_stream.HEARTBEAT_S", 0.02)
    pace = Pace(0.5)
    server = start(engine_factory=says("up " * 80, pace))
    body = user(QUESTION) | {"stream": True, "max_tokens": 80}
    pings = 0
    with httpx.stream("POST", f"{server.url}/v1/messages", json=body, timeout=60) as answer:
        for line in answer.iter_lines():
            pings += line == "event: ping"
            if pings > 1:  # the first one is not of a quiet time
                pace.token_s = 0.0
    assert pings > 1
    _, client = asking(start, "up down", 0.2)
    with client.messages.stream(**user(QUESTION)) as stream:
        assert stream.get_final_text() == "up down"


def test_the_asynchronous_client_streams_and_asks_at_once(server: Any) -> None:
    async def main() -> None:
        async with anthropic.AsyncAnthropic(base_url=server.url, auth_token="unused", max_retries=0) as client:

            async def one(seed: int) -> None:
                asked: Any = user(QUESTION) | {"tools": [MOVE], "extra_body": OURS | {"seed": seed}}
                whole = await client.messages.create(**asked)
                async with client.messages.stream(**asked) as stream:
                    deltas = [event async for event in stream if event.type == "message_delta"]
                    final = await stream.get_final_message()
                assert plain(final.to_dict())["content"] == plain(whole.to_dict())["content"]
                assert (final.stop_reason, final.usage) == (whole.stop_reason, whole.usage)
                told = whole.model_extra or {}
                assert [(deltas[0].model_extra or {})[name] for name in NAMES] == [told[name] for name in NAMES]
                assert (final.model_extra or {})["prompt_token_ids"] == told["prompt_token_ids"]

            await asyncio.gather(*(one(seed) for seed in range(4)))

    asyncio.run(main())


# -------------------------------------------------------------------------------------------------------- the input


@pytest.mark.parametrize(
    ("arguments", "value"),
    [
        ('{"dir": "up"}', {"dir": "up"}),
        ("", {}),
        ("up", {"INVALID_JSON": "up"}),
        ("[1]", {"INVALID_JSON": "[1]"}),
        ('{"a": NaN}', {"INVALID_JSON": '{"a": NaN}'}),
        ('{"a": 1e999}', {"INVALID_JSON": '{"a": 1e999}'}),
        ('{"a": "\\ud800"}', {"INVALID_JSON": '{"a": "\\ud800"}'}),
        ('{"a":' * 5000 + "1" + "}" * 5000, {"INVALID_JSON": '{"a":' * 5000 + "1" + "}" * 5000}),
        ('{"INVALID_JSON": "x"}', {"INVALID_JSON": '{"INVALID_JSON": "x"}'}),
        ('{"INVALID_JSON": 1}', {"INVALID_JSON": 1}),
        ('{"a": 100000000000000000000000000000}', {"a": 10**29}),
    ],
)
def test_whatever_a_policy_wrote_is_an_object_and_comes_back(arguments: str, value: Any) -> None:
    request = MessagesRequest.model_validate(user("x"))
    reply = Reply(
        (1,), Completion((5,), (-0.5,), (0,), (0,), "stop"), "", "stop",
        Message("assistant", "", (ToolCall("c", "move", arguments),)),
    )  # fmt: skip
    answer = MessagesAnswer(request, ContentStream(()), 100)
    assert json.loads(bytes(answer.whole([reply])["content"][0]["input"])) == value
    delta = next(event["delta"] for event in answer.closing(0, reply) if event["type"] == "content_block_delta")
    assert json.loads(delta["partial_json"]) == value
    back = arguments_of(json.loads(input_of(arguments)))
    assert back == arguments or json.loads(back) == json.loads(arguments or "{}")
