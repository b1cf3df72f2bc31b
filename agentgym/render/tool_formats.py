"""How a policy writes a tool call, and how it is told of the tools where the template does not say.

Law: `parse` takes any text and raises nothing; a call that was opened and cannot be read becomes
`ToolCall(name="", arguments=what was written)`, so that the environment can answer it. Must never know a token id.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from agentgym.errors import UnknownNameError
from agentgym.messages import ToolCall, ToolSpec

Wrap = Callable[[str], str]  # marks text from outside


class ToolFormat(Protocol):
    """One way to write calls. `describe`, `write_call` and `write_result` serve templates without tool support."""

    name: str
    opening: str  # the text that a call begins with

    def parse(self, text: str, tools: Sequence[ToolSpec]) -> tuple[str, tuple[ToolCall, ...]]:
        """The content beside the calls, and the calls."""
        ...

    def arrange(self, call: ToolCall, tools: Sequence[ToolSpec]) -> dict[str, Any] | str:
        """The arguments as a template takes them; the text as written where it is not a JSON object."""
        ...

    def describe(self, tools: Sequence[ToolSpec], wrap: Wrap) -> str: ...

    def write_call(self, call: ToolCall, tools: Sequence[ToolSpec], wrap: Wrap) -> str: ...

    def write_result(self, content: str) -> str:
        """The user-side text of a tool's result; `content` is wrapped already."""
        ...


def tool_format(name: str) -> ToolFormat:
    """Raises UnknownNameError."""
    if name not in FORMATS:
        raise UnknownNameError.of("tool format", name, ["auto", *FORMATS])
    return FORMATS[name]


class Hermes:
    """`<tool_call>{"name": "move", "arguments": {"dir": "up"}}</tool_call>`, as Hermes and Qwen models write."""

    name = "hermes"
    opening, _close = "<tool_call>", "</tool_call>"

    def parse(self, text: str, tools: Sequence[ToolSpec]) -> tuple[str, tuple[ToolCall, ...]]:
        content: list[str] = []
        calls: list[ToolCall] = []
        position = 0
        while (start := text.find(self.opening, position)) >= 0:
            content.append(text[position:start])
            body = start + len(self.opening)
            value, position = self._read(text, body)
            if value is None:
                calls.append(ToolCall(f"call_{len(calls)}", "", text[body:position].strip()))
            for item in value or ():
                calls.append(_hermes_call(f"call_{len(calls)}", item))
            if text.startswith(self._close, position):
                position += len(self._close)
        content.append(text[position:])
        return "".join(content).strip(), tuple(calls)

    def _read(self, text: str, start: int) -> tuple[list[Any] | None, int]:
        """The JSON values of one block and where it ends; None if it is malformed. JSON is read from the left, so
        that an argument may say `</tool_call>`."""
        values: list[Any] = []
        position = start
        while True:
            while position < len(text) and text[position].isspace():
                position += 1
            if values and (position == len(text) or not text.startswith("{", position)):
                break
            try:
                value, position = _DECODER.raw_decode(text, position)
            except (ValueError, RecursionError):
                values = []
                break
            values += value if isinstance(value, list) and value else [value]
        if values and (position == len(text) or text.startswith(self._close, position)):
            return values, position
        end = text.find(self._close, start)
        return None, end if end >= 0 else len(text)

    def arrange(self, call: ToolCall, tools: Sequence[ToolSpec]) -> dict[str, Any] | str:
        return _arguments(call)

    def describe(self, tools: Sequence[ToolSpec], wrap: Wrap) -> str:
        lines = [wrap(_dumps(tool.to_openai())) for tool in tools]
        return (
            "# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
            "You are provided with function signatures within <tools></tools> XML tags:\n<tools>\n"
            + "\n".join(lines)
            + "\n</tools>\n\nFor each function call, return a json object with function name and arguments within "
            "<tool_call></tool_call> XML tags:\n<tool_call>\n"
            '{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>'
        )

    def write_call(self, call: ToolCall, tools: Sequence[ToolSpec], wrap: Wrap) -> str:
        arguments = _arguments(call)
        text = _dumps(arguments) if isinstance(arguments, dict) else _dumps(str(arguments))
        return f'<tool_call>\n{{"name": {wrap(_dumps(call.name))}, "arguments": {wrap(text)}}}\n</tool_call>'

    def write_result(self, content: str) -> str:
        return f"<tool_response>\n{content}\n</tool_response>"


class Plain:
    """`<call> move up`: the name, then the values in the schema's order with `<sep>` between them; for tiny models,
    whose tokenizer has one token for each of these words."""

    name = "plain"
    opening, separator = "<call>", "<sep>"

    def parse(self, text: str, tools: Sequence[ToolSpec]) -> tuple[str, tuple[ToolCall, ...]]:
        content, *bodies = text.split(self.opening)
        return content.strip(), tuple(self._read(f"call_{i}", body.strip(), tools) for i, body in enumerate(bodies))

    def _read(self, call_id: str, body: str, tools: Sequence[ToolSpec]) -> ToolCall:
        first, *more = body.split(self.separator)
        name, _, value = first.strip().partition(" ")
        values = [value.strip(), *(part.strip() for part in more)] if value.strip() or more else []
        schemas = _properties(name, tools)
        if not name or len(values) > len(schemas):
            return ToolCall(call_id, name, " ".join(values) if name else body)
        arguments = {
            key: _typed(text, schema) for (key, schema), text in zip(schemas.items(), values, strict=False) if text
        }
        return ToolCall(call_id, name, _dumps(arguments))

    def arrange(self, call: ToolCall, tools: Sequence[ToolSpec]) -> dict[str, Any] | str:
        arguments = _arguments(call)
        if isinstance(arguments, str):
            return arguments
        keys = [*_properties(call.name, tools)]
        while keys and keys[-1] not in arguments:
            keys.pop()  # only values at the end can be left out without a place for them
        keys += [key for key in arguments if key not in keys]
        values = {key: arguments.get(key, "") for key in keys}
        return {key: value if isinstance(value, str) else _dumps(value) for key, value in values.items()}

    def describe(self, tools: Sequence[ToolSpec], wrap: Wrap) -> str:
        lines = [
            wrap(f"{tool.name}: {tool.description}")
            + f"\n  {self.opening} "
            + wrap(f"{tool.name}")
            + f" {self.separator}".join(f" {wrap(key)}" for key in _properties(tool.name, tools))
            for tool in tools
        ]
        return "Tools, and how to call them:\n" + "\n".join(lines)

    def write_call(self, call: ToolCall, tools: Sequence[ToolSpec], wrap: Wrap) -> str:
        arguments = self.arrange(call, tools)
        values = arguments.values() if isinstance(arguments, dict) else [arguments]
        return f"{self.opening} {wrap(call.name)}" + f" {self.separator}".join(f" {wrap(str(v))}" for v in values)

    def write_result(self, content: str) -> str:
        return content


FORMATS: Mapping[str, ToolFormat] = {"hermes": Hermes(), "plain": Plain()}
_DECODER = json.JSONDecoder(strict=False)


def _hermes_call(call_id: str, value: Any) -> ToolCall:
    name = value.get("name") if isinstance(value, dict) else None
    if not isinstance(name, str) or not name or not name.isprintable():
        return ToolCall(call_id, "", _dumps(value))
    arguments = value.get("arguments", value.get("parameters", {}))
    return ToolCall(call_id, name, arguments if isinstance(arguments, str) else _dumps(arguments))


def _arguments(call: ToolCall) -> dict[str, Any] | str:
    try:
        value = _DECODER.decode(call.arguments or "{}")
    except (ValueError, RecursionError):
        return call.arguments
    return value if isinstance(value, dict) else call.arguments


def _properties(name: str, tools: Sequence[ToolSpec]) -> Mapping[str, Any]:
    found = next((tool.parameters.get("properties") for tool in tools if tool.name == name), None)
    return found or {}


def _typed(text: str, schema: Any) -> Any:
    """The value that `text` stands for under its schema; the text itself where it is none, for the environment to
    refuse."""
    choices = [schema, *_listed(schema, "anyOf")]
    kinds = {
        kind
        for choice in choices
        for kind in ([choice["type"]] if isinstance(_of(choice, "type"), str) else _listed(choice, "type"))
    }
    if "string" in kinds and not ("null" in kinds and text == "null"):
        return text
    if not kinds and text in _listed(schema, "enum"):
        return text
    try:
        return _DECODER.decode(text)
    except (ValueError, RecursionError):
        return text


def _of(schema: Any, key: str) -> Any:
    return schema.get(key) if isinstance(schema, Mapping) else None


def _listed(schema: Any, key: str) -> Sequence[Any]:
    """A list in a schema that anybody may have written; of types only those that are named."""
    found = _of(schema, key)
    return [one for one in found if key != "type" or isinstance(one, str)] if isinstance(found, list | tuple) else ()


def _dumps(value: Any) -> str:
    try:
        text = json.dumps(value, ensure_ascii=False)
        text.encode("utf-8")
    except UnicodeEncodeError:  # a lone surrogate: keep it escaped
        return json.dumps(value)
    except RecursionError:
        return '"nested too deeply"'
    return text
