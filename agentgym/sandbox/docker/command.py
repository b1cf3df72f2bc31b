"""One `docker exec`: a command in a container, its streams and how it ended. Must never know why it was started."""

from __future__ import annotations

import contextlib
import socket
import ssl
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from agentgym.sandbox.docker.container import STREAM_FRAME, Container
from agentgym.sandbox.docker.host import hijacked
from agentgym.sandbox.socket_channel import SocketChannel
from agentgym.sandbox.worker_client import GRACE_S

SLICE_S = 0.25  # how often a silent command is asked after: a background child may hold its output open
# What a command wrote comes later than its end where the daemon is far or busy. So its output is over when nothing has
# come for this long after its end; only a command whose child keeps its output open is waited for in vain.
LULL_S = 2.0
KILLED = 128 + 9
# TLS cannot be closed in one direction only, so there the end of the input is counted
COUNTED = """
size=$1; shift
command -v head >/dev/null || { echo "input over TLS needs head in the image" >&2; exit 125; }
head -c "$size" | "$@"
"""


class DockerCommand:
    """Started by its making. Example: `DockerCommand(container, ["sh", "-c", "cat"], b"hi", 10001, {})`."""

    def __init__(
        self, container: Container, argv: Sequence[str], stdin: bytes, uid: int, environment: Mapping[str, str]
    ) -> None:
        self._container, self._api = container, container.daemon.api
        argv = list(argv)
        if stdin and container.daemon.host.tls is not None:
            argv = ["sh", "-c", COUNTED, "sh", str(len(stdin)), *argv]
        created = self._api.exec_create(
            container.name, argv, stdin=bool(stdin), user=f"{uid}:{uid}", environment=dict(environment)
        )
        self._id = created["Id"]
        self._connection: Any = self._api.exec_start(self._id, socket=True)
        self._stream, early = hijacked(self._connection)
        self._channel = SocketChannel(self._stream, lambda: "")
        self._received = bytearray(early)
        self._feeder: threading.Thread | None = None
        if stdin:
            self._feeder = threading.Thread(target=self._write, args=(stdin,), name="agentgym-stdin", daemon=True)
            self._feeder.start()

    def _write(self, data: bytes) -> None:
        with contextlib.suppress(OSError):  # it need not read its input
            self._channel.send(data, time.monotonic() + 3600.0)
            if not isinstance(self._stream, ssl.SSLSocket):
                self._stream.shutdown(socket.SHUT_WR)

    def output(self, until: float, lull_s: float = LULL_S) -> Iterator[tuple[int, bytes]]:
        """(1 for stdout, 2 for stderr; bytes) until it has ended and all of that has come, or nothing more for `lull_s`
        after its end. TimeoutError: `until` came first. OSError: the connection was lost within its output."""
        ended = False
        last = time.monotonic()  # when something was last seen: bytes, or its end
        while True:
            while len(self._received) >= STREAM_FRAME.size:
                stream, size = STREAM_FRAME.unpack_from(self._received)
                if len(self._received) - STREAM_FRAME.size < size:
                    break
                yield stream, bytes(self._received[STREAM_FRAME.size : STREAM_FRAME.size + size])
                del self._received[: STREAM_FRAME.size + size]
            now = time.monotonic()
            if now >= until:
                raise TimeoutError("the deadline has passed")
            try:
                data = self._channel.receive(min(until, now + SLICE_S))
            except TimeoutError:
                if not ended and not self._api.exec_inspect(self._id)["Running"]:
                    ended, last = True, time.monotonic()
                if ended and time.monotonic() - last >= lull_s:
                    return
                continue
            if not data and self._received:
                raise OSError("the connection to the daemon ended within a frame")
            if not data:
                return
            self._received += data
            last = time.monotonic()

    def exit_code(self) -> int:
        """What it ended with; a signal that killed it shows as 128 and its number, like in a shell."""
        until = time.monotonic() + GRACE_S
        while time.monotonic() < until:
            seen = self._api.exec_inspect(self._id)
            if not seen["Running"] and seen["ExitCode"] is not None:
                if seen["ExitCode"] == KILLED and not self._container.is_running():
                    break  # with the whole box
                return int(seen["ExitCode"])
            time.sleep(0.005)
        raise OSError("the box ended, or its daemon does not say how the command did")

    def shut(self) -> None:
        self._channel.shut()

    def release(self) -> None:
        self._channel.shut()
        if self._feeder is not None:
            self._feeder.join(GRACE_S)
        self._channel.release()
        with contextlib.suppress(OSError):
            self._connection.close()
