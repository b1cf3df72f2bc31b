"""A request answered, in whichever of the surface's dialects. Law: a request is checked whole before anything is
sampled for it; a conversation is asked once, and what it was told before is told again."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from dataclasses import replace
from typing import Any

import msgspec
from fastapi import Request
from fastapi.responses import Response, StreamingResponse

from agentgym.errors import PromptTooLongError, UnknownNameError
from agentgym.messages import Message, ToolSpec
from agentgym.server import openai_stream
from agentgym.server.keys import Principal
from agentgym.server.openai_answers import Answer
from agentgym.server.openai_errors import ParameterError, TooLongError, UnknownModelError
from agentgym.server.openai_requests import SampledRequest, check_vocabulary
from agentgym.server.replies import Conversation, Exchange, Question, Replies, Reply, Sampling, Tell, render
from agentgym.server.visit import Visit

ConversationOf = Callable[[Principal, str | None], Conversation]
"""(who asks, the session that the path names) -> what its requests are part of. Raises InputError and its kin."""

Sample = Callable[[Tell | None], Coroutine[Any, Any, Sequence[Reply]]]


class Answering:
    """What the routes of every dialect do with a request that they have read."""

    def __init__(self, model: str, vocab_size: int, replies: Replies, conversation_of: ConversationOf) -> None:
        self.model = model
        self.vocab_size = vocab_size
        self.replies = replies
        self._conversation_of = conversation_of

    def check(self, body: SampledRequest) -> Sampling:
        """Raises ParameterError and UnknownModelError."""
        self.check_model(body.model)
        body.check()
        check_vocabulary("stop_token_ids", body.stop_token_ids or [], self.vocab_size)
        if body.timeout_s is not None and body.timeout_s > self.replies.max_request_s:
            raise ParameterError("timeout_s", f"timeout_s may be at most {self.replies.max_request_s:g} here")
        return body.sampling()

    def check_model(self, name: str) -> None:
        """Raises UnknownModelError."""
        if name != self.model:
            raise UnknownModelError(str(UnknownNameError.of("model", name[:200], [self.model])))

    def check_size(
        self, body: SampledRequest, messages: Sequence[Message], tools: Sequence[ToolSpec], text: str = ""
    ) -> None:
        """Raises TooLongError for what is not even worth encoding."""
        try:
            self.replies.check_size(messages, tools, text)
        except PromptTooLongError as error:
            raise TooLongError(body.PROMPT, str(error)) from error

    async def converse(
        self,
        request: Request,
        session_id: str | None,
        body: SampledRequest,
        messages: tuple[Message, ...],
        tools: tuple[ToolSpec, ...],
        answer: Answer,
        sampling: Sampling,
    ) -> Response:
        """The next message of a conversation; `session_id` is what the path names."""
        visit: Visit = request.state.visit
        assert visit.principal is not None
        self.check_size(body, messages, tools)
        conversation = self._conversation_of(visit.principal, session_id)
        visit.session_id = conversation.session_id
        retry_key = request.headers.get("idempotency-key")
        retry_count = request.headers.get("x-stainless-retry-count", "")
        retries = int(retry_count) if retry_count.isascii() and retry_count.isdigit() and len(retry_count) < 10 else 0
        question = Question(messages, tools, sampling, retry_key, retries)
        exchange = await visit.after.enter_async_context(conversation.ask(question))
        visit.when_sent.append(exchange.deliver)
        sampling = replace(sampling, left=exchange.left)
        if exchange.known:
            if not body.stream:
                return _json(answer.whole(exchange.known))
            return _stream(openai_stream.retold(answer, exchange.known, body.wants_usage))

        async def sample(tell: Tell | None) -> Sequence[Reply]:
            return await self._exchange(visit, exchange, tools, sampling, tell)

        return await self.answer(visit, body, answer, exchange.prompt_ids, sampling, sample)

    async def count(
        self, visit: Visit, session_id: str | None, messages: Sequence[Message], tools: Sequence[ToolSpec]
    ) -> int:
        """How many tokens the prompt of a conversation has, encoded anew; nothing is sampled or recorded."""
        assert visit.principal is not None
        visit.session_id = self._conversation_of(visit.principal, session_id).session_id
        self.replies.check_size(messages, tools)
        return len(await render(self.replies.renderer, messages, tools))

    async def answer(
        self,
        visit: Visit,
        body: SampledRequest,
        answer: Answer,
        prompt_ids: Sequence[int],
        sampling: Sampling,
        sample: Sample,
    ) -> Response:
        """Samples, once the prompt is seen to fit, and says what was sampled. Raises TooLongError."""
        self._check_fits(body, prompt_ids, sampling)
        if not body.stream:
            return _json(answer.whole(counted(visit, await sample(None))))

        async def counting(tell: Tell) -> Sequence[Reply]:
            return counted(visit, await sample(tell))

        stream = openai_stream.ReplyStream.begin(visit, counting)
        return _stream(openai_stream.events(visit, answer, prompt_ids, sampling.n, body.wants_usage, stream))

    # ------------------------------------------------------------------------------------------------------- parts

    async def _exchange(
        self, visit: Visit, exchange: Exchange, tools: Sequence[ToolSpec], sampling: Sampling, tell: Tell | None
    ) -> Sequence[Reply]:
        replies = await self.replies.sample(
            exchange.prompt_ids, tools, sampling, session_id=visit.session_id, tell=tell
        )
        exchange.record(replies)
        return replies

    def _check_fits(self, body: SampledRequest, prompt_ids: Sequence[int], sampling: Sampling) -> None:
        try:
            self.replies.plan(prompt_ids, sampling, None)
        except PromptTooLongError as error:  # said in the words of the request's own dialect
            param = body.PROMPT if sampling.max_tokens is None or sampling.cut else body.LENGTH
            raise TooLongError(param, str(error).replace("max_tokens", body.LENGTH)) from error


def counted(visit: Visit, replies: Sequence[Reply]) -> Sequence[Reply]:
    """Notes how many tokens it took."""
    visit.prompt_tokens = len(replies[0].prompt_ids)
    visit.sampled_tokens = sum(len(reply.completion.token_ids) for reply in replies)
    return replies


def _json(value: dict[str, Any]) -> Response:
    return Response(msgspec.json.encode(value), media_type="application/json")


def _stream(events: AsyncIterator[bytes]) -> Response:
    return StreamingResponse(events, media_type=openai_stream.MEDIA_TYPE, headers=openai_stream.HEADERS)
