"""A box of an image without Python: every call is a `docker exec` of a shell, 50 to 100 times as slow as a worker's.
Law: the box is as hardened as any other, nothing in it is believed, and what cannot be done this way is refused.

Its pid 1 is a shell under a uid of its own, so that nothing in the box can signal it, read its input or hold it open.
It waits for the beats of its owner and ends the box with the end of its input, or when no beat came for the lease.
"""

from __future__ import annotations

import contextlib
import secrets
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import docker.errors

from agentgym.errors import (
    InputError,
    SandboxDiedError,
    SandboxError,
    SandboxLimitError,
    SandboxTimeoutError,
    UnavailableError,
)
from agentgym.sandbox.archive import Archive, ArchiveLimits
from agentgym.sandbox.box import (
    PACK_EXTRA,
    checked_command,
    checked_environment,
    checked_export,
    checked_text,
    checked_timeout,
    outermost,
    warn_of_relaxations,
)
from agentgym.sandbox.docker.command import DockerCommand, UpToMark
from agentgym.sandbox.docker.container import Container, NoPythonError
from agentgym.sandbox.docker.host import FAILURES, DockerHost, connect, root_cause
from agentgym.sandbox.docker.promises import check_promises
from agentgym.sandbox.docker.scripts import KEEPER, READ, RUN, WHOLE, WRITE
from agentgym.sandbox.docker.settings import enforced, owner_uid
from agentgym.sandbox.inside.worker_streams import Capture
from agentgym.sandbox.network.report import NetworkReport
from agentgym.sandbox.spec import PING_S, WORK_DIRECTORY, Answer, ExecResult, SandboxSpec
from agentgym.sandbox.worker_client import NothingSentError

KEEPER_UID = 10003  # of pid 1; neither a box's commands nor a verifier's
CALL_S = 60.0  # for reading, writing and moving files
FULL = ("No space left", "File too large", "quota exceeded")
KILLING_S = 30.0  # for a shell that kills to be started and to have killed
SENT = 90  # the code of a shell of ours that has sent its signal
TOO_LARGE = 93
LOST = 126  # what the daemon notes where a command's connection ended before its output did
CODES = {
    91: "there is no such file",
    92: "it is not a regular file",
    TOO_LARGE: "it is larger than a file may be",
    94: "only a part of it arrived, or something in the box cut it short",
}


class DockerExecSandbox:
    """Implements `Sandbox` without resident processes."""

    def __init__(self, spec: SandboxSpec, host: DockerHost | None = None, tier: str = "docker") -> None:
        if spec.allow_network:
            raise UnavailableError(
                f"the image {spec.image} has no python3 that can be the worker, and sandbox.allow_network goes through "
                "the worker; add python3 (3.9 or newer) to the image"
            )
        self._environment = {"LANG": "C.UTF-8", "HOME": WORK_DIRECTORY, **checked_environment(spec.environment)}
        daemon = connect(host)
        check_promises(daemon, tier, spec)
        self._container = container = Container(daemon, tier, spec)
        self.name, self.spec, self.tier = container.name, spec, tier
        self.limits: Mapping[str, str] = enforced(tier, spec, "docker exec")
        self._lock = threading.RLock()  # one call at a time
        self._beat_lock = threading.Lock()
        self._gone: str | None = None
        self._frozen = False
        self._has: dict[str, bool] = {}  # programs that were looked for in the box
        try:
            container.look_up_image()
            container.create(["sh", "-c", KEEPER, "sh", str(max(1, int(spec.lease_s)))], KEEPER_UID)
            self._lifeline = container.attach()
            container.start()
        except BaseException as error:
            failure = container.failed(error)
            if isinstance(failure, NoPythonError):
                failure = UnavailableError(
                    f"the image {spec.image} has neither python3 nor a shell (sh) in its PATH, and a box needs one of "
                    "them; add one to the image, or start it from agentgym/base:bookworm"
                )
            raise failure from error
        container.keep(self.renew)
        warn_of_relaxations(spec)

    # ------------------------------------------------------------------------------------------------------ the calls

    def exec(
        self, command: Sequence[str] | str, *, timeout_s: float = 10.0, stdin: bytes = b"", cwd: str | None = None
    ) -> ExecResult:
        argv = checked_command(command)
        checked_timeout(timeout_s)
        if len(stdin) > self._file_limit:
            raise InputError(f"stdin must be <= sandbox.tmpfs_mb = {self.spec.tmpfs_mb} MiB, got {len(stdin)} bytes")
        mark = f"agentgym-{secrets.token_hex(8)}"
        wrapped = ["sh", "-c", RUN, "sh", mark, checked_text("cwd", cwd) or "", *argv]
        with self._lock:
            self._not_frozen("exec")
            captures = [Capture(self.spec.output_limit) for _ in range(2)]
            out, err = (UpToMark(mark.encode(), capture.add) for capture in captures)
            code, seconds = self._run(
                wrapped, argv, stdin, timeout_s, out.add, err.add, lambda: out.ended and err.ended
            )
        for stream in (out, err):
            stream.end()
        (stdout, dropped_out), (stderr, dropped_err) = (capture.result() for capture in captures)
        if code == 125 and err.ended and not out.ended:
            raise SandboxError(f"sandbox {self.name}: the directory {cwd!r} cannot be entered")
        if not (out.ended and err.ended) and _was_lost(code, stdout):
            raise self._died(OSError("the connection ended before all of its output had come"))
        return ExecResult(code, stdout, stderr, dropped_out + dropped_err, seconds)

    def read_file(self, path: str) -> bytes:
        argv = ["sh", "-c", READ, "sh", str(checked_text("path", path)), str(self._file_limit)]
        return self._read(argv, path, self._file_limit)

    def write_file(self, path: str, data: bytes) -> None:
        checked_text("path", path)
        if len(data) > self._file_limit:
            raise SandboxLimitError(
                f"sandbox {self.name}: {len(data)} bytes for {path!r} exceed sandbox.tmpfs_mb = {self.spec.tmpfs_mb}"
            )
        with self._lock:
            self._not_frozen("write_file")
            self._feed(["sh", "-c", WRITE, "sh", path, str(len(data))], data, path)

    def put(self, source: Archive | Mapping[str, bytes | str] | Path, path: str = WORK_DIRECTORY) -> None:
        archive = source
        if isinstance(archive, Path):
            archive = Archive.from_folder(archive)
        elif not isinstance(archive, Archive):
            archive = Archive.of(archive)
        checked_text("path", path)
        with self._lock:
            self._not_frozen("put")
            self._needs("tar", "put")
            script = 'mkdir -p -- "$1" && exec tar -x -f - -C "$1"'
            self._feed(["sh", "-c", script, "sh", path], archive.to_tar(), path)

    def export(self, paths: Sequence[str]) -> Archive:
        if isinstance(paths, str):
            raise InputError(f"export takes a list of paths, got the one path {paths!r:.200}")
        asked = outermost([checked_export(path) for path in paths])
        limit = self._tree_limit
        return Archive.from_tar(self._tar(asked, limit, "export"), ArchiveLimits(bytes=limit))

    @property
    def frozen(self) -> bool:
        return self._frozen

    def freeze(self) -> None:
        with self._lock:
            if not self._signal("STOP"):
                raise SandboxLimitError(f"sandbox {self.name} cannot be frozen: no process can be started in it")
            self._frozen = True

    def thaw(self) -> None:
        with self._lock:
            if not self._signal("CONT"):
                raise SandboxLimitError(f"sandbox {self.name} cannot be thawed: no process can be started in it")
            self._frozen = False

    def fork(self) -> DockerExecSandbox:
        if self.spec.writable_root:
            raise SandboxError(
                f"sandbox {self.name} cannot be forked: its root is writable and its image has no python3; add it, or "
                "keep the work in the writable folders"
            )
        with self._lock:
            thaw = not self._frozen
            if thaw:
                self.freeze()
            try:
                pack = self._tar(["/tmp", WORK_DIRECTORY, *self.spec.folders], self._tree_limit, "fork")
            finally:
                if thaw:
                    self.thaw()
        twin = DockerExecSandbox(self.spec, self._container.daemon.host, self.tier)
        try:
            twin._feed(["tar", "-x", "-p", "-f", "-", "-C", "/"], pack, "/")
        except BaseException:
            twin.close()
            raise
        return twin

    @property
    def network(self) -> NetworkReport:
        return NetworkReport()

    def ping(self, *, timeout_s: float = PING_S) -> None:
        """Returns when a command runs; SandboxDiedError otherwise."""
        checked_timeout(timeout_s)
        with self._lock:
            try:
                self._run(["sh", "-c", ":"], ["sh"], b"", timeout_s, _ignore, _ignore)
            except SandboxTimeoutError as error:
                self._gone = self._gone or f"it did not answer 'ping' within {timeout_s:.1f} s"
                raise SandboxDiedError(f"sandbox {self.name} died: {self._gone}") from error

    def renew(self) -> None:
        """Renews the lease, from any thread, also while a call waits."""
        with self._beat_lock, contextlib.suppress(NothingSentError):  # the line is full of beats
            self._lifeline.send(b"\n", time.monotonic() + 1.0)

    @property
    def python(self) -> str:
        """There is none in the box."""
        raise self._no_python("an interpreter")

    def start_process(self, command: Sequence[str], *, cwd: str | None = None) -> int:
        raise self._no_python("a resident process")

    def ask_process(self, process: int, message: bytes, *, timeout_s: float = 10.0) -> Answer:
        raise self._no_python("a resident process")

    def stop_process(self, process: int) -> None:
        raise self._no_python("a resident process")

    def __enter__(self) -> DockerExecSandbox:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._gone = self._gone or "it was closed"
        self._lifeline.shut()
        with self._beat_lock:
            self._lifeline.release()
        self._container.remove()  # which ends a call that waits

    # ------------------------------------------------------------------------------------------------- one docker exec

    def _run(
        self,
        argv: Sequence[str],
        shown: Sequence[str],
        stdin: bytes,
        timeout_s: float,
        out: Callable[[bytes], None],
        err: Callable[[bytes], None],
        is_whole: Callable[[], bool] | None = None,
        then_kill: bool = True,
    ) -> tuple[int, float]:
        """Runs argv in the box until it has ended, with all that it wrote, or the deadline has come: (exit code,
        seconds). What the daemon takes to start it does not count."""
        if self._gone is not None:
            raise SandboxDiedError(f"sandbox {self.name} is gone: {self._gone}")
        try:
            command = DockerCommand(self._container, argv, stdin, owner_uid(self.spec), self._environment)
        except FAILURES as error:
            raise self._died(error) from error
        started = time.monotonic()
        try:
            for stream, data in command.output(started + timeout_s, is_whole):
                (out if stream == 1 else err)(data)
            code = command.exit_code()
            if self._gone is not None:
                raise SandboxDiedError(f"sandbox {self.name} is gone: {self._gone}")
            return code, time.monotonic() - started
        except TimeoutError as error:
            command.shut()
            if then_kill:
                self._kill_all()
            raise SandboxTimeoutError(
                f"sandbox {self.name}: {' '.join(shown)[:200]!r} passed its deadline of {timeout_s:g} s and was killed"
            ) from error
        except SandboxLimitError:  # more than was asked for; whatever writes it may never end
            self._kill_all()
            raise
        except SandboxError:
            raise
        except FAILURES as error:
            raise self._died(error) from error
        finally:
            command.release()

    def _read(self, argv: Sequence[str], path: str, limit: int) -> bytes:
        """What a command of ours prints, all of it."""
        data, said = bytearray(), Capture(4096)
        mark = secrets.token_hex(16)

        def keep(more: bytes) -> None:
            if len(data) + len(more) > limit + len(mark):
                raise SandboxLimitError(f"sandbox {self.name}: {path!r} is larger than {limit} bytes")
            data.extend(more)

        wrapped = ["sh", "-c", WHOLE, "sh", mark, *argv]
        with self._lock:
            code, _ = self._run(wrapped, argv[:1], b"", CALL_S, keep, said.add, lambda: data.endswith(mark.encode()))
        if not data.endswith(mark.encode()) and _was_lost(code, data):
            raise self._died(OSError("the connection ended before all of it had come"))
        self._check(code, said, path)
        return bytes(data[: -len(mark)])

    def _feed(self, argv: Sequence[str], data: bytes, path: str) -> None:
        said = Capture(4096)
        code, _ = self._run(argv, argv[:1], data, CALL_S, _ignore, said.add)
        self._check(code, said, path)

    def _check(self, code: int, said: Capture, path: str) -> None:
        if code == 0:
            return
        text = said.result()[0].decode(errors="replace").strip()
        why = CODES.get(code, text[-1000:])
        kind = SandboxLimitError if code == TOO_LARGE or any(mark in text for mark in FULL) else SandboxError
        raise kind(f"sandbox {self.name}: {path!r}: {why} (exit code {code})")

    def _tar(self, paths: Sequence[str], limit: int, what: str) -> bytes:
        self._needs("tar", what)
        relative = [path.lstrip("/") for path in paths]
        return self._read(["tar", "-c", "-f", "-", "-C", "/", "--", *relative], ", ".join(paths), limit + PACK_EXTRA)

    def _needs(self, program: str, what: str) -> None:
        if program not in self._has:
            script = ["sh", "-c", 'command -v "$1" >/dev/null', "sh", program]
            with self._lock:
                self._has[program] = self._run(script, [program], b"", CALL_S, _ignore, _ignore)[0] == 0
        if not self._has[program]:
            raise UnavailableError(
                f"sandbox {self.name}: {what} needs {program} in an image without python3; add {program} or python3 to "
                f"the image {self.spec.image}"
            )

    def _signal(self, name: str, within_s: float = CALL_S) -> bool:
        """To everything in the box but pid 1, which has another uid, and the shell that sends it; atomic. Whether it
        was sent: where no process can be started, the daemon notes another code."""
        script = f"kill -s {name} -- -1 2>/dev/null; exit {SENT}"
        code, _ = self._run(["sh", "-c", script], ["kill"], b"", within_s, _ignore, _ignore, then_kill=False)
        return code == SENT

    def _kill_all(self) -> None:
        """What was left by earlier calls goes, too: through `docker exec` nobody knows what belongs to which call."""
        until = time.monotonic() + KILLING_S
        why = "no process can be started in it"
        try:
            while time.monotonic() < until:
                if self._signal("KILL", until - time.monotonic()):
                    return
                time.sleep(0.05)
        except SandboxError as error:
            why = str(error)
        self._gone = self._gone or f"what ran in it could not be killed ({why})"  # then the whole box goes
        self._container.remove()

    def _died(self, error: Exception) -> SandboxDiedError:
        why = self._gone
        if why is None:
            gone = isinstance(error, docker.errors.APIError) and error.status_code in (404, 409)
            why = self._container.why_gone() if gone or isinstance(error, OSError) else str(root_cause(error))
            self._gone = why
        return SandboxDiedError(f"sandbox {self.name} died: {why}")

    def _not_frozen(self, what: str) -> None:
        if self._frozen:
            raise SandboxError(f"sandbox {self.name} is frozen; {what} needs it thawed")

    def _no_python(self, what: str) -> UnavailableError:
        return UnavailableError(
            f"sandbox {self.name} has no python3 and works through docker exec, which cannot keep {what}; add python3 "
            f"(3.9 or newer) to the image {self.spec.image}"
        )

    @property
    def _file_limit(self) -> int:
        return self.spec.tmpfs_mb * 2**20

    @property
    def _tree_limit(self) -> int:
        return self._file_limit * (2 + len(self.spec.folders))


def _ignore(_: bytes) -> None:
    pass


def _was_lost(code: int, printed: bytes | bytearray) -> bool:
    """Whether it was the connection that kept a mark from coming, and not a shell that could not begin: it may have no
    place for one more process; where it could not even be started, the daemon notes LOST as well and prints why."""
    return code == 0 or (code == LOST and not printed.startswith(b"OCI runtime"))
