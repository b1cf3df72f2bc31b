"""One box over its worker, the same for every tier; the tiers differ in what they start and how they end it. Must never
know which isolation it runs in."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from agentgym.errors import InputError, SandboxDiedError, SandboxError, SandboxLimitError, SandboxTimeoutError
from agentgym.sandbox.archive import Archive, ArchiveLimits
from agentgym.sandbox.network.report import NetworkLimits, NetworkReport
from agentgym.sandbox.spec import PING_S, WORK_DIRECTORY, Answer, ExecResult, SandboxSpec
from agentgym.sandbox.worker_client import Channel, WorkerClient, whole, worker_program

MARK_BYTES = 64  # room for the line that says how much output was cut
MOVE_S = 60.0  # for what may be as large as all the box's folders
PACK_EXTRA = 16 * 2**20  # headers of a tar, beside the bytes of its files
WARNED: set[tuple[str, ...]] = set()  # relaxations that were warned about in this process

logger = logging.getLogger(__name__)


class WorkerSandbox:
    """Implements `Sandbox`; a tier's class adds the start and `_end`."""

    def __init__(self, tier: str, name: str, spec: SandboxSpec, channel: Channel, limits: Mapping[str, str]) -> None:
        self.tier = tier
        self.name = name
        self.spec = spec
        self.limits = limits
        self._way_out = _WayOut(channel, name, spec) if spec.allow_network else None
        self._client = self._way_out.client if self._way_out else WorkerClient(channel, name)
        self._frozen = False

    def _boot(
        self,
        rlimits: Mapping[str, int],
        *,
        compiled_for: str | None = None,
        modules: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> Mapping[str, Any]:
        """Starts the worker and checks what it became: pid 1 and who the spec says, or this is no box.

        `compiled_for`: the box runs this interpreter of the host. `modules`: files of this package that are sent along;
        the worker calls `apply(settings)` of each before its first answer. What they returned, by their names."""
        way_out = self._way_out
        more = (*(modules or ()), *(("worker_network",) if way_out else ()))
        settings = {
            "environment": {
                **(way_out.environment if way_out else {}),
                **checked_environment(self.spec.environment),
            },
            "network": way_out and {"at_once": way_out.limits.at_once},
            "output_limit": self.spec.output_limit,
            "file_limit": self._file_limit,
            "lease_s": self.spec.lease_s,
            "rlimits": dict(rlimits),
            "modules": {name: dict(fields) for name, fields in (modules or {}).items()},
        }
        greeting = self._client.boot(settings, worker_program(compiled_for, more))
        uid = 0 if self.spec.run_as_root else self.spec.uid
        if greeting.get("pid") != 1 or greeting.get("uid") != uid:
            raise SandboxError(
                f"sandbox {self.name} is not isolated: its worker is pid {greeting.get('pid')} of uid "
                f"{greeting.get('uid')}, not pid 1 of uid {uid}"
            )
        if way_out:
            way_out.open()
        self._python = str(greeting.get("executable"))
        applied = greeting.get("applied")
        return applied if isinstance(applied, dict) else {}

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

    def put(self, source: Archive | Mapping[str, bytes | str] | Path, path: str = WORK_DIRECTORY) -> None:
        archive = source
        if isinstance(archive, Path):
            archive = Archive.from_folder(archive)
        elif not isinstance(archive, Archive):
            archive = Archive.of(archive)
        self._client.request("put", {"path": checked_text("path", path)}, archive.to_tar(), wait_s=MOVE_S)

    def export(self, paths: Sequence[str]) -> Archive:
        if isinstance(paths, str):
            raise InputError(f"export takes a list of paths, got the one path {paths!r:.200}")
        asked = outermost([checked_export(path) for path in paths])
        limit = self._tree_limit
        fields = {"paths": asked, "exact": False, "limit": limit}
        _, body = self._client.request("export", fields, wait_s=MOVE_S, max_body=limit + PACK_EXTRA)
        return Archive.from_tar(body, ArchiveLimits(bytes=limit))

    @property
    def frozen(self) -> bool:
        return self._frozen

    def freeze(self) -> None:
        self._client.request("freeze", {})
        self._frozen = True

    def thaw(self) -> None:
        self._client.request("thaw", {})
        self._frozen = False

    def fork(self) -> WorkerSandbox:
        pack = self._pack()
        twin = self._open_like()
        try:
            twin._restore(pack)
        except BaseException:
            twin.close()
            raise
        return twin

    def _open_like(self) -> WorkerSandbox:
        """A new box of the same spec; a tier whose boxes are opened in another way says how."""
        return type(self)(self.spec)  # type: ignore[call-arg]

    def _pack(self) -> bytes:
        """The writable folders at one moment, in a form that only another worker reads."""
        limit = self._tree_limit
        fields = {"paths": list(self.folders), "exact": True, "limit": limit}
        _, body = self._client.request("export", fields, wait_s=MOVE_S, max_body=limit + PACK_EXTRA)
        return body

    def _restore(self, pack: bytes) -> None:
        self._client.request("restore", {}, pack, wait_s=MOVE_S)

    @property
    def folders(self) -> tuple[str, ...]:
        """What can be written to in the box."""
        return ("/tmp", WORK_DIRECTORY, *self.spec.folders)

    @property
    def _tree_limit(self) -> int:
        return (self._file_limit + PACK_EXTRA) * len(self.folders)

    def renew(self) -> None:
        """Renews the lease, from any thread, also while a call waits; a box that is gone is found by the next call."""
        self._client.renew()

    @property
    def network(self) -> NetworkReport:
        return self._way_out.gateway.report() if self._way_out else NetworkReport()

    def ping(self, *, timeout_s: float = PING_S) -> None:
        """Returns when the worker answers; SandboxDiedError otherwise."""
        checked_timeout(timeout_s)
        self._client.request("ping", {}, wait_s=timeout_s, grace_s=0.0)

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
        self._close_line()
        self._end()

    def _close_line(self) -> None:
        self._client.close()
        if self._way_out:
            self._way_out.gateway.close()

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


class _WayOut:
    """The parts of a box that has an allow-list; without one, none of it is even imported."""

    def __init__(self, channel: Channel, name: str, spec: SandboxSpec) -> None:
        from agentgym.sandbox.network.allow_list import AllowList
        from agentgym.sandbox.network.gateway import Gateway, proxy_environment
        from agentgym.sandbox.network.shared_client import SharedWorkerClient

        self.environment = proxy_environment()
        self.limits = NetworkLimits(bytes=spec.network_mb * 2**20)
        self.client = SharedWorkerClient(channel, name)
        allow = AllowList(spec.allow_network)
        self.gateway = Gateway(name, allow, self.limits, self.client.send_beside, self.client.broke)

    def open(self) -> None:
        self.client.share(self.gateway.take)


def network_limit(spec: SandboxSpec) -> dict[str, str]:
    """`Sandbox.limits` of a box with a way out."""
    if not spec.allow_network:
        return {}
    hosts = ", ".join(spec.allow_network)
    return {"network": f"relaxed: through a proxy on the host to {hosts}, {spec.network_mb} MiB; no interface"}


def warn_of_relaxations(spec: SandboxSpec) -> None:
    """Once in a process for each combination; the box's limits and labels show it for every box."""
    if spec.relaxations and spec.relaxations not in WARNED:
        WARNED.add(spec.relaxations)
        logger.warning(
            "sandboxes are not fully hardened, because their spec asks for it: %s", ", ".join(spec.relaxations)
        )


def checked_command(command: Sequence[str] | str) -> list[str]:
    """argv; a string goes through the shell."""
    argv = ["/bin/sh", "-c", command] if isinstance(command, str) else list(command)
    if not argv or not argv[0] or not all(isinstance(part, str) for part in argv):
        raise InputError(f"a command must be a string or a non-empty sequence of strings, got {command!r:.200}")
    for part in argv:
        checked_text("command", part)
    return argv


def checked_export(path: str) -> str:
    """An absolute path without "." and ".."; what is relative lies in the work directory."""
    checked_text("path", path)
    whole_path = path if path.startswith("/") else f"{WORK_DIRECTORY}/{path}"
    parts = [part for part in whole_path.split("/") if part not in ("", ".")]
    if ".." in parts or not parts:
        raise InputError(f"export takes paths below / without '..', got {path!r:.200}")
    return "/" + "/".join(parts)


def outermost(paths: Sequence[str]) -> list[str]:
    """Without those that lie in another of them."""
    kept: list[str] = []
    for path in sorted(set(paths)):
        if not any(path.startswith(f"{above}/") for above in kept):
            kept.append(path)
    return kept


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
