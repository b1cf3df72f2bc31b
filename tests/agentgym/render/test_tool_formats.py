"""Reading and writing calls: tolerant, and never an exception."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentgym.messages import ToolCall, ToolSpec
from agentgym.render.tool_formats import FORMATS, Hermes, Plain

MOVE = ToolSpec("move", "", {"type": "object", "properties": {"dir": {"type": "string"}}, "required": ["dir"]})
SET = ToolSpec(
    "set",
    "",
    {
        "type": "object",
        "properties": {
            "name": {"type": "string"}, "value": {"type": "integer"}, "on": {"type": "boolean"},
            "note": {"anyOf": [{"type": "string"}, {"type": "null"}]},
        },
        "required": ["name", "value"],
    },
)  # fmt: skip
TOOLS = (MOVE, SET)


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        ("hello ", "hello", []),
        ('<tool_call>\n{"name": "move", "arguments": {"dir": "up"}}\n</tool_call>', "", [("move", '{"dir": "up"}')]),
        ('<tool_call>{"name":"move","arguments":{"dir":"up"}}', "", [("move", '{"dir": "up"}')]),
        (
            'a<tool_call>{"name": "f"}</tool_call>b<tool_call>{"name": "g", "parameters": {}}</tool_call>c', "abc",
            [("f", "{}"), ("g", "{}")],
        ),
        ('<tool_call>[{"name": "f"}, {"name": "g"}]</tool_call>', "", [("f", "{}"), ("g", "{}")]),
        ('<tool_call>{"name": "f"}\n{"name": "g"}</tool_call>', "", [("f", "{}"), ("g", "{}")]),
        ('<tool_call>{"name": "f", "arguments": "{\\"x\\": 1}"}</tool_call>', "", [("f", '{"x": 1}')]),
        (
            '<tool_call>{"name": "f", "arguments": {"x": "</tool_call>"}}</tool_call>', "",
            [("f", '{"x": "</tool_call>"}')],
        ),
        ('<tool_call>{"name": move}</tool_call> x', "x", [("", '{"name": move}')]),
        ('<tool_call>{"name": "move", "argu', "", [("", '{"name": "move", "argu')]),
        ("<tool_call></tool_call>", "", [("", "")]),
        ('<tool_call>{"arguments": {}}</tool_call>', "", [("", '{"arguments": {}}')]),
        ('<tool_call>{"name": "f", "arguments": [1]}</tool_call>', "", [("f", "[1]")]),
    ],
)  # fmt: skip
def test_hermes_reads(text: str, content: str, calls: list[tuple[str, str]]) -> None:
    assert Hermes().parse(text, TOOLS) == (content, tuple(ToolCall(f"call_{i}", *one) for i, one in enumerate(calls)))


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        ("up down", "up down", []),
        ("<call> move up", "", [("move", '{"dir": "up"}')]),
        ("so <call> move far up <call> move down", "so", [("move", '{"dir": "far up"}'), ("move", '{"dir": "down"}')]),
        ("<call> set x <sep> 3 <sep> true", "", [("set", '{"name": "x", "value": 3, "on": true}')]),
        ("<call> set x <sep> 3 <sep> <sep> null", "", [("set", '{"name": "x", "value": 3, "note": null}')]),
        ("<call> set 7 <sep> three", "", [("set", '{"name": "7", "value": "three"}')]),
        ("<call> move", "", [("move", "{}")]),
        ("<call> move up <sep> down", "", [("move", "up down")]),
        ("<call> jump high", "", [("jump", "high")]),
        ("<call>", "", [("", "")]),
    ],
)
def test_plain_reads(text: str, content: str, calls: list[tuple[str, str]]) -> None:
    assert Plain().parse(text, TOOLS) == (content, tuple(ToolCall(f"call_{i}", *one) for i, one in enumerate(calls)))


@given(
    text=st.lists(
        st.one_of(
            st.sampled_from(
                ["<tool_call>", "</tool_call>", '{"name": "move"', '"arguments": ', "{", "}", "[", "]", "<call>",
                 "<sep>", " move ", "\\ud800", '"', "[" * 100_000, "9" * 5000]
            ),
            st.text(max_size=5),
        ),
        max_size=8,
    ).map("".join)
)  # fmt: skip
def test_any_text_is_read_without_an_exception(text: str) -> None:
    for one in FORMATS.values():
        _, calls = one.parse(text, TOOLS)
        for call in calls:
            call.arguments.encode("utf-8", "strict" if text.isascii() else "surrogatepass")


values = st.fixed_dictionaries(
    {"name": st.from_regex(r"\A[a-z]{1,5}( [a-z]{1,5})?\Z"), "value": st.integers()},
    optional={"on": st.booleans(), "note": st.from_regex(r"\A[a-z]{1,5}\Z").filter(lambda t: t != "null")},
)


@given(arguments=values)
def test_every_format_reads_the_call_it_wrote(arguments: dict[str, object]) -> None:
    call = ToolCall("call_0", "set", json.dumps(arguments))
    for one in FORMATS.values():
        content, (read,) = one.parse(one.write_call(call, TOOLS, lambda text: text), TOOLS)

        assert (content, read.name, json.loads(read.arguments)) == ("", "set", arguments)
