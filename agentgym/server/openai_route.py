"""What every route under `/v1` shares: how its body is read, and how its schema says what a refusal looks like."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any

import msgspec
from fastapi import Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from fastapi.routing import APIRoute
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from agentgym.server import openai_stream


class ErrorObject(BaseModel):
    """OpenAI's error object."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(BaseModel):
    """The body of every status from 400 on."""

    error: ErrorObject


ERRORS: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": ErrorAnswer, "description": "the request is refused, by the name of what was wrong"},
    "5XX": {"model": ErrorAnswer, "description": "the server's failure"},
}
SAMPLED: dict[str, Any] = {  # the options of a route that answers whole or in a stream
    "responses": ERRORS | {200: {"description": "the replies", "content": {openai_stream.MEDIA_TYPE: {}}}},
    "response_model": None,
    "response_class": Response,
}


class StrictJson(APIRoute):
    """Reads bodies as strict JSON: no NaN, no lone surrogates, no numbers that nothing can hold, no nesting without
    end; and only where the caller says that it is JSON."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()

        async def strict(request: Request) -> Response:
            return await handler(_StrictRequest(request.scope, request.receive))

        return strict


class _StrictRequest(Request):
    async def body(self) -> bytes:
        body = await super().body()
        kind = self.headers.get("content-type", "").partition(";")[0].strip().lower()
        if body and kind != "application/json":
            raise HTTPException(415, "the body must be JSON, with the header 'Content-Type: application/json'")
        return body

    async def json(self) -> Any:
        try:
            return msgspec.json.decode(await self.body())
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            why = str(error)
        except RecursionError:
            why = "nested too deeply"
        problem = {"type": "json_invalid", "loc": ("body",), "msg": why, "input": None, "ctx": {"error": why}}
        raise RequestValidationError([problem])
