"""The Responses routes, beside chat completions. Law: they sample and record what chat would for the same conversation,
so an agent may ask in either, and in both within one session."""

from __future__ import annotations

from fastapi import APIRouter, Request
from fastapi.responses import Response

from agentgym.server.openai_answering import Answering
from agentgym.server.openai_route import SAMPLED, StrictJson
from agentgym.server.responses_answers import ResponseAnswer
from agentgym.server.responses_requests import ResponsesRequest


class ResponsesSurface:
    """`POST /v1/responses`, and the same of a session."""

    def __init__(self, answering: Answering) -> None:
        self._answering = answering

    def router(self) -> APIRouter:
        router = APIRouter(prefix="/v1", route_class=StrictJson)
        router.post("/responses", **SAMPLED)(self.respond)
        router.post("/sessions/{session_id}/responses", **SAMPLED)(self.respond_in_session)
        return router

    async def respond(self, request: Request, body: ResponsesRequest) -> Response:
        """The next message of a conversation, as the Responses API says it."""
        return await self._respond(request, body, None)

    async def respond_in_session(self, request: Request, body: ResponsesRequest, session_id: str) -> Response:
        """The next message of a recorded session's conversation."""
        return await self._respond(request, body, session_id)

    async def _respond(self, request: Request, body: ResponsesRequest, session_id: str | None) -> Response:
        sampling = self._answering.check(body)
        messages, tools = body.read_messages(), body.read_tools()
        shown = () if body.tool_choice == "none" else tools
        replies = self._answering.replies
        answer = ResponseAnswer(body, tools, replies.renderer.encoder.decode, replies.content_stream(shown))
        return await self._answering.converse(request, session_id, body, messages, shown, answer, sampling)
