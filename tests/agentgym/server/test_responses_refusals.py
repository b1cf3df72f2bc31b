"""What the Responses API refuses: by its name, with what to do instead, and before anything is sampled."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

USER: Any = {"role": "user", "content": "1 up"}
MOVE: Any = {"type": "function", "name": "move", "parameters": {"type": "object"}}
CALL: Any = {"type": "function_call", "call_id": "c", "name": "move", "arguments": "{}"}
OUTPUT: Any = {"type": "function_call_output", "call_id": "c", "output": "1 left"}


def refused(server: Any, change: dict[str, Any]) -> dict[str, Any]:
    before = server.service.policy.engine._sampled
    response = httpx.post(f"{server.url}/v1/responses", json={"model": "small", "input": [USER]} | change)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert error["param"] in error["message"] or error["code"] == "context_length_exceeded"
    assert server.service.policy.engine._sampled == before
    return error


@pytest.mark.parametrize(
    ("change", "says_what"),
    [
        ({"store": True}, "store=True is not supported here; leave it out or send False: nothing is stored"),
        ({"previous_response_id": "resp_1"}, "nothing is stored: send the whole history in `input`"),
        ({"conversation": "conv_1"}, "nothing is stored: send the whole history in `input`"),
        ({"conversation": {"id": "conv_1"}}, "conversation={'id': 'conv_1'} is not supported here"),
        ({"background": True}, "background=True is not supported here; leave it out, and stream"),
        ({"prompt": {"id": "pmpt_1"}}, "send `instructions` and `input`"),
        ({"truncation": "auto"}, "truncation='auto' is not supported here; send an input that fits"),
        ({"reasoning": {"effort": "low"}}, "the policy has no effort to set"),
        ({"reasoning": {"summary": "auto"}}, "reasoning={'summary': 'auto'}"),
        ({"max_tool_calls": 3}, "it bounds built-in tools"),
        ({"context_management": []}, "shorten `input` yourself"),
        ({"text": {"format": {"type": "json_object"}}}, "send {'format': {'type': 'text'}}"),
        ({"text": {"verbosity": "low"}}, "text={'verbosity': 'low'} is not supported here"),
        ({"top_p": 0.9}, "top_p=0.9 is not supported here; leave it out or send 1.0"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"include": ["reasoning.encrypted_content"]}, "include[0]: Input should be 'message.output_text.logprobs'"),
        ({"parallel_tool_calls": False}, "parallel_tool_calls"),
        ({"service_tier": "flex"}, "service_tier"),
        ({"tool_choice": "required"}, "tool_choice='required' is not supported here; leave it out or send 'auto'"),
        ({"tool_choice": {"type": "function", "name": "move"}}, "tool_choice"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"max_tokens": 3}, "unknown parameter 'max_tokens'"),
        ({"n": 2}, "unknown parameter 'n'"),
        ({"messages": [USER]}, "unknown parameter 'messages'"),
        ({"stream_options": {"include_obfuscation": False}}, "stream_options needs stream=true"),
        ({"stream": True, "stream_options": {"include_usage": True}}, "stream_options.include_usage"),
        ({"stream": True, "stream_options": {"include_obfuscation": True}}, "stream_options.include_obfuscation"),
        ({"timeout_s": 61}, "timeout_s may be at most 60"),
        ({"stop_token_ids": [10**6]}, "stop_token_ids: 1000000 is not in the vocabulary of"),
        ({"metadata": {"a": 1}}, "metadata"),
        ({"instructions": ["x"]}, "instructions"),
        ({"tools": [{"type": "web_search"}]}, "tools[0]: a tool of type 'web_search' is not supported here"),
        ({"tools": [MOVE | {"strict": True}]}, "tools[0].strict=True is not supported here; send strict=false"),
        ({"tools": [MOVE | {"defer_loading": True}]}, "unknown parameter 'tools[0].defer_loading'"),
        ({"tools": [{"type": "function", "function": MOVE}]}, "tools[0].name must be text"),
        ({"tools": [MOVE | {"parameters": 3}]}, "tools[0]: function.parameters must be the JSON schema"),
        ({"tools": [MOVE, MOVE]}, "tools[1] has the name of another tool"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(server: Any, change: dict[str, Any], says_what: str) -> None:
    error = refused(server, change)
    assert says_what in error["message"]
    assert error["param"].startswith(next(name for name in reversed(change)))


@pytest.mark.parametrize(
    ("items", "says_what"),
    [
        ([], "input must have at least one item"),
        (3, "input"),
        ([3], "input[0]"),
        ([USER, {}], "input[1]: an item of type None is not supported here"),
        ([{"type": "item_reference", "id": "msg_1"}], "nothing is stored: send the item itself"),
        ([{"type": "reasoning", "summary": []}], "replies have no such items"),
        ([{"type": "web_search_call", "id": "x"}], "'web_search_call' is not supported here; an item is a message"),
        ([{"type": ["message"], "role": "user", "content": "x"}], "an item of type ['message']"),
        ([{"role": "wizard", "content": "x"}], "input[0].role must be system, developer, user or assistant"),
        ([{"role": ["user"], "content": "x"}], "input[0].role must be"),
        ([{"role": "tool", "content": "x"}], "send a result of a tool as a function_call_output"),
        ([USER | {"images": ["y"]}], "unknown parameter 'input[0].images'"),
        ([{"role": "user"}], "input[0].content must be text or a list of text parts, got None"),
        ([{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}], "got 'input_image'; send text"),
        (
            [{"role": "user", "content": [{"type": "input_file", "file_id": "x"}]}],
            "input[0].content[0] must be of type",
        ),
        ([{"role": "user", "content": ["x"]}], "input[0].content[0] must be of type"),
        ([{"role": "user", "content": [{"type": "input_text", "text": None}]}], "input[0].content[0].text must be"),
        ([{"role": "user", "content": [{"type": "input_text", "text": "x", "y": 1}]}], "'input[0].content[0].y'"),
        ([USER, {"role": "assistant", "content": "x"}], "the last item of input must not be the assistant's"),
        ([USER, CALL], "the last item of input must not be the assistant's"),
        ([USER, OUTPUT], "input[1]: no function_call before it has the call_id 'c'"),
        ([USER, OUTPUT, CALL], "input[1]: no function_call before it has the call_id 'c'"),
        ([USER, CALL, OUTPUT, CALL, OUTPUT], "input[3].call_id 'c' is that of an earlier call"),
        ([USER, CALL, OUTPUT, OUTPUT], "input[3]: the call 'c' has an output already"),
        ([USER, CALL | {"call_id": ""}, OUTPUT], "input[1].call_id must be text that is not empty"),
        ([USER, CALL | {"name": None}, OUTPUT], "input[1].name must be text that is not empty"),
        ([USER, CALL | {"arguments": {}}, OUTPUT], "input[1].arguments must be text (JSON), got {}"),
        ([USER, CALL | {"caller": {"type": "x"}}, OUTPUT], "unknown parameter 'input[1].caller'"),
        ([USER, CALL, OUTPUT | {"images": ["y"]}], "unknown parameter 'input[2].images'"),
        ([USER, CALL, OUTPUT | {"output": 3}], "input[2].output must be text or a list of text parts, got 3"),
        ([USER, CALL, OUTPUT | {"output": [{"type": "input_image"}]}], "input[2].output[0] must be of type"),
    ],
)
def test_items_that_are_no_history_are_refused_by_their_place(server: Any, items: Any, says_what: str) -> None:
    assert says_what in refused(server, {"input": items})["message"]


@pytest.mark.parametrize(
    ("change", "param"),
    [({"input": "goal " * 200}, "input"), ({"max_output_tokens": 10**9}, "max_output_tokens")],
)
def test_what_does_not_fit_is_said_in_this_dialects_words(server: Any, change: dict[str, Any], param: str) -> None:
    error = refused(server, change)
    assert (error["code"], error["param"]) == ("context_length_exceeded", param)
    assert "does not fit the context of 120 tokens" in error["message"]
    assert " max_tokens" not in error["message"]


def test_what_says_nothing_is_taken(server: Any) -> None:
    null = dict.fromkeys(("previous_response_id", "conversation", "tools", "text", "include", "store", "truncation"))
    said = {
        "text": {"format": {"type": "text"}, "verbosity": None}, "reasoning": {"effort": None}, "include": [],
        "store": False, "truncation": "disabled", "top_p": 1, "parallel_tool_calls": True, "tool_choice": "auto",
        "tools": [MOVE | {"strict": None}], "safety_identifier": "me", "prompt_cache_retention": "24h",
    }  # fmt: skip
    history = [
        USER,
        CALL | {"id": "fc_1", "status": "completed"},
        OUTPUT | {"id": None, "status": None},
        USER | {"id": ""},
    ]
    for change in (null, said, {"input": history}, {"input": ""}):
        body = {"model": "small", "input": "1 up", "max_output_tokens": 2} | change
        answer = httpx.post(f"{server.url}/v1/responses", json=body)
        assert answer.status_code == 200, answer.text


def test_many_calls_of_one_reply_are_read_at_once(server: Any) -> None:
    calls = [CALL | {"call_id": str(number), "arguments": ""} for number in range(500)]
    assert refused(server, {"input": [USER, *calls, USER]})["code"] == "context_length_exceeded"
