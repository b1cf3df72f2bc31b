"""One HTTP connection, before and behind its requests. Must never know what a request asks.

Law: a connection costs its caller's time, not ours: a request's head arrives within a time limit however slowly its
bytes drip, what waits to be read is taken within one, and there are no more connections than a limit. What a body may
take is the door's to say.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from agentgym.server.openai_errors import RETRY_AFTER_S, error_body

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ConnectionLimits:
    """What connections may use. Example: `ConnectionLimits(max_connections=2048, max_head_s=15.0, max_read_s=60.0)`."""

    max_connections: int
    max_head_s: float  # from a request's first byte, or from the connection's beginning, to its last header
    max_read_s: float  # for a caller to read what waits for it


class Connection(H11Protocol):
    """uvicorn's connection within limits; `count` is told the class of each that is ended for one."""

    def __init__(self, limits: ConnectionLimits, count: Callable[[str], None], **uvicorns: Any) -> None:
        super().__init__(**uvicorns)
        self._limits = limits
        self._count = count
        self._head: asyncio.TimerHandle | None = None
        self._read: asyncio.TimerHandle | None = None
        self._began = False  # a byte of a request has come

    @property
    def _answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self._limits.max_connections:
            text = f"{self._limits.max_connections} connections are open, as many as server.max_connections allows"
            self._end("TooManyConnectionsError", 503, "Service Unavailable", text, "too_many_connections")
        else:
            self._wait_for_head()

    def data_received(self, data: bytes) -> None:
        self._began = True
        if not self._answering:
            self._wait_for_head()  # drops that follow do not begin the time anew
        super().data_received(data)
        if self._answering:
            self._head = _cancelled(self._head)
            self._began = False
        elif self.conn.our_state is h11.IDLE and not self.conn.trailing_data[0]:
            self._began = False  # that was the rest of a request that was refused before its end

    def pause_writing(self) -> None:
        super().pause_writing()
        self._read = self._read or self.loop.call_later(self._limits.max_read_s, self._unread)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._read = _cancelled(self._read)

    def connection_lost(self, exc: Exception | None) -> None:
        self._head, self._read = _cancelled(self._head), _cancelled(self._read)
        super().connection_lost(exc)

    def timeout_keep_alive_handler(self) -> None:
        super().timeout_keep_alive_handler()
        if self.transport.get_write_buffer_size():  # the end of an answer that nobody reads would keep it open
            self.transport.abort()

    # --------------------------------------------------------------------------------------------------------- ends

    def _wait_for_head(self) -> None:
        self._head = self._head or self.loop.call_later(self._limits.max_head_s, self._headless)

    def _headless(self) -> None:
        self._head = None
        if self._answering or self.transport.is_closing():
            return
        if self._began and self.conn.our_state is h11.IDLE:
            text = f"the request's head did not arrive within {self._limits.max_head_s:g} s"
            self._end("HeadTimeoutError", 408, "Request Timeout", text, "head_timeout")
        else:  # it said nothing, or goes on with the body of a request that was refused
            self.transport.abort()

    def _unread(self) -> None:
        self._read = None
        log.warning("a caller has not read its answer for %g s; its connection is ended", self._limits.max_read_s)
        self._count("SlowReaderError")
        self.transport.abort()

    def _end(self, kind: str, status: int, phrase: str, text: str, code: str) -> None:
        """Answers without a request, and closes."""
        self._count(kind)
        body = json.dumps({"error": error_body(status, text, None, code)}).encode()
        head = (
            f"HTTP/1.1 {status} {phrase}\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n"
            f"retry-after: {RETRY_AFTER_S}\r\nconnection: close\r\n\r\n"
        )
        self.transport.write(head.encode() + body)
        self.transport.close()


def _cancelled(timer: asyncio.TimerHandle | None) -> None:
    if timer is not None:
        timer.cancel()
