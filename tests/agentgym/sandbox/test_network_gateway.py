"""The host's end of a way out, asked by boxes that are honest, slow, greedy or lying; the world is real servers on this
machine's loopback, which are listed by address."""

from __future__ import annotations

import queue
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest

from agentgym.errors import SandboxDiedError
from agentgym.sandbox.inside.worker_network import WINDOW
from agentgym.sandbox.network.allow_list import AllowList
from agentgym.sandbox.network.gateway import Gateway
from agentgym.sandbox.network.report import NetworkLimits

LIMITS = NetworkLimits(bytes=2**26, at_once=4, connections=20, head_s=5, connect_s=5, idle_s=5, total_s=20)
WAIT_S = 20.0
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


@pytest.fixture
def world() -> Iterator[Callable[..., World]]:
    made: list[World] = []

    def make(serve: Callable[[socket.socket, World], None]) -> World:
        made.append(World(serve))
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.fixture
def boxes() -> Iterator[Callable[..., Box]]:
    made: list[Box] = []

    def make(*allow: str, **options: Any) -> Box:
        made.append(Box(*allow, **options))
        return made[-1]

    yield make
    for box in made:
        box.gateway.close()


def get(target: str) -> bytes:
    return f"GET {target} HTTP/1.1\r\nHost: inner.secret\r\n\r\n".encode()


# ---------------------------------------------------------------------------------------------------- what gets through


def test_one_request_and_not_what_is_sent_behind_it(world, boxes) -> None:
    server = world(answer_once)
    box = boxes(f"127.0.0.1:{server.port}")
    body = f"POST http://127.0.0.1:{server.port}/a HTTP/1.1\r\nContent-Length: 3\r\n\r\nabc".encode()
    smuggled = b"GET / HTTP/1.1\r\nHost: inner.secret\r\n\r\n"

    assert box.answer(body + smuggled) == b"HTTP/1.1 200 OK\r\n\r\nhello"

    server.ended.wait(WAIT_S)
    heard = b"".join(server.heard)
    assert heard.startswith(b"POST /a HTTP/1.1\r\nHost: 127.0.0.1:%d\r\n" % server.port)
    assert heard.endswith(b"\r\n\r\nabc")
    assert b"inner.secret" not in heard
    (seen,) = box.connections(1).recent
    assert (seen.host, seen.port, seen.decision, seen.why) == ("127.0.0.1", server.port, "allowed", "")
    assert (seen.sent_bytes, seen.received_bytes) == (len(heard), 24)
    assert box.gateway.report().sent_bytes == len(heard)
    assert not box.broken


def test_a_tunnel_carries_both_ways_until_both_have_ended(world, boxes) -> None:
    server = world(echo)
    box = boxes(f"127.0.0.1:{server.port}")
    box.request(f"CONNECT 127.0.0.1:{server.port} HTTP/1.1\r\n\r\nearly ".encode())
    assert box.read(most=45) == b"HTTP/1.1 200 Connection established\r\n\r\nearly "
    box.say("data", body=b"later")
    assert box.read(most=5) == b"later"
    box.say("end")  # the program writes no more; the server sees it, and ends too
    assert box.read() == b""
    box.say("gone")
    assert server.ended.wait(WAIT_S)
    assert box.connections(1).recent[0].sent_bytes == len(b"early later")


def test_a_listed_name_is_looked_up_once_and_that_address_is_asked(world, boxes) -> None:
    server = world(answer_once)
    asked: list[tuple[str, int]] = []

    def resolve(name: str, port: int) -> Sequence[str]:
        asked.append((name, port))
        return ["10.255.255.1", "127.0.0.1"] if len(asked) == 1 else ["169.254.169.254"]

    box = boxes(f"*.mirror.test:{server.port}", f"127.0.0.1:{server.port}", resolve=resolve)
    assert box.answer(get(f"http://A.Mirror.test:{server.port}/")).endswith(b"hello")
    assert asked == [("a.mirror.test", server.port)]


# ------------------------------------------------------------------------------------------------------- what does not


@pytest.mark.parametrize(
    ("request_", "status", "why"),
    [
        (get("http://other.test/"), 403, b"other.test:80 is not in sandbox.allow_network"),
        (get("http://listed.test:81/"), 403, b"listed.test:81 is not in sandbox.allow_network"),
        (get("http://169.254.169.254/"), 403, b"169.254.169.254:80 is not in sandbox.allow_network"),
        (get("http://listed.test/"), 403, b"listed.test:80: 127.0.0.1 is not public and not listed itself"),
        (get("http://metadata.test/"), 403, b"metadata.test:80: 169.254.169.254 is not public"),
        (get("http://mapped.test/"), 403, b"is not public and not listed itself"),
        (get("http://nowhere.test/"), 502, b"nowhere.test: no such name"),
        (get("http://empty.test/"), 502, b"empty.test:80: it has no address"),
        (b"CONNECT listed.test:80@other.test:80 HTTP/1.1\r\n\r\n", 400, b"is not host:port"),
        (b"CONNECT other.test:80 HTTP/1.1\r\nHost: listed.test:80\r\n\r\n", 403, b"other.test:80 is not in"),
        (b"\x16\x03\x01\x02\x00\x01\r\n\r\n", 400, b"this is no HTTP request to a proxy"),
        (b"GET http://listed.test/ HTTP/1.1\r\nX: " + b"a" * 20_000 + b"\r\n\r\n", 400, b"no request in the first"),
    ],
)
def test_what_is_refused_is_told_and_written_down(boxes, request_: bytes, status: int, why: bytes) -> None:
    names = {
        "listed.test": ["127.0.0.1", "::1"],
        "metadata.test": ["169.254.169.254"],
        "mapped.test": ["::ffff:10.0.0.1"],
        "empty.test": [],
    }

    def resolve(name: str, _: int) -> Sequence[str]:
        if name not in names:
            raise OSError("no such name")
        return names[name]

    box = boxes(
        "listed.test:80", "metadata.test:80", "mapped.test:80", "nowhere.test:80", "empty.test:80", resolve=resolve
    )
    got = box.answer(request_)
    assert got.startswith(b"HTTP/1.1 %d " % status), got
    assert why in got
    seen = box.connections(1)
    assert seen.recent[0].decision == ("failed" if status == 502 else "refused")
    assert seen.refused == (status != 502)
    assert (seen.sent_bytes, seen.received_bytes) == (0, 0)


def test_a_server_that_is_not_there(boxes) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    box = boxes(f"127.0.0.1:{port}")
    assert box.answer(get(f"http://127.0.0.1:{port}/")).startswith(b"HTTP/1.1 502 Bad Gateway")
    assert box.connections(1).recent[0].decision == "failed"


def test_a_resolver_that_hangs_is_not_waited_for(boxes) -> None:
    hang = threading.Event()
    box = boxes("slow.test:80", limits=replace(LIMITS, connect_s=0.2), resolve=lambda *_: hang.wait(WAIT_S) and [])
    try:
        assert box.answer(get("http://slow.test/")).startswith(b"HTTP/1.1 504 ")
    finally:
        hang.set()


# -------------------------------------------------------------------------------------------------------------- limits


def test_the_bytes_of_a_box_have_an_end(world, boxes) -> None:
    server = world(lambda connection, _: connection.recv(65_536) and connection.sendall(b"x" * 400_000))
    box = boxes(f"127.0.0.1:{server.port}", limits=replace(LIMITS, bytes=300_000))
    box.request(get(f"http://127.0.0.1:{server.port}/"))
    assert len(box.read()) <= 300_000
    box.say("gone")
    assert box.connections(1).recent[0].decision == "limited"
    assert box.gateway.report().received_bytes <= 300_000
    far = get(f"http://127.0.0.1:{server.port}/" + "a" * 9_000)
    assert b"the box has used up its 0 MiB of network" in box.answer(far, 2)
    assert box.connections(2).recent[1].decision == "limited"


def test_the_connections_of_a_box_have_an_end(world, boxes) -> None:
    server = world(answer_once)
    box = boxes(f"127.0.0.1:{server.port}", limits=replace(LIMITS, connections=2))
    answers = [box.answer(get(f"http://127.0.0.1:{server.port}/"), number) for number in (1, 2, 3)]
    assert [text.split()[1] for text in answers] == [b"200", b"200", b"403"]
    assert b"has made 2 connections already" in answers[2]
    assert server.calls == 2


@pytest.mark.parametrize(
    ("limits", "serve", "data"),
    [
        (replace(LIMITS, head_s=0.2), echo, b"CONNECT 127."),
        (replace(LIMITS, idle_s=0.2), echo, b"CONNECT 127.0.0.1:%d HTTP/1.1\r\n\r\n"),
        (replace(LIMITS, total_s=0.2, idle_s=0.5), echo, b"CONNECT 127.0.0.1:%d HTTP/1.1\r\n\r\n"),
    ],
    ids=["a request that never ends", "silence", "too long"],
)
def test_time_has_an_end(world, boxes, limits: NetworkLimits, serve: Any, data: bytes) -> None:
    server = world(serve)
    box = boxes(f"127.0.0.1:{server.port}", limits=limits)
    box.request(data % server.port if b"%d" in data else data)
    box.read()  # its end, or that it was dropped
    box.say("gone")
    assert box.connections(1).recent[0].decision in ("limited", "refused")
    assert not box.broken
    if server.calls:
        assert server.ended.wait(WAIT_S)


def test_a_slow_reader_holds_up_its_server_and_nobody_else(world, boxes) -> None:
    sent: list[int] = []

    def pour(connection: socket.socket, _: World) -> None:
        connection.recv(65_536)
        for _round in range(SENDS):
            connection.sendall(b"x" * 65_536)
            sent.append(65_536)

    slow, quick = world(pour), world(answer_once)
    box = boxes(f"127.0.0.1:{slow.port}", f"127.0.0.1:{quick.port}")
    box.request(get(f"http://127.0.0.1:{slow.port}/"))
    first = box.read(most=WINDOW, takes=False)
    assert len(first) == WINDOW
    assert box.answer(get(f"http://127.0.0.1:{quick.port}/"), 2).endswith(b"hello")
    assert box.frames.empty(), "more than a window was sent to a program that reads nothing"
    box.say("took", size=WINDOW)
    rest = box.read()
    assert len(first) + len(rest) == sum(sent) == SENDS * 65_536


def test_a_server_that_reads_nothing_holds_up_the_box(world, boxes) -> None:
    go_on = threading.Event()

    def wait(connection: socket.socket, world: World) -> None:
        go_on.wait(WAIT_S)
        hear_all(connection, world)

    server = world(wait)
    box = boxes(f"127.0.0.1:{server.port}")
    box.request(f"CONNECT 127.0.0.1:{server.port} HTTP/1.1\r\n\r\n".encode())
    assert b" 200 " in box.read(most=39)
    credit, sent, total = WINDOW, 0, SENDS * 65_536  # an honest worker sends what was taken off it, and no more
    while sent < total:
        while credit >= 32_768 and sent < total:
            box.say("data", body=b"y" * 32_768)
            credit, sent = credit - 32_768, sent + 32_768
        try:
            fields, _ = box.frames.get(timeout=0.5 if not go_on.is_set() else WAIT_S)
        except queue.Empty:
            assert sent < total, "everything was taken although the server reads nothing"
            go_on.set()
            continue
        assert fields["event"] == "took"
        credit += fields["size"]
    assert go_on.is_set()
    box.say("end")
    assert server.ended.wait(WAIT_S)
    assert sum(map(len, server.heard)) == total


# --------------------------------------------------------------------------------------------------------- lying boxes


@pytest.mark.parametrize(
    "frames",
    [
        [({"net": 2, "event": "open"}, b"")],
        [({"net": 0, "event": "open"}, b"")],
        [({"net": True, "event": "open"}, b"")],
        [({"net": "1", "event": "open"}, b"")],
        [({"net": 1, "event": "open"}, b"body")],
        [({"net": 1, "event": "open"}, b"")] * 2,
        [({"net": number, "event": "open"}, b"") for number in range(1, 6)],  # at_once is 4
        [({"net": 1, "event": "data"}, b"x")],
        [({"net": 1, "event": "open"}, b""), ({"net": 1, "event": "data"}, b"")],
        [({"net": 1, "event": "open"}, b""), ({"net": 1, "event": "data"}, b"x" * (WINDOW + 1))],
        [({"net": 1, "event": "open"}, b""), *[({"net": 1, "event": "data"}, b"x" * 1000)] * 66],
        [({"net": 1, "event": "open"}, b""), ({"net": 1, "event": "took", "size": 1}, b"")],
        [({"net": 1, "event": "open"}, b""), ({"net": 1, "event": "took", "size": -1}, b"")],
        [({"net": 1, "event": "open"}, b""), ({"net": 1, "event": "took"}, b"")],
        [({"net": 1, "event": "open"}, b""), *[({"net": 1, "event": "end"}, b"")] * 2],
        [({"net": 1, "event": "open"}, b""), ({"net": 1, "event": "end"}, b""), ({"net": 1, "event": "data"}, b"x")],
        [({"net": 1, "event": "open"}, b""), *[({"net": 1, "event": "gone"}, b"")] * 2],
        [({"net": 1, "event": "open"}, b""), ({"net": 1, "event": "drop"}, b"")],
        [({"net": 1, "event": ["open"]}, b"")],
        [({"net": 1, "event": "x" * 1000}, b"")],
    ],
)
def test_a_lie_ends_the_box(boxes, frames: list[tuple[dict[str, Any], bytes]]) -> None:
    box = boxes("127.0.0.1:9")
    for fields, body in frames:
        box.gateway.take(fields, body)
    assert box.why_broken().startswith("its worker sent ")
    assert len(box.why_broken()) < 200
    box.say("open", 1)  # whatever still comes is heard by nobody
    box.gateway.close()
    assert len(box.broken) == 1


def test_a_flood_of_frames_waits_on_the_line(boxes) -> None:
    """The loop stands still here, as one that waits for a box that takes nothing."""
    let_go = threading.Event()
    box = boxes("127.0.0.1:9")
    box.gateway._loop.call_soon_threadsafe(let_go.wait, WAIT_S)
    taken = 0

    def flood() -> None:
        nonlocal taken
        box.say("open")
        for _ in range(2000):
            box.say("data", body=b"x")
            taken += 1

    thread = threading.Thread(target=flood)
    thread.start()
    thread.join(1.0)
    assert thread.is_alive()
    assert taken < 500
    let_go.set()
    thread.join(WAIT_S)
    assert taken == 2000
    assert not box.broken


def test_a_box_that_dies_takes_its_connections_along(world, boxes) -> None:
    server = world(echo)
    box = boxes(f"127.0.0.1:{server.port}")
    box.request(f"CONNECT 127.0.0.1:{server.port} HTTP/1.1\r\n\r\n".encode())
    assert b" 200 " in box.read(most=39)
    box.is_dead = True
    box.say("data", body=b"x")
    assert server.ended.wait(WAIT_S)
    box.say("data", body=b"y")
    box.gateway.close()
    assert box.gateway.report().connections == 1


def test_closing_ends_connections_and_threads(world, boxes) -> None:
    server = world(echo)
    box = boxes(f"127.0.0.1:{server.port}")
    box.request(f"CONNECT 127.0.0.1:{server.port} HTTP/1.1\r\n\r\n".encode())
    assert b" 200 " in box.read(most=39)
    box.gateway.close()
    assert server.ended.wait(WAIT_S)
    assert not [thread for thread in threading.enumerate() if thread.name == "agentgym-network"]
    box.gateway.close()
    box.say("open", 2)


def test_a_way_out_that_nobody_takes_has_no_thread(boxes) -> None:
    box = boxes("127.0.0.1:9")
    assert not [thread for thread in threading.enumerate() if thread.name == "agentgym-network"]
    box.gateway.close()
    assert box.gateway.report().connections == 0
