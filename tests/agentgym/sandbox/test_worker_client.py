"""The host against a worker that lies, stammers or says nothing."""

from __future__ import annotations

import contextlib
import json
import marshal
import queue
import select
import socket
import threading
import time
from collections.abc import Iterator

import pytest

from agentgym.errors import SandboxDiedError, SandboxError, SandboxLimitError
from agentgym.sandbox import worker_client
from agentgym.sandbox.inside.worker_frames import BOX, HOST, TAG, sealed
from agentgym.sandbox.network.shared_client import Frame, SharedWorkerClient
from agentgym.sandbox.socket_channel import SocketChannel
from agentgym.sandbox.worker_client import WorkerClient, whole


class Liar:
    """The other end of the socket: reads one request and answers with what it is told to."""

    def __init__(self, answers: list[bytes | None]) -> None:
        ours, self._theirs = socket.socketpair()
        self.client = WorkerClient(SocketChannel(ours, lambda: "the liar left"), "box-1")
        self._answers = answers
        self._thread = threading.Thread(target=self._lie)
        self._thread.start()

    def _lie(self) -> None:
        for answer in self._answers:
            if not self._theirs.recv(1 << 16):
                break
            if answer is None:
                break
            self._theirs.sendall(answer)
        else:
            self._theirs.recv(1)  # silent until the other end closes
        self._theirs.close()

    def end(self) -> None:
        self.client.close()
        self._thread.join(60)
        assert not self._thread.is_alive()


def frame(header: object, body: bytes = b"", number: int = 0, key: bytes = b"", sender: bytes = BOX) -> bytes:
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    return sealed(key, sender, number, encoded, body) + body


@pytest.fixture
def liars() -> Iterator[list[Liar]]:
    made: list[Liar] = []
    yield made
    for liar in made:
        liar.end()


def ask(liars: list[Liar], *answers: bytes | None) -> WorkerClient:
    liars.append(Liar(list(answers)))
    return liars[-1].client


def test_an_honest_answer_in_pieces(liars: list[Liar]) -> None:
    client = ask(liars, frame({"id": 1, "x": 2}, b"body"))
    assert client.request("ping", {}, max_body=10) == ({"id": 1, "x": 2}, b"body")


def test_an_honest_answer_in_parts(liars: list[Liar]) -> None:
    client = ask(liars, frame({"id": 1, "part": True}, b"12345") + frame({"id": 1, "x": 2}, b"6789a", 1))
    assert client.request("read", {}, max_body=10) == ({"id": 1, "x": 2}, b"123456789a")


@pytest.mark.parametrize(
    "answer",
    [
        b"\xff" * 64,
        b"\x80\0\0\0\0\0\0\0" + bytes(TAG),
        b"\0\0\0\x0a\x80\0\0\0" + bytes(TAG),
        frame({"id": 1}, b"longer than asked for"),
        frame({"id": 2}),
        frame({"id": True}),
        frame({"id": "1"}),
        frame({}),
        frame([1]),
        frame(b"nonsense"),
        frame(b"\xff\xfe"),
        frame(b"[" * 30_000),
        frame({"id": 1})[:-1],
        frame({"id": 1}, number=1),
        frame({"id": 1}, key=b"another"),
        frame({"id": 1}, sender=HOST),
        frame({"id": 1}).replace(b"1}", b"1 }"),
        frame({"id": 1, "part": True}),
        frame({"id": 1, "part": True}, b"12345678") + frame({"id": 1}, b"9ab", 1),
        b"",
        None,
    ],
    ids=lambda answer: repr(answer)[:24],
)
def test_a_lie_is_a_dead_box(liars: list[Liar], monkeypatch: pytest.MonkeyPatch, answer: bytes | None) -> None:
    monkeypatch.setattr(worker_client, "GRACE_S", 0.2)
    client = ask(liars, answer)
    started = time.monotonic()
    with pytest.raises(SandboxDiedError, match="box-1 died"):
        client.request("ping", {}, wait_s=0.2, max_body=10)
    assert time.monotonic() - started < 100, "it was waited for"
    with pytest.raises(SandboxDiedError, match="is gone"):
        client.request("ping", {})


def test_parts_of_nothing_are_not_waited_for(liars: list[Liar]) -> None:
    client = ask(liars, b"".join(frame({"id": 1, "part": True}, number=number) for number in range(50)))
    with pytest.raises(SandboxDiedError, match="a part of nothing"):
        client.request("read", {}, max_body=10)


def test_a_worker_that_does_not_read_cannot_hold_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_client, "GRACE_S", 0.2)
    ours, theirs = socket.socketpair()
    client = WorkerClient(SocketChannel(ours, lambda: ""), "box-1")
    with theirs, pytest.raises(SandboxDiedError, match="did not answer"):
        client.request("write", {}, bytes(50_000_000), wait_s=0.2)


def test_a_line_that_broke_is_told_as_its_other_end_tells_it() -> None:
    """Whoever notices first: a renewal says nothing, and the request after it asks."""
    ours, theirs = socket.socketpair()
    client = WorkerClient(SocketChannel(ours, lambda: "the worker was shot"), "box-1")
    client._is_booted = True
    theirs.close()
    client.renew()
    with pytest.raises(SandboxDiedError, match="box-1 died: the worker was shot"):
        client.request("ping", {})


def test_an_answer_that_came_while_this_process_stood_still_has_come() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        channel = SocketChannel(ours, lambda: "")
        with pytest.raises(TimeoutError):
            channel.receive(time.monotonic() - 1)
        theirs.sendall(b"answer")
        channel._wait(select.POLLIN, time.monotonic() - 1)


def test_error_replies_are_typed(liars: list[Liar]) -> None:
    client = ask(
        liars,
        frame({"id": 1, "error": "missing", "message": "no such file"}),
        frame({"id": 2, "error": "limit", "message": "disk full"}, number=1),
        frame({"id": 3, "error": ["?"], "message": "z" * 50_000}, number=2),
    )
    with pytest.raises(SandboxError, match="no such file"):
        client.request("read", {})
    with pytest.raises(SandboxLimitError, match="disk full"):
        client.request("write", {})
    with pytest.raises(SandboxError) as caught:
        client.request("write", {})
    assert len(str(caught.value)) < 3000


@pytest.mark.parametrize("value", [-1, 1.0, True, None, "1", [1]])
def test_numbers_of_a_reply_are_checked(value: object) -> None:
    with pytest.raises(SandboxDiedError):
        whole({"size": value}, "size")
    assert whole({"size": 3}, "size") == 3


def test_a_reply_that_was_read_before_the_end_is_heard() -> None:
    """Of a box with a way out, whose line one thread reads: the reply and the end of the line come while another, who
    waits, has just found nothing."""

    class Late(queue.Queue[Frame]):
        def get(self, block: bool = True, timeout: float | None = None) -> Frame:
            if client._over.is_set():
                return super().get(block, timeout)
            self.put(({"id": 1}, b"reply"))
            client._over.set()
            raise queue.Empty

    ours, theirs = socket.socketpair()
    client = SharedWorkerClient(SocketChannel(ours, lambda: ""), "box-1")
    client._reader, client._replies = threading.Thread(), Late()
    assert client._frame(5, time.monotonic() + 60) == ({"id": 1}, b"reply")
    with pytest.raises(SandboxDiedError, match="its worker ended"):
        client._frame(5, time.monotonic() + 60)
    ours.close()
    theirs.close()


def test_a_full_line_is_no_dead_box() -> None:
    """Frames of a way out may fill it; a renewal of the lease that finds no room leaves no half frame behind."""
    ours, theirs = socket.socketpair()
    client = WorkerClient(SocketChannel(ours, lambda: ""), "box-1")
    client._is_booted = True
    with contextlib.suppress(BlockingIOError):
        while True:
            ours.send(bytes(65_536))
    client.renew()
    theirs.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        while True:
            theirs.recv(65_536)
    client.renew()
    header = marshal.dumps({"op": "renew"}, 2)
    assert theirs.recv(65_536) == sealed(b"", HOST, 0, header, b"")
    client.close()
    theirs.close()
