"""The HTTP application: both doors, who may enter, and how errors look from outside.

Law: a key is compared before a body is read; no body is read beyond its limit; and an error is an answer in the
caller's own dialect, with the status that says whose turn it is, never a traceback.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from agentgym.errors import AgentGymError, InputError, PromptTooLongError, ServiceError, VersionError
from agentgym.server import wire
from agentgym.server.openai_api import ParameterError, UnknownModelError, openai_router
from agentgym.server.service import RolloutService
from agentgym.server.trainer_api import trainer_router

log = logging.getLogger(__name__)
TRAINER_PREFIX = "/trainer"
OPEN_PATHS = ("/health",)


@dataclass(frozen=True, slots=True)
class Keys:
    """Who may enter. Example: `Keys(trainer="k7...", openai=None)`; None: no key is asked for."""

    trainer: str
    openai: str | None


def create_app(service: RolloutService, keys: Keys, stop: Callable[[], None], max_body_bytes: int) -> ASGIApp:
    """The application around `service`; `stop` is what the trainer's shutdown calls."""
    app = FastAPI(title="agentgym rollout service", docs_url=None, redoc_url=None)
    app.include_router(trainer_router(service, stop))
    app.include_router(openai_router(service))

    @app.get("/health")
    async def health() -> dict[str, Any]:
        return {"status": "ok", "policy_version": service.policy.policy_version}

    app.add_exception_handler(AgentGymError, _on_error)
    app.add_exception_handler(RequestValidationError, _on_invalid)
    app.add_exception_handler(HTTPException, _on_http)
    app.add_exception_handler(Exception, _on_bug)
    return _Door(app, keys, max_body_bytes)


class _Door:
    """Checks key and body size before the application sees a request."""

    def __init__(self, app: ASGIApp, keys: Keys, max_body_bytes: int) -> None:
        self._app = app
        self._keys = keys
        self._max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        path: str = scope["path"]
        headers = dict(scope["headers"])
        for_trainer = path == TRAINER_PREFIX or path.startswith(TRAINER_PREFIX + "/")
        key = self._keys.trainer if for_trainer else self._keys.openai
        if key is not None and path not in OPEN_PATHS and not _holds(headers.get(b"authorization", b""), key):
            refusal = _refuse(for_trainer, 401, "ServiceError", "this needs the header 'Authorization: Bearer KEY'")
            return await refusal(scope, receive, send)
        too_big = f"a request body may have at most {self._max_body_bytes} bytes"
        length = headers.get(b"content-length", b"0")
        if not length.isdigit() or int(length) > self._max_body_bytes:
            return await _refuse(for_trainer, 413, "InputError", too_big)(scope, receive, send)
        await self._app(scope, self._limited(receive, too_big), send)

    def _limited(self, receive: Receive, too_big: str) -> Receive:
        """`receive` for a body whose length nobody declared."""
        left = self._max_body_bytes

        async def limited() -> Message:
            nonlocal left
            message = await receive()
            left -= len(message.get("body", b""))
            if left < 0:
                raise HTTPException(413, too_big)
            return message

        return limited


def _holds(header: bytes, key: str) -> bool:
    scheme, _, given = header.partition(b" ")
    return scheme.lower() == b"bearer" and secrets.compare_digest(given.strip(), key.encode())


# ------------------------------------------------------------------------------------------------------- errors


def _refuse(
    for_trainer: bool, status: int, kind: str, message: str, param: str | None = None, code: str | None = None
) -> Response:
    if for_trainer:
        return Response(wire.encode(wire.Fault(kind, message)), status, media_type=wire.CONTENT_TYPE)
    error = {"message": message, "type": _openai_type(status), "param": param, "code": code}
    return JSONResponse({"error": error}, status)


def _openai_type(status: int) -> str:
    named = {401: "authentication_error", 404: "not_found_error"}
    return named.get(status, "server_error" if status >= 500 else "invalid_request_error")


def _is_trainers(request: Request) -> bool:
    return request.url.path.startswith(TRAINER_PREFIX)


async def _on_error(request: Request, error: Exception) -> Response:
    status, code = _status(error)
    if status >= 500:
        log.error("%s %s: %s: %s", request.method, request.url.path, type(error).__name__, error)
    kind = "InputError" if isinstance(error, ParameterError) else type(error).__name__
    param = error.param if isinstance(error, ParameterError) else None
    return _refuse(_is_trainers(request), status, kind, str(error), param, code)


def _status(error: Exception) -> tuple[int, str | None]:
    if isinstance(error, UnknownModelError):
        return 404, "model_not_found"
    if isinstance(error, PromptTooLongError):
        return 400, "context_length_exceeded"
    if isinstance(error, VersionError):
        return 409, None
    if isinstance(error, InputError):
        return 400, None
    return (503 if isinstance(error, ServiceError) else 500), None


async def _on_invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    problem: Mapping[str, Any] = error.errors()[0]
    path = ".".join(str(part) for part in problem["loc"][1:])
    if problem["type"] == "extra_forbidden":
        message = f"unknown parameter {path!r}"
    elif problem["type"] == "json_invalid":
        message = "the body is not valid JSON"
    else:
        message = f"{path or 'the body'}: {problem['msg']}"
    return _refuse(_is_trainers(request), 400, "InputError", message, path or None)


async def _on_http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = str(error.detail) if error.status_code != 404 else f"there is nothing at {request.url.path}"
    response = _refuse(_is_trainers(request), error.status_code, "ServiceError", message)
    response.headers.update(error.headers or {})
    return response


async def _on_bug(request: Request, error: Exception) -> Response:
    return _refuse(_is_trainers(request), 500, "ServiceError", f"{type(error).__name__}: {error}")
