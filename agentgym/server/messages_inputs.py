"""The input of a tool_use, which Anthropic's API says as an object and a policy writes as text. Law: what stands for a
call's arguments here, sent back, is those arguments again, whatever the policy wrote."""

from __future__ import annotations

import json
from typing import Any

import msgspec

UNREADABLE = "INVALID_JSON"  # the key that Anthropic's documentation gives to text that is no JSON


def input_of(arguments: str) -> str:
    """The JSON text of an object.

    >>> input_of('{"dir": "up"}'), input_of("up")
    ('{"dir": "up"}', '{"INVALID_JSON":"up"}')
    """
    text = arguments or "{}"
    try:
        value = msgspec.json.decode(text)
    except (msgspec.DecodeError, RecursionError):  # Python's own reader would take NaN and half a character
        value = None
    if isinstance(value, dict) and not _stands_for_text(value):
        return text
    return msgspec.json.encode({UNREADABLE: arguments}).decode()


def arguments_of(value: dict[str, Any]) -> str:
    """What `input_of` was made of, in a form of the same JSON. Raises RecursionError for what nests too deeply."""
    return value[UNREADABLE] if _stands_for_text(value) else json.dumps(value)


def _stands_for_text(value: dict[str, Any]) -> bool:
    return value.keys() == {UNREADABLE} and isinstance(value[UNREADABLE], str)
