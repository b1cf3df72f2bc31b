"""The way to one server's streamed answers: JSON out, lines in, over connections that are kept. Must never know what
the lines say.

Law: a connection is used again only behind an answer that was read to its end; one whose answer is left half-way is
closed, which is how the server learns that nobody waits. Who has all of an answer that matters says so, and need not
wait for its end.

Why not a client library: sampling is most of what the service's process does, and httpx took three of the five
milliseconds of CPU time that a request cost it.
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
import time
from collections.abc import AsyncIterator
from urllib.parse import urlsplit

import msgspec

_KEPT_S = 3.0  # idle; servers close theirs after five seconds (uvicorn's default), and must not be met doing so
_REST_S = 5.0  # for the end of an answer that nobody waits for
_MOST_LINE = 2**24  # bytes of one event: a prompt's logprobs are one


class Answer:
    """A streamed answer. `lines` or `read` takes its body, once."""

    def __init__(self, status: int, headers: dict[bytes, bytes], reader: asyncio.StreamReader) -> None:
        self.status = status
        self.complete = False
        self.suffices = False  # set by whoever has read what matters: the rest is its end
        self.kept = headers.get(b"connection", b"").lower() != b"close"
        self._length = int(headers.get(b"content-length", b"-1"))
        self._chunked = headers.get(b"transfer-encoding", b"").lower() == b"chunked"
        self._reader = reader

    async def lines(self) -> AsyncIterator[bytes]:
        """The body's lines, as they come. Raises OSError, EOFError, ValueError where the server breaks off."""
        rest = b""
        async for part in self._parts():
            *lines, rest = (rest + part).split(b"\n")
            for line in lines:
                yield line
        if rest:
            yield rest

    async def read(self) -> bytes:
        """The whole body, or what `lines` has left of it. Raises as `lines` does."""
        return b"".join([part async for part in self._parts()])

    async def _parts(self) -> AsyncIterator[bytes]:
        if self._chunked:
            while size := int((await self._reader.readuntil(b"\r\n")).partition(b";")[0], 16):
                yield (await self._reader.readexactly(size + 2))[:-2]
            while await self._reader.readuntil(b"\r\n") != b"\r\n":
                pass  # trailers
        elif self._length >= 0:
            left, self._length = self._length, 0
            yield await self._reader.readexactly(left)
        else:  # its end is the connection's
            self.kept = False
            while part := await self._reader.read(65536):
                yield part
        self.complete = True


class StreamClient:
    """Posts to the server at `url`, or at the Unix socket `socket`.

    >>> async with client.post("/inference/v1/generate", {"token_ids": [1, 2]}) as answer:
    ...     async for line in answer.lines(): ...
    """

    def __init__(self, *, url: str | None = None, socket: str | None = None) -> None:
        where = urlsplit(url or "http://vllm")
        self._socket = socket
        self._host = where.hostname or ""
        self._tls = ssl.create_default_context() if where.scheme == "https" else None
        self._port = where.port or (443 if self._tls else 80)
        self._prefix = where.path.rstrip("/")
        self._authority = where.netloc.rpartition("@")[2]
        self._idle: list[tuple[float, asyncio.StreamReader, asyncio.StreamWriter]] = []
        self._ending: set[asyncio.Task[None]] = set()

    @contextlib.asynccontextmanager
    async def post(self, route: str, body: object) -> AsyncIterator[Answer]:
        """The answer to `body`. Raises OSError, EOFError, ValueError for a server that does not answer in HTTP."""
        content = msgspec.json.encode(body)
        head = (
            f"POST {self._prefix}{route} HTTP/1.1\r\nHost: {self._authority}\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(content)}\r\n\r\n"
        )
        answer: Answer | None = None
        reader, writer, used = await self._connection()
        try:
            try:
                answer = await _exchange(reader, writer, head.encode() + content)
            except (ConnectionError, EOFError):
                if not used:
                    raise
                writer.close()  # closed by the server while it was idle, and nothing was done for this request yet
                reader, writer = await self._connect()
                answer = await _exchange(reader, writer, head.encode() + content)
            yield answer
        finally:
            if answer is not None and answer.suffices and not answer.complete:
                task = asyncio.create_task(self._end(answer, reader, writer))
                self._ending.add(task)
                task.add_done_callback(self._ending.discard)
            else:
                self._give_back(answer, reader, writer)

    async def close(self) -> None:
        """Closes what is idle; answers that are being read close theirs."""
        for task in self._ending:
            task.cancel()
        await asyncio.gather(*self._ending, return_exceptions=True)
        for _, _, writer in self._idle:
            writer.close()
        self._idle.clear()

    async def _end(self, answer: Answer, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Reads what is left of an answer, for the sake of its connection."""
        try:
            with contextlib.suppress(OSError, EOFError, ValueError, asyncio.LimitOverrunError):
                async with asyncio.timeout(_REST_S):
                    await answer.read()
        finally:
            self._give_back(answer, reader, writer)

    def _give_back(self, answer: Answer | None, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if answer is not None and answer.complete and answer.kept:
            self._idle.append((time.monotonic(), reader, writer))
        else:
            writer.close()

    async def _connection(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter, bool]:
        """One to use, and whether it was used before."""
        while self._idle:
            since, reader, writer = self._idle.pop()
            if time.monotonic() - since < _KEPT_S and not reader.at_eof() and not writer.is_closing():
                return reader, writer, True
            writer.close()
        return *await self._connect(), False

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        if self._socket is not None:
            return await asyncio.open_unix_connection(self._socket, limit=_MOST_LINE)
        return await asyncio.open_connection(self._host, self._port, ssl=self._tls, limit=_MOST_LINE)


async def _exchange(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, request: bytes) -> Answer:
    writer.write(request)
    await writer.drain()
    head = await reader.readuntil(b"\r\n\r\n")
    first, *rest = head[:-4].split(b"\r\n")
    version, _, status = first.partition(b" ")
    if not version.startswith(b"HTTP/1."):
        raise ValueError(f"no HTTP: {first[:100]!r}")
    pairs = (line.partition(b":") for line in rest)
    headers = {name.strip().lower(): value.strip() for name, _, value in pairs}
    return Answer(int(status[:3]), headers, reader)
