"""What a class says of its tools, and what a policy may write into a call."""

from __future__ import annotations

import enum
import json
from typing import Annotated, Any, Literal, Optional

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentgym.errors import InputError, ToolError
from agentgym.tools import Range, ToolBinding, bind_tool, is_tool, sample_arguments, tool


class Colour(enum.Enum):
    RED = "red"
    BLUE = "blue"


class Box:
    def move(self, dir: Literal["up", "down", "left", "right"]) -> str:
        """Move one cell.

        Args:
            dir: where to go.
        """
        return dir

    def many(
        self,
        text: str,
        count: Annotated[int, Range(1, 32)],
        share: float = 0.5,
        flag: bool = False,
        colour: Colour = Colour.RED,
        names: list[str] | None = None,
        limit: Optional[int] = None,  # noqa: UP045  (both spellings are supported)
    ) -> None:
        """Do much at once,
        in one paragraph.

        And say more in another.

        Args:
            text: what to
                write, on two lines: with a colon.
            count (int): how often.

        Returns:
            nothing: at all.
        """

    def plain(self) -> None: ...


def bound(name: str) -> ToolBinding:
    return bind_tool("Box", name, getattr(Box, name))


def of_hint(hint: Any) -> ToolBinding:
    def method(self, x): ...

    method.__annotations__ = {"x": hint}
    return bind_tool("Box", "method", method)


def decode(hint: Any, text: str) -> Any:
    return of_hint(hint).decode_arguments(text)["x"]


def test_schema_of_literal():
    spec = bound("move").spec
    assert spec.name == "move"
    assert spec.description == "Move one cell."
    assert spec.parameters == {
        "type": "object",
        "properties": {
            "dir": {"type": "string", "enum": ["up", "down", "left", "right"], "description": "where to go."}
        },
        "required": ["dir"],
        "additionalProperties": False,
    }


def test_schema_of_every_kind():
    spec = bound("many").spec
    assert spec.description == "Do much at once, in one paragraph.\nAnd say more in another."
    assert spec.parameters["required"] == ["text", "count"]
    assert spec.parameters["properties"] == {
        "text": {"type": "string", "description": "what to write, on two lines: with a colon."},
        "count": {"type": "integer", "minimum": 1, "maximum": 32, "description": "how often."},
        "share": {"type": "number", "default": 0.5},
        "flag": {"type": "boolean", "default": False},
        "colour": {"type": "string", "enum": ["red", "blue"], "default": "red"},
        "names": {"anyOf": [{"type": "array", "items": {"type": "string"}}, {"type": "null"}], "default": None},
        "limit": {"anyOf": [{"type": "integer"}, {"type": "null"}], "default": None},
    }
    json.dumps(spec.to_openai())


def test_arguments_arrive_as_the_hints_say():
    text = '{"text": "a", "count": 3, "share": 1, "colour": "blue", "names": ["x"], "limit": null}'
    values = bound("many").decode_arguments(text)
    assert values == {"text": "a", "count": 3, "share": 1.0, "colour": Colour.BLUE, "names": ["x"], "limit": None}
    assert type(values["share"]) is float
    assert bound("plain").decode_arguments("") == {}


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("move", '{"dir": "north"}', "move: argument 'dir' must be one of up, down, left, right, got 'north'"),
        ("move", "{}", "move: argument 'dir' is missing, it must be one of up, down, left, right"),
        ("move", '{"dir": "up", "far": 2}', "move: unknown argument 'far'"),
        ("move", '{"dir": "up"', "move: the arguments must be a JSON object, got '{\"dir\": \"up\"'"),
        ("move", '["up"]', 'move: the arguments must be a JSON object, got ["up"]'),
        ("many", '{"text": "a", "count": 33}', "many: argument 'count' must be an integer from 1 to 32, got 33"),
        ("many", '{"text": "a", "count": "3"}', "many: argument 'count' must be an integer from 1 to 32, got '3'"),
        ("many", '{"text": "a", "count": true}', "many: argument 'count' must be an integer from 1 to 32, got true"),
        ("many", '{"text": null, "count": 1.5}', "many: argument 'text' must be a string, got null; argument 'count' "),
        ("many", '{"text": "a", "count": 1, "names": [1]}', "many: argument 'names' must be a list, each item a str"),
    ],
)  # fmt: skip
def test_a_policy_is_told_what_is_wrong(name: str, text: str, message: str):
    with pytest.raises(ToolError) as raised:
        bound(name).decode_arguments(text)
    assert str(raised.value).startswith(message)


def test_a_long_wrong_value_is_shortened():
    with pytest.raises(ToolError) as raised:
        bound("move").decode_arguments(json.dumps({"dir": "x" * 10_000}))
    assert len(str(raised.value)) < 200


@pytest.mark.parametrize(
    ("hint", "text"),
    [
        (int, '{"x": NaN}'),
        (float, '{"x": Infinity}'),
        (float, '{"x": 1e999}'),
        (float, '{"x": ' + "9" * 400 + "}"),
        (int, '{"x": ' + "9" * 5000 + "}"),  # Python refuses to read it
        (int, '{"x": 1.5}'),
        (int, '{"x": 1e300}'),
        (str, '{"x": "\\ud800"}'),  # half of a surrogate pair: nothing behind a tool could encode it
        (list[int], '{"x": ' + "[" * 100_000 + "}"),
        (list[int], '{"x": ' + "[" * 500 + "]" * 500 + "}"),
        (Literal[1, 2], '{"x": true}'),
        (Literal[1, 2], '{"x": [1]}'),
    ],
)
def test_hostile_arguments(hint: Any, text: str):
    with pytest.raises(ToolError):
        of_hint(hint).decode_arguments(text)


def test_lenient_where_meaning_is_clear():
    assert decode(int, '{"x": 3.0}') == 3
    assert type(decode(int, '{"x": 3.0}')) is int
    assert decode(str, '{"x": "a\nb"}') == "a\nb"
    assert decode(Annotated[str, "a remark"], '{"x": "a"}') == "a"


def _unhinted(self, x): ...
def _starred(self, *x: int): ...
def _keywords(self, **x: int): ...
def _default_of_another_kind(self, x: int = None): ...  # noqa: RUF013  # pyright: ignore[reportArgumentType]
def _unresolved(self, x: Nowhere): ...  # noqa: F821  # pyright: ignore[reportUndefinedVariable]
def _documents_another(self, y: int):
    """Wrong.

    Args:
        x: there is no x.
    """


@pytest.mark.parametrize(
    "method", [_unhinted, _starred, _keywords, _default_of_another_kind, _unresolved, _documents_another]
)
def test_bad_methods_are_named(method: Any):
    with pytest.raises(InputError) as raised:
        bind_tool("Box", "press", method)
    assert str(raised.value).startswith("Box.press: ")
    assert "'x'" in str(raised.value) or "Nowhere" in str(raised.value)


@pytest.mark.parametrize(
    "hint", [dict, list, int | str, bytes, Literal[1.5], Annotated[str, Range(1, 2)], object, tuple[int, int], Any]
)
def test_bad_hints_are_named(hint: Any):
    with pytest.raises(InputError, match=r"Box\.method: parameter 'x'"):
        of_hint(hint)


def test_a_range_needs_an_order():
    with pytest.raises(InputError, match="minimum <= maximum"):
        Range(3, 2)


def test_the_mark_goes_on_plain_methods():
    async def later(self): ...

    for wrong in (later, staticmethod(lambda: None), 3):
        with pytest.raises(InputError, match="plain method"):
            tool(wrong)
    assert is_tool(tool(lambda self: None))
    assert not is_tool(len)


# ----------------------------------------------------------------------------------------------------- properties

_LEAVES: st.SearchStrategy[tuple[Any, st.SearchStrategy[Any]]] = st.one_of(
    st.just((str, st.text(st.characters(codec="utf-8")))),
    st.just((int, st.integers())),
    st.just((float, st.floats(allow_nan=False, allow_infinity=False))),
    st.just((bool, st.booleans())),
    st.tuples(st.integers(-50, 50), st.integers(0, 50)).map(
        lambda bounds: (Annotated[int, Range(bounds[0], sum(bounds))], st.integers(bounds[0], sum(bounds)))
    ),
    st.lists(st.one_of(st.text("abc", min_size=1), st.integers(0, 9)), min_size=1, max_size=4, unique=True).map(
        lambda values: (Literal[tuple(values)], st.sampled_from(values))  # pyright: ignore[reportInvalidTypeForm]
    ),
)
_HINTS: st.SearchStrategy[tuple[Any, st.SearchStrategy[Any]]] = st.recursive(
    _LEAVES,
    lambda inner: st.one_of(
        inner.map(lambda pair: (list[pair[0]], st.lists(pair[1], max_size=3))),
        inner.map(lambda pair: (pair[0] | None, st.none() | pair[1])),
    ),
    max_leaves=3,
)


@given(st.data())
def test_values_of_a_hint_survive_the_way_through_json(data: st.DataObject):
    hint, values = data.draw(_HINTS)
    value = data.draw(values)
    decoded = decode(hint, json.dumps({"x": value}, ensure_ascii=data.draw(st.booleans())))
    assert decoded == value
    assert type(decoded) is type(value)


@given(_HINTS, st.integers(0, 2**32))
def test_what_is_drawn_from_a_schema_fits_it(pair: tuple[Any, Any], seed: int):
    binding = of_hint(pair[0])
    arguments = sample_arguments(binding.spec.parameters, np.random.default_rng(seed))
    assert set(binding.decode_arguments(json.dumps(arguments))) == {"x"}


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["x", "y", "z"]), inner, max_size=3),
)


@given(_HINTS, st.one_of(st.text(), _JSON.map(json.dumps), st.fixed_dictionaries({"x": _JSON}).map(json.dumps)))
def test_any_text_is_read_or_answered(pair: tuple[Any, Any], text: str):
    binding = of_hint(pair[0])
    try:
        values = binding.decode_arguments(text)
    except ToolError as error:
        str(error).encode()
    else:
        assert set(values) == {"x"}
        rewritten = json.dumps(values)  # these hints decode to JSON values
        assert binding.decode_arguments(rewritten) == values
