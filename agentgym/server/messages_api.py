"""The Messages routes, beside chat completions. Law: they sample and record what chat would for the same conversation,
so an agent may ask in either, and in both within one session.

Anthropic's client puts `/v1/messages` behind its base URL, others `/messages`: a session's base URL has both.
"""

from __future__ import annotations

from typing import Any, Literal

from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import BaseModel

from agentgym.server.messages_answers import MessagesAnswer
from agentgym.server.messages_requests import CountRequest, MessagesRequest
from agentgym.server.openai_answering import Answering
from agentgym.server.openai_route import SAMPLED, StrictJson
from agentgym.server.sessions_errors import UntrainableError
from agentgym.server.visit import Visit


class MessagesError(BaseModel):
    """Anthropic's error object; `details` names our cause, where it has a name."""

    type: str
    message: str
    details: dict[str, str] | None = None


class MessagesErrorAnswer(BaseModel):
    """The body of every status from 400 on."""

    type: Literal["error"]
    error: MessagesError


class TokenCount(BaseModel):
    """How many tokens a prompt has."""

    input_tokens: int


ERRORS: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": MessagesErrorAnswer, "description": "the request is refused, by the name of what was wrong"},
    "5XX": {"model": MessagesErrorAnswer, "description": "the server's failure"},
}
_IN_SESSION = ("/sessions/{session_id}/messages", "/sessions/{session_id}/v1/messages")


class MessagesSurface:
    """`POST /v1/messages`, its count of tokens, and the same of a session."""

    def __init__(self, answering: Answering) -> None:
        self._answering = answering

    def router(self) -> APIRouter:
        router = APIRouter(prefix="/v1", route_class=StrictJson)
        sampled: dict[str, Any] = SAMPLED | {"responses": SAMPLED["responses"] | ERRORS}
        router.post("/messages", **sampled)(self.say)
        router.post("/messages/count_tokens", responses=ERRORS)(self.count)
        for path in _IN_SESSION:
            router.post(path, **sampled)(self.say_in_session)
            router.post(f"{path}/count_tokens", responses=ERRORS)(self.count_in_session)
        return router

    async def say(self, request: Request, body: MessagesRequest) -> Response:
        """The next message of a conversation, as Anthropic's Messages API says it."""
        return await self._say(request, body, None)

    async def say_in_session(self, request: Request, body: MessagesRequest, session_id: str) -> Response:
        """The next message of a recorded session's conversation."""
        return await self._say(request, body, session_id)

    async def count(self, request: Request, body: CountRequest) -> TokenCount:
        """How many tokens the prompt of such a request has."""
        return await self._count(request, body, None)

    async def count_in_session(self, request: Request, body: CountRequest, session_id: str) -> TokenCount:
        """The same; what the session has sampled is counted as if it were encoded anew."""
        return await self._count(request, body, session_id)

    # ------------------------------------------------------------------------------------------------------- parts

    async def _say(self, request: Request, body: MessagesRequest, session_id: str | None) -> Response:
        sampling = self._answering.check(body)
        messages, tools = body.read_messages(), body.read_tools()
        replies = self._answering.replies
        answer = MessagesAnswer(body, replies.content_stream(tools), replies.max_context)
        try:
            return await self._answering.converse(request, session_id, body, messages, tools, answer, sampling)
        except UntrainableError as error:
            if error.param != "stop":
                raise
            raise UntrainableError("stop_sequences", f"stop_sequences: {error}") from error

    async def _count(self, request: Request, body: CountRequest, session_id: str | None) -> TokenCount:
        visit: Visit = request.state.visit
        self._answering.check_model(body.model)
        body.check()
        return TokenCount(
            input_tokens=await self._answering.count(visit, session_id, body.read_messages(), body.read_tools())
        )
