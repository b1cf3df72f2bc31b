"""The host's end of a box's way out: an HTTP proxy that reaches what the box's allow-list names. Law: the box has no
interface but its loopback, in every tier; what it sends arrives here as frames of its worker, and this process, which
may reach more than the box, decides for each connection, looks names up itself and connects to the address it checked.

The box is no way into this process: nothing of it is parsed but the head of a request, everything is bounded
(`NetworkLimits`, the windows of the streams), and a box that breaks the rules of the frames is dead. One thread and
event loop for each box that uses its way out, so that a flood in one does not hold up another.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import socket
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from agentgym.errors import SandboxError
from agentgym.sandbox.inside.worker_network import CHUNK, HOST, PORT
from agentgym.sandbox.network.allow_list import Address, AllowList
from agentgym.sandbox.network.report import Connection, Decision, NetworkLimits, NetworkReport
from agentgym.sandbox.network.request_head import MAX_HEAD, BadRequest, Request, parse
from agentgym.sandbox.network.streams import ForgedFrameError, Send, Stream, StreamGoneError, Streams

logger = logging.getLogger(__name__)

Resolve = Callable[[str, int], Sequence[str]]  # addresses of a name; OSError: it has none

UNHEARD = 256  # frames that wait for the loop; more wait on the line
RECENT = 256  # connections that a report tells of
LOCAL = "localhost,127.0.0.1,::1"
REASONS = {400: "Bad Request", 403: "Forbidden", 411: "Length Required", 502: "Bad Gateway", 504: "Gateway Timeout"}


def proxy_environment() -> dict[str, str]:
    """What tells programs in the box of it. Servers in the box are asked directly."""
    url = f"http://{HOST}:{PORT}"
    names = ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY")
    return {**dict.fromkeys(names, url), "no_proxy": LOCAL, "NO_PROXY": LOCAL}


def look_up(name: str, port: int) -> list[str]:
    """As this machine does."""
    found = socket.getaddrinfo(name, port, type=socket.SOCK_STREAM)
    return [str(entry[4][0]).partition("%")[0] for entry in found]


class NotReached(Exception):
    """The connection is not made, or not continued."""

    def __init__(self, decision: Decision, status: int, why: str) -> None:
        super().__init__(why)
        self.decision: Decision = decision
        self.status, self.why = status, why


class Gateway:
    """The way out of one box. `send` gives a frame to its worker; `broken` is called when the box broke the rules.

    Example: `Gateway("box", AllowList(("pypi.org:443",)), NetworkLimits(bytes=2**28), send, broken)`, then `take` for
    each frame that comes.
    """

    def __init__(
        self,
        name: str,
        allow: AllowList,
        limits: NetworkLimits,
        send: Send,
        broken: Callable[[str], object],
        resolve: Resolve = look_up,
    ) -> None:
        self._name, self._allow, self._limits = name, allow, limits
        self._broken, self._resolve = broken, resolve
        self._loop, self._over = asyncio.new_event_loop(), asyncio.Event()
        self._streams = Streams(limits.at_once, send, self._begin)
        self._tasks: set[asyncio.Task[None]] = set()
        self._unheard = threading.Semaphore(UNHEARD)
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()  # of what is below
        self._is_closed = False
        self._opened = 0
        self._report = NetworkReport()
        self._recent: deque[Connection] = deque(maxlen=RECENT)

    def take(self, fields: Mapping[str, Any], body: bytes) -> None:
        """A frame of the worker, from the thread that reads the line; waits while too many wait already."""
        while not self._unheard.acquire(timeout=1.0):
            if self._is_closed:
                return
        with self._lock:
            if self._is_closed:
                return
            if self._thread is None:  # many boxes never use it
                self._thread = threading.Thread(target=self._run, name="agentgym-network", daemon=True)
                self._thread.start()
            self._loop.call_soon_threadsafe(self._hear, dict(fields), body)

    def report(self) -> NetworkReport:
        with self._lock:
            seen = self._report
            return NetworkReport(
                seen.connections, seen.refused, seen.sent_bytes, seen.received_bytes, tuple(self._recent)
            )

    def close(self) -> None:
        """Ends all connections; returns when they are closed. Idempotent."""
        with self._lock:
            was_open, self._is_closed = not self._is_closed, True
            thread = self._thread
            if was_open and thread is None:
                self._loop.close()
            elif was_open:
                self._loop.call_soon_threadsafe(self._over.set)
        if thread is not None and thread is not threading.current_thread():
            thread.join()

    # ------------------------------------------------------------------------------------------------ in the loop

    def _run(self) -> None:
        try:
            self._loop.run_until_complete(self._live())
        finally:
            self._loop.close()

    async def _live(self) -> None:
        await self._over.wait()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _hear(self, fields: Mapping[str, Any], body: bytes) -> None:
        self._unheard.release()
        if self._is_closed:  # what was on its way when the loop was told to stop
            return
        try:
            self._streams.take(fields, body)
        except ForgedFrameError as error:
            self._broken(f"its worker sent {error}")
            self._stop()
        except (SandboxError, OSError):  # the box is gone
            self._stop()

    def _stop(self) -> None:
        with self._lock:
            self._is_closed = True
        self._over.set()

    def _begin(self, stream: Stream) -> None:
        task = self._loop.create_task(self._serve(stream))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, stream: Stream) -> None:
        """One connection, from its first byte until nothing of it is left in the box."""
        visit = _Visit(self, stream, self._limits)
        with contextlib.suppress(SandboxError, OSError):  # the line to the box is broken, and with it everything ends
            try:
                with contextlib.suppress(StreamGoneError):
                    await visit.run()
            finally:
                self._record(visit.ended(self._loop.time()))
            with contextlib.suppress(TimeoutError):  # a program that does not read to the end
                async with asyncio.timeout(self._limits.idle_s):
                    await stream.gone()
            stream.drop()

    # ------------------------------------------------------------------------------------------------- the rules

    def admit(self) -> None:
        """Counts one more connection."""
        self._opened += 1
        if self._opened > self._limits.connections:
            raise NotReached("limited", 403, f"the box has made {self._limits.connections} connections already")

    def spend(self, sent: int, received: int) -> None:
        """Counts bytes before they go on."""
        with self._lock:
            before = self._report
            total = before.sent_bytes + before.received_bytes + sent + received
            if total > self._limits.bytes:
                raise NotReached("limited", 403, f"the box has used up its {self._limits.bytes >> 20} MiB of network")
            self._report = NetworkReport(
                before.connections, before.refused, before.sent_bytes + sent, before.received_bytes + received
            )

    async def addresses(self, request: Request) -> list[Address]:
        """Where to connect to: of a listed host, every address that is no way to something else."""
        host, port = request.host, request.port
        refusal = self._allow.refusal(host, port)
        if refusal is not None:
            raise NotReached("refused", 403, f"{host}:{port} is {refusal}")
        try:
            found = [ipaddress.ip_address(host)]
        except ValueError:
            found = [ipaddress.ip_address(text) for text in await self._in_thread(host, port)]
        refusals = {address: self._allow.address_refusal(address, port) for address in found}
        good = [address for address, why in refusals.items() if why is None]
        if not good:
            why = next(filter(None, refusals.values()), "it has no address")
            raise NotReached("refused" if found else "failed", 403 if found else 502, f"{host}:{port}: {why}")
        return good

    async def _in_thread(self, host: str, port: int) -> Sequence[str]:
        """A look-up cannot be cancelled; one that is too slow is left to end by itself."""
        result: asyncio.Future[Sequence[str]] = self._loop.create_future()

        def settle(error: Exception | None, found: Sequence[str]) -> None:
            if not result.done():
                result.set_exception(error) if error else result.set_result(found)

        def work() -> None:
            error, found = None, ()
            try:
                found = tuple(self._resolve(host, port))
            except (OSError, UnicodeError) as problem:
                error = NotReached("failed", 502, f"{host}: {problem}")
            with contextlib.suppress(RuntimeError):  # the loop has ended meanwhile
                self._loop.call_soon_threadsafe(settle, error, found)

        threading.Thread(target=work, name="agentgym-resolve", daemon=True).start()
        return await result

    def _record(self, done: Connection) -> None:
        with self._lock:
            before = self._report
            refused = before.refused + (done.decision in ("refused", "limited"))
            self._report = NetworkReport(before.connections + 1, refused, before.sent_bytes, before.received_bytes)
            self._recent.append(done)
        logger.info("sandbox %s: a connection has ended: %s", self._name, done)


class _Visit:
    """One connection of the box while it lasts."""

    def __init__(self, gateway: Gateway, stream: Stream, limits: NetworkLimits) -> None:
        self._gateway, self._stream, self._limits = gateway, stream, limits
        self._loop = asyncio.get_running_loop()
        self._began = self._moved = self._loop.time()
        self._host, self._port = "", 0
        self._stopped: NotReached | None = None
        self._sent = self._received = 0
        self._answered = False

    async def run(self) -> None:
        try:
            await self._reach()
        except NotReached as error:
            self._stopped = error
            await self._refuse(error.status, error.why)

    def ended(self, now: float) -> Connection:
        stopped = self._stopped or NotReached("allowed", 200, "")
        took = now - self._began
        return Connection(self._host, self._port, stopped.decision, stopped.why, self._sent, self._received, took)

    async def _reach(self) -> None:
        self._gateway.admit()
        request = await self._request()
        self._host, self._port = request.host, request.port
        try:
            async with asyncio.timeout(self._limits.connect_s):
                reader, writer = await self._connect(request)
        except TimeoutError:
            raise NotReached("failed", 504, f"{request.host}:{request.port} did not answer in time") from None
        try:
            await self._relay(request, reader, writer)
        finally:
            writer.transport.abort()

    async def _request(self) -> Request:
        try:
            async with asyncio.timeout(self._limits.head_s):
                head = await self._stream.read_head(MAX_HEAD)
            if head is None:
                raise NotReached("refused", 400, f"no request in the first {MAX_HEAD} bytes")
            return parse(head)
        except TimeoutError:
            raise NotReached("refused", 400, "no request came in time") from None
        except BadRequest as error:
            raise NotReached("refused", error.status, error.why) from None

    async def _connect(self, request: Request) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        problem: OSError | None = None
        for address in await self._gateway.addresses(request):
            try:
                return await asyncio.open_connection(str(address), request.port)
            except OSError as error:
                problem = error
        raise NotReached("failed", 502, f"{request.host}:{request.port}: {problem}")

    async def _relay(self, request: Request, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if request.head is None:
            self._answered = True
            await self._stream.write(b"HTTP/1.1 200 Connection established\r\n\r\n")
        else:
            self._count(sent=len(request.head))
            writer.write(request.head)
        up = self._loop.create_task(self._up(writer, None if request.is_tunnel else request.body_bytes))
        down = self._loop.create_task(self._down(reader))
        pending: set[asyncio.Task[None]] = {up, down}
        try:
            while pending and (request.is_tunnel or down in pending):
                left = min(self._moved + self._limits.idle_s, self._began + self._limits.total_s) - self._loop.time()
                if left <= 0:
                    raise NotReached("limited", 504, "nothing moved, or it took too long")
                done, pending = await asyncio.wait(pending, timeout=left, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    task.result()
        except SandboxError:  # the box is gone: not the world's fault
            raise
        except OSError as error:  # of the connection to the world
            raise NotReached("failed", 502, str(error)) from None
        finally:
            for task in (up, down):
                task.cancel()
            await asyncio.gather(up, down, return_exceptions=True)

    async def _up(self, writer: asyncio.StreamWriter, left: int | None) -> None:
        """From the box to the world; `left`: of a request whose body has an end."""
        while left is None or left > 0:
            data = await self._stream.read()
            if not data:
                break
            data = data if left is None else data[:left]
            left = None if left is None else left - len(data)
            self._count(sent=len(data))
            writer.write(data)
            await writer.drain()
        if left is None:
            writer.write_eof()

    async def _down(self, reader: asyncio.StreamReader) -> None:
        while data := await reader.read(CHUNK):
            self._count(received=len(data))
            self._answered = True
            await self._stream.write(data)
        self._stream.end()

    def _count(self, sent: int = 0, received: int = 0) -> None:
        self._gateway.spend(sent, received)
        self._sent, self._received = self._sent + sent, self._received + received
        self._moved = self._loop.time()

    async def _refuse(self, status: int, why: str) -> None:
        """Says so, unless an answer has begun, which then ends too early for the program to take it for whole."""
        if self._answered:
            self._stream.drop()
            return
        text = f"agentgym: {why}\n".encode("utf-8", "replace")
        head = f"HTTP/1.1 {status} {REASONS[status]}\r\nContent-Type: text/plain; charset=utf-8\r\n"
        await self._stream.write(f"{head}Content-Length: {len(text)}\r\nConnection: close\r\n\r\n".encode() + text)
        self._stream.end()
