"""Message spaces for Gymnasium, whose own text space is alphanumeric only. Must never know a token."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

import gymnasium

from agentgym.messages import Message, Role, ToolCall, ToolSpec
from agentgym.tools import sample_arguments, sample_text


class MessageSpace(gymnasium.Space[Message]):
    """Every message of one role; samples call one of `tools` with arguments that fit, or say a short text."""

    def __init__(self, role: Role, tools: Sequence[ToolSpec] = (), seed: int | None = None) -> None:
        super().__init__(seed=seed)
        self.role: Role = role
        self.tools = tuple(tools)

    @property
    def is_np_flattenable(self) -> bool:
        return False

    def sample(self, mask: Any | None = None, probability: Any | None = None) -> Message:
        if not self.tools:
            return Message(self.role, sample_text(self.np_random))
        spec = self.tools[int(self.np_random.integers(len(self.tools)))]
        arguments = json.dumps(sample_arguments(spec.parameters, self.np_random))
        return Message(self.role, "", (ToolCall("call_0", spec.name, arguments),))

    def contains(self, x: Any) -> bool:
        return is_message(x) and x.role == self.role

    def to_jsonable(self, sample_n: Iterable[Message]) -> list[Any]:
        return [message.to_openai() for message in sample_n]

    def from_jsonable(self, sample_n: list[Any]) -> list[Message]:
        return [Message.from_openai(value) for value in sample_n]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, MessageSpace) and (self.role, self.tools) == (other.role, other.tools)

    __hash__ = None  # type: ignore[assignment]  # a space is mutable: it holds a generator

    def __repr__(self) -> str:
        return f"MessageSpace({self.role!r}, tools={[spec.name for spec in self.tools]})"


class ConversationSpace(gymnasium.Space[tuple[Message, ...]]):
    """Tuples of messages from outside a policy: what `reset` and `step` return."""

    @property
    def is_np_flattenable(self) -> bool:
        return False

    def sample(self, mask: Any | None = None, probability: Any | None = None) -> tuple[Message, ...]:
        count = int(self.np_random.integers(1, 4))
        return tuple(Message("user", sample_text(self.np_random)) for _ in range(count))

    def contains(self, x: Any) -> bool:
        return isinstance(x, tuple) and all(is_message(message) for message in x)

    def to_jsonable(self, sample_n: Iterable[tuple[Message, ...]]) -> list[Any]:
        return [[message.to_openai() for message in messages] for messages in sample_n]

    def from_jsonable(self, sample_n: list[Any]) -> list[tuple[Message, ...]]:
        return [tuple(Message.from_openai(value) for value in values) for values in sample_n]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ConversationSpace)

    __hash__ = None  # type: ignore[assignment]  # a space is mutable: it holds a generator

    def __repr__(self) -> str:
        return "ConversationSpace()"


def is_message(value: Any) -> bool:
    """Whether `value` is a Message whose fields are of their types."""
    return (
        isinstance(value, Message)
        and value.role in ("system", "user", "assistant", "tool")
        and isinstance(value.content, str)
        and isinstance(value.tool_calls, tuple)
        and all(isinstance(call, ToolCall) for call in value.tool_calls)
        and (value.tool_call_id is None or isinstance(value.tool_call_id, str))
    )
