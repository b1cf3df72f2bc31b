"""What is said of a container that has ended, in whatever order its end, its last words and its daemon's news come."""

from __future__ import annotations

import contextlib
import http.server
import json
import socket
import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from agentgym.errors import SandboxDiedError
from agentgym.sandbox import SandboxSpec
from agentgym.sandbox.docker.container import STREAM_FRAME, AttachedChannel, Container
from agentgym.sandbox.docker.host import DockerHost, connect
from agentgym.sandbox.ownership.lease import owner
from agentgym.sandbox.worker_client import WorkerClient


def attached(why_gone: Callable[[float], str]) -> tuple[AttachedChannel, socket.socket]:
    """A channel over a connection as the docker package gives it, and the daemon's end."""
    ours, theirs = socket.socketpair()
    reader = ours.makefile("rb")
    response = SimpleNamespace(raw=SimpleNamespace(_fp=SimpleNamespace(fp=reader)))
    connection: Any = SimpleNamespace(_sock=ours, _response=response, close=reader.close)
    return AttachedChannel(connection, why_gone), theirs


def test_the_last_words_are_heard_though_the_connection_broke_before_anybody_read_them() -> None:
    channel, daemon = attached(lambda _: "nobody knows why")
    words = b"its worker failed: ImportError: too old\n"
    daemon.sendall(STREAM_FRAME.pack(2, len(words)) + words)
    daemon.close()
    client = WorkerClient(channel, "box")
    with pytest.raises(SandboxDiedError, match="its worker ended: its worker failed: ImportError: too old"):
        client.boot({}, b"program")
    client.close()


def test_complaints_without_an_end_do_not_hold_a_reply_up() -> None:
    channel, daemon = attached(lambda _: "")

    def complain() -> None:
        with contextlib.suppress(OSError):
            while True:
                daemon.sendall(complaint * 100)

    complaint = STREAM_FRAME.pack(2, 100) + bytes(100)
    daemon.sendall(complaint)
    complaining = threading.Thread(target=complain)
    complaining.start()
    try:
        with pytest.raises(TimeoutError):
            channel.receive(0.0)
    finally:
        channel.shut()
        channel.release()
        complaining.join()
        daemon.close()


@contextlib.contextmanager
def a_daemon_that_tells(*states: dict[str, object] | None) -> Iterator[DockerHost]:
    """A daemon that, asked after a container, says one after the other, and then goes on with the last; None: it knows
    of none."""
    told = iter(states)

    class Answers(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            code, answer = 200, b"OK"
            if self.path.endswith("/version"):
                answer = json.dumps({"ApiVersion": "1.41"}).encode()
            elif self.path.endswith("/json"):
                state = next(told, states[-1])
                code, answer = (
                    (404, b'{"message": "No such container"}')
                    if state is None
                    else (200, json.dumps({"State": state}).encode())
                )
            self.send_response(code)
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, format: str, *args: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answers) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield DockerHost(f"tcp://127.0.0.1:{server.server_address[1]}")
        finally:
            server.shutdown()


RUNS = {"Running": True, "ExitCode": 0, "OOMKilled": False}
KILLED = {"Running": False, "ExitCode": 137, "OOMKilled": False}
BOMBED = {"Running": False, "ExitCode": 137, "OOMKilled": True}
ENDED = {"Running": False, "ExitCode": 0, "OOMKilled": False}


@pytest.mark.parametrize(
    ("states", "said"),
    [
        ((RUNS, RUNS, BOMBED), "it ended with code 137, out of memory"),
        ((RUNS, KILLED), "it ended with code 137 (killed: out of memory, or the container was stopped)"),
        ((RUNS, None), "it ended and was removed (out of memory, or the container was stopped)"),
        ((ENDED,), "it ended with code 0"),
    ],
    ids=["out of memory", "killed", "removed", "by itself"],
)
def test_a_daemon_that_learns_of_the_end_after_its_connection_is_asked_again(
    states: tuple[dict[str, object] | None, ...], said: str
) -> None:
    with a_daemon_that_tells(*states) as host:
        container = Container(connect(host), "docker", SandboxSpec())
        owner().forget(container.name)  # nothing will be made there
        assert container.why_gone(60.0) == said


def test_a_container_that_goes_on_lost_its_connection() -> None:
    with a_daemon_that_tells(RUNS) as host:
        container = Container(connect(host), "docker", SandboxSpec())
        owner().forget(container.name)
        assert container.why_gone(0.2) == f"the connection to it through the Docker daemon at {host.url} was lost"
