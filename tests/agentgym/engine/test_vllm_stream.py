"""The way to a server's streamed answers, against servers that answer well and badly, byte by byte."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest

from agentgym.engine.vllm import stream as vllm_stream
from agentgym.engine.vllm.stream import StreamClient

STREAMED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
Speak = Callable[[asyncio.StreamReader, asyncio.StreamWriter, int], Awaitable[None]]


@pytest.fixture(autouse=True)
def _unhurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether a connection is kept must not depend on how long this process stood still."""
    monkeypatch.setattr(vllm_stream, "_KEPT_S", 600.0)
    monkeypatch.setattr(vllm_stream, "_REST_S", 600.0)


def chunk(text: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(text), text)


async def asked(reader: asyncio.StreamReader) -> bytes:
    """The body of the next request."""
    head = await reader.readuntil(b"\r\n\r\n")
    length = int(head.lower().partition(b"content-length:")[2].split()[0])
    return await reader.readexactly(length)


class Server:
    """Speaks on each connection what a test says; counts them, and those that the client has closed."""

    def __init__(self, path: Path, speak: Speak) -> None:
        self.path = str(path / "http.sock")
        self.connections = 0
        self.hung_up = asyncio.Event()
        self._speak = speak

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            await self._speak(reader, writer, self.connections)
        except (asyncio.IncompleteReadError, ConnectionError):
            self.hung_up.set()
        finally:
            writer.close()

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[StreamClient]:
        server = await asyncio.start_unix_server(self._connected, self.path)
        client = StreamClient(socket=self.path)
        async with server:
            yield client
            await client.close()


async def lines(client: StreamClient, body: object) -> list[bytes]:
    async with client.post("/generate", body) as answer:
        assert answer.status == 200
        return [line async for line in answer.lines()]


def test_lines_come_whole_however_chunks_cut_them_and_the_connection_is_kept(tmp_path: Path) -> None:
    async def speak(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, number: int) -> None:
        while True:
            said = json.loads(await asked(reader))["n"]
            parts = [b"data: %d\n" % said, b"\nda", b"ta: ", "ä".encode()[:1], "ä".encode()[1:] + b"\n", b"", b"end"]
            writer.write(STREAMED + b"".join(map(chunk, filter(None, parts))) + b"0\r\n\r\n")

    async def main() -> None:
        server = Server(tmp_path, speak)
        async with server.running() as client:
            for number in (7, 8):
                expected = [b"data: %d" % number, b"", "data: ä".encode(), b"end"]
                assert await lines(client, {"n": number}) == expected
            assert server.connections == 1

    asyncio.run(main())


def test_an_answer_that_is_left_closes_its_connection(tmp_path: Path) -> None:
    async def speak(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, number: int) -> None:
        await asked(reader)
        writer.write(STREAMED + chunk(b"data: 1\n"))
        await reader.readexactly(1)  # until the client hangs up

    async def main() -> None:
        server = Server(tmp_path, speak)
        async with server.running() as client:
            async with client.post("/generate", {}) as answer:
                async for line in answer.lines():
                    assert line == b"data: 1"
                    break
            await asyncio.wait_for(server.hung_up.wait(), 60)
            server.hung_up.clear()
            waiting = asyncio.create_task(lines(client, {}))
            while server.connections < 2:
                await asyncio.sleep(0.01)
            waiting.cancel()
            await asyncio.wait_for(server.hung_up.wait(), 60)

    asyncio.run(main())


@pytest.mark.parametrize("in_chunks", [True, False])
def test_who_has_enough_of_an_answer_need_not_wait_for_its_end_and_the_connection_is_kept(
    tmp_path: Path, in_chunks: bool
) -> None:
    left = asyncio.Event()

    async def speak(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, number: int) -> None:
        while True:
            said = json.loads(await asked(reader))["n"]
            text = b"data: %d\n" % said
            whole = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(text), text)
            writer.write(STREAMED + chunk(text) if in_chunks else whole)
            await left.wait()
            if in_chunks:
                writer.write(chunk(b"data: [DONE]\n") + b"0\r\n\r\n")

    async def main() -> None:
        server = Server(tmp_path, speak)
        async with server.running() as client:
            for number in (7, 8):
                async with client.post("/generate", {"n": number}) as answer:
                    async for line in answer.lines():
                        assert line == b"data: %d" % number
                        answer.suffices = True
                        break
                left.set()
                while client._ending:
                    await asyncio.sleep(0.001)
            assert server.connections == 1  # one whose answer did not end in its time would have been closed

    asyncio.run(asyncio.wait_for(main(), 60))


def test_a_kept_connection_that_the_server_closed_is_no_failure_but_a_new_one_is(tmp_path: Path) -> None:
    async def speak(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, number: int) -> None:
        if number == 3:
            await asked(reader)
            return  # hangs up without a word
        await asked(reader)
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
        if number == 1:
            await asked(reader)  # takes the next request, and hangs up on it as if it had been too late

    async def main() -> None:
        server = Server(tmp_path, speak)
        async with server.running() as client:
            assert await lines(client, {}) == [b"ok"]
            assert await lines(client, {}) == [b"ok"]  # asked on the first connection, answered on the second
            assert server.connections == 2
            await asyncio.sleep(0.05)  # the second one is closed by now, and seen to be
            with pytest.raises(EOFError):
                await lines(client, {})
            assert server.connections == 3

    asyncio.run(main())


BROKEN: dict[str, bytes] = {
    "ends in the head": b"HTTP/1.1 200",
    "ends in a chunk": STREAMED + b"ff\r\ndata",
    "ends before the last chunk": STREAMED + chunk(b"data: 1\n"),
    "ends before its length": b"HTTP/1.1 200 OK\r\nContent-Length: 20\r\n\r\nshort",
    "no HTTP": b"SSH-2.0-OpenSSH_9.2\r\n\r\n",
    "no size of a chunk": STREAMED + b"data: 1\n\r\n",
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_server_that_breaks_off_is_an_error(tmp_path: Path, name: str) -> None:
    async def speak(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, number: int) -> None:
        await asked(reader)
        writer.write(BROKEN[name])

    async def main() -> None:
        async with Server(tmp_path, speak).running() as client:
            with pytest.raises((OSError, EOFError, ValueError)):
                await lines(client, {})

    asyncio.run(main())


def test_a_refusal_is_read_whole(tmp_path: Path) -> None:
    async def speak(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, number: int) -> None:
        await asked(reader)
        writer.write(b"HTTP/1.1 503 Service Unavailable\r\nConnection: close\r\nContent-Length: 6\r\n\r\npaused")

    async def main() -> None:
        server = Server(tmp_path, speak)
        async with server.running() as client:
            for _ in range(2):
                async with client.post("/generate", {}) as answer:
                    assert (answer.status, await answer.read()) == (503, b"paused")
            assert server.connections == 2  # it was told that the first one would close

    asyncio.run(main())
