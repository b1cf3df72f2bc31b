"""The host's end of the frames. Law: the other end is believed in nothing: tags, sizes, types and ids are checked,
every wait has a deadline of the host's own, and after the first wrong byte the box counts as dead. What goes to the
worker may be marshalled; what comes from it is JSON and bytes."""

from __future__ import annotations

import functools
import hmac
import importlib.resources
import importlib.util
import json
import marshal
import os
import secrets
import subprocess
import threading
import time
from collections.abc import Mapping
from typing import Any, Protocol

from agentgym.errors import ArchiveError, SandboxDiedError, SandboxError, SandboxLimitError
from agentgym.sandbox.inside.worker_frames import BOX, HOST, PART, SIZES, TAG, sealed, tag_of

MAX_HEADER = 64 * 1024
GRACE_S = 10.0  # what a loaded machine may take beyond the deadline that the worker keeps
START_S = 30.0
KINDS = {"limit": SandboxLimitError, "archive": ArchiveError}
MODULES = (
    "worker_frames",
    "worker_tar",
    "worker_tree",
    "worker_streams",
    "worker_line",
    "worker_processes",
    "worker_files",
    "worker",
)

# What the container's or bubblewrap's command is: it reads the worker from its input, so that nothing has to be
# mounted and no image has to hold it. Compiled code is taken if this Python wrote it, or one like it.
BOOT = """
import marshal, posix, select, sys
from _frozen_importlib_external import MAGIC_NUMBER
def read(size):
    data = b""
    while len(data) < size:
        more = select.select([0], [], [], 60)[0] and posix.read(0, size - len(data))
        if not more:
            posix._exit(0)
        data += more
    return data
magic, compiled, sources = marshal.loads(read(int(read(8))))
for name, code in marshal.loads(compiled) if magic == MAGIC_NUMBER else sources:
    module = sys.modules[name] = type(sys)(name)
    exec(code if magic == MAGIC_NUMBER else compile(code, name, "exec"), module.__dict__)
module.main()
"""
COMPILE = """
import marshal, sys
from _frozen_importlib_external import MAGIC_NUMBER
sources = marshal.loads(sys.stdin.buffer.read())
code = marshal.dumps([(name, compile(source, name, "exec", optimize=2)) for name, source in sources])
sys.stdout.buffer.write(marshal.dumps((MAGIC_NUMBER, code), 2))
"""


def boot_command(python: str) -> list[str]:
    """The argv that becomes the worker: isolated, without site packages."""
    return [python, "-I", "-S", "-c", BOOT]


def worker_program(compiled_for: str | None = None, modules: tuple[str, ...] = ()) -> bytes:
    """What is sent to the boot command first, behind its length in eight digits: the worker's sources, and code
    compiled by this Python, or by the host's interpreter `compiled_for` if that is what the box runs."""
    status = os.stat(compiled_for) if compiled_for else None
    return _program(compiled_for, status and (status.st_mtime_ns, status.st_size), modules)


@functools.lru_cache(maxsize=8)
def _program(python: str | None, _version: tuple[int, int] | None, modules: tuple[str, ...]) -> bytes:
    package = importlib.resources.files("agentgym.sandbox.inside")
    names = (*modules, *MODULES)
    sources = [(f"agentgym.sandbox.inside.{name}", (package / f"{name}.py").read_text("utf-8")) for name in names]
    if python is None:
        magic = importlib.util.MAGIC_NUMBER
        compiled = [(name, compile(text, name, "exec", dont_inherit=True, optimize=2)) for name, text in sources]
        code = marshal.dumps(compiled)
    else:  # the host's own interpreter: trusted as this one is
        done = subprocess.run(
            [python, "-I", "-S", "-c", COMPILE], input=marshal.dumps(sources, 2), capture_output=True, check=False
        )
        if done.returncode:
            raise SandboxError(f"{python} cannot compile the worker: {done.stderr.decode(errors='replace')[-500:]}")
        magic, code = marshal.loads(done.stdout)
    program = marshal.dumps((magic, code, sources), 2)
    return b"%08d" % len(program) + program


class NothingSentError(TimeoutError):
    """The line is full, and not one byte of a frame was taken: the frames before it and after it stay whole."""


class Channel(Protocol):
    """Bytes to and from the worker. `until` is on the monotonic clock; past it, TimeoutError, and of a send that had
    not begun NothingSentError. OSError: broken."""

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
        self._lock = threading.Lock()  # of a request and its reply
        self._send_lock = threading.Lock()  # of one frame
        self._received = bytearray()
        self._key = b""
        self._num_sent = self._num_received = 0
        self._next_id = 1
        self._is_booted = False
        self._dead: str | None = None

    def boot(self, start: Mapping[str, Any], program: bytes) -> dict[str, Any]:
        """Sends the worker and its settings; its greeting."""
        try:
            self._channel.send(program, time.monotonic() + START_S)
        except TimeoutError as error:
            raise self._died(f"it did not take its worker ({error})") from error
        except OSError as error:  # it has ended already, and may have said why
            raise self._died(self._channel.epitaph() or f"it did not take its worker ({error})") from error
        key = secrets.token_bytes(32)
        greeting, _ = self.request("start", {**start, "key": key}, wait_s=START_S, new_key=key)
        self._is_booted = True  # before, a renewal could meet the worker between two keys
        return greeting

    def request(
        self,
        op: str,
        fields: Mapping[str, Any],
        body: bytes = b"",
        *,
        wait_s: float = 20.0,
        grace_s: float | None = None,
        max_body: int = 0,
        new_key: bytes | None = None,
    ) -> tuple[dict[str, Any], bytes]:
        """One request and its reply. `wait_s`: what the worker itself may take, `grace_s`: what comes on top for the
        machine (default: GRACE_S). An error reply is raised."""
        with self._lock:
            if self._dead is not None:
                raise SandboxDiedError(f"sandbox {self._name} is gone: {self._dead}")
            patience_s = wait_s + (GRACE_S if grace_s is None else grace_s)
            until = time.monotonic() + patience_s
            number, self._next_id = self._next_id, self._next_id + 1
            try:
                self._send({"op": op, "id": number, "size": len(body), **fields}, body[:PART], until)
                for start in range(PART, len(body), PART):
                    self._send({"op": "part"}, body[start : start + PART], until)
                if new_key is not None:
                    self._key, self._num_sent, self._num_received = new_key, 0, 0
                reply, data = self._reply(number, max_body, until)
            except SandboxDiedError:
                raise
            except TimeoutError as error:
                raise self._died(f"it did not answer {op!r} within {patience_s:.1f} s") from error
            except OSError as error:
                raise self._died(self._dead or self._channel.epitaph() or str(error)) from error
        if "error" in reply:
            said = str(reply.get("message", ""))[:2000].encode("utf-8", "backslashreplace").decode()
            message = f"sandbox {self._name}: {said}"
            raise KINDS.get(str(reply["error"]), SandboxError)(message)
        return reply, data

    def renew(self) -> None:
        """Renews the box's lease, also while a request waits; never blocks for long and never raises: a box that is
        gone is found by the next request."""
        if not self._send_lock.acquire(blocking=False):
            return  # a frame is being sent, which renews as well
        try:
            if self._dead is None and self._is_booted:
                self._send_held({"op": "renew"}, b"", time.monotonic() + 1.0)
        except NothingSentError:
            pass  # the line is full of frames, which renew as well once they are heard
        except TimeoutError as error:
            self._died(f"its lease could not be renewed ({error})")  # half a frame may have been sent
        except OSError:
            self._channel.shut()  # the other end is gone, and the next request asks why
        finally:
            self._send_lock.release()

    def close(self) -> None:
        """No request succeeds after this, and one that waits now fails."""
        self._dead = self._dead or "it was closed"
        self._channel.shut()
        with self._lock, self._send_lock:
            self._channel.release()

    def _send(self, fields: Mapping[str, Any], body: bytes, until: float) -> None:
        with self._send_lock:
            self._send_held(fields, body, until)

    def _send_held(self, fields: Mapping[str, Any], body: bytes, until: float) -> None:
        header = marshal.dumps(dict(fields), 2)
        frame = sealed(self._key, HOST, self._num_sent, header, body)
        self._num_sent += 1
        try:
            self._channel.send(frame + body, until)
        except NothingSentError:
            self._num_sent -= 1
            raise

    def _reply(self, number: int, max_body: int, until: float) -> tuple[dict[str, Any], bytes]:
        data = bytearray()
        while True:
            reply, part = self._frame(max_body - len(data), until)
            if reply.get("id") != number or type(reply["id"]) is not int:
                raise self._died("its worker answered another question")
            data += part
            if reply.get("part") is not True:
                return reply, bytes(data)
            if not part:
                raise self._died("its worker sent a part of nothing")

    def _frame(self, max_body: int, until: float) -> tuple[dict[str, Any], bytes]:
        head = self._take(SIZES + TAG, until)
        header_size, body_size = int.from_bytes(head[:4], "big"), int.from_bytes(head[4:8], "big")
        if header_size > MAX_HEADER or body_size > max_body:
            raise self._died(f"its worker announced a reply of {header_size} + {body_size} bytes")
        encoded, body = self._take(header_size, until), self._take(body_size, until)
        tag = tag_of(self._key, BOX, self._num_received, head[:SIZES], encoded, body)
        if not hmac.compare_digest(tag, head[SIZES:]):
            raise self._died("a reply came that its worker did not write")
        self._num_received += 1
        try:
            reply = json.loads(encoded)
        except (ValueError, RecursionError) as error:
            raise self._died("its worker's reply is not JSON") from error
        if not isinstance(reply, dict):
            raise self._died("its worker's reply is no object")
        return reply, body

    def _take(self, size: int, until: float) -> bytes:
        while len(self._received) < size:
            data = self._channel.receive(until)
            if not data:
                raise self._died(self._dead or self._channel.epitaph() or "its worker ended")
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
