"""The host's end of the frames. Law: the other end is believed in nothing: sizes, types and ids are checked, every
wait has a deadline of the host's own, and after the first wrong byte the box counts as dead."""

from __future__ import annotations

import importlib.resources
import json
import struct
import threading
import time
from collections.abc import Mapping
from typing import Any, Protocol

from agentgym.errors import SandboxDiedError, SandboxError, SandboxLimitError

FRAME = struct.Struct(">II")
MAX_HEADER = 64 * 1024
GRACE_S = 10.0  # what a loaded machine may take beyond the deadline that the worker keeps
START_S = 30.0

# What the container's or bubblewrap's command is: it reads the worker from its input, so that nothing has to be
# mounted and no image has to hold it.
BOOT = """
import os
def read(size):
    data = b""
    while len(data) < size:
        more = os.read(0, size - len(data))
        if not more:
            os._exit(0)
        data += more
    return data
exec(compile(read(int(read(8))), "boot", "exec"))
"""
LAUNCH = """
import sys
for name, source in {sources!r}:
    module = sys.modules[name] = type(sys)(name)
    exec(compile(source, name, "exec"), module.__dict__)
module.main()
"""


def boot_command(python: str) -> list[str]:
    """The argv that becomes the worker: isolated, without site packages."""
    return [python, "-I", "-S", "-c", BOOT]


def worker_program() -> bytes:
    """What is sent to the boot command first: the worker's sources, behind their length in eight digits."""
    package = importlib.resources.files("agentgym.sandbox")
    names = ("worker_streams", "worker")
    sources = [(f"agentgym.sandbox.{name}", (package / f"{name}.py").read_text()) for name in names]
    program = LAUNCH.format(sources=sources).encode()
    return b"%08d" % len(program) + program


class Channel(Protocol):
    """Bytes to and from the worker. `until` is on the monotonic clock; past it, TimeoutError. OSError: broken."""

    def send(self, data: bytes, until: float) -> None: ...

    def receive(self, until: float) -> bytes:
        """Some bytes, b"" at the end."""
        ...

    def shut(self) -> None:
        """Ends the connection; a receive that waits in another thread returns. Idempotent."""
        ...

    def release(self) -> None:
        """Gives back the descriptor; only when nobody waits on it, for its number is given out again at once."""
        ...

    def epitaph(self) -> str:
        """What is known about why the other end is gone, for the message; may be empty."""
        ...


class WorkerClient:
    """Requests to one worker, one at a time, from any thread."""

    def __init__(self, channel: Channel, name: str) -> None:
        self._channel = channel
        self._name = name
        self._lock = threading.Lock()
        self._received = bytearray()
        self._next_id = 1
        self._dead: str | None = None

    def boot(self, start: Mapping[str, Any]) -> dict[str, Any]:
        """Sends the worker and its settings; its greeting."""
        try:
            self._channel.send(worker_program(), time.monotonic() + START_S)
        except OSError as error:
            raise self._died(f"it did not take its worker ({error})") from error
        greeting, _ = self.request("start", start, wait_s=START_S)
        return greeting

    def request(
        self, op: str, fields: Mapping[str, Any], body: bytes = b"", *, wait_s: float = 20.0, max_body: int = 0
    ) -> tuple[dict[str, Any], bytes]:
        """One request and its reply. `wait_s`: what the worker itself may take. An error reply is raised."""
        with self._lock:
            if self._dead is not None:
                raise SandboxDiedError(f"sandbox {self._name} is gone: {self._dead}")
            until = time.monotonic() + wait_s + GRACE_S
            number, self._next_id = self._next_id, self._next_id + 1
            header = json.dumps({"op": op, "id": number, **fields}).encode()
            try:
                self._channel.send(FRAME.pack(len(header), len(body)) + header + body, until)
                reply, data = self._reply(number, max_body, until)
            except SandboxDiedError:
                raise
            except TimeoutError as error:
                raise self._died(f"it did not answer {op!r} within {wait_s + GRACE_S:.1f} s") from error
            except OSError as error:
                raise self._died(str(error)) from error
        if "error" in reply:
            message = f"sandbox {self._name}: {str(reply.get('message', ''))[:2000]}"
            raise (SandboxLimitError if reply["error"] == "limit" else SandboxError)(message)
        return reply, data

    def close(self) -> None:
        """No request succeeds after this, and one that waits now fails."""
        self._dead = self._dead or "it was closed"
        self._channel.shut()
        with self._lock:
            self._channel.release()

    def _reply(self, number: int, max_body: int, until: float) -> tuple[dict[str, Any], bytes]:
        header_size, body_size = FRAME.unpack(self._take(FRAME.size, until))
        if header_size > MAX_HEADER or body_size > max_body:
            raise self._died(f"its worker announced a reply of {header_size} + {body_size} bytes")
        encoded = self._take(header_size, until)
        body = self._take(body_size, until)
        try:
            reply = json.loads(encoded)
        except (ValueError, RecursionError) as error:
            raise self._died("its worker's reply is not JSON") from error
        if not isinstance(reply, dict) or reply.get("id") != number or type(reply["id"]) is not int:
            raise self._died("its worker answered another question")
        return reply, body

    def _take(self, size: int, until: float) -> bytes:
        while len(self._received) < size:
            data = self._channel.receive(until)
            if not data:
                raise self._died(self._channel.epitaph() or "its worker ended")
            self._received += data
        taken = bytes(self._received[:size])
        del self._received[:size]
        return taken

    def _died(self, why: str) -> SandboxDiedError:
        """Marks the box as dead and ends the connection, which ends the worker and with it the box."""
        self._dead = self._dead or why
        self._channel.shut()
        return SandboxDiedError(f"sandbox {self._name} died: {self._dead}")


def whole(reply: Mapping[str, Any], key: str) -> int:
    """A non-negative integer of a reply; anything else is a worker that cannot be believed."""
    value = reply.get(key)
    if type(value) is not int or value < 0:
        raise SandboxDiedError(f"the worker's reply has {key}={value!r:.50}")
    return value
