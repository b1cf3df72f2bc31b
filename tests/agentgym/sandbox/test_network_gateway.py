"""The host's end of a way out: what gets through and what does not. The servers of this world are on this machine's
loopback and listed by address."""

from __future__ import annotations

import socket
import threading
from collections.abc import Sequence
from dataclasses import replace

import pytest
from network_world import LIMITS, WAIT_S, answer_once, echo, get

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
    with socket.socket() as taken:  # by us, so that nobody else listens there meanwhile
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
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
