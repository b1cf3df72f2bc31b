from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentgym.errors import InputError
from agentgym.messages import Message, ToolCall, ToolSpec, call

text = st.text(max_size=30)
calls = st.builds(ToolCall, call_id=text, name=text, arguments=text)
messages = st.builds(
    Message,
    role=st.sampled_from(["system", "user", "assistant", "tool"]),
    content=text,
    tool_calls=st.lists(calls, max_size=3).map(tuple),
    tool_call_id=st.none() | text,
)


@given(messages)
def test_a_message_survives_the_openai_form(message: Message) -> None:
    assert Message.from_openai(json.loads(json.dumps(message.to_openai()))) == message


def test_the_openai_form_leaves_out_what_is_not_there() -> None:
    assert Message("user", "hi").to_openai() == {"role": "user", "content": "hi"}


def test_arguments_stay_the_text_that_the_policy_wrote() -> None:
    broken = '{"dir": "up"'
    assert Message("assistant", "", (ToolCall("c", "move", broken),)).to_openai()["tool_calls"][0]["function"] == {
        "name": "move",
        "arguments": broken,
    }


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"role": "developer", "content": "x"}, Message("system", "x")),
        ({"role": "assistant", "content": None}, Message("assistant", "")),
        ({"role": "assistant"}, Message("assistant", "")),
        ({"role": "user", "content": [{"type": "text", "text": t} for t in "ab"]}, Message("user", "ab")),
        (
            {"role": "assistant", "tool_calls": [{"function": {"name": "move", "arguments": {"dir": "up"}}}]},
            Message("assistant", "", (ToolCall("", "move", '{"dir": "up"}'),)),
        ),
    ],
)  # fmt: skip
def test_what_other_clients_write_is_read(value: dict[str, Any], message: Message) -> None:
    assert Message.from_openai(value) == message


@pytest.mark.parametrize(
    ("value", "why"),
    [
        ({"role": "bot", "content": "x"}, "role must be .* got 'bot'"),
        ({"role": "user", "content": 7}, "content must be text .* got int"),
        ({"role": "user", "content": [{"type": "image_url"}]}, "content must be text"),
        ({"role": "tool", "content": "x", "tool_call_id": 3}, "tool_call_id must be a string, got 3"),
        ({"role": "assistant", "tool_calls": [{"name": "move"}]}, r"tool_calls\[\] must hold"),
        ({"role": "assistant", "tool_calls": ["move"]}, r"tool_calls\[\] must hold"),
    ],
)
def test_bad_messages_are_refused_by_field(value: dict[str, Any], why: str) -> None:
    with pytest.raises(InputError, match=why):
        Message.from_openai(value)


def test_a_tool_survives_the_openai_form() -> None:
    spec = ToolSpec("move", "Move.", {"type": "object", "properties": {"dir": {"type": "string"}}})
    assert ToolSpec.from_openai(spec.to_openai()) == spec


@pytest.mark.parametrize(
    "value", [{}, {"type": "function"}, {"type": "function", "function": {"name": ""}}, {"type": "x"}]
)
def test_what_is_no_tool_is_refused(value: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="a tool must be"):
        ToolSpec.from_openai(value)


def test_call_writes_one_call() -> None:
    message = call("move", dir="up")
    assert message.role == "assistant"
    assert json.loads(message.tool_calls[0].arguments) == {"dir": "up"}


def test_call_takes_arguments_of_any_name() -> None:
    assert json.loads(call("open", name="x").tool_calls[0].arguments) == {"name": "x"}
