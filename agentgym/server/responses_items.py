"""A Responses request's input, read into messages. Law: the items of one reply, sent back in a row, are the one message
that the reply was; an item is read whole or refused by its place, and nothing that says something is left out.

An assistant's message item begins a message, and the calls that follow it are its calls: so an answer's output, put
into the next request's input as it is, is the history that a session has recorded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from agentgym.messages import Message, Role, ToolCall
from agentgym.server.openai_errors import ParameterError
from agentgym.server.openai_requests import check_no_others, read_word, short

_TEXT = {"type": "string"}
_PART = {
    "type": "object",
    "properties": {"type": {"enum": ["input_text", "output_text"]}, "text": _TEXT},
    "required": ["type", "text"],
}
_PARTS = {"anyOf": [_TEXT, {"type": "array", "items": _PART}]}
_MESSAGE_SCHEMA = {
    "type": "object",
    "properties": {
        "type": {"const": "message"},
        "role": {"enum": ["system", "developer", "user", "assistant"]},
        "content": _PARTS,
        "id": _TEXT,
        "status": _TEXT,
    },
    "required": ["role", "content"],
}
_CALL_SCHEMA = {
    "type": "object",
    "properties": {
        "type": {"const": "function_call"},
        "call_id": {"type": "string", "minLength": 1},
        "name": {"type": "string", "minLength": 1},
        "arguments": _TEXT,
        "id": _TEXT,
        "status": _TEXT,
    },
    "required": ["type", "call_id", "name", "arguments"],
}
_OUTPUT_SCHEMA = {
    "type": "object",
    "properties": {
        "type": {"const": "function_call_output"},
        "call_id": {"type": "string", "minLength": 1},
        "output": _PARTS,
        "id": _TEXT,
        "status": _TEXT,
    },
    "required": ["type", "call_id", "output"],
}
ITEM_SCHEMA = {"anyOf": [_MESSAGE_SCHEMA, _CALL_SCHEMA, _OUTPUT_SCHEMA]}

LABELS = frozenset({"type", "id", "status"})  # said of an item, shown to no model
_MESSAGE_KEYS = LABELS | {"role", "content", "phase"}
_CALL_KEYS = LABELS | {"call_id", "name", "arguments", "parsed_arguments"}
_OUTPUT_KEYS = LABELS | {"call_id", "output"}
_PART_KEYS = frozenset({"type", "text", "annotations", "logprobs", "parsed"})
_ROLES: Mapping[Any, Role] = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
_MENDS = {
    "item_reference": "nothing is stored: send the item itself",
    "reasoning": "this policy's replies have no such items; leave it out",
}


def read_items(items: Sequence[dict[str, Any]]) -> tuple[Message, ...]:
    """The messages that `items` are. Raises ParameterError naming the item."""
    reader = _Reader()
    for index, item in enumerate(items):
        reader.read(f"input[{index}]", item)
    reader.end_reply()
    if not reader.messages:
        raise ParameterError("input", "input must have at least one item")
    if reader.messages[-1].role == "assistant":
        raise ParameterError(
            "input", "the last item of input must not be the assistant's: a reply is what input asks for"
        )
    return tuple(reader.messages)


class _Reader:
    def __init__(self) -> None:
        self.messages: list[Message] = []
        self._said: str | None = None  # by the reply that is being read; None: there is none
        self._calls: list[ToolCall] = []  # of it
        self._called: set[str] = set()
        self._answered: set[str] = set()

    def read(self, place: str, item: dict[str, Any]) -> None:
        kind = item.get("type")
        if kind is None and "role" in item:  # OpenAI's short form of a message
            kind = "message"
        if kind == "message":
            self._message(place, item)
        elif kind == "function_call":
            self._call(place, item)
        elif kind == "function_call_output":
            self._output(place, item)
        else:
            mend = "an item is a message, a function_call or a function_call_output"
            mend = _MENDS.get(kind, mend) if isinstance(kind, str) else mend
            raise ParameterError(place, f"{place}: an item of type {short(kind)} is not supported here; {mend}")

    def end_reply(self) -> None:
        """What follows is not part of the reply before it."""
        if self._said is not None:
            self.messages.append(Message("assistant", self._said, tuple(self._calls)))
        self._said, self._calls = None, []

    def _message(self, place: str, item: dict[str, Any]) -> None:
        check_no_others(place, item, _MESSAGE_KEYS)
        role = item.get("role")
        if not isinstance(role, str) or role not in _ROLES:
            mend = "; send a result of a tool as a function_call_output" if role == "tool" else ""
            known = "system, developer, user or assistant"
            raise ParameterError(place, f"{place}.role must be {known}, got {short(role)}{mend}")
        text = _text(f"{place}.content", item.get("content"))
        self.end_reply()
        if role == "assistant":
            self._said = text
        else:
            self.messages.append(Message(_ROLES[role], text))

    def _call(self, place: str, item: dict[str, Any]) -> None:
        check_no_others(place, item, _CALL_KEYS)
        call_id, name = read_word(place, item, "call_id"), read_word(place, item, "name")
        arguments = item.get("arguments")
        if not isinstance(arguments, str):
            raise ParameterError(place, f"{place}.arguments must be text (JSON), got {short(arguments)}")
        if call_id in self._called:
            raise ParameterError(
                place, f"{place}.call_id {short(call_id)} is that of an earlier call; each needs its own"
            )
        self._called.add(call_id)
        self._said = self._said or ""
        self._calls.append(ToolCall(call_id, name, arguments))

    def _output(self, place: str, item: dict[str, Any]) -> None:
        check_no_others(place, item, _OUTPUT_KEYS)
        call_id = read_word(place, item, "call_id")
        if call_id not in self._called:
            raise ParameterError(place, f"{place}: no function_call before it has the call_id {short(call_id)}")
        if call_id in self._answered:
            raise ParameterError(place, f"{place}: the call {short(call_id)} has an output already; send one of them")
        self._answered.add(call_id)
        self.end_reply()
        self.messages.append(Message("tool", _text(f"{place}.output", item.get("output")), (), call_id))


def _text(place: str, content: Any) -> str:
    """Text, or the text of its parts."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise ParameterError(place, f"{place} must be text or a list of text parts, got {short(content)}")
    texts = []
    for index, part in enumerate(content):
        where = f"{place}[{index}]"
        kind = part.get("type") if isinstance(part, dict) else None
        if not isinstance(part, dict) or kind not in ("input_text", "output_text"):
            raise ParameterError(
                where, f"{where} must be of type input_text or output_text, got {short(kind or part)}; send text alone"
            )
        check_no_others(where, part, _PART_KEYS)
        if not isinstance(part.get("text"), str):
            raise ParameterError(where, f"{where}.text must be text, got {short(part.get('text'))}")
        texts.append(part["text"])
    return "".join(texts)
