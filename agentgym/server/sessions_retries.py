"""Which requests are one request, sent again. Must never know what a session is.

Laws: a client says that it repeats a request, by an idempotency key or by its SDK's count of retries; two requests of
equal content that say nothing are two requests. A repeated request gets the replies of the first, or waits for them;
one whose first attempt failed, or whose client went away before it was sampled, is sampled again.

OpenAI's SDKs send no key of their own, only `x-stainless-retry-count`, which is 0 at first. A count above 0 says *that*
an earlier attempt was made, not which: it is the undelivered one of the same content, of several the oldest.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from hashlib import blake2b

from agentgym.errors import InputError
from agentgym.rollout.recording import RecordedPrompt
from agentgym.server.replies import Question, Reply

KEPT = 64  # answered requests that can still be repeated


class KeyReusedError(InputError):
    """An idempotency key that came before with another request."""


class Asked:
    """A request and its repetitions."""

    def __init__(self, question: Question) -> None:
        self.fingerprint = _fingerprint(question)
        self.key = question.retry_key
        self.count = question.retry_count  # the last one seen
        self.prompt: RecordedPrompt | None = None
        self.known: tuple[Reply, ...] = ()
        self.numbers: tuple[int, ...] = ()  # of the recorded turns
        self.delivered = False
        self.ended = asyncio.Event()


class Retries:
    """The requests of one session that may be repeated."""

    def __init__(self) -> None:
        self._asked: list[Asked] = []  # in the order of their first attempts

    @contextlib.asynccontextmanager
    async def ask(self, question: Question) -> AsyncIterator[Asked]:
        """`known` of what this yields holds the replies if they are there; else the caller samples them and says so by
        setting `known`. Raises KeyReusedError."""
        while (asked := self._find(question)) is not None:
            await asked.ended.wait()
            if asked.known:
                yield asked
                return
        asked = Asked(question)
        self._asked.append(asked)
        try:
            yield asked
        finally:
            asked.ended.set()
            if not asked.known:
                self._asked.remove(asked)
            self._forget()

    def _find(self, question: Question) -> Asked | None:
        fingerprint = _fingerprint(question)
        if question.retry_key is not None:
            found = next((asked for asked in self._asked if asked.key == question.retry_key), None)
            if found is not None and found.fingerprint != fingerprint:
                raise KeyReusedError(f"the idempotency key {question.retry_key!r} came before with another request")
            return found
        if question.retry_count == 0:
            return None
        earlier = [
            asked
            for asked in self._asked
            if asked.key is None and asked.fingerprint == fingerprint and asked.count < question.retry_count
        ]
        if not earlier:  # the earlier attempt never came here, or failed
            return None
        # Handed to the connection is not yet read by the client, so a delivered one may be meant; then the latest.
        found = next((asked for asked in earlier if not asked.delivered), earlier[-1])
        found.count = question.retry_count
        return found

    def _forget(self) -> None:
        ended = [asked for asked in self._asked if asked.ended.is_set()]
        for asked in ended[: max(0, len(ended) - KEPT)]:
            self._asked.remove(asked)


def _fingerprint(question: Question) -> bytes:
    text = repr((question.messages, question.tools, question.sampling))
    return blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()
