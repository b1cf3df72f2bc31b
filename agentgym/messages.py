"""What environments and policies say to each other: messages, tool calls and tool specifications.

Owns the translation to and from the OpenAI chat dictionaries. Must never know a token. The arguments of a tool call
stay the text that the policy wrote: decoding it, and telling the policy what is wrong with it, is the environment's
work, so a malformed call is visible instead of lost.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from agentgym.errors import InputError

Role = Literal["system", "user", "assistant", "tool"]


@dataclass(frozen=True, slots=True)
class ToolCall:
    """One call that an assistant message makes.

    Example: `ToolCall(call_id="call_0", name="move", arguments='{"dir": "up"}')`. An empty name means that the
    policy opened a tool call that could not be read; `arguments` then holds what it wrote.
    """

    call_id: str
    name: str
    arguments: str

    def to_openai(self) -> dict[str, Any]:
        return {"id": self.call_id, "type": "function", "function": {"name": self.name, "arguments": self.arguments}}


@dataclass(frozen=True, slots=True)
class ToolSpec:
    """A tool as the policy is told of it.

    Example: `ToolSpec("move", "Move one cell.", {"type": "object", "properties": {"dir": {"type": "string",
    "enum": ["up", "down", "left", "right"]}}, "required": ["dir"]})`.
    """

    name: str
    description: str
    parameters: Mapping[str, Any]  # JSON schema of an object

    def to_openai(self) -> dict[str, Any]:
        function = {"name": self.name, "description": self.description, "parameters": dict(self.parameters)}
        return {"type": "function", "function": function}

    @classmethod
    def from_openai(cls, value: Mapping[str, Any]) -> ToolSpec:
        """Raises InputError if `value` is not an OpenAI function tool."""
        function = value.get("function")
        name = function.get("name") if isinstance(function, Mapping) else None
        if (
            value.get("type") != "function"
            or not isinstance(function, Mapping)
            or not isinstance(name, str)
            or not name
        ):
            raise InputError(f"a tool must be {{'type': 'function', 'function': {{'name': ...}}}}, got {value!r}")
        description = function.get("description") or ""
        parameters = function.get("parameters") or {"type": "object", "properties": {}}
        if not isinstance(description, str):
            raise InputError(f"function.description must be a string, got {description!r}")
        if not isinstance(parameters, Mapping) or not isinstance(parameters.get("properties", {}), Mapping):
            raise InputError(f"function.parameters must be the JSON schema of an object, got {parameters!r}")
        return cls(name, description, parameters)


@dataclass(frozen=True, slots=True)
class Message:
    """One message of a conversation.

    Example: `Message("assistant", "", tool_calls=(ToolCall("call_0", "move", '{"dir": "up"}'),))` and its answer
    `Message("tool", "2 up 1 left", tool_call_id="call_0")`.
    """

    role: Role
    content: str
    tool_calls: tuple[ToolCall, ...] = field(default=())
    tool_call_id: str | None = None

    def to_openai(self) -> dict[str, Any]:
        value: dict[str, Any] = {"role": self.role, "content": self.content}
        if self.tool_calls:
            value["tool_calls"] = [call.to_openai() for call in self.tool_calls]
        if self.tool_call_id is not None:
            value["tool_call_id"] = self.tool_call_id
        return value

    @classmethod
    def from_openai(cls, value: Mapping[str, Any]) -> Message:
        """Reads one OpenAI chat message; text parts are joined.

        Raises InputError, naming the field, for an unknown role, content that is not text, or a malformed call.
        """
        role = value.get("role")
        if role == "developer":  # OpenAI's newer name for the same thing
            role = "system"
        if role not in ("system", "user", "assistant", "tool"):
            raise InputError(f"message.role must be system, user, assistant or tool, got {value.get('role')!r}")
        listed = value.get("tool_calls") or ()
        if not isinstance(listed, list | tuple):
            raise InputError(f"message.tool_calls must be a list, got {listed!r}")
        calls = tuple(_call_from_openai(call) for call in listed)
        call_id = value.get("tool_call_id")
        if call_id is not None and not isinstance(call_id, str):
            raise InputError(f"message.tool_call_id must be a string, got {call_id!r}")
        return cls(role, _text(value.get("content")), calls, call_id)


def _text(content: Any) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if isinstance(content, Sequence):
        parts = [
            part.get("text") if isinstance(part, Mapping) and part.get("type") == "text" else None for part in content
        ]
        if all(isinstance(part, str) for part in parts):
            return "".join(parts)  # type: ignore[arg-type]
    raise InputError(f"message.content must be text or a list of text parts, got {type(content).__name__}")


def _call_from_openai(value: Any) -> ToolCall:
    function = value.get("function") if isinstance(value, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise InputError(f"message.tool_calls[] must hold {{'id', 'function': {{'name', 'arguments'}}}}, got {value!r}")
    arguments = function.get("arguments", "{}")
    if not isinstance(arguments, str):
        arguments = json.dumps(arguments)
    return ToolCall(str(value.get("id") or ""), function["name"], arguments)


def call(name: str, /, **arguments: Any) -> Message:
    """An assistant message that calls one tool; what oracles and tests write.

    >>> call("move", dir="up").tool_calls[0].arguments
    '{"dir": "up"}'
    """
    return Message("assistant", "", (ToolCall("call_0", name, json.dumps(arguments)),))
