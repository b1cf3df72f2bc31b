"""The OpenAI surface: models, chat completions, plain completions. Law: a request is checked whole before anything is
sampled for it; what samples knows no dialect, and another surface can stand beside this one."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from typing import Any

import msgspec
from fastapi import APIRouter, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response, StreamingResponse
from fastapi.routing import APIRoute
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from agentgym.errors import UnknownNameError
from agentgym.messages import ToolSpec
from agentgym.server import openai_stream
from agentgym.server.keys import ACTOR, Principal
from agentgym.server.openai_answers import Answer, ChatAnswer, CompletionAnswer
from agentgym.server.openai_errors import ForbiddenError, ParameterError, UnknownModelError
from agentgym.server.openai_requests import ChatRequest, CompletionRequest, SampledRequest, check_vocabulary
from agentgym.server.replies import Conversation, Exchange, Question, Replies, Reply, Sampling, Tell, encode_text
from agentgym.server.visit import Visit

ConversationOf = Callable[[Principal, str | None], Conversation]
"""(who asks, the session that the path names) -> what its chat requests are part of. Raises InputError and its kin."""


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
_SAMPLED = ERRORS | {200: {"description": "the replies", "content": {openai_stream.MEDIA_TYPE: {}}}}


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


class OpenAiSurface:
    """The routes under `/v1`."""

    def __init__(self, model: str, vocab_size: int, replies: Replies, conversation_of: ConversationOf) -> None:
        self._model = model
        self._vocab_size = vocab_size
        self._replies = replies
        self._conversation_of = conversation_of
        self._created = int(time.time())

    def router(self) -> APIRouter:
        router = APIRouter(prefix="/v1", route_class=StrictJson)
        for prefix in ("", "/sessions/{session_id}"):  # a session's base URL has the routes of the bare one
            router.get(f"{prefix}/models", responses=ERRORS)(self.models)
            router.get(f"{prefix}/models/{{name:path}}", responses=ERRORS)(self.one_model)
        options: dict[str, Any] = {"responses": _SAMPLED, "response_model": None, "response_class": Response}
        router.post("/chat/completions", **options)(self.chat)
        router.post("/sessions/{session_id}/chat/completions", **options)(self.chat_in_session)
        router.post("/completions", **options)(self.complete)
        return router

    # ---------------------------------------------------------------------------------------------------- handlers

    async def models(self) -> dict[str, Any]:
        """The one model that is served."""
        return {"object": "list", "data": [self._card()]}

    async def one_model(self, name: str) -> dict[str, Any]:
        """The card of the model, if that is its name."""
        self._check_model(name)
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
            raise ForbiddenError("a session records chat completions; plain ones need the acting key")
        sampling = self._check(body)
        prompt = body.read_prompt()
        if isinstance(prompt, str):
            prompt_ids = await encode_text(self._replies.renderer, prompt)
        else:
            check_vocabulary("prompt", prompt, self._vocab_size)
            prompt_ids = prompt
        self._replies.plan(prompt_ids, sampling, None)
        answer = CompletionAnswer(body, self._replies.renderer.encoder.decode)

        async def sample(tell: Tell | None) -> Sequence[Reply]:
            replies = await self._replies.sample(prompt_ids, (), sampling, tell=tell)
            return _counted(visit, replies)

        return await self._answer(visit, body, answer, prompt_ids, sampling, sample)

    async def _chat(self, request: Request, body: ChatRequest, session_id: str | None) -> Response:
        visit: Visit = request.state.visit
        assert visit.principal is not None
        sampling = self._check(body)
        messages, tools = body.read_messages(), body.read_tools()
        conversation = self._conversation_of(visit.principal, session_id)
        visit.session_id = conversation.session_id
        retry_key = request.headers.get("idempotency-key")
        retry_count = request.headers.get("x-stainless-retry-count", "")
        retries = int(retry_count) if retry_count.isascii() and retry_count.isdigit() and len(retry_count) < 10 else 0
        question = Question(messages, tools, sampling, retry_key, retries)
        exchange = await visit.after.enter_async_context(conversation.ask(question))
        visit.when_sent.append(exchange.deliver)
        answer = ChatAnswer(body, self._replies.renderer.encoder.decode, lambda: self._replies.content_stream(tools))
        if exchange.known:
            return self._retell(body, answer, exchange.known)
        self._replies.plan(exchange.prompt_ids, sampling, visit.session_id)

        async def sample(tell: Tell | None) -> Sequence[Reply]:
            return await self._exchange(visit, exchange, tools, sampling, tell)

        return await self._answer(visit, body, answer, exchange.prompt_ids, sampling, sample)

    # ------------------------------------------------------------------------------------------------------- parts

    async def _exchange(
        self, visit: Visit, exchange: Exchange, tools: Sequence[ToolSpec], sampling: Sampling, tell: Tell | None
    ) -> Sequence[Reply]:
        replies = await self._replies.sample(
            exchange.prompt_ids, tools, sampling, session_id=visit.session_id, tell=tell
        )
        exchange.record(replies)
        return _counted(visit, replies)

    async def _answer(
        self,
        visit: Visit,
        body: SampledRequest,
        answer: Answer,
        prompt_ids: Sequence[int],
        sampling: Sampling,
        sample: Callable[[Tell | None], Coroutine[Any, Any, Sequence[Reply]]],
    ) -> Response:
        if not body.stream:
            return _json(answer.whole(await sample(None)))
        stream = openai_stream.ReplyStream.begin(visit, sample)
        return _stream(openai_stream.events(visit, answer, prompt_ids, sampling.n, body.wants_usage, stream))

    def _retell(self, body: SampledRequest, answer: Answer, replies: Sequence[Reply]) -> Response:
        if not body.stream:
            return _json(answer.whole(replies))
        return _stream(openai_stream.retold(answer, replies, body.wants_usage))

    def _check(self, body: SampledRequest) -> Sampling:
        self._check_model(body.model)
        body.check()
        check_vocabulary("stop_token_ids", body.stop_token_ids or [], self._vocab_size)
        if body.timeout_s is not None and body.timeout_s > self._replies.max_request_s:
            raise ParameterError("timeout_s", f"timeout_s may be at most {self._replies.max_request_s:g} here")
        return body.sampling()

    def _check_model(self, name: str) -> None:
        if name != self._model:
            raise UnknownModelError(str(UnknownNameError.of("model", name[:200], [self._model])))

    def _card(self) -> dict[str, Any]:
        return {
            "id": self._model,
            "object": "model",
            "created": self._created,
            "owned_by": "agentgym",
            "max_model_len": self._replies.max_context,
            "policy_version": self._replies.policy_version,
        }


def _counted(visit: Visit, replies: Sequence[Reply]) -> Sequence[Reply]:
    visit.prompt_tokens = len(replies[0].prompt_ids)
    visit.sampled_tokens = sum(len(reply.completion.token_ids) for reply in replies)
    return replies


def _json(value: dict[str, Any]) -> Response:
    return Response(msgspec.json.encode(value), media_type="application/json")


def _stream(events: AsyncIterator[bytes]) -> Response:
    return StreamingResponse(events, media_type=openai_stream.MEDIA_TYPE, headers=openai_stream.HEADERS)
