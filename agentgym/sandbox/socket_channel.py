"""A worker at the other end of a socket. Must never know which isolation it runs in."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Callable

CHUNK = 1 << 18


class SocketChannel:
    """Implements `worker_client.Channel` over a stream socket; the docker tier puts its framing on top.

    Example: `SocketChannel(ours, epitaph=lambda: "bubblewrap ended with code 1")`.
    """

    def __init__(self, stream: socket.socket, epitaph: Callable[[], str]) -> None:
        self._stream = stream
        self.epitaph = epitaph

    def send(self, data: bytes, until: float) -> None:
        self._stream.settimeout(_left(until))
        self._stream.sendall(data)

    def receive(self, until: float) -> bytes:
        self._stream.settimeout(_left(until))
        try:
            return self._stream.recv(CHUNK)
        except ConnectionError:
            return b""

    def shut(self) -> None:
        with contextlib.suppress(OSError):
            self._stream.shutdown(socket.SHUT_RDWR)  # wakes a receive in another thread; closing would not

    def release(self) -> None:
        self._stream.close()


def _left(until: float) -> float:
    left = until - time.monotonic()
    if left <= 0:
        raise TimeoutError("the deadline has passed")
    return left
