"""From an annotated method to a tool: its specification, and the reading of what a policy wrote into a call.

Owns schemas, argument decoding and the messages that tell a policy what is wrong with its call. Must never know an
environment or a token. Law: whatever text a policy writes, `decode_arguments` returns values that fit the method's
hints or raises ToolError; bad hints are found when the class is made, never in an episode.
"""

from __future__ import annotations

import enum
import inspect
import json
import math
import re
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import numpy as np

from agentgym.errors import InputError, ToolError
from agentgym.messages import ToolSpec

F = TypeVar("F")
_MARK = "__agentgym_tool__"
_NO = object()  # what a decoder answers for a value that does not fit
_SHOWN_CHARS = 60  # of a wrong value, in the message that names it
_SECTION = re.compile(r"^(Args|Arguments|Returns|Raises|Yields|Example|Examples|Note|Notes):\s*$")
_PARAMETER = re.compile(r"^(\w+)\s*(?:\([^)]*\))?:\s*(.*)$")


def tool(method: F) -> F:
    """Marks a method of a ToolEnv as a tool.

    The hints of its parameters make the schema (str, int, float, bool, Literal, Enum, list, Optional, and
    `Annotated[int, Range(1, 32)]`; a default makes a parameter optional), its Google-style docstring the text.
    """
    if not inspect.isfunction(method) or inspect.iscoroutinefunction(method):
        raise InputError(f"@tool goes on a plain method (not async, static or a class method), got {method!r}")
    setattr(method, _MARK, True)
    return method


def is_tool(value: object) -> bool:
    """Whether `value` is a method that @tool marked."""
    return inspect.isfunction(value) and hasattr(value, _MARK)


@dataclass(frozen=True, slots=True)
class Range:
    """Bounds of a number, both included, for `Annotated[int, Range(1, 32)]`; None leaves a side open."""

    minimum: float | None = None
    maximum: float | None = None

    def __post_init__(self) -> None:
        if self.minimum is not None and self.maximum is not None and self.minimum > self.maximum:
            raise InputError(f"Range needs minimum <= maximum, got {self.minimum} and {self.maximum}")


@dataclass(frozen=True, slots=True)
class _Kind:
    """What one type hint means: its schema, its name to a policy, and its reading of a JSON value."""

    schema: dict[str, Any]
    expected: str
    decode: Callable[[Any], Any]


@dataclass(frozen=True, slots=True)
class _Parameter:
    kind: _Kind
    required: bool


@dataclass(frozen=True, slots=True)
class ToolBinding:
    """A tool as its class holds it: the specification, and the reading of its arguments.

    Example: `bind_tool("Maze", "move", Maze.move)` has `spec.name == "move"`, and its
    `decode_arguments('{"dir": "up"}')` returns `{"dir": "up"}`.
    """

    spec: ToolSpec
    parameters: Mapping[str, _Parameter]

    def decode_arguments(self, text: str) -> dict[str, Any]:
        """The keyword arguments that `text` says. Raises ToolError, worded for the policy."""
        name = self.spec.name
        try:
            values = _JSON.decode(text) if text.strip() else {}
        except (ValueError, RecursionError):
            raise ToolError(f"{name}: the arguments must be a JSON object, got {_show(text)}") from None
        if not isinstance(values, dict):
            raise ToolError(f"{name}: the arguments must be a JSON object, got {_show(values)}")
        decoded: dict[str, Any] = {}
        problems = [f"unknown argument {_show(key)}" for key in values if key not in self.parameters]
        for key, parameter in self.parameters.items():
            if key in values:
                decoded[key] = parameter.kind.decode(values[key])
                if decoded[key] is _NO:
                    problems.append(f"argument {key!r} must be {parameter.kind.expected}, got {_show(values[key])}")
            elif parameter.required:
                problems.append(f"argument {key!r} is missing, it must be {parameter.kind.expected}")
        if problems:
            raise ToolError(f"{name}: {'; '.join(problems[:3])}")
        return decoded


def bind_tool(owner: str, name: str, method: Any, namespace: Mapping[str, Any] | None = None) -> ToolBinding:
    """Reads the hints and the docstring of the @tool method `name` of class `owner`.

    `namespace` holds names that hints may use beside the module's (the class's own). Raises InputError naming the
    class, the tool and the parameter.
    """
    where = f"{owner}.{name}"
    if not re.fullmatch(r"[a-zA-Z_][a-zA-Z0-9_]{0,63}", name):
        raise InputError(f"{where}: a tool's name must be 1 to 64 ASCII letters, digits and underscores")
    try:
        hints = typing.get_type_hints(method, localns=dict(namespace or {}), include_extras=True)
    except (NameError, TypeError, SyntaxError) as error:
        raise InputError(f"{where}: a type hint cannot be resolved: {error}") from error
    description, texts = _read_docstring(inspect.getdoc(method) or "")
    parameters: dict[str, _Parameter] = {}
    properties: dict[str, Any] = {}
    for parameter in list(inspect.signature(method).parameters.values())[1:]:
        at = f"{where}: parameter {parameter.name!r}"
        if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            raise InputError(f"{at} must be an ordinary one that can be passed by name")
        if parameter.name not in hints:
            raise InputError(f"{at} needs a type hint")
        kind = _kind_of(hints[parameter.name], at)
        schema = dict(kind.schema)
        if parameter.name in texts:
            schema["description"] = texts[parameter.name]
        if parameter.default is not parameter.empty:
            schema["default"] = _default(parameter.default, kind, at)
        parameters[parameter.name] = _Parameter(kind, parameter.default is parameter.empty)
        properties[parameter.name] = schema
    if unknown := sorted(set(texts) - set(parameters)):
        raise InputError(f"{where}: the docstring describes {unknown[0]!r}, which is not a parameter")
    required = [key for key, parameter in parameters.items() if parameter.required]
    specification = {"type": "object", "properties": properties, "required": required, "additionalProperties": False}
    return ToolBinding(ToolSpec(name, description, specification), parameters)


# ------------------------------------------------------------------------------------------------------ hints


def _kind_of(hint: Any, at: str) -> _Kind:
    origin = typing.get_origin(hint)
    if origin is typing.Annotated:
        base, *extras = typing.get_args(hint)
        bounds = [extra for extra in extras if isinstance(extra, Range)]
        if not bounds:
            return _kind_of(base, at)
        if base not in (int, float) or len(bounds) > 1:
            raise InputError(f"{at}: one Range goes on int or float, got {hint!r}")
        return _number(base, bounds[0])
    if hint in (int, float):
        return _number(hint, Range())
    if hint is str:
        return _Kind({"type": "string"}, "a string", _decode_text)
    if hint is bool:
        return _Kind({"type": "boolean"}, "true or false", lambda value: value if isinstance(value, bool) else _NO)
    if origin is Literal:
        return _choice({value: value for value in typing.get_args(hint)}, at)
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return _choice({member.value: member for member in hint}, at)
    if origin is list:
        return _list(_kind_of(typing.get_args(hint)[0], at))
    if origin in (typing.Union, types.UnionType):
        parts = [part for part in typing.get_args(hint) if part is not types.NoneType]
        if len(parts) == 1:
            return _optional(_kind_of(parts[0], at))
    raise InputError(
        f"{at}: a tool takes str, int, float, bool, Literal, Enum, list[...], Optional[...] and Annotated numbers, "
        f"got {hint!r}"
    )


def _number(base: type, bounds: Range) -> _Kind:
    low, high, integer = bounds.minimum, bounds.maximum, base is int
    schema: dict[str, Any] = {"type": "integer" if integer else "number"}
    if low is not None:
        schema["minimum"] = low
    if high is not None:
        schema["maximum"] = high
    expected = "an integer" if integer else "a number"
    if low is not None and high is not None:
        expected += f" from {low} to {high}"
    elif low is not None or high is not None:
        expected += f" >= {low}" if low is not None else f" <= {high}"

    def decode(value: Any) -> Any:
        if type(value) is float:
            if integer and (not value.is_integer() or abs(value) > 2**53):
                return _NO
            value = int(value) if integer else value
        elif type(value) is not int:
            return _NO
        elif not integer:
            if abs(value) > 2**1000:  # float() of it might overflow
                return _NO
            value = float(value)
        if not integer and not math.isfinite(value):  # 1e999 is JSON, and Python reads NaN
            return _NO
        if (low is not None and value < low) or (high is not None and value > high):
            return _NO
        return value

    return _Kind(schema, expected, decode)


def _choice(meanings: Mapping[Any, Any], at: str) -> _Kind:
    """Literal and Enum: what may be written -> what the method gets."""
    if not meanings or not all(type(value) in (str, int) for value in meanings):
        raise InputError(f"{at}: the choices must be strings or integers, got {list(meanings)!r}")
    kinds = {type(value) for value in meanings}
    schema: dict[str, Any] = {"enum": list(meanings)}
    if len(kinds) == 1:
        schema = {"type": "string" if kinds == {str} else "integer", **schema}
    expected = f"one of {', '.join(str(value) for value in meanings)}"

    def decode(value: Any) -> Any:
        return meanings.get(value, _NO) if type(value) in (str, int) else _NO

    return _Kind(schema, expected, decode)


def _list(item: _Kind) -> _Kind:
    def decode(value: Any) -> Any:
        if not isinstance(value, list):
            return _NO
        items = [item.decode(part) for part in value]
        return _NO if any(part is _NO for part in items) else items

    return _Kind({"type": "array", "items": item.schema}, f"a list, each item {item.expected}", decode)


def _optional(inner: _Kind) -> _Kind:
    schema = {"anyOf": [inner.schema, {"type": "null"}]}
    return _Kind(schema, f"{inner.expected} or null", lambda value: None if value is None else inner.decode(value))


def _decode_text(value: Any) -> Any:
    if not isinstance(value, str):
        return _NO
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:  # JSON can write half of a surrogate pair; nothing behind a tool can take it
            return _NO
    return value


def _default(value: Any, kind: _Kind, at: str) -> Any:
    written = value.value if isinstance(value, enum.Enum) else value
    if kind.decode(written) is _NO:
        raise InputError(f"{at}: the default must be {kind.expected}, got {value!r}")
    return written


# -------------------------------------------------------------------------------------------------- docstrings


def _read_docstring(text: str) -> tuple[str, dict[str, str]]:
    """The text before the first section, and what `Args:` says of each parameter."""
    summary: list[str] = []
    arguments: dict[str, str] = {}
    section, current, indent = "", "", 0
    for line in text.splitlines():
        header = _SECTION.match(line)
        if header:
            section, current = header[1], ""
        elif not section:
            summary.append(line)
        elif section in ("Args", "Arguments") and line.strip():
            depth = len(line) - len(line.lstrip())
            entry = _PARAMETER.match(line.strip())
            if entry and (not current or depth <= indent):
                current, indent = entry[1], depth
                arguments[current] = entry[2]
            elif current:
                arguments[current] = f"{arguments[current]} {line.strip()}".strip()
    paragraphs = re.split(r"\n\s*\n", "\n".join(summary).strip())
    return "\n".join(" ".join(paragraph.split()) for paragraph in paragraphs), arguments


# -------------------------------------------------------------------------------------- what a policy wrote, or may


# strict=False takes a bare newline in a string, which small models write into code
_JSON = json.JSONDecoder(strict=False)


def _show(value: Any) -> str:
    try:
        text = repr(value) if isinstance(value, str) else json.dumps(value)
    except (ValueError, RecursionError):
        text = "a value that cannot be shown"
    return text if len(text) <= _SHOWN_CHARS else f"{text[: _SHOWN_CHARS - 3]}..."


def sample_arguments(parameters: Mapping[str, Any], rng: np.random.Generator) -> dict[str, Any]:
    """Arguments drawn uniformly from the JSON schema of an object; an optional one is there half of the time."""
    required = parameters.get("required", ())
    return {
        name: sample_value(schema, rng)
        for name, schema in parameters.get("properties", {}).items()
        if name in required or rng.random() < 0.5
    }


def sample_value(schema: Mapping[str, Any], rng: np.random.Generator) -> Any:
    """One JSON value drawn from `schema`: numbers within its bounds (else -100 to 100), strings short."""
    if "enum" in schema:
        return schema["enum"][int(rng.integers(len(schema["enum"])))]
    if "anyOf" in schema:
        return sample_value(schema["anyOf"][int(rng.integers(len(schema["anyOf"])))], rng)
    kind = schema.get("type", "string")
    if kind in ("integer", "number"):
        low, high = schema.get("minimum"), schema.get("maximum")
        if low is None:
            low = -100 if high is None else high - 200
        if high is None:
            high = low + 200
        if kind == "number":
            return float(rng.uniform(low, high))
        return int(rng.integers(math.ceil(low), math.floor(high), endpoint=True))
    if kind == "boolean":
        return bool(rng.integers(2))
    if kind == "null":
        return None
    if kind == "array":
        return [sample_value(schema.get("items", {}), rng) for _ in range(int(rng.integers(4)))]
    if kind == "object":
        return sample_arguments(schema, rng)
    return sample_text(rng)


def sample_text(rng: np.random.Generator) -> str:
    """A short text of letters, digits, spaces and a little punctuation."""
    letters = "abcdefghijklmnopqrstuvwxyz 0123456789+-*()."
    return "".join(letters[int(i)] for i in rng.integers(len(letters), size=int(rng.integers(1, 13))))
