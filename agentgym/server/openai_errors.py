"""How errors look from outside, on both doors. Law: an error is an answer in the caller's own dialect, with the status
that says whose turn it is and the name of what was wrong; never a traceback."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import msgspec
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from starlette.exceptions import HTTPException

from agentgym.errors import (
    AgentGymError,
    EngineError,
    InputError,
    NotNowError,
    PromptTooLongError,
    ServiceError,
    UnknownNameError,
    VersionError,
)
from agentgym.server import wire
from agentgym.server.messages_errors import error_answer, is_messages, status_of
from agentgym.server.replies import DeadlineError
from agentgym.server.sessions_errors import SessionBusyError, SessionEndedError, SessionLimitError, UnknownSessionError
from agentgym.server.sessions_retries import KeyReusedError

log = logging.getLogger(__name__)
TRAINER_PREFIX = "/trainer"
RETRY_AFTER_S = 1
_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
_MOST_NAME = 100  # of a parameter that nobody knows
_MOST_TEXT = 2000  # of a message: what a caller sent is not sent back whole


class ParameterError(InputError):
    """A request parameter that is refused; `param` is its name, `code` the cause's, where clients look for one."""

    def __init__(self, param: str, message: str, code: str | None = None) -> None:
        super().__init__(message if param in message else f"{param}: {message}")
        self.param = param
        self.code = code


class TooLongError(PromptTooLongError):
    """A request that does not fit the context; `param` is the parameter that makes it too long, in its dialect."""

    def __init__(self, param: str, message: str) -> None:
        super().__init__(message)
        self.param = param


class UnknownModelError(UnknownNameError):
    """A model that is not served here."""


class ForbiddenError(ServiceError):
    """A bearer that is known, for something it may not do."""


def add_handlers(app: FastAPI) -> None:
    """Has `app` answer every exception."""
    app.add_exception_handler(AgentGymError, _on_error)
    app.add_exception_handler(RequestValidationError, _on_invalid)
    app.add_exception_handler(HTTPException, _on_http)
    app.add_exception_handler(RecursionError, _on_depth)
    app.add_exception_handler(Exception, _on_bug)


def refusal(
    path: str,
    status: int,
    kind: str,
    message: str,
    *,
    param: str | None = None,
    code: str | None = None,
    headers: Mapping[str, str] | None = None,
) -> Response:
    """An error as a response, in the dialect that is spoken at `path`."""
    if is_trainers(path):
        return Response(wire.encode(wire.Fault(kind, message)), status, headers, wire.CONTENT_TYPE)
    body: dict[str, Any] = {"error": error_body(status, message, param, code)}
    if is_messages(path):
        body, status = error_answer(status, body["error"]["message"], code), status_of(status)
    return Response(msgspec.json.encode(body), status, headers, "application/json")


def error_body(status: int, message: str, param: str | None, code: str | None) -> dict[str, Any]:
    """OpenAI's error object; `param` is in its message."""
    kind = _TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
    if len(message) > _MOST_TEXT:
        message = message[:_MOST_TEXT] + " ..."
    return {"message": message, "type": kind, "param": param, "code": code}


def describe(error: AgentGymError) -> tuple[int, dict[str, Any]]:
    """The status and the OpenAI error object of one of our errors."""
    status, code = _status(error)
    param = getattr(error, "param", None)
    if param is None and isinstance(error, UnknownModelError):
        param = "model"
    if isinstance(error, ParameterError):
        code = error.code or code
    return status, error_body(status, str(error), param, code)


def is_trainers(path: str) -> bool:
    return path == TRAINER_PREFIX or path.startswith(TRAINER_PREFIX + "/")


def _status(error: AgentGymError) -> tuple[int, str | None]:
    table: tuple[tuple[type[AgentGymError], int, str | None], ...] = (  # a class stands before its parents
        (UnknownModelError, 404, "model_not_found"),
        (PromptTooLongError, 400, "context_length_exceeded"),
        (VersionError, 409, None),
        (UnknownSessionError, 404, "session_not_found"),
        (SessionEndedError, 409, "session_ended"),
        (SessionBusyError, 409, "session_busy"),
        (SessionLimitError, 400, "session_limit_reached"),
        (KeyReusedError, 422, "idempotency_key_reused"),
        (InputError, 400, None),
        (ForbiddenError, 403, "forbidden"),
        (NotNowError, 429, "rate_limit_exceeded"),
        (DeadlineError, 504, "deadline_exceeded"),
        (ServiceError, 503, None),
        (EngineError, 500, None),
    )
    return next(((status, code) for kind, status, code in table if isinstance(error, kind)), (500, None))


def _headers(error: AgentGymError, status: int) -> dict[str, str]:
    if isinstance(error, DeadlineError | SessionEndedError | SessionBusyError):
        return {"x-should-retry": "false"}  # which the official client obeys: it would take as long, or fail again
    return {"retry-after": str(RETRY_AFTER_S)} if status in (429, 503) else {}


async def _on_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, AgentGymError)
    status, body = describe(error)
    if status >= 500:
        log.error("%s: %s", type(error).__name__, error)
    request.state.visit.failed = type(error).__name__
    kind = "InputError" if isinstance(error, ParameterError) else type(error).__name__
    headers = _headers(error, status)
    path = request.url.path
    text = str(error) if is_trainers(path) else body["message"]
    return refusal(path, status, kind, text, param=body["param"], code=body["code"], headers=headers)


async def _on_invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    # of the branches of a union, the one that got furthest is the one that was meant
    problem: Mapping[str, Any] = max(error.errors(), key=lambda one: _depth(one["loc"]))
    name = parameter_path(problem["loc"])
    if problem["type"] == "extra_forbidden":
        *before, key = problem["loc"]  # the caller's own word, which may look like anything
        name = ".".join(filter(None, (parameter_path(tuple(before)), key[:_MOST_NAME] or "(empty)")))
        message = f"unknown parameter '{name}'"
    elif problem["type"] == "json_invalid":
        name, message = "", f"the body is not valid JSON: {problem['ctx']['error']}"
    elif problem["type"] == "missing":
        message = f"the parameter {name!r} is missing" if name else "the request needs a body"
    else:
        message = f"{name or 'the body'}: {problem['msg']}"
    request.state.visit.failed = "InputError"
    return refusal(request.url.path, 400, "InputError", message, param=name or None)


def _depth(loc: tuple[Any, ...]) -> tuple[int, int]:
    return len(loc), sum(part for part in loc if isinstance(part, int))


def parameter_path(loc: tuple[Any, ...]) -> str:
    """Where a validation error lies, as a caller would write it; pydantic's names of union branches are left out.

    >>> parameter_path(("body", "messages", 0, "role"))
    'messages[0].role'
    """
    path = ""
    for part in loc[1:]:
        if isinstance(part, int):
            path += f"[{part}]"
        elif not any(char in part for char in "[](){}") and part not in _BRANCHES:
            path += f".{part}" if path else part
    return path


_BRANCHES = {"str", "int", "float", "bool", "dict", "list", "constrained-str", "constrained-int"}


async def _on_http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    missing = error.status_code == 404 and error.detail == "Not Found"
    message = f"there is nothing at {request.url.path[:200]!r}" if missing else str(error.detail)
    if error.status_code == 405:
        message = f"{request.method} is not a method of {request.url.path[:200]!r}"
    request.state.visit.failed = f"HTTP{error.status_code}"
    headers = dict(error.headers or {})
    return refusal(request.url.path, error.status_code, "ServiceError", message, headers=headers)


async def _on_depth(request: Request, error: Exception) -> Response:
    """JSON may nest deeper than what reads it: a template, a message's repr."""
    log.warning("a request nests too deeply: %s", error)
    request.state.visit.failed = "InputError"
    return refusal(request.url.path, 400, "InputError", "the body nests too deeply", code="too_deep")


async def _on_bug(request: Request, error: Exception) -> Response:
    kind = request.state.visit.failed = type(error).__name__
    path = request.url.path
    message = f"{kind}: {error}" if is_trainers(path) else f"a bug of the server ({kind}); its log says more"
    return refusal(path, 500, "ServiceError", message)
