"""A Messages request's turns, read into messages. Law: a turn is read whole or refused by its place, and nothing that
says something is left out; so an answer's content, sent back as it is, is the history that a session has recorded.

A user's turn becomes a message for each of its tool results and one for the text between them. Assistant turns in a row
are one turn, as this API says, because a reply is one message.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from agentgym.messages import Message, ToolCall
from agentgym.server.messages_inputs import arguments_of
from agentgym.server.openai_errors import ParameterError
from agentgym.server.openai_requests import check_no_others, read_word, short

_TEXT = {"type": "string"}
_WORD = {"type": "string", "minLength": 1}
CACHE = {"anyOf": [{"type": "object"}, {"type": "null"}]}
TEXT_BLOCK_SCHEMA = {
    "type": "object",
    "properties": {"type": {"const": "text"}, "text": _TEXT, "cache_control": CACHE},
    "required": ["type", "text"],
}
_TEXTS = {"anyOf": [_TEXT, {"type": "array", "items": TEXT_BLOCK_SCHEMA}]}
_USE_SCHEMA = {
    "type": "object",
    "properties": {
        "type": {"const": "tool_use"},
        "id": _WORD,
        "name": _WORD,
        "input": {"type": "object"},
        "cache_control": CACHE,
    },
    "required": ["type", "id", "name", "input"],
}
_RESULT_SCHEMA = {
    "type": "object",
    "properties": {
        "type": {"const": "tool_result"},
        "tool_use_id": _WORD,
        "content": _TEXTS,
        "is_error": {"type": "boolean"},
        "cache_control": CACHE,
    },
    "required": ["type", "tool_use_id"],
}
_BLOCKS = {"type": "array", "items": {"anyOf": [TEXT_BLOCK_SCHEMA, _USE_SCHEMA, _RESULT_SCHEMA]}}
TURN_SCHEMA = {
    "type": "object",
    "properties": {"role": {"enum": ["user", "assistant", "system"]}, "content": {"anyOf": [_TEXT, _BLOCKS]}},
    "required": ["role", "content"],
}

LABELS = frozenset({"type", "cache_control"})  # cache_control has no effect: what a cache holds changes no answer
_TURN_KEYS = frozenset({"role", "content"})
_TEXT_KEYS = LABELS | {"text"}
_USE_KEYS = LABELS | {"id", "name", "input", "caller"}
_RESULT_KEYS = LABELS | {"tool_use_id", "content", "is_error"}
_DIRECT = {"type": "direct"}  # the only caller there is: the policy itself
_MENDS = {
    "thinking": "this policy's replies have no such blocks; leave it out",
    "redacted_thinking": "this policy's replies have no such blocks; leave it out",
    "image": "send text alone",
    "document": "send its text",
    "search_result": "send its text",
}


def read_turns(turns: Sequence[dict[str, Any]]) -> list[Message]:
    """The messages that `turns` are. Raises ParameterError naming the turn or the block."""
    reader = _Reader()
    for index, turn in enumerate(turns):
        reader.read(f"messages[{index}]", turn)
    reader.end_reply()
    if reader.messages and reader.messages[-1].role == "assistant":
        raise ParameterError(
            "messages",
            "the last of messages must not be the assistant's: a reply is sampled from its beginning, not prefilled",
        )
    return reader.messages


def read_text(place: str, content: Any) -> str:
    """Text, or the text of text blocks. Raises ParameterError naming the block."""
    return "".join(_text(where, block) for where, block in _blocks(place, content))


class _Reader:
    def __init__(self) -> None:
        self.messages: list[Message] = []
        self._said: list[str] | None = None  # by the reply that is being read; None: there is none
        self._calls: list[ToolCall] = []  # of it
        self._called: set[str] = set()
        self._answered: set[str] = set()

    def read(self, place: str, turn: dict[str, Any]) -> None:
        check_no_others(place, turn, _TURN_KEYS)
        role, where = turn.get("role"), f"{place}.content"
        if role not in ("user", "assistant", "system"):
            mend = "; send a result of a tool as a tool_result block of the user" if role == "tool" else ""
            raise ParameterError(place, f"{place}.role must be user, assistant or system, got {short(role)}{mend}")
        blocks = _blocks(where, turn.get("content"))
        if role == "assistant":
            self._replied(blocks)
            return
        self.end_reply()
        if not blocks:
            raise ParameterError(place, f"{where} must have at least one block")
        if role == "system":
            self.messages.append(Message("system", "".join(_text(*block) for block in blocks)))
        else:
            self._asked(blocks)

    def end_reply(self) -> None:
        """What follows is not part of the reply before it."""
        if self._said is not None:
            self.messages.append(Message("assistant", "".join(self._said), tuple(self._calls)))
        self._said, self._calls = None, []

    def _asked(self, blocks: Sequence[tuple[str, Any]]) -> None:
        texts: list[str] = []
        for place, block in blocks:
            kind = _kind(block)
            if kind == "tool_use":
                raise ParameterError(place, f"{place}: a tool_use is the assistant's; send it in a turn of that role")
            if kind == "tool_result":
                self._say(texts)
                self._result(place, block)
            else:
                texts.append(_text(place, block))
        self._say(texts)

    def _say(self, texts: list[str]) -> None:
        """The text blocks up to here are one message."""
        if texts:
            self.messages.append(Message("user", "".join(texts)))
            texts.clear()

    def _result(self, place: str, block: Mapping[str, Any]) -> None:
        check_no_others(place, block, _RESULT_KEYS)
        call_id = read_word(place, block, "tool_use_id")
        if call_id not in self._called:
            raise ParameterError(place, f"{place}: no tool_use before it has the id {short(call_id)}")
        if call_id in self._answered:
            raise ParameterError(place, f"{place}: the tool_use {short(call_id)} has a result already; send one")
        self._answered.add(call_id)
        content, failed = block.get("content"), block.get("is_error")
        if failed is not None and not isinstance(failed, bool):
            raise ParameterError(place, f"{place}.is_error must be true or false, got {short(failed)}")
        text = "" if content is None else read_text(f"{place}.content", content)
        if failed and not text.startswith("Error"):  # a result has no other place to say it in
            text = f"Error: {text}"
        self.messages.append(Message("tool", text, (), call_id))

    def _replied(self, blocks: Sequence[tuple[str, Any]]) -> None:
        self._said = [] if self._said is None else self._said
        for place, block in blocks:
            kind = _kind(block)
            if kind == "tool_use":
                self._calls.append(self._call(place, block))
                continue
            if kind == "tool_result":
                raise ParameterError(place, f"{place}: a tool_result is the user's; send it in a turn of that role")
            text = _text(place, block)
            if text and self._calls:
                raise ParameterError(place, f"{place}: text behind a tool_use is not supported here; send it before")
            self._said.append(text)

    def _call(self, place: str, block: Mapping[str, Any]) -> ToolCall:
        known = _USE_KEYS if block.get("caller") == _DIRECT else _USE_KEYS - {"caller"}
        check_no_others(place, block, known)
        call_id, name = read_word(place, block, "id"), read_word(place, block, "name")
        value = block.get("input")
        if not isinstance(value, dict):
            raise ParameterError(place, f"{place}.input must be an object, got {short(value)}")
        if call_id in self._called:
            raise ParameterError(place, f"{place}.id {short(call_id)} is that of an earlier tool_use; each has its own")
        self._called.add(call_id)
        return ToolCall(call_id, name, arguments_of(value))


def _blocks(place: str, content: Any) -> list[tuple[str, Any]]:
    """The blocks of a content, each with its place; text alone is one."""
    if isinstance(content, str):
        return [(place, {"type": "text", "text": content})]
    if not isinstance(content, list):
        raise ParameterError(place, f"{place} must be text or a list of blocks, got {short(content)}")
    return [(f"{place}[{index}]", block) for index, block in enumerate(content)]


def _kind(block: Any) -> Any:
    return block.get("type") if isinstance(block, dict) else None


def _text(place: str, block: Any) -> str:
    kind = _kind(block)
    if kind != "text":
        mend = _MENDS.get(kind) if isinstance(kind, str) else None
        raise ParameterError(
            place, f"{place}: a block of type {short(kind)} is not supported here; {mend or 'send a text block'}"
        )
    check_no_others(place, block, _TEXT_KEYS)
    if not isinstance(block.get("text"), str):
        raise ParameterError(place, f"{place}.text must be text, got {short(block.get('text'))}")
    return block["text"]
