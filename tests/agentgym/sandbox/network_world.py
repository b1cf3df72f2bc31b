"""A world on this machine's loopback, and a box as its gateway sees it, both played by a test."""

from __future__ import annotations

import queue
import socket
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from agentgym.errors import SandboxDiedError
from agentgym.sandbox.network.allow_list import AllowList
from agentgym.sandbox.network.gateway import Gateway
from agentgym.sandbox.network.report import NetworkLimits

LIMITS = NetworkLimits(bytes=2**26, at_once=4, connections=20, head_s=30, connect_s=30, idle_s=30, total_s=120)
WAIT_S = 60.0
SENDS = 160  # of 64 KiB: more than the kernel's buffers of a connection hold


class World:
    """A server of one connection at a time that does what a test says and remembers what it heard."""

    def __init__(self, serve: Callable[[socket.socket, World], None]) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self.heard: list[bytes] = []
        self.calls = 0
        self.ended = threading.Event()
        self._serve = serve
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            self.calls += 1
            with connection:
                connection.settimeout(WAIT_S)
                try:
                    self._serve(connection, self)
                except OSError:
                    self.heard.append(b"<broken>")
            self.ended.set()

    def close(self) -> None:
        self._listener.close()


def hear_all(connection: socket.socket, world: World) -> None:
    while data := connection.recv(65_536):
        world.heard.append(data)


def echo(connection: socket.socket, world: World) -> None:
    while data := connection.recv(65_536):
        world.heard.append(data)
        connection.sendall(data)


def answer_once(connection: socket.socket, world: World) -> None:
    """One HTTP answer, then whatever else comes within a moment."""
    world.heard.append(connection.recv(65_536))
    connection.sendall(b"HTTP/1.1 200 OK\r\n\r\nhello")
    connection.shutdown(socket.SHUT_WR)
    hear_all(connection, world)


class Box:
    """The worker's end of the frames, played by a test."""

    def __init__(self, *allow: str, limits: NetworkLimits = LIMITS, resolve: Any = None) -> None:
        self.frames: queue.Queue[tuple[dict[str, Any], bytes]] = queue.Queue()
        self.broken: list[str] = []
        self.is_dead = False
        more = {} if resolve is None else {"resolve": resolve}
        self.gateway = Gateway("box-1", AllowList(allow), limits, self._hear, self.broken.append, **more)

    def _hear(self, fields: Mapping[str, Any], body: bytes) -> None:
        if self.is_dead:
            raise SandboxDiedError("box-1 died")
        assert fields["op"] == "net"
        self.frames.put((dict(fields), body))

    def say(self, event: str, number: Any = 1, body: bytes = b"", **more: Any) -> None:
        self.gateway.take({"net": number, "event": event, **more}, body)

    def request(self, data: bytes, number: int = 1) -> None:
        self.say("open", number)
        self.say("data", number, data)

    def read(self, number: int = 1, *, most: int = 2**30, takes: bool = True) -> bytes:
        """What the program reads, until its end or `most` bytes."""
        got = bytearray()
        while len(got) < most:
            fields, body = self.frames.get(timeout=WAIT_S)
            if fields["net"] != number or fields["event"] == "took":
                continue
            if fields["event"] != "data":
                break
            got += body
            if takes:
                self.say("took", number, size=len(body))
        return bytes(got)

    def answer(self, data: bytes, number: int = 1) -> bytes:
        """The whole answer to a request; then the program hangs up."""
        self.request(data, number)
        got = self.read(number)
        self.say("end", number)
        self.say("gone", number)
        return got

    def connections(self, count: int) -> Any:
        """The report, once it tells of so many."""
        until = time.monotonic() + WAIT_S
        while self.gateway.report().connections < count and time.monotonic() < until:
            time.sleep(0.01)
        return self.gateway.report()

    def why_broken(self) -> str:
        until = time.monotonic() + WAIT_S
        while not self.broken and time.monotonic() < until:
            time.sleep(0.01)
        return self.broken[0]


def get(target: str) -> bytes:
    return f"GET {target} HTTP/1.1\r\nHost: inner.secret\r\n\r\n".encode()
