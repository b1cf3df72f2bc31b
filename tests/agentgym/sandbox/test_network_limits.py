"""The host's end of a way out, used by boxes that are slow, greedy or lying."""

from __future__ import annotations

import queue
import socket
import threading
from dataclasses import replace
from typing import Any

import pytest
from network_world import LIMITS, SENDS, WAIT_S, World, answer_once, echo, get, hear_all

from agentgym.sandbox.inside.worker_network import WINDOW
from agentgym.sandbox.network.report import NetworkLimits

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


def test_a_box_that_dies_is_not_the_worlds_fault(world, boxes) -> None:
    go_on = threading.Event()

    def late(connection: socket.socket, _: World) -> None:
        go_on.wait(WAIT_S)
        connection.sendall(b"answer")
        connection.recv(1)

    server = world(late)
    box = boxes(f"127.0.0.1:{server.port}")
    box.request(f"CONNECT 127.0.0.1:{server.port} HTTP/1.1\r\n\r\n".encode())
    assert b" 200 " in box.read(most=39)
    box.is_dead = True
    go_on.set()
    (seen,) = box.connections(1).recent
    assert (seen.decision, seen.why, seen.received_bytes) == ("allowed", "", 6)


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
