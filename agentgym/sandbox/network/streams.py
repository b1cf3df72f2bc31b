"""The connections of one box, as streams of bytes. Law: what comes from the box is believed in nothing: numbers, sizes
and the order of frames are checked, the first wrong one ends the box, and no stream holds more than WINDOW bytes.

Runs in the event loop of its gateway; worker_network.py is the other end.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Any

from agentgym.sandbox.inside.worker_network import CHUNK, WINDOW

Send = Callable[[Mapping[str, Any], bytes], None]


class ForgedFrameError(Exception):
    """The worker sent what it never sends."""


class StreamGoneError(Exception):
    """The program in the box, or the box, has closed the connection."""


class Stream:
    """One connection of a program in the box. Example: `await stream.write(b"HTTP/1.1 403 Forbidden\\r\\n\\r\\n")`."""

    def __init__(self, number: int, send: Send) -> None:
        self.number = number
        self._send = send
        self._received = bytearray()
        self._credit = WINDOW
        self._has_ended = self._is_gone = False
        self._is_dropped = False
        self._changed = asyncio.Event()

    async def read(self) -> bytes:
        """Some bytes, b"" at the end."""
        await self._until(lambda: bool(self._received) or self._has_ended)
        data = bytes(self._received)
        self._took(len(data))
        return data

    async def read_head(self, most: int) -> bytes | None:
        """Everything up to an empty line; None if that does not come within `most` bytes. What follows stays."""
        mark = b"\r\n\r\n"
        await self._until(lambda: mark in self._received or len(self._received) >= most or self._has_ended)
        end = self._received.find(mark, 0, most)
        if end < 0:
            return None
        head = bytes(self._received[: end + len(mark)])
        self._took(len(head))
        return head

    async def write(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            await self._until(lambda: self._credit > 0)
            piece = view[: min(CHUNK, self._credit)]
            self._credit -= len(piece)
            self._send({"op": "net", "net": self.number, "event": "data"}, bytes(piece))
            view = view[len(piece) :]

    def end(self) -> None:
        """The program is told that nothing more comes, once it has read what did."""
        self._tell("end")

    def drop(self) -> None:
        """Closes it at once. Idempotent."""
        if not self._is_gone and not self._is_dropped:
            self._is_dropped = True
            self._tell("drop")

    async def gone(self) -> None:
        """Returns when nothing of it is left in the box; what the program still writes is thrown away."""
        while not self._is_gone:
            if self._received:
                self._took(len(self._received))
            self._changed.clear()
            await self._changed.wait()

    def take(self, event: object, size: object, body: bytes) -> None:
        """A frame of the worker."""
        if event == "data" and body and not self._has_ended:
            if len(self._received) + len(body) > WINDOW:
                raise ForgedFrameError(f"more than {WINDOW} bytes of a connection")
            self._received += body
        elif event == "end" and not body and not self._has_ended:
            self._has_ended = True
        elif event == "took" and not body and type(size) is int and 0 < size <= WINDOW - self._credit:
            self._credit += size
        elif event == "gone" and not body:
            self._is_gone = True
        else:
            raise ForgedFrameError(f"the event {event!r:.40} of a connection that cannot have it")
        self._changed.set()

    async def _until(self, holds: Callable[[], bool]) -> None:
        while not holds():
            if self._is_gone or self._is_dropped:
                raise StreamGoneError
            self._changed.clear()
            await self._changed.wait()

    def _took(self, size: int) -> None:
        if size:
            del self._received[:size]
            self._send({"op": "net", "net": self.number, "event": "took", "size": size}, b"")

    def _tell(self, event: str) -> None:
        self._send({"op": "net", "net": self.number, "event": event}, b"")


class Streams:
    """All streams of one box. `serve` is called with each new one."""

    def __init__(self, at_once: int, send: Send, serve: Callable[[Stream], None]) -> None:
        self._at_once, self._send, self._serve = at_once, send, serve
        self._open: dict[int, Stream] = {}
        self._next = 1

    def take(self, fields: Mapping[str, Any], body: bytes) -> None:
        """A frame of the worker; ForgedFrameError for one that it cannot have sent."""
        number, event = fields.get("net"), fields.get("event")
        if type(number) is not int:
            raise ForgedFrameError("a connection without a number")
        if event == "open":
            if number != self._next or len(self._open) >= self._at_once or body:
                raise ForgedFrameError("a connection that it cannot have opened")
            self._next += 1
            stream = self._open[number] = Stream(number, self._send)
            self._serve(stream)
            return
        found = self._open.get(number)
        if found is None:
            raise ForgedFrameError("a frame of a connection that is not open")
        found.take(event, fields.get("size"), body)
        if event == "gone":
            del self._open[number]
