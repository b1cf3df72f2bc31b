"""The tier without a daemon: bubblewrap. Law: the box sees the host's /usr and the few files that programs need to
start, read-only, and nothing else of the host; no home, no network, no other process.

A root owner starts it as an unprivileged user of the host, so that even a hole in the user namespace leads to nobody.
The thread that starts bubblewrap lives as long as the box: `--die-with-parent` follows the starting *thread*, and the
rollout's threads come and go.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import platform
import secrets
import select
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path

from agentgym.errors import SandboxDiedError, SandboxError, UnavailableError
from agentgym.sandbox import cgroup
from agentgym.sandbox.box import WorkerSandbox
from agentgym.sandbox.socket_channel import SocketChannel
from agentgym.sandbox.spec import BOX_UID, WORK_DIRECTORY, SandboxSpec
from agentgym.sandbox.worker_client import START_S, boot_command

logger = logging.getLogger(__name__)

NEEDED_MODULES = "ast, ctypes, decimal, fractions, json, math, random, statistics, traceback"
HOST_FILES = ("/etc/ld.so.cache", "/etc/ld.so.conf", "/etc/ld.so.conf.d", "/etc/alternatives", "/etc/localtime")
SYSTEM_FOLDERS = ("/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32")
ISOLATION = (
    "--unshare-all",
    "--unshare-user",
    "--die-with-parent",
    "--new-session",
    "--as-pid-1",
    "--cap-drop",
    "ALL",
)
MEND = "install it (apt-get install bubblewrap) or use sandbox.tier=docker"


class NamespaceSandbox(WorkerSandbox):
    """One bubblewrap box. `NamespaceSandbox(SandboxSpec())` starts it."""

    def __init__(self, spec: SandboxSpec) -> None:
        bwrap = find_bubblewrap()
        python, prefix = find_python()
        name = f"agentgym-{os.getpid()}-{secrets.token_hex(4)}"
        self._cgroup = cgroup.Cgroup.create(name, spec)
        limits = dict(self._cgroup.limits) if self._cgroup else {}
        rlimits = _rlimits(spec, limits)
        ours, theirs = socket.socketpair()
        self._process = BubblewrapProcess(_command(bwrap, spec, python, prefix), theirs, _host_uid())
        super().__init__("namespace", name, spec, SocketChannel(ours, self._process.epitaph), limits)
        try:
            self._process.start()
            pid = self._process.worker_pid()
            if self._cgroup:  # nothing of the box has run yet: the worker itself is sent after this
                self._cgroup.add(pid)
            self._boot(rlimits)
        except BaseException as error:
            self.close()
            if isinstance(error, SandboxDiedError) and "bwrap: " in self._process.epitaph():
                raise _start_error(self._process.epitaph()) from error
            raise

    def _end(self) -> None:
        self._process.end()
        if self._cgroup:
            self._cgroup.remove()


class BubblewrapProcess:
    """One bubblewrap, its keeper thread and its complaints."""

    def __init__(self, command: list[str], streams: socket.socket, uid: int | None) -> None:
        self._command = command
        self._streams = streams
        self._uid = uid
        self._info_read, self._info_write = os.pipe()
        self._started = threading.Event()
        self._failure: OSError | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._complaint = b""
        self._thread = threading.Thread(target=self._keep, name="agentgym-box", daemon=True)

    def start(self) -> None:
        """Returns when bubblewrap was started."""
        self._thread.start()
        self._started.wait()
        if self._failure:
            raise SandboxError(f"bubblewrap cannot be started: {self._failure}") from self._failure

    def _keep(self) -> None:
        command = [*self._command[:1], "--info-fd", str(self._info_write), *self._command[1:]]
        try:
            process = subprocess.Popen(
                command,
                stdin=self._streams.fileno(),
                stdout=self._streams.fileno(),
                stderr=subprocess.PIPE,
                pass_fds=(self._info_write,),
                env={},
                cwd="/",
                start_new_session=True,
                user=self._uid,
                group=self._uid,
                extra_groups=None if self._uid is None else (),
            )
        except OSError as error:
            self._failure = error
            return
        finally:
            self._streams.close()
            os.close(self._info_write)
            if self._process is None and self._failure:
                self._started.set()
        self._process = process
        self._started.set()
        assert process.stderr is not None
        with process.stderr:
            for chunk in iter(functools.partial(os.read, process.stderr.fileno(), 4096), b""):
                self._complaint = (self._complaint + chunk)[-4096:]
        process.wait()

    def worker_pid(self) -> int:
        """The worker's process, as the host counts it."""
        text, until = b"", time.monotonic() + START_S
        while not text.rstrip().endswith(b"}"):
            if not select.select([self._info_read], [], [], max(0.0, until - time.monotonic()))[0]:
                raise SandboxError(f"bubblewrap did not start within {START_S:g} s")
            chunk = os.read(self._info_read, 4096)
            if not chunk:
                raise _start_error(self.epitaph())
            text += chunk
        return int(json.loads(text)["child-pid"])

    def epitaph(self) -> str:
        """How it ended, with what bubblewrap said."""
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join(1.0)
        code = self._process.poll() if self._process else None
        said = self._complaint.decode(errors="replace").strip()
        return f"bubblewrap ended with code {code}{': ' if said else ''}{said}"

    def end(self) -> None:
        """Kills it and with it everything in the box; returns when it is gone."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(signal.SIGKILL)
            self._thread.join(10.0)
        if self._info_read >= 0:
            os.close(self._info_read)
            self._info_read = -1


def namespace_problem() -> str | None:
    """Why this machine cannot have namespace boxes, with the mend; None if it can."""
    try:
        bwrap = find_bubblewrap()
        find_python()
    except UnavailableError as error:
        return str(error)
    uid = _host_uid()
    trial = [bwrap, *ISOLATION, "--ro-bind", "/usr", "/usr", *_links()]
    try:
        done = subprocess.run(
            [*trial, "--proc", "/proc", "--dev", "/dev", "/usr/bin/env", "true"],
            capture_output=True,
            env={},
            timeout=10,
            check=False,
            user=uid,
            group=uid,
            extra_groups=None if uid is None else (),
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"bubblewrap does not run: {error}; {MEND}"
    if done.returncode:
        return str(_start_error(done.stderr.decode(errors="replace").strip()))
    return None


def _start_error(said: str) -> UnavailableError:
    return UnavailableError(
        f"bubblewrap cannot make a box here ({said}); allow user namespaces (sysctl user.max_user_namespaces > 0, "
        "kernel.unprivileged_userns_clone=1, kernel.apparmor_restrict_unprivileged_userns=0; in a container they need "
        "its permission) or use sandbox.tier=docker"
    )


def find_bubblewrap() -> str:
    """The path of bwrap."""
    found = shutil.which("bwrap")
    if found is None:
        raise UnavailableError(f"bubblewrap (bwrap) is not on this machine; {MEND}")
    return found


@functools.cache
def _help(bwrap: str) -> str:
    """What this version can do (asked once; a version does not change under us)."""
    return subprocess.run([bwrap, "--help"], capture_output=True, text=True, timeout=10, check=False).stdout


@functools.cache
def find_python() -> tuple[str, str | None]:
    """(interpreter with the standard library, its prefix to show in the box or None if /usr holds it)."""
    for version in ("", "3.14", "3.13", "3.12", "3.11", "3.10", "3.9"):
        candidate = f"/usr/bin/python{version or '3'}"
        if os.access(candidate, os.X_OK) and _usable(candidate):
            return candidate, None
    own = str(Path(sys.base_prefix).resolve())
    candidate = f"{own}/bin/python{sys.version_info[0]}.{sys.version_info[1]}"
    if os.access(candidate, os.X_OK) and _usable(candidate):
        if os.geteuid() == 0 and not all(folder.stat().st_mode & 0o001 for folder in (Path(own), *Path(own).parents)):
            raise UnavailableError(
                f"the only Python here, {candidate}, lies where only root can go, and a box does not run as root; "
                "install python3 in /usr (apt-get install python3)"
            )
        return candidate, None if own.startswith("/usr/") else own
    raise UnavailableError("no python3 with its standard library was found for the box; install python3 in /usr")


def _usable(python: str) -> bool:
    probe = f"import sys, {NEEDED_MODULES}; sys.exit(sys.version_info < (3, 9))"
    done = subprocess.run([python, "-I", "-S", "-c", probe], capture_output=True, timeout=30, check=False)
    return done.returncode == 0


def _host_uid() -> int | None:
    """As whom bubblewrap starts: None = as we are; a root owner becomes an unprivileged uid, because to root's own uid
    too much of /proc is open, capabilities or not."""
    return BOX_UID if os.geteuid() == 0 else None


def _links() -> list[str]:
    """/bin, /lib, ... as they are here: links into /usr, or folders."""
    options: list[str] = []
    for folder in SYSTEM_FOLDERS:
        if os.path.islink(folder):
            options += ["--symlink", os.readlink(folder), folder]
        elif os.path.isdir(folder):
            options += ["--ro-bind", folder, folder]
    return options


def _command(bwrap: str, spec: SandboxSpec, python: str, prefix: str | None) -> list[str]:
    able = _help(bwrap)
    options = [*ISOLATION]
    if "--disable-userns" in able:
        options += ["--disable-userns"]
    options += ["--uid", str(BOX_UID), "--gid", str(BOX_UID), "--hostname", "box", "--clearenv"]
    options += ["--ro-bind", "/usr", "/usr", *_links(), "--perms", "0755", "--dir", "/etc"]
    for path in (*HOST_FILES, *(["/nix/store"] if os.path.isdir("/nix/store") else [])):
        options += ["--ro-bind-try", path, path]
    options += ["--proc", "/proc", "--dev", "/dev", "--remount-ro", "/dev"]
    size = ["--size", str(spec.tmpfs_mb * 2**20)] if "--size BYTES" in able else []
    for folder in ("/tmp", "/dev/shm", WORK_DIRECTORY):
        options += [*size, "--tmpfs", folder]
    if prefix:
        options += ["--ro-bind", prefix, prefix, "--setenv", "PATH", f"{prefix}/bin:/usr/local/bin:/usr/bin:/bin"]
    options += ["--remount-ro", "/", "--chdir", WORK_DIRECTORY]
    return [bwrap, *options, "--", *boot_command(python)]


def _rlimits(spec: SandboxSpec, limits: dict[str, str]) -> Mapping[str, int]:
    """What the worker limits for itself and its children; completes `limits` with what no cgroup enforces."""
    rlimits = {"CORE": 0, "NOFILE": 1024, "FSIZE": spec.tmpfs_mb * 2**20}
    if "memory" not in limits:
        rlimits["AS"] = spec.memory_mb * 2**20
        limits["memory"] = "rlimit (of each process)"
    kernel = tuple(int(part) for part in platform.release().split("-")[0].split(".")[:2] if part.isdigit())
    if "pids" not in limits:
        # since 5.14 processes are counted per user namespace; before, all of the user's processes would count
        if kernel >= (5, 14):
            rlimits["NPROC"] = spec.pids
        limits["pids"] = "rlimit" if kernel >= (5, 14) else "none"
    limits.setdefault("cpus", "none")
    limits["disk"] = "tmpfs size"
    return rlimits
