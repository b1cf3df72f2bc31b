"""Server-sent events of replies while they are sampled. Law: the last event is the answer's own end, or an error in its
place; a reader that is slow gets fewer and longer parts, never other ones."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any

import msgspec

from agentgym.errors import AgentGymError
from agentgym.server.openai_answers import Answer, Part
from agentgym.server.openai_errors import describe
from agentgym.server.replies import Reply, Tell, TokenEvent
from agentgym.server.visit import Visit

HEARTBEAT_S = 15.0  # without an event for so long, something says that the connection lives
MEDIA_TYPE = "text/event-stream"
HEADERS = {"cache-control": "no-cache", "x-accel-buffering": "no"}  # for proxies that would collect it first

Told = tuple[int, TokenEvent]


class ReplyStream:
    """Replies under way: begun by `begin`, and ended when the visit ends, whether anybody reads them or not."""

    def __init__(self) -> None:
        self._queue: asyncio.Queue[Told | None] = asyncio.Queue()
        self.replies: asyncio.Task[Sequence[Reply]] | None = None

    @classmethod
    def begin(cls, visit: Visit, sample: Callable[[Tell], Awaitable[Sequence[Reply]]]) -> ReplyStream:
        """Starts sampling; what it tells becomes events."""
        stream = cls()
        queue = stream._queue

        async def run() -> Sequence[Reply]:
            try:
                return await sample(lambda index, event: queue.put_nowait((index, event)))
            finally:
                queue.put_nowait(None)

        stream.replies = asyncio.create_task(run())
        visit.after.push_async_callback(_end, stream.replies)
        return stream

    async def parts(self) -> AsyncIterator[tuple[int, Part] | None]:
        """The tokens as they come, those that wait joined; None where nothing came for a while."""
        ended = False
        while not ended:
            try:
                told = [await asyncio.wait_for(self._queue.get(), HEARTBEAT_S)]
            except TimeoutError:
                yield None
                continue
            while not self._queue.empty():
                told.append(self._queue.get_nowait())
            ended = None in told
            by_reply: dict[int, list[TokenEvent]] = {}
            for one in told:
                if one is not None:
                    by_reply.setdefault(one[0], []).append(one[1])
            for index, events in by_reply.items():
                yield index, Part.joined(events)


async def _end(task: asyncio.Task[Any]) -> None:
    if not task.done():
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def events(
    visit: Visit, answer: Answer, prompt_ids: Sequence[int], count: int, wants_usage: bool, stream: ReplyStream
) -> AsyncIterator[bytes]:
    """The body of a streamed answer."""
    assert stream.replies is not None
    for chunk in answer.opening(prompt_ids, count):
        yield _event(chunk)
    said = time.monotonic()
    async for told in stream.parts():
        chunks: Sequence[bytes] = ()
        if told is not None:
            visit.first_token()
            chunks = [_event(chunk) for chunk in answer.chunks(*told)]
        if chunks or time.monotonic() - said >= HEARTBEAT_S:
            said = time.monotonic()
            yield b"".join(chunks) or answer.ALIVE
    try:
        replies = await stream.replies
    except AgentGymError as error:
        visit.failed = type(error).__name__
        yield _event(answer.failure(*describe(error)))
        return
    for rest in ending(answer, replies, wants_usage):
        yield rest


async def retold(answer: Answer, replies: Sequence[Reply], wants_usage: bool) -> AsyncIterator[bytes]:
    """The body of a streamed answer that was given before."""
    for chunk in answer.opening(replies[0].prompt_ids, len(replies)):
        yield _event(chunk)
    for index, reply in enumerate(replies):
        for chunk in answer.chunks(index, Part.of(reply)):
            yield _event(chunk)
    for rest in ending(answer, replies, wants_usage):
        yield rest


def ending(answer: Answer, replies: Sequence[Reply], wants_usage: bool) -> Sequence[bytes]:
    """What follows the last token."""
    chunks = [chunk for index, reply in enumerate(replies) for chunk in answer.closing(index, reply)]
    if wants_usage:
        chunks.append(answer.usage(replies))
    return [*map(_event, chunks), answer.END]


def _event(value: dict[str, Any]) -> bytes:
    """A chunk that has a type is an event of that name."""
    name = f"event: {value['type']}\n".encode() if "type" in value else b""
    return name + b"data: " + msgspec.json.encode(value) + b"\n\n"
