"""Errors as Anthropic's API says them. Law: the same refusal as on OpenAI's routes, in other words and under the number
that this API's clients know it by. Must never know which of our errors it was."""

from __future__ import annotations

import re
from typing import Any

_PATHS = re.compile(r"/v1(/sessions/[^/]+)?(/v1)?/messages(/.*)?", re.DOTALL)
_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    409: "conflict_error",
    413: "request_too_large",
    429: "rate_limit_error",
    504: "timeout_error",
    529: "overloaded_error",
}


def is_messages(path: str) -> bool:
    """Whether who asks at `path` speaks Anthropic's API.

    >>> is_messages("/v1/sessions/ses-1/v1/messages"), is_messages("/v1/responses")
    (True, False)
    """
    return _PATHS.fullmatch(path) is not None


def status_of(status: int) -> int:
    """The number that this dialect has for one of ours."""
    return 529 if status == 503 else status


def error_answer(status: int, message: str, code: str | None) -> dict[str, Any]:
    """An error's body, and the data of a stream's error event. `code` is our name of the cause."""
    if code == "context_length_exceeded":  # the words by which agents know that they have to shorten their history
        message = f"prompt is too long: {message}"
    kind = _TYPES.get(status_of(status), "api_error" if status >= 500 else "invalid_request_error")
    error: dict[str, Any] = {"type": kind, "message": message}
    return {"type": "error", "error": error | {"details": {"error_code": code}} if code else error}
