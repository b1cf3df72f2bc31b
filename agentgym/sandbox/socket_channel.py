"""A worker at the other end of a socket. Must never know which isolation it runs in."""

from __future__ import annotations

import contextlib
import select
import socket
import ssl
import threading
import time
from collections.abc import Callable

from agentgym.sandbox.worker_client import NothingSentError

CHUNK = 1 << 18


class SocketChannel:
    """Implements `worker_client.Channel` over a stream socket, TLS included; the docker tier puts its framing on top.

    The socket never blocks, because its timeout would be shared by the thread that waits for a reply and the one that
    renews the lease; each waits by itself.

    Example: `SocketChannel(ours, epitaph=lambda: "bubblewrap ended with code 1")`.
    """

    def __init__(self, stream: socket.socket, epitaph: Callable[[], str]) -> None:
        self._stream = stream
        self._stream.setblocking(False)
        self._lock = threading.Lock()  # TLS can do one thing at a time
        self.epitaph = epitaph

    def send(self, data: bytes, until: float) -> None:
        view = memoryview(data)
        if isinstance(self._stream, ssl.SSLSocket):  # which may keep a part of what it says it has not taken
            try:
                self._wait(select.POLLOUT, until)
            except TimeoutError as error:
                raise NothingSentError(str(error)) from None
        while view:
            try:
                with self._lock:
                    sent = self._stream.send(view)
                view = view[sent:]
            except ssl.SSLWantReadError:
                self._wait(select.POLLIN, until)
            except ssl.SSLWantWriteError:  # TLS may hold a part of it already
                self._wait(select.POLLOUT, until)
            except BlockingIOError:
                try:
                    self._wait(select.POLLOUT, until)
                except TimeoutError as error:
                    raise (NothingSentError(str(error)) if len(view) == len(data) else error) from None

    def receive(self, until: float) -> bytes:
        while True:
            try:
                with self._lock:
                    return self._stream.recv(CHUNK)
            except (BlockingIOError, ssl.SSLWantReadError):
                self._wait(select.POLLIN, until)
            except ssl.SSLWantWriteError:
                self._wait(select.POLLOUT, until)
            except ConnectionError:
                return b""

    def shut(self) -> None:
        with contextlib.suppress(OSError):
            self._stream.shutdown(socket.SHUT_RDWR)  # wakes a receive in another thread; closing would not

    def release(self) -> None:
        self._stream.close()

    def _wait(self, events: int, until: float) -> None:
        poll = select.poll()
        poll.register(self._stream, events)
        # looked at past the deadline, too: what came while this process stood still has come in time
        if not poll.poll(max(0.0, until - time.monotonic()) * 1000):
            raise TimeoutError("the deadline has passed")
