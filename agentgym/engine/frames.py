"""What parent and child of a process engine say to each other. Law: a frame is a length and a list of messages, and
what one turn of the event loop says goes out as one frame.

Coalescing is what keeps short requests cheap: a system call and a wake-up a turn, not a message. Must never know torch.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import msgspec

from agentgym.engine.protocol import EngineStats
from agentgym.policy import SamplingParams, Segment

_HEADER_BYTES = 4


class Sample(msgspec.Struct, tag=True, array_like=True, frozen=True):
    """To the child: continue these tokens, and say `Tokens` as they come where `stream` asks for it."""

    call: int
    prompt_ids: list[int]
    params: SamplingParams
    stream: bool


class Cancel(msgspec.Struct, tag=True, array_like=True, frozen=True):
    """To the child: nobody waits for this call any more; it gets no reply."""

    call: int


class Command(msgspec.Struct, tag=True, array_like=True, frozen=True):
    """To the child: `abort`, `keep` (the modes of a pause), `resume` or `stats`."""

    call: int
    name: str


class Load(msgspec.Struct, tag=True, array_like=True, frozen=True):
    """To the child: serve the weights in this file."""

    call: int
    version: int
    path: str


class Ready(msgspec.Struct, tag=True, array_like=True, frozen=True):
    """To the parent, first of all: the model is loaded."""

    max_context: int
    policy_version: int


class Tokens(msgspec.Struct, tag=True, array_like=True, frozen=True):
    """To the parent: what has been sampled since the last one."""

    call: int
    token_ids: list[int]
    logprobs: list[float]
    policy_version: int
    kv_version: int


class Sampled(msgspec.Struct, tag=True, array_like=True, frozen=True):
    """To the parent: the reply to Sample."""

    call: int
    segments: tuple[Segment, ...]


class Counted(msgspec.Struct, tag=True, array_like=True, frozen=True):
    """To the parent: the reply to `stats`."""

    call: int
    stats: EngineStats


class Obeyed(msgspec.Struct, tag=True, array_like=True, frozen=True):
    """To the parent: a command is done, and this version is served."""

    call: int
    policy_version: int


class Loaded(msgspec.Struct, tag=True, array_like=True, frozen=True):
    """To the parent: the reply to Load; this version is served."""

    call: int
    policy_version: int
    loaded_bytes: int


class Failed(msgspec.Struct, tag=True, array_like=True, frozen=True):
    """To the parent: the call (0: the start) raised this error of our tree."""

    call: int
    error: str
    message: str


ToChild = Sample | Cancel | Command | Load
ToParent = Ready | Tokens | Sampled | Counted | Obeyed | Loaded | Failed


class FrameProtocol(asyncio.Protocol):
    """One end of the socket: hands over each message that arrives, and says once that the other end is gone."""

    def __init__(self, types: Any, on_message: Callable[[Any], None], on_lost: Callable[[], None]) -> None:
        self._decoder = msgspec.msgpack.Decoder(list[types])
        self._encoder = msgspec.msgpack.Encoder()
        self._on_message = on_message
        self._on_lost = on_lost
        self._received = bytearray()
        self._unsent: list[Any] = []
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """As asyncio.Protocol."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        """As asyncio.Protocol."""
        self._received += data
        start = 0
        while len(self._received) >= start + _HEADER_BYTES:
            body = start + _HEADER_BYTES
            end = body + int.from_bytes(self._received[start:body], "big")
            if len(self._received) < end:
                break
            messages = self._decoder.decode(memoryview(self._received)[body:end])
            start = end
            for message in messages:
                self._on_message(message)
        del self._received[:start]

    def connection_lost(self, exc: Exception | None) -> None:
        """As asyncio.Protocol."""
        self._transport = None
        self._on_lost()

    def send(self, message: ToChild | ToParent) -> None:
        """Queues `message` for the frame of this turn of the event loop; nothing is sent over a lost connection."""
        if not self._unsent:
            asyncio.get_running_loop().call_soon(self.flush)
        self._unsent.append(message)

    def flush(self) -> None:
        """Sends what is queued now."""
        if self._unsent and self._transport is not None:
            body = self._encoder.encode(self._unsent)
            self._transport.write(len(body).to_bytes(_HEADER_BYTES, "big") + body)
        self._unsent.clear()

    def close(self) -> None:
        """Closes the socket after what was sent."""
        if self._transport is not None:
            self._transport.close()
