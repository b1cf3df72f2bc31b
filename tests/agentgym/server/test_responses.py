"""The Responses API, asked by the official client: what a stream says is what the whole answer says, and both are what
OpenAI's own types take."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import openai
import pytest
from openai.types.responses import Response, ResponseStreamEvent
from outside_agents import says
from pydantic import TypeAdapter

from agentgym.messages import Message
from agentgym.policy import Completion
from agentgym.server.replies import Reply
from agentgym.server.responses_answers import ResponseAnswer
from agentgym.server.responses_requests import ResponsesRequest
from agentgym.server.text_stream import ContentStream

QUESTION: Any = "1 up 2 left U. D. L. R#"
MOVE: Any = {
    "type": "function",
    "name": "move",
    "description": "Move.",
    "parameters": {"type": "object", "properties": {"dir": {"type": "string"}}, "required": ["dir"]},
    "strict": False,
}
OURS = {"return_token_ids": True, "return_policy_versions": True}
LOGPROBS: Any = ["message.output_text.logprobs"]
EVENT: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)


@pytest.fixture(scope="module")
def client(server: Any) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0) as client:
        yield client


def events_of(url: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    """The events of a stream as they were sent, each of the name that its data has, numbered without a gap."""
    answer = httpx.post(f"{url}/v1/responses", json={"model": "small", "stream": True} | body)
    assert answer.headers["content-type"].startswith("text/event-stream")
    sent = [part.split("\n") for part in answer.text.split("\n\n") if part and not part.startswith(":")]
    events = [json.loads(data.removeprefix("data: ")) for _, data in sent]
    assert [name for name, _ in sent] == [f"event: {event['type']}" for event in events]
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    return events


def plain(response: dict[str, Any]) -> dict[str, Any]:
    """Without what is another one in each answer."""
    calls = [item["call_id"] for item in response["output"] if item["type"] == "function_call"]
    assert len(set(calls)) == len(calls)
    output = [{**item, "id": None, "call_id": None} for item in response["output"]]
    return {**response, "id": None, "created_at": None, "output": output}


# ------------------------------------------------------------------------------------------------- whole and in parts


@pytest.mark.parametrize(
    "options",
    [
        {"max_output_tokens": 12, "seed": 4},  # cut
        {"input": [{"role": "user", "content": QUESTION}], "instructions": "1 left", "temperature": 0.5, "seed": 4},
        {"temperature": 0, "max_output_tokens": 20, "include": LOGPROBS, "metadata": {"a": "b"}, "user": "me"},
        {"max_output_tokens": 30, "tools": [MOVE], "seed": 5, "include": LOGPROBS},  # two calls
        {"max_output_tokens": 30, "tools": [MOVE], "seed": 13},  # cut in a call
        {"max_output_tokens": 30, "seed": 9, "stop": ["up", " down"]},
    ],
)
def test_a_stream_put_together_is_the_whole_answer(server: Any, options: dict[str, Any]) -> None:
    body = {"model": "small", "input": QUESTION} | OURS | options
    whole = httpx.post(f"{server.url}/v1/responses", json=body).raise_for_status().json()
    Response.model_validate(whole)  # every field that OpenAI requires, each of its type
    events = events_of(server.url, body)
    for event in events:
        assert EVENT.validate_python(event).type == event["type"]
    assert [event["type"] for event in events[:2]] == ["response.created", "response.in_progress"]
    assert events[-1]["type"] == f"response.{whole['status']}"
    assert plain(events[-1]["response"]) == plain(whole)
    assert {e["response"]["id"] for e in events if "response" in e} == {events[0]["response"]["id"]}
    message = next(item for item in events[-1]["response"]["output"] if item["type"] == "message")
    deltas = [event for event in events if event["type"] == "response.output_text.delta"]
    (text,) = message["content"]
    assert "".join(event["delta"] for event in deltas) == text["text"]
    assert [token for event in deltas for token in event["logprobs"]] == text["logprobs"]
    assert {event["item_id"] for event in events if "content_index" in event} == {message["id"]}
    assert len(text["logprobs"]) == (len(whole["token_ids"]) if "include" in options else 0)
    assert deltas
    (done,) = [event for event in events if event["type"] == "response.output_text.done"]
    assert (done["text"], done["logprobs"]) == (text["text"], text["logprobs"])
    ended = [event["item"] for event in events if event["type"] == "response.output_item.done"]
    assert ended == events[-1]["response"]["output"]
    sampled = whole["usage"]["output_tokens"]
    assert len(whole["token_ids"]) == len(whole["policy_versions"]) == len(whole["kv_versions"]) == sampled
    assert len(whole["prompt_token_ids"]) == whole["usage"]["input_tokens"]
    assert whole["usage"]["total_tokens"] == whole["usage"]["input_tokens"] + sampled


def test_an_answer_says_what_was_asked_and_that_nothing_is_stored(client: openai.OpenAI) -> None:
    answer = client.responses.create(
        model="small", input=QUESTION, instructions="1 left", max_output_tokens=3, temperature=0.5, tools=[MOVE],
        metadata={"a": "b"}, store=False, truncation="disabled", prompt_cache_key="k",
    )  # fmt: skip
    assert (answer.object, answer.model, answer.instructions, answer.temperature) == (
        "response",
        "small",
        "1 left",
        0.5,
    )
    assert (answer.max_output_tokens, answer.metadata, answer.prompt_cache_key) == (3, {"a": "b"}, "k")
    assert ([tool.to_dict() for tool in answer.tools], answer.tool_choice) == ([MOVE], "auto")
    assert (answer.model_extra or {})["store"] is False
    assert "token_ids" not in (answer.model_extra or {})
    other = client.responses.create(model="small", input=QUESTION, max_output_tokens=3)
    assert other.id != answer.id
    assert {item.id for item in other.output}.isdisjoint(item.id for item in answer.output)


def test_what_is_sampled_is_what_chat_samples(client: openai.OpenAI) -> None:
    ours: Any = OURS | {"seed": 7}
    answer = client.responses.create(
        model="small", instructions="1 left", input=QUESTION, max_output_tokens=9, temperature=0.5, tools=[MOVE],
        include=LOGPROBS, extra_body=ours,
    )  # fmt: skip
    messages: Any = [{"role": "system", "content": "1 left"}, {"role": "user", "content": QUESTION}]
    function = {name: MOVE[name] for name in ("name", "description", "parameters")}
    chat = client.chat.completions.create(
        model="small", messages=messages, max_tokens=9, temperature=0.5, logprobs=True,
        tools=[{"type": "function", "function": function}], extra_body=ours,  # type: ignore[arg-type]
    )  # fmt: skip
    told, (choice,) = answer.model_extra or {}, chat.choices
    assert told["prompt_token_ids"] == (chat.model_extra or {})["prompt_token_ids"]
    for role in ("system", "developer"):
        items: Any = [{"role": role, "content": "1 left"}, {"type": "message", "role": "user", "content": QUESTION}]
        other = client.responses.create(model="small", input=items, tools=[MOVE], max_output_tokens=1, extra_body=OURS)
        assert (other.model_extra or {})["prompt_token_ids"] == told["prompt_token_ids"]
    for name in ("token_ids", "policy_versions", "kv_versions"):
        assert told[name] == (choice.model_extra or {})[name]
    assert answer.output_text == choice.message.content
    assert choice.logprobs is not None
    said: Any = answer.output[0]
    assert [(one.token, one.logprob) for one in said.content[0].logprobs] == [
        (one.token, one.logprob) for one in choice.logprobs.content or []
    ]


# ------------------------------------------------------------------------------------------------------ chosen replies


def asking(start: Callable[..., Any], text: str, latency_s: float = 0.0) -> tuple[str, openai.OpenAI]:
    server = start(engine_factory=says(text, latency_s))
    return server.url, openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0)


def test_the_events_of_text_and_calls_in_their_order(start: Callable[..., Any]) -> None:
    url, client = asking(start, "goal <call> move up <call> move left")
    events = events_of(url, {"input": QUESTION, "tools": [MOVE], "temperature": 0})
    call = ["output_item.added", "function_call_arguments.delta", "function_call_arguments.done", "output_item.done"]
    assert [event["type"].removeprefix("response.") for event in events] == [
        "created", "in_progress", "output_item.added", "content_part.added", "output_text.delta", "output_text.done",
        "content_part.done", "output_item.done", *call, *call, "completed",
    ]  # fmt: skip
    assert [event["output_index"] for event in events if "output_index" in event] == [0] * 6 + [1] * 4 + [2] * 4
    done = [event["item"] for event in events if event["type"] == "response.output_item.done"]
    assert done == events[-1]["response"]["output"]
    begun = [event["item"] for event in events if event["type"] == "response.output_item.added"]
    assert [item["id"] for item in begun] == [item["id"] for item in done]
    assert [item["status"] for item in begun + done] == ["in_progress"] * 3 + ["completed"] * 3
    assert [json.loads(item["arguments"]) for item in done[1:]] == [{"dir": "up"}, {"dir": "left"}]
    asked: Any = {"model": "small", "input": QUESTION, "tools": [MOVE], "temperature": 0}
    whole = client.responses.create(**asked)
    with client.responses.stream(**asked) as stream:
        snapshots = [event.snapshot for event in stream if event.type == "response.output_text.delta"]
        final = stream.get_final_response()
    assert snapshots[-1] == whole.output_text == final.output_text == "goal"
    kept = {"status", "type", "name", "arguments", "content", "role"}
    assert [item.to_dict().keys() & kept for item in final.output] == [x.to_dict().keys() & kept for x in whole.output]
    assert [item.name for item in final.output if item.type == "function_call"] == ["move", "move"]
    without = client.responses.create(**asked | {"tool_choice": "none"})  # no tools, no calls: it is text
    assert [item.type for item in without.output] == ["message"]
    assert without.usage is not None
    assert whole.usage is not None
    assert without.usage.input_tokens < whole.usage.input_tokens
    assert len(without.tools) == 1


def test_calls_alone_are_no_message_but_where_logprobs_are_asked_for(start: Callable[..., Any]) -> None:
    url, _ = asking(start, "<call> move up")
    body = {"input": QUESTION, "tools": [MOVE], "temperature": 0, "return_token_ids": True}
    events = events_of(url, body)
    assert [item["type"] for item in events[-1]["response"]["output"]] == ["function_call"]
    assert not [event for event in events if "content_index" in event]
    told = events_of(url, body | {"include": LOGPROBS})
    message, call = told[-1]["response"]["output"]
    assert call["name"] == "move"
    (text,) = message["content"]
    assert text["text"] == ""
    assert len(text["logprobs"]) == len(told[-1]["response"]["token_ids"]) > 2


def test_a_call_that_cannot_be_read_is_text_to_the_end(start: Callable[..., Any]) -> None:
    url, _ = asking(start, "goal <call> <sep> up")
    events = events_of(url, {"input": QUESTION, "tools": [MOVE], "temperature": 0})
    (item,) = events[-1]["response"]["output"]
    (text,) = item["content"]
    assert text["text"] == "goal<sep> up"
    assert "".join(event["delta"] for event in events if event["type"] == "response.output_text.delta") == text["text"]


def test_a_token_that_is_a_part_of_a_character_has_no_bytes() -> None:
    request = ResponsesRequest(model="small", input="x", include=LOGPROBS)
    answer = ResponseAnswer(request, (), lambda ids: {5: "\ufffd", 6: "é"}[ids[0]], ContentStream(()))
    completion = Completion((5, 6), (-0.5, -1.0), (0, 0), (0, 0), "stop")
    whole = answer.whole([Reply((1,), completion, "é", "stop", Message("assistant", "é"))])
    whole["tools"] = []
    said: Any = Response.model_validate(whole).output[0]
    assert [(one.token, one.bytes) for one in said.content[0].logprobs] == [("\ufffd", []), ("é", [0xC3, 0xA9])]


def test_a_reply_that_says_nothing_is_an_empty_message(start: Callable[..., Any]) -> None:
    url, client = asking(start, "")
    for options in ({}, {"tools": [MOVE]}):
        asked: Any = {"model": "small", "input": QUESTION, "temperature": 0} | options
        (item,) = client.responses.create(**asked).output
        assert item.type == "message"
        assert item.status == "completed"
        assert [part.to_dict()["text"] for part in item.content] == [""]
        events = events_of(url, asked)
        assert [event["type"] for event in events].count("response.output_item.done") == 1
        assert plain(events[-1]["response"])["output"][0]["content"][0]["text"] == ""


def test_a_reply_that_is_cut_is_incomplete(start: Callable[..., Any]) -> None:
    url, client = asking(start, "up down up down up down")
    answer = client.responses.create(model="small", input=QUESTION, max_output_tokens=3, temperature=0)
    assert answer.status == "incomplete"
    assert answer.incomplete_details is not None
    assert answer.incomplete_details.reason == "max_output_tokens"
    (item,) = answer.output
    assert item.type == "message"
    assert item.status == "incomplete"
    assert answer.output_text == "up down up"
    last = events_of(url, {"input": QUESTION, "max_output_tokens": 3, "temperature": 0})[-1]
    assert (last["type"], last["response"]["output"][0]["status"]) == ("response.incomplete", "incomplete")
    whole = client.responses.create(model="small", input=QUESTION, temperature=0)
    assert (whole.status, whole.incomplete_details) == ("completed", None)


def test_a_stream_that_fails_ends_with_an_error(start: Callable[..., Any]) -> None:
    url, client = asking(start, "up " * 90, 0.6)
    for limit in (1.0, 3.0, 10.0, 30.0):  # s; until the first token comes within it, however slow the machine is
        events = events_of(url, {"input": QUESTION, "timeout_s": limit})
        assert (events[-1]["type"], events[-1]["code"]) == ("error", "deadline_exceeded")
        assert EVENT.validate_python(events[-1]).message.startswith(f"not sampled to the end within {limit:g} s")
        if "response.output_text.delta" in (said := [event["type"] for event in events]):
            break
    assert "response.output_text.delta" in said  # said while the rest was sampled
    asked: Any = {"model": "small", "input": QUESTION, "extra_body": {"timeout_s": 0.3}}
    with client.responses.stream(**asked) as stream:
        assert [event.type for event in stream][-1] == "error"
    with pytest.raises(openai.InternalServerError, match="not sampled to the end within 0"):
        client.responses.create(**asked)


def test_the_asynchronous_client_streams_and_asks_at_once(server: Any) -> None:
    async def main() -> None:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0) as client:

            async def ask(seed: int) -> None:
                asked: Any = {"model": "small", "input": QUESTION, "max_output_tokens": 12}
                asked |= {"extra_body": OURS | {"seed": seed}}
                whole = await client.responses.create(**asked)
                async with client.responses.stream(**asked) as stream:
                    last = [event async for event in stream][-1]
                assert last.type in ("response.completed", "response.incomplete")
                told = last.response  # type: ignore[union-attr]
                assert (told.output_text, told.model_extra, told.usage) == (
                    whole.output_text, whole.model_extra, whole.usage,
                )  # fmt: skip

            await asyncio.gather(*(ask(seed) for seed in range(8)))

    asyncio.run(main())


def test_tools_there_and_back_with_the_items_of_the_answer(start: Callable[..., Any]) -> None:
    _, client = asking(start, "goal <call> move up <call> move left")
    asked: Any = {"model": "small", "tools": [MOVE], "temperature": 0, "extra_body": {"return_token_ids": True}}
    history: list[Any] = [{"role": "user", "content": [{"type": "input_text", "text": QUESTION}]}]
    answer = client.responses.create(input=history, **asked)
    history += answer.output
    calls = [item for item in answer.output if item.type == "function_call"]
    for call, said in zip(calls, ("1 left", [{"type": "input_text", "text": "1 down"}]), strict=True):
        history.append({"type": "function_call_output", "call_id": call.call_id, "output": said})
    second = client.responses.create(input=history, **asked)
    messages: Any = [
        {"role": "user", "content": QUESTION},
        {
            "role": "assistant",
            "content": "goal",
            "tool_calls": [
                {"id": call.call_id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
                for call in calls
            ],
        },
        {"role": "tool", "tool_call_id": calls[0].call_id, "content": "1 left"},
        {"role": "tool", "tool_call_id": calls[1].call_id, "content": "1 down"},
    ]
    function = {name: MOVE[name] for name in ("name", "description", "parameters")}
    chat = client.chat.completions.create(
        messages=messages, **asked | {"tools": [{"type": "function", "function": function}]}
    )
    assert (second.model_extra or {})["prompt_token_ids"] == (chat.model_extra or {})["prompt_token_ids"]
    assert {call.call_id for call in calls}.isdisjoint(x.call_id for x in second.output if x.type == "function_call")
