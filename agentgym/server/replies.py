"""What the policy says: prompts in, token events out, and replies at the end. Must never know a dialect or HTTP.

Law: whatever cannot be sampled is refused before anything is; the tokens of a reply are those that were sampled, and
its text is cut where the caller asked, so that text may be shorter than its tokens but never stands for others; and a
caller that goes away, or whose time is up, ends its sampling.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

import msgspec

from agentgym.engine.gate import VersionedPolicy
from agentgym.errors import EngineError, InputError, PromptTooLongError, ServiceError
from agentgym.messages import Message, ToolCall, ToolSpec
from agentgym.policy import Completion, FinishReason, SamplingParams
from agentgym.render import ChatTemplateRenderer
from agentgym.server.text_stream import ContentStream, TextStream


class DeadlineError(ServiceError, TimeoutError):
    """A request that was not answered within its time."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How to sample the replies to one prompt; reply 0 is drawn with `seed` itself, the others with seeds derived of
    it.

    Example: `Sampling(n=4, max_tokens=256, seed=7, stop=("Observation:",))`.
    """

    n: int = 1
    max_tokens: int | None = None  # None: as many as the context holds
    temperature: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()  # besides those that close a turn
    timeout_s: float | None = None  # None: the server's limit
    left: int | None = None  # tokens that each reply may have at most, whatever was asked for; None: no such limit
    # max_tokens that the context has no room for: cut to it instead of refused. How a dialect says it, not what it asks
    # (repr: what tells two questions apart), so that one question is one in every dialect.
    cut: bool = field(default=False, repr=False)


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """Tokens as they came, and the text that became certain with them (it may belong to earlier tokens).

    Example: `TokenEvent((5, 9), (-0.1, -1.2), policy_version=3, kv_version=3, text=" up")`.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    policy_version: int
    kv_version: int
    text: str


@dataclass(frozen=True, slots=True)
class Reply:
    """One reply. `text` is what its tokens say without the token that closed it, cut before a stop string; `message` is
    what a chat's client is sent, its calls with ids of their own.

    Example: `Reply((1, 7), Completion((5, 2), ...), "hi", "stop", Message("assistant", "hi"))`.
    """

    prompt_ids: tuple[int, ...]
    completion: Completion
    text: str
    finish_reason: FinishReason
    message: Message
    stopped: str | None = None  # the stop string that ended it; None: none did


@dataclass(frozen=True, slots=True)
class Question:
    """A chat's request for its next message; `retry_key` and `retry_count` are what the client said about repeating it
    (None, 0: nothing).

    Example: `Question((Message("user", "hello"),), (), Sampling(), retry_key="4f...", retry_count=1)`.
    """

    messages: tuple[Message, ...]
    tools: tuple[ToolSpec, ...]
    sampling: Sampling
    retry_key: str | None
    retry_count: int


class Exchange(Protocol):
    """One question on its way. Left without `record`, it leaves no trace."""

    prompt_ids: Sequence[int]
    known: tuple[Reply, ...]  # replies that this question got already: it is asked again; nothing is sampled
    left: int | None  # tokens that each reply may have; None: as many as were asked for

    def record(self, replies: Sequence[Reply]) -> None:
        """These were sampled and are about to be sent."""
        ...

    def deliver(self) -> None:
        """The last byte of the answer has been handed to the client's connection."""
        ...


class Conversation(Protocol):
    """What a chat request is part of: a recorded session, or nothing. Finds its prompt and keeps its replies."""

    session_id: str | None

    def ask(self, question: Question) -> AbstractAsyncContextManager[Exchange]:
        """Opens an exchange, and may wait for one that is under way. Raises InputError and its kin for what cannot be
        asked here."""
        ...


Tell = Callable[[int, TokenEvent], None]  # (which reply, its event); runs in the event loop and must not wait


class Replies:
    """Samples replies from a policy.

    Example: `replies = await Replies(policy, renderer, 4096, 600.0).sample(prompt_ids, tools, Sampling(n=2))`.
    """

    def __init__(
        self, policy: VersionedPolicy, renderer: ChatTemplateRenderer, max_context: int, max_request_s: float
    ) -> None:
        self.renderer = renderer
        self.max_context = max_context
        self.max_request_s = max_request_s
        self._policy = policy

    @property
    def policy_version(self) -> int:
        return self._policy.policy_version

    def plan(self, prompt_ids: Sequence[int], sampling: Sampling, session_id: str | None) -> list[SamplingParams]:
        """The parameters of each reply. Raises InputError, PromptTooLongError."""
        if not prompt_ids:
            raise InputError("a prompt must have at least one token")
        room = self.max_context - len(prompt_ids)
        most = sampling.max_tokens
        if room < 1 or (most is not None and most > room and not sampling.cut):
            asked = "" if most is None or sampling.cut else f" and max_tokens {most}"
            raise PromptTooLongError(
                f"a prompt of {len(prompt_ids)} tokens{asked} does not fit the context of {self.max_context} tokens"
            )
        stops = tuple(dict.fromkeys((*self.renderer.stop_token_ids, *sampling.stop_token_ids)))
        most = min(most or room, room, room if sampling.left is None else max(sampling.left, 1))
        first = SamplingParams(most, sampling.temperature, stops, sampling.seed, session_id)
        if sampling.seed is None:
            return [first] * sampling.n
        return [replace(first, seed=derived_seed(sampling.seed, index)) for index in range(sampling.n)]

    def check_size(self, messages: Sequence[Message], tools: Sequence[ToolSpec], text: str = "") -> None:
        """Refuses what cannot fit before it is rendered and encoded, which takes seconds, and a hundred times its
        memory, for megabytes that nobody could have meant. Raises PromptTooLongError."""
        calls = [call for message in messages for call in message.tool_calls]
        characters = len(text) + sum(len(message.content) for message in messages)
        characters += sum(len(call.name) + len(call.arguments) for call in calls)
        characters += sum(len(tool.description) + len(msgspec.json.encode(tool.parameters)) for tool in tools)
        marks = len(messages) + len(calls) + len(tools)  # that each begins is said by a token, too
        least = marks + characters // self.renderer.encoder.longest
        if least > self.max_context:
            raise PromptTooLongError(
                f"a prompt of {characters} characters in {marks} messages, tools and calls, which is {least} tokens or "
                f"more, does not fit the context of {self.max_context} tokens"
            )

    async def sample(
        self,
        prompt_ids: Sequence[int],
        tools: Sequence[ToolSpec],
        sampling: Sampling,
        *,
        session_id: str | None = None,
        tell: Tell | None = None,
    ) -> tuple[Reply, ...]:
        """Samples `sampling.n` replies; `tell` hears of each token. Raises InputError, PromptTooLongError (before
        anything is sampled), DeadlineError, and what the engine raises."""
        plan = self.plan(prompt_ids, sampling, session_id)
        limit = min(sampling.timeout_s or self.max_request_s, self.max_request_s)
        running = [
            asyncio.create_task(self._one(prompt_ids, tools, params, sampling.stop, _of(index, tell)))
            for index, params in enumerate(plan)
        ]
        deadline = asyncio.timeout(limit)
        try:
            async with deadline:
                return tuple(await asyncio.gather(*running))
        except TimeoutError as error:
            if not deadline.expired():
                raise
            raise DeadlineError(f"not sampled to the end within {limit:g} s; ask for fewer tokens") from error
        finally:  # also when one failed or the caller went away
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)

    async def _one(
        self,
        prompt_ids: Sequence[int],
        tools: Sequence[ToolSpec],
        params: SamplingParams,
        stop: Sequence[str],
        tell: Callable[[TokenEvent], None] | None,
    ) -> Reply:
        if tell is None and not stop:
            completion = await self._policy.complete(prompt_ids, params)
            text = self.renderer.encoder.decode(_said(completion, params))
            return self._reply(prompt_ids, completion, text, completion.finish_reason, tools)
        taker = _Taker(TextStream(self.renderer.encoder.decode, stop), params.stop_token_ids, tell)
        sampling = asyncio.create_task(self._policy.complete(prompt_ids, params, taker.take))
        taker.cancel = sampling.cancel
        try:
            await asyncio.wait((sampling,))
        finally:
            sampling.cancel()
        if taker.text.stopped is not None:
            with contextlib.suppress(asyncio.CancelledError):
                await sampling
            return self._reply(prompt_ids, taker.completion(), taker.text.text, "stop", tools, taker.text.stopped)
        completion = sampling.result()
        if taker.token_ids != list(completion.token_ids):
            raise EngineError("the engine told other tokens than those of its completion")
        taker.finish()
        reason, stopped = completion.finish_reason, taker.text.stopped  # by what was held back until now
        return self._reply(prompt_ids, completion, taker.text.text, reason, tools, stopped)

    def _reply(
        self,
        prompt_ids: Sequence[int],
        completion: Completion,
        text: str,
        finish_reason: FinishReason,
        tools: Sequence[ToolSpec],
        stopped: str | None = None,
    ) -> Reply:
        return Reply(tuple(prompt_ids), completion, text, finish_reason, self._message(text, tools), stopped)

    def _message(self, text: str, tools: Sequence[ToolSpec]) -> Message:
        """Calls are read where tools were offered. One that could not be read has no name to call: it is shown as what
        it is, text. Ids are unique, because a client's history holds the calls of many replies."""
        if not tools:
            return Message("assistant", text)
        content, calls = self.renderer.template.tool_format.parse(text, tools)
        content += "".join(call.arguments for call in calls if not call.name)
        named = (ToolCall(f"call_{uuid.uuid4().hex[:24]}", call.name, call.arguments) for call in calls if call.name)
        return Message("assistant", content, tuple(named))

    def content_stream(self, tools: Sequence[ToolSpec]) -> ContentStream:
        """Tells content from calls while a reply comes."""
        return ContentStream((self.renderer.template.tool_format.opening,) if tools else ())


class _Taker:
    """Takes tokens as the engine tells them, one by one, until a stop string is complete."""

    def __init__(
        self, text: TextStream, stop_token_ids: Sequence[int], tell: Callable[[TokenEvent], None] | None
    ) -> None:
        self.text = text
        self.cancel: Callable[[], object] = lambda: None
        self.token_ids: list[int] = []
        self._logprobs: list[float] = []
        self._policy_versions: list[int] = []
        self._kv_versions: list[int] = []
        self._stop_token_ids = stop_token_ids
        self._tell = tell

    def take(self, token_ids: Sequence[int], logprobs: Sequence[float], policy_version: int, kv_version: int) -> None:
        if self.text.stopped is not None:
            return
        text = ""
        taken = 0
        for token_id in token_ids:
            taken += 1
            if token_id not in self._stop_token_ids:
                text += self.text.feed(token_id)
            if self.text.stopped is not None:
                self.cancel()
                break
        self.token_ids += token_ids[:taken]
        self._logprobs += logprobs[:taken]
        self._policy_versions += [policy_version] * taken
        self._kv_versions += [kv_version] * taken
        if self._tell is not None and taken:
            told = TokenEvent(tuple(token_ids[:taken]), tuple(logprobs[:taken]), policy_version, kv_version, text)
            self._tell(told)

    def finish(self) -> None:
        text = self.text.finish()
        if text and self._tell is not None:
            self._tell(TokenEvent((), (), -1, -1, text))

    def completion(self) -> Completion:
        return Completion(
            tuple(self.token_ids), tuple(self._logprobs), tuple(self._policy_versions), tuple(self._kv_versions), "stop"
        )


class Unrecorded:
    """A conversation that nobody keeps: every question brings its whole history."""

    def __init__(self, renderer: ChatTemplateRenderer) -> None:
        self.session_id: str | None = None
        self._renderer = renderer

    @contextlib.asynccontextmanager
    async def ask(self, question: Question) -> AsyncIterator[Exchange]:
        """As Conversation.ask."""
        yield _UnrecordedExchange(await render(self._renderer, question.messages, question.tools))


class _UnrecordedExchange:
    def __init__(self, prompt_ids: Sequence[int]) -> None:
        self.prompt_ids = prompt_ids
        self.known: tuple[Reply, ...] = ()
        self.left: int | None = None

    def record(self, replies: Sequence[Reply]) -> None:
        pass

    def deliver(self) -> None:
        pass


BIG_CHARACTERS = 50_000


async def render(
    renderer: ChatTemplateRenderer, messages: Sequence[Message], tools: Sequence[ToolSpec]
) -> Sequence[int]:
    """As `renderer.render`; long conversations in a thread, so that they hold up nobody."""
    if not is_long(messages):
        return renderer.render(messages, tools)
    return await asyncio.to_thread(renderer.render, messages, tools)


def is_long(messages: Sequence[Message]) -> bool:
    """Whether a conversation takes so long to encode that others would notice."""
    return sum(len(message.content) for message in messages) >= BIG_CHARACTERS


def vocabulary_size(model_folder: Path, renderer: ChatTemplateRenderer) -> int:
    """How many ids the model can read: its own count, which padding may make larger than the tokenizer's."""
    try:
        config = json.loads((model_folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return renderer.encoder.size
    size = config.get("vocab_size") or (config.get("text_config") or {}).get("vocab_size")
    return size if isinstance(size, int) else renderer.encoder.size


async def encode_text(renderer: ChatTemplateRenderer, text: str) -> Sequence[int]:
    """The ids of text from outside; long text in a thread."""
    if len(text) < BIG_CHARACTERS:
        return renderer.encoder.outside(text)
    return await asyncio.to_thread(renderer.encoder.outside, text)


def derived_seed(seed: int, index: int) -> int:
    """The seed of reply `index` of a request. Reply 0 has the request's own, so that `n` changes nothing for it.

    >>> derived_seed(7, 0), derived_seed(7, 1) != derived_seed(7, 2)
    (7, True)
    """
    if index == 0:
        return seed
    return int.from_bytes(hashlib.blake2b(f"{seed}/{index}".encode(), digest_size=8).digest(), "big")


def _said(completion: Completion, params: SamplingParams) -> Sequence[int]:
    """The ids that are text: all but the stop token that closed it."""
    ids = completion.token_ids
    return ids[:-1] if ids and ids[-1] in params.stop_token_ids else ids


def _of(index: int, tell: Tell | None) -> Callable[[TokenEvent], None] | None:
    return None if tell is None else lambda event: tell(index, event)
