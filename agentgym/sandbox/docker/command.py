"""One `docker exec`: a command in a container, its streams and how it ended. Must never know why it was started."""

from __future__ import annotations

import contextlib
import math
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from agentgym.sandbox.docker.container import STREAM_FRAME, Container
from agentgym.sandbox.docker.host import hijacked
from agentgym.sandbox.socket_channel import SocketChannel
from agentgym.sandbox.worker_client import GRACE_S

SLICE_S = 0.25  # how often a silent command is asked after: a background child may hold its output open
# What a command wrote comes later than its end where the daemon is far or busy. Where no mark ends it (its shell was
# killed), it is over when nothing has come for this long after its end.
LULL_S = 2.0
LATE_S = 60.0  # for a busy daemon to tell the rest of what has ended already
SIGNALLED, KILLED = 128, 128 + 9
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

    def output(self, until: float, is_whole: Callable[[], bool] | None = None) -> Iterator[tuple[int, bytes]]:
        """(1 for stdout, 2 for stderr; bytes) until it has ended and all of that has come: `is_whole` says so of what
        was given; where nobody can, or a signal ended it and its mark will not come, when nothing more comes.
        TimeoutError: `until` came first. OSError: the connection was lost within its output."""
        lull_s: float | None = None  # None: it runs
        last = time.monotonic()  # when something was last seen: bytes, or its end
        while True:
            while len(self._received) >= STREAM_FRAME.size:
                stream, size = STREAM_FRAME.unpack_from(self._received)
                if len(self._received) - STREAM_FRAME.size < size:
                    break
                yield stream, bytes(self._received[STREAM_FRAME.size : STREAM_FRAME.size + size])
                del self._received[: STREAM_FRAME.size + size]
            if is_whole is not None and is_whole():
                return
            now = time.monotonic()
            try:
                data = self._channel.receive(min(until, now + SLICE_S))
            except TimeoutError:
                data = None
            if data == b"" and self._received:
                raise OSError("the connection to the daemon ended within a frame")
            if data == b"":
                return
            if data:
                self._received += data
                last = time.monotonic()
            if lull_s is None and (data is None or now >= until):
                code = self._ended()
                if code is not None:  # it may have been seen late, and the rest is late as well
                    lull_s = LULL_S if is_whole is None or code >= SIGNALLED else math.inf
                    last = time.monotonic()
                    until = max(until, last + LATE_S)
            if now >= until and lull_s == LULL_S:
                return  # it has ended long ago, and what still comes is not its own
            if now >= until:
                raise TimeoutError("the deadline has passed")
            if lull_s is not None and data is None and time.monotonic() - last >= lull_s:
                return

    def _ended(self) -> int | None:
        """Its exit code; None while it runs."""
        seen = self._api.exec_inspect(self._id)
        return None if seen["Running"] or seen["ExitCode"] is None else int(seen["ExitCode"])

    def exit_code(self) -> int:
        """What it ended with; a signal that killed it shows as 128 and its number, like in a shell."""
        until = time.monotonic() + LATE_S
        while time.monotonic() < until:
            code = self._ended()
            if code == KILLED and not self._container.is_running():
                break  # with the whole box
            if code is not None:
                return code
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


class UpToMark:
    """Passes on what comes before a mark, in whatever pieces it comes; what follows the mark is nobody's."""

    def __init__(self, mark: bytes, out: Callable[[bytes], None]) -> None:
        self._mark, self._out = mark, out
        self._held = bytearray()  # what may be the beginning of the mark
        self.ended = False

    def add(self, data: bytes) -> None:
        if self.ended:
            return
        self._held += data
        place = self._held.find(self._mark)
        self.ended = place >= 0
        sure = place if self.ended else max(0, len(self._held) - len(self._mark) + 1)
        self._out(bytes(self._held[:sure]))
        del self._held[: len(self._held) if self.ended else sure]

    def end(self) -> None:
        """No mark will come any more."""
        self._out(bytes(self._held))
        self._held.clear()
