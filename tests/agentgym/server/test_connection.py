"""Callers that are slow, silent or many, as real sockets: each costs its own time, and only so many are let in."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import replace
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from outside_agents import Pace, slow

from agentgym.server.connection import ConnectionLimits
from agentgym.server.door import Limits
from agentgym.server.process import listen
from agentgym.server.settings import ServerSection

READY = b"GET /health/ready HTTP/1.1\r\nHost: x\r\n\r\n"
ENDLESS = b"GET /health/ready HTTP/1.1\r\nHost: x\r\nX-Long: " + b"a" * 10_000
HEAD_S, PATIENCE_S = 1.0, 60.0


def connect(url: str) -> socket.socket:
    where = urlsplit(url)
    return socket.create_connection((where.hostname, where.port or 80), timeout=PATIENCE_S)


def drip(connection: socket.socket, text: bytes) -> bytes:
    """Sends a byte every 20 ms until the server ends the connection; what it said."""
    connection.settimeout(0.02)
    said = b""
    deadline = time.monotonic() + PATIENCE_S
    for index in range(len(text)):
        assert time.monotonic() < deadline, "the server let it drip"
        try:
            connection.sendall(text[index : index + 1])
            part = connection.recv(65536)
        except TimeoutError:
            continue
        except OSError:  # it hung up on us in the middle of a byte; what it said before may wait to be read
            with suppress(OSError):
                said += connection.recv(65536)
            return said
        if not part:
            return said
        said += part
    raise AssertionError("the text was too short")


def read_answer(connection: socket.socket) -> tuple[int, dict[str, str], Any]:
    """Status, headers and JSON body of one answer."""
    connection.settimeout(PATIENCE_S)
    reader = connection.makefile("rb")
    status = int(reader.readline().split()[1])
    headers: dict[str, str] = {}
    while (line := reader.readline().strip()) != b"":
        name, _, value = line.decode().partition(":")
        headers[name.lower()] = value.strip()
    return status, headers, json.loads(reader.read(int(headers["content-length"])))


def begin(url: str, request: bytes = READY) -> tuple[socket.socket, int]:
    """A connection whose first request was answered, and the status. Whoever stands still for HEAD_S between connecting
    and asking is hung up on, and begins anew."""
    deadline = time.monotonic() + PATIENCE_S
    while True:
        connection = connect(url)
        try:
            connection.sendall(request)
            return connection, read_answer(connection)[0]
        except (OSError, IndexError):  # IndexError: no status line
            connection.close()
            assert time.monotonic() < deadline


@pytest.fixture
def limited(start: Callable[..., Any], limits: Limits) -> Callable[..., Any]:
    def begin(engine: Any = None, **connection: Any) -> Any:
        most = ConnectionLimits(**{"max_connections": 8, "max_head_s": HEAD_S, "max_read_s": PATIENCE_S} | connection)
        options = {} if engine is None else {"engine_factory": engine}
        return start(limits=replace(limits, connection=most), **options)

    return begin


@pytest.fixture
def server(limited: Callable[..., Any]) -> Any:
    return limited()


def failures(url: str) -> dict[str, float]:
    deadline = time.monotonic() + PATIENCE_S
    while True:
        try:
            lines = httpx.get(f"{url}/metrics").text.splitlines()
            break
        except httpx.TransportError:  # hung up on, as in `begin`
            assert time.monotonic() < deadline
    found = (line.rsplit(" ", 1) for line in lines if line.startswith("agentgym_failures_total{"))
    return {name.split('"')[1]: float(value) for name, value in found}


def test_a_head_that_drips_is_given_up(server: Any) -> None:
    said = b""
    deadline = time.monotonic() + PATIENCE_S
    while not said and time.monotonic() < deadline:  # no word, as in `begin`: its first byte came too late
        began = time.monotonic()
        with closing(connect(server.url)) as connection:
            said = drip(connection, ENDLESS)
        assert time.monotonic() - began >= HEAD_S
    head, _, body = said.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 408 ")
    assert b"connection: close" in head
    error = json.loads(body)["error"]
    assert (error["code"], error["type"]) == ("head_timeout", "invalid_request_error")
    assert failures(server.url) == {"HeadTimeoutError": 1.0}


def test_so_is_one_behind_an_answered_request(server: Any) -> None:
    connection, status = begin(server.url)
    with closing(connection):
        assert status == 200
        assert drip(connection, ENDLESS).startswith(b"HTTP/1.1 408 ")


def test_so_is_a_body_that_nobody_waits_for_any_more(server: Any) -> None:
    refused = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000000\r\n\r\n"
    connection, status = begin(server.url, refused)
    with closing(connection):
        assert status == 413
        drip(connection, b"a" * 10_000)  # ended within PATIENCE_S, or this fails


def test_a_stranger_s_body_is_not_even_waited_for(server: Any) -> None:
    """Who brings no key may ask how the server is, and fill no memory with it."""
    connection, status = begin(server.url, READY.replace(b"Host", b"Content-Length: 40000\r\nHost"))
    with closing(connection):
        assert status == 200
        said = b""
        with suppress(ConnectionError):
            connection.sendall(b"a" * 40_000)
            said = connection.recv(100)
        assert said == b"", "nor is it taken for the next request"


def test_a_connection_that_says_nothing_is_closed_without_an_answer(server: Any) -> None:
    with closing(connect(server.url)) as connection, suppress(ConnectionResetError):
        assert connection.recv(100) == b""
    assert failures(server.url) == {}


def test_the_time_of_a_head_is_not_that_of_an_answer_or_of_a_pause(limited: Callable[..., Any]) -> None:
    server = limited(engine=slow(Pace(0.1)))
    chat = {"model": "small", "messages": [{"role": "user", "content": "1 up"}], "max_tokens": 12, "seed": 1}
    body = json.dumps(chat | {"temperature": 1.0}).encode()
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    request = head + b"Content-Length: %d\r\n\r\n" % len(body) + body
    connection, status = begin(server.url, request)  # 1.2 s, if no token ends it
    with closing(connection):
        assert status == 200
        time.sleep(2 * HEAD_S)  # an idle connection is kept
        connection.sendall(request)
        assert read_answer(connection)[0] == 200


def test_only_so_many_connections_are_open(limited: Callable[..., Any]) -> None:
    server = limited(max_connections=3, max_head_s=PATIENCE_S)
    held = [connect(server.url) for _ in range(3)]
    deadline = time.monotonic() + PATIENCE_S
    try:
        for connection in held:  # each is let in, and stays
            connection.sendall(READY)
            assert read_answer(connection)[0] == 200
        with closing(connect(server.url)) as one_more:
            status, headers, body = read_answer(one_more)
            assert (status, body["error"]["code"]) == (503, "too_many_connections")
            assert (headers["retry-after"], headers["connection"]) == ("1", "close")
        held.pop().close()
        while True:  # the server has yet to see that it went
            with closing(connect(server.url)) as again:
                again.sendall(READY)
                if read_answer(again)[0] == 200:
                    break
            assert time.monotonic() < deadline
    finally:
        for connection in held:
            connection.close()


def test_an_answer_that_nobody_reads_is_given_up(limited: Callable[..., Any]) -> None:
    server = limited(max_read_s=0.5, max_head_s=PATIENCE_S)
    with closing(socket.socket()) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        where = urlsplit(server.url)
        connection.connect((where.hostname, where.port))
        connection.settimeout(PATIENCE_S)
        connection.sendall(b"GET /openapi.json HTTP/1.1\r\nHost: x\r\n\r\n" * 400)  # more than the kernel holds
        deadline = time.monotonic() + PATIENCE_S
        while failures(server.url).get("SlowReaderError") != 1.0:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        read = 0
        with suppress(ConnectionResetError):
            while part := connection.recv(1 << 20):
                read += len(part)
        assert read < 400 * len(httpx.get(f"{server.url}/openapi.json").content)


def test_an_answer_never_waits_for_the_acknowledgement_of_its_head() -> None:
    listener = listen(ServerSection(port=0))
    with closing(listener), closing(socket.create_connection(listener.getsockname())):
        listener.setblocking(True)
        accepted, _ = listener.accept()
        with closing(accepted):
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
