"""One box over its worker, the same for every tier; the tiers differ in what they start and how they end it. Must never
know which isolation it runs in."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from agentgym.errors import InputError, SandboxDiedError, SandboxError, SandboxLimitError, SandboxTimeoutError
from agentgym.sandbox.spec import BOX_UID, Answer, ExecResult, SandboxSpec
from agentgym.sandbox.worker_client import Channel, WorkerClient, whole

MARK_BYTES = 64  # room for the line that says how much output was cut


class WorkerSandbox:
    """Implements `Sandbox`; a tier's class adds the start and `_end`."""

    def __init__(self, tier: str, name: str, spec: SandboxSpec, channel: Channel, limits: Mapping[str, str]) -> None:
        self.tier = tier
        self.name = name
        self.spec = spec
        self.limits = limits
        self._client = WorkerClient(channel, name)

    def _boot(self, rlimits: Mapping[str, int]) -> None:
        """Starts the worker and checks what it became: pid 1 and nobody's root, or this is no box."""
        settings = {
            "environment": checked_environment(self.spec.environment),
            "output_limit": self.spec.output_limit,
            "file_limit": self._file_limit,
            "rlimits": dict(rlimits),
        }
        greeting = self._client.boot(settings)
        if greeting.get("pid") != 1 or greeting.get("uid") != BOX_UID:
            raise SandboxError(
                f"sandbox {self.name} is not isolated: its worker is pid {greeting.get('pid')} of uid "
                f"{greeting.get('uid')}, not pid 1 of uid {BOX_UID}"
            )
        self._python = str(greeting.get("executable"))

    @property
    def python(self) -> str:
        """The interpreter in the box."""
        return self._python

    @property
    def _file_limit(self) -> int:
        return self.spec.tmpfs_mb * 2**20

    def exec(
        self, command: Sequence[str] | str, *, timeout_s: float = 10.0, stdin: bytes = b"", cwd: str | None = None
    ) -> ExecResult:
        argv = checked_command(command)
        checked_timeout(timeout_s)
        if len(stdin) > self._file_limit:
            raise InputError(f"stdin must be <= sandbox.tmpfs_mb = {self.spec.tmpfs_mb} MiB, got {len(stdin)} bytes")
        fields = {"argv": argv, "cwd": checked_text("cwd", cwd), "timeout_s": timeout_s}
        longest = 2 * (self.spec.output_limit + MARK_BYTES) + 4096
        reply, body = self._client.request("exec", fields, stdin, wait_s=timeout_s, max_body=longest)
        if reply.get("timeout"):
            raise SandboxTimeoutError(
                f"sandbox {self.name}: {' '.join(argv)[:200]!r} passed its deadline of {timeout_s:g} s and was killed"
            )
        out, err = self._split(body, reply, "out", "err")
        return ExecResult(self._exit_code(reply), out, err, whole(reply, "dropped"), self._seconds(reply))

    def read_file(self, path: str) -> bytes:
        _, body = self._client.request("read", {"path": checked_text("path", path)}, max_body=self._file_limit)
        return body

    def write_file(self, path: str, data: bytes) -> None:
        if len(data) > self._file_limit:
            raise SandboxLimitError(
                f"sandbox {self.name}: {len(data)} bytes for {path!r} exceed sandbox.tmpfs_mb = {self.spec.tmpfs_mb}"
            )
        self._client.request("write", {"path": checked_text("path", path)}, data)

    def ping(self) -> None:
        """Returns when the worker answers; SandboxDiedError otherwise."""
        self._client.request("ping", {})

    def start_process(self, command: Sequence[str], *, cwd: str | None = None) -> int:
        fields = {"argv": checked_command(command), "cwd": checked_text("cwd", cwd)}
        reply, _ = self._client.request("spawn", fields)
        return whole(reply, "process")

    def ask_process(self, process: int, message: bytes, *, timeout_s: float = 10.0) -> Answer:
        checked_timeout(timeout_s)
        fields = {"process": process, "timeout_s": timeout_s}
        longest = 2 * (self.spec.output_limit + MARK_BYTES) + 4096
        reply, body = self._client.request("ask", fields, message, wait_s=timeout_s, max_body=longest)
        state = reply.get("state")
        if state not in ("answered", "timeout", "died") or whole(reply, "output") > len(body):
            raise self._disbelieved("an answer without a known state")
        output, data = body[: reply["output"]], body[reply["output"] :]
        code = None if state == "answered" or reply.get("exit_code") is None else self._exit_code(reply)
        return Answer(state, data, output, whole(reply, "dropped"), code, self._seconds(reply))

    def stop_process(self, process: int) -> None:
        self._client.request("stop", {"process": process})

    def close(self) -> None:
        self._client.close()
        self._end()

    def _end(self) -> None:
        """Returns when nothing of the box is left; idempotent."""
        raise NotImplementedError

    def __enter__(self) -> WorkerSandbox:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _split(self, body: bytes, reply: Mapping[str, Any], first: str, second: str) -> tuple[bytes, bytes]:
        size = whole(reply, first)
        if size + whole(reply, second) != len(body):
            raise self._disbelieved("output of another size than announced")
        return body[:size], body[size:]

    def _exit_code(self, reply: Mapping[str, Any]) -> int:
        code = reply.get("exit_code")
        if type(code) is not int or not -128 <= code <= 255:
            raise self._disbelieved("an exit code that is none")
        return code

    def _seconds(self, reply: Mapping[str, Any]) -> float:
        seconds = reply.get("seconds")
        if not isinstance(seconds, (int, float)) or not math.isfinite(seconds) or seconds < 0:
            raise self._disbelieved("a duration that is none")
        return float(seconds)

    def _disbelieved(self, what: str) -> SandboxDiedError:
        self._client.close()
        return SandboxDiedError(f"sandbox {self.name} died: its worker sent {what}")


def checked_command(command: Sequence[str] | str) -> list[str]:
    """argv; a string goes through the shell."""
    argv = ["/bin/sh", "-c", command] if isinstance(command, str) else list(command)
    if not argv or not argv[0] or not all(isinstance(part, str) for part in argv):
        raise InputError(f"a command must be a string or a non-empty sequence of strings, got {command!r:.200}")
    for part in argv:
        checked_text("command", part)
    return argv


def checked_text(what: str, text: str | None) -> str | None:
    """A text that the kernel can take as an argument or a path."""
    if text is not None and ("\0" in text or not encodable(text)):
        raise InputError(f"{what} must hold no NUL character and no lone surrogate, got {text!r:.200}")
    return text


def encodable(text: str) -> bool:
    """Whether UTF-8 can hold it."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def checked_timeout(timeout_s: float) -> None:
    """A deadline must lie in the future and be finite."""
    if not (timeout_s > 0 and math.isfinite(timeout_s)):
        raise InputError(f"timeout_s must be > 0 and finite, got {timeout_s}")


def checked_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Names and values that the kernel can take."""
    for name, value in environment.items():
        if not name or "=" in name or "\0" in name + value or not encodable(name + value):
            raise InputError(f"sandbox.environment has the entry {name!r}={value!r:.50}, which no process can be given")
    return dict(environment)
