"""The host's end of the frames of a box with a way out: the frames of its connections come whenever they come, between
those of the replies. Law as in worker_client.py; one thread reads the line and gives each frame to whom it concerns.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from agentgym.errors import SandboxDiedError
from agentgym.sandbox.inside.worker_frames import PART
from agentgym.sandbox.worker_client import Channel, WorkerClient

LOOK_S = 600.0  # between frames the line may be silent for ever
WHOLE_S = 60.0  # for the rest of a frame, once it has begun
SEND_S = 90.0  # a worker that packs a large tree does not listen meanwhile
LARGEST = 2 * PART  # body of one frame; a part of an archive has its headers on top
READY = 8  # replies' parts that are read ahead of whoever asked

Frame = tuple[dict[str, Any], bytes]


class SharedWorkerClient(WorkerClient):
    """Example: `client.boot(start, program)`, then `client.share(gateway.take)`."""

    def __init__(self, channel: Channel, name: str) -> None:
        super().__init__(channel, name)
        self._replies: queue.Queue[Frame] = queue.Queue(READY)
        self._over = threading.Event()
        self._reader: threading.Thread | None = None

    def share(self, take: Callable[[Mapping[str, Any], bytes], None]) -> None:
        """From now on the frames of connections go to `take`."""
        self._reader = threading.Thread(target=self._read, args=(take,), name="agentgym-line", daemon=True)
        self._reader.start()

    def send_beside(self, fields: Mapping[str, Any], body: bytes) -> None:
        """A frame that is no request. SandboxDiedError if the box does not take it."""
        if self._dead is not None:
            raise SandboxDiedError(f"sandbox {self._name} is gone: {self._dead}")
        try:
            self._send(fields, body, time.monotonic() + SEND_S)
        except OSError as error:
            raise self._died(f"it takes no frames ({error})") from error

    def broke(self, why: str) -> None:
        """The box sent what it never sends: it is dead."""
        self._died(why)

    def close(self) -> None:
        self._dead = self._dead or "it was closed"
        self._channel.shut()
        if self._reader is not None:
            self._reader.join()
        super().close()

    def _read(self, take: Callable[[Mapping[str, Any], bytes], None]) -> None:
        try:
            while True:
                self._wait_for_a_frame()
                fields, body = super()._frame(LARGEST, time.monotonic() + WHOLE_S)
                if "net" in fields:
                    take(fields, body)
                else:
                    self._hand_over((fields, body))
        except SandboxDiedError:
            pass  # written down; whoever asks next is told
        except OSError as error:
            self._died(str(error))
        finally:
            self._over.set()

    def _wait_for_a_frame(self) -> None:
        while not self._received:
            with contextlib.suppress(TimeoutError):
                data = self._channel.receive(time.monotonic() + LOOK_S)
                if not data:
                    raise self._died(self._dead or self._channel.epitaph() or "its worker ended")
                self._received += data

    def _hand_over(self, frame: Frame) -> None:
        """To whoever asked; a worker that answers without a question fills the line and no more than that."""
        while self._dead is None:
            with contextlib.suppress(queue.Full):
                self._replies.put(frame, timeout=1.0)
                return

    def _frame(self, max_body: int, until: float) -> Frame:
        if self._reader is None:
            return super()._frame(max_body, until)
        while True:
            is_over = self._over.is_set()  # asked first: what was read before the end is there then
            try:
                fields, body = self._replies.get(timeout=0.05 if is_over else self._left(until))
            except queue.Empty:
                if is_over:
                    raise self._died(self._dead or "its worker ended") from None
                if time.monotonic() >= until:
                    raise TimeoutError("the deadline has passed") from None
                continue
            if len(body) > max_body:
                raise self._died(f"its worker announced a reply of {len(body)} bytes")
            return fields, body

    @staticmethod
    def _left(until: float) -> float:
        return max(0.0, min(0.25, until - time.monotonic()))
