"""The OpenAI surface: models, chat completions, plain completions. Law: what samples knows no dialect, so that other
surfaces stand beside this one."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from agentgym.server.keys import ACTOR
from agentgym.server.openai_answering import Answering
from agentgym.server.openai_answers import ChatAnswer, CompletionAnswer
from agentgym.server.openai_errors import ForbiddenError
from agentgym.server.openai_requests import ChatRequest, CompletionRequest, check_vocabulary
from agentgym.server.openai_route import ERRORS, SAMPLED, StrictJson
from agentgym.server.replies import Reply, Tell, encode_text
from agentgym.server.visit import Visit


class OpenAiSurface:
    """The routes of models, chat completions and plain completions."""

    def __init__(self, answering: Answering) -> None:
        self._answering = answering
        self._replies = answering.replies
        self._created = int(time.time())

    def router(self) -> APIRouter:
        router = APIRouter(prefix="/v1", route_class=StrictJson)
        for prefix in ("", "/sessions/{session_id}"):  # a session's base URL has the routes of the bare one
            router.get(f"{prefix}/models", responses=ERRORS)(self.models)
            router.get(f"{prefix}/models/{{name:path}}", responses=ERRORS)(self.one_model)
        router.post("/chat/completions", **SAMPLED)(self.chat)
        router.post("/sessions/{session_id}/chat/completions", **SAMPLED)(self.chat_in_session)
        router.post("/completions", **SAMPLED)(self.complete)
        return router

    # ---------------------------------------------------------------------------------------------------- handlers

    async def models(self) -> dict[str, Any]:
        """The one model that is served."""
        return {"object": "list", "data": [self._card()]}

    async def one_model(self, name: str) -> dict[str, Any]:
        """The card of the model, if that is its name."""
        self._answering.check_model(name)
        return self._card()

    async def chat(self, request: Request, body: ChatRequest) -> Response:
        """The next message of a conversation."""
        return await self._chat(request, body, None)

    async def chat_in_session(self, request: Request, body: ChatRequest, session_id: str) -> Response:
        """The next message of a recorded session's conversation."""
        return await self._chat(request, body, session_id)

    async def complete(self, request: Request, body: CompletionRequest) -> Response:
        """What follows a prompt of text or token ids."""
        visit: Visit = request.state.visit
        if visit.principal != ACTOR:
            raise ForbiddenError("a session records conversations; plain completions need the acting key")
        sampling = self._answering.check(body)
        prompt = body.read_prompt()
        if isinstance(prompt, str):
            self._answering.check_size(body, (), (), prompt)
            prompt_ids = await encode_text(self._replies.renderer, prompt)
        else:
            check_vocabulary("prompt", prompt, self._answering.vocab_size)
            prompt_ids = prompt
        answer = CompletionAnswer(body, self._replies.renderer.encoder.decode)

        async def sample(tell: Tell | None) -> Sequence[Reply]:
            return await self._replies.sample(prompt_ids, (), sampling, tell=tell)

        return await self._answering.answer(visit, body, answer, prompt_ids, sampling, sample)

    # ------------------------------------------------------------------------------------------------------- parts

    async def _chat(self, request: Request, body: ChatRequest, session_id: str | None) -> Response:
        sampling = self._answering.check(body)
        messages, tools = body.read_messages(), body.read_tools()
        answer = ChatAnswer(body, self._replies.renderer.encoder.decode, lambda: self._replies.content_stream(tools))
        return await self._answering.converse(request, session_id, body, messages, tools, answer, sampling)

    def _card(self) -> dict[str, Any]:
        return {
            "id": self._answering.model,
            "object": "model",
            "created": self._created,
            "owned_by": "agentgym",
            "max_model_len": self._replies.max_context,
            "policy_version": self._replies.policy_version,
        }
