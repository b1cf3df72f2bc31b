"""The tier without a daemon: bubblewrap. Law: the box sees the host's /usr and the few files that programs need to
start, read-only, and nothing else of the host; no home, no network, no other process.

A root owner starts it as an unprivileged user of the host, so that even a hole in the user namespace leads to nobody.
Behind the namespaces stand a filter of system calls, Landlock, and cgroups or rlimits, each where the kernel has it;
`limits` says which.
"""

from __future__ import annotations

import contextlib
import functools
import os
import platform
import secrets
import stat
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

from agentgym.errors import AgentGymError, SandboxDiedError, SandboxError, UnavailableError
from agentgym.sandbox import seccomp
from agentgym.sandbox.box import WorkerSandbox, network_limit, warn_of_relaxations
from agentgym.sandbox.namespace import cgroup
from agentgym.sandbox.namespace.bubblewrap import (
    ASKED_S,
    MEND,
    BubblewrapProcess,
    abilities,
    find_bubblewrap,
    identity,
    setpriv,
    start_error,
)
from agentgym.sandbox.ownership.lease import owner
from agentgym.sandbox.socket_channel import SocketChannel
from agentgym.sandbox.spec import BOX_UID, VERIFIER_UID, WORK_DIRECTORY, SandboxSpec
from agentgym.sandbox.worker_client import boot_command

NEEDED_MODULES = "ast, ctypes, decimal, fractions, json, math, random, statistics, traceback"
HOST_FILES = ("/etc/ld.so.cache", "/etc/alternatives", "/nix/store")
SYSTEM_FOLDERS = ("/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32")
WRITABLE_FOLDERS = ("/tmp", "/dev/shm", WORK_DIRECTORY)
# what everybody may read in the host's /proc and a container's default hides, and the addresses of the kernel
MASKED = ("interrupts", "kallsyms", "kcore", "keys", "latency_stats", "sched_debug", "timer_list", "timer_stats")
ISOLATION = (
    "--unshare-all",
    "--unshare-user",
    "--die-with-parent",
    "--new-session",
    "--as-pid-1",
    "--cap-drop",
    "ALL",
)


class NamespaceSandbox(WorkerSandbox):
    """One bubblewrap box. `NamespaceSandbox(SandboxSpec())` starts it."""

    def __init__(self, spec: SandboxSpec) -> None:
        if spec.needs_container:
            raise UnavailableError(
                f"sandbox.tier=namespace cannot give {' and '.join(spec.needs_container)}: its boxes are always "
                "hardened; use sandbox.tier=docker"
            )
        bwrap = find_bubblewrap()
        python, prefix = find_python()
        with _typed(), contextlib.ExitStack() as undo:
            uid = _host_uid(spec.uid)
            name = owner().new_name("namespace", spec)
            undo.callback(owner().forget, name)
            made = cgroup.Cgroup.create(name, spec)
            if made:
                undo.callback(made.remove)
            entrances = made.entrances if made and (uid is None or setpriv()) else []
            limits = _limits(spec, made.limits if made else {}, bwrap)
            process = BubblewrapProcess(
                [bwrap, *_filter(limits), *_options(bwrap, spec, python, prefix)],
                uid=uid,
                entrances=entrances,
                tell_pid=made is not None and not entrances,
            )
            undo.callback(process.end)
            channel = SocketChannel(process.start(), process.epitaph)
            super().__init__("namespace", name, spec, channel, limits)
            undo.callback(self._close_line)
            try:
                if made and not entrances:  # nothing of the box has run yet: the worker itself is sent after this
                    made.add(process.worker_pid())
                rlimits = _rlimits(spec, limits)
                modules = {"worker_landlock": _landlock(spec, prefix)}
                applied = self._boot(rlimits, compiled_for=python, modules=modules)
            except SandboxDiedError as error:
                epitaph = process.epitaph()
                if process.refused():
                    raise start_error(epitaph) from error
                raise SandboxDiedError(str(error) if epitaph in str(error) else f"{error}; {epitaph}") from error
            self.limits = {**limits, "landlock": str(applied["worker_landlock"]), **network_limit(spec)}
            warn_of_relaxations(spec)
            owner().keep(name, self._client.renew, spec.lease_s)
            self._undo = undo.pop_all()

    def _end(self) -> None:
        self._undo.close()


@contextlib.contextmanager
def _typed() -> Iterator[None]:
    """What runs out while a box is started (descriptors, threads, room for its lease), said as ours."""
    try:
        yield
    except AgentGymError:
        raise
    except (OSError, RuntimeError) as error:
        raise SandboxError(f"a namespace box cannot be started: {error}") from error


def namespace_problem() -> str | None:
    """Why this machine cannot have namespace boxes, with the mend; None if it can."""
    try:
        bwrap = find_bubblewrap()
        find_python()
    except UnavailableError as error:
        return str(error)
    prefix, user = identity(_host_uid(BOX_UID))
    trial = [*prefix, bwrap, *ISOLATION, "--ro-bind", "/usr", "/usr", *_links(), "--proc", "/proc", "--dev", "/dev"]
    try:
        done = subprocess.run(
            [*trial, "/usr/bin/env", "true"],
            capture_output=True,
            env={},
            timeout=ASKED_S,
            check=False,
            user=user,
            group=user,
            extra_groups=None if user is None else (),
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"bubblewrap does not run: {error}; {MEND}"
    if done.returncode:
        return str(start_error(done.stderr.decode(errors="replace").strip()))
    try:
        with _typed(), contextlib.ExitStack() as undo:
            made = cgroup.Cgroup.create(f"agentgym-{os.getpid()}-{secrets.token_hex(4)}", SandboxSpec())
            if made:
                undo.callback(made.remove)
            _limits(SandboxSpec(), made.limits if made else {}, bwrap)
    except AgentGymError as error:
        return str(error)
    return None


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
    done = subprocess.run([python, "-I", "-S", "-c", probe], capture_output=True, timeout=ASKED_S, check=False)
    return done.returncode == 0


def _host_uid(uid: int) -> int | None:
    """As whom bubblewrap starts: None = as we are; a root owner becomes the box's uid, because to root's own uid too
    much of /proc is open, capabilities or not. Root of a user namespace that has no such uid is nobody's root."""
    return uid if os.geteuid() == 0 and _is_mapped("uid", uid) and _is_mapped("gid", uid) else None


def _is_mapped(kind: str, number: int) -> bool:
    ranges = (map(int, line.split()) for line in Path(f"/proc/self/{kind}_map").read_text().splitlines())
    return any(first <= number < first + count for first, _, count in ranges)


# ---------------------------------------------------------------------------------------------- what the box can see


def _links() -> list[str]:
    """/bin, /lib, ... as they are here: links into /usr, or folders."""
    options: list[str] = []
    for folder in SYSTEM_FOLDERS:
        if os.path.islink(folder):
            options += ["--symlink", os.readlink(folder), folder]
        elif os.path.isdir(folder):
            options += ["--ro-bind", folder, folder]
    return options


@functools.cache
def _masks() -> tuple[str, ...]:
    """Nothing in place of what /proc tells of the host. /proc/sys is read-only: some of it (the limits of messages)
    would be the box's to write; it shows the namespaces of who looks, whichever /proc it is taken from."""
    options = ["--ro-bind", "/proc/sys", "/proc/sys"]
    for name in MASKED:
        path = f"/proc/{name}"
        if os.path.exists(path) and os.stat(path).st_mode & stat.S_IROTH:
            options += ["--ro-bind", "/dev/null", path]
    return tuple(options)


def _filter(limits: Mapping[str, str]) -> list[str | bytes]:
    program = seccomp.program(platform.machine())
    return ["--seccomp", program] if limits["seccomp"] == "filter" and program else []


def _options(bwrap: str, spec: SandboxSpec, python: str, prefix: str | None) -> list[str | bytes]:
    able = abilities(bwrap)
    options: list[str | bytes] = [*ISOLATION]
    options += [option for option in ("--disable-userns", "--clearenv") if option in able]
    options += ["--uid", str(spec.uid), "--gid", str(spec.uid), "--hostname", "box"]
    options += ["--ro-bind", "/usr", "/usr", *_links(), *(["--perms", "0755"] if "--perms" in able else [])]
    options += ["--dir", "/etc"]
    for path in HOST_FILES:
        if os.path.exists(path):
            options += ["--ro-bind", path, path]
    for path, content in _own_files(spec.uid).items():
        options += ["--file", content, path]
    options += ["--proc", "/proc", *_masks(), "--dev", "/dev", "--remount-ro", "/dev"]
    size = ["--size", str(spec.tmpfs_mb * 2**20)] if "--size" in able else []
    for folder in (*WRITABLE_FOLDERS, *sorted(spec.folders)):
        options += [*size, "--tmpfs", folder]
    if prefix:
        options += ["--ro-bind", prefix, prefix, "--setenv", "PATH", f"{prefix}/bin:/usr/local/bin:/usr/bin:/bin"]
    options += ["--remount-ro", "/", "--chdir", WORK_DIRECTORY]
    return [*options, "--", *boot_command(python)]


def _own_files(uid: int) -> dict[str, bytes]:
    """What a program looks up: who it is, what localhost is. Without them neither has an answer."""
    names = {0: "root", BOX_UID: "agent", VERIFIER_UID: "verifier", 65534: "nobody"}
    accounts = {uid: "user", **names}
    return {
        "/etc/passwd": "".join(
            f"{name}:x:{i}:{i}::{WORK_DIRECTORY}:/bin/sh\n" for i, name in accounts.items()
        ).encode(),
        "/etc/group": "".join(f"{name}:x:{i}:\n" for i, name in accounts.items()).encode(),
        "/etc/hosts": b"127.0.0.1 localhost box\n::1 localhost box\n",
        "/etc/nsswitch.conf": b"passwd: files\ngroup: files\nhosts: files\n",
    }


def _landlock(spec: SandboxSpec, prefix: str | None) -> dict[str, str]:
    """The settings of worker_landlock: what may be done below which folder."""
    read = ["/usr", "/etc", "/nix/store", *SYSTEM_FOLDERS, *([prefix] if prefix else [])]
    write = (*WRITABLE_FOLDERS, *spec.folders)
    return {
        "/": "list",
        "/proc": "device",
        "/dev": "device",
        **dict.fromkeys(read, "read"),
        **dict.fromkeys(write, "write"),
    }


# ------------------------------------------------------------------------------------------------ what holds its limits


def _limits(spec: SandboxSpec, by_cgroup: Mapping[str, str], bwrap: str) -> dict[str, str]:
    """What enforces each limit here; UnavailableError if nothing can keep the box from filling the host's memory."""
    able = abilities(bwrap)
    limits = {
        "memory": "rlimit (of each process)",
        # since 5.14 processes are counted per user namespace; before, all of the user's processes would count
        "pids": "rlimit" if _kernel() >= (5, 14) else "none: this kernel counts all of a user's processes",
        "cpus": "none: no cgroup can be made here; only the deadline of a call ends what spins",
        "disk": "tmpfs size" if "memory" in by_cgroup else "tmpfs size (of bytes; nothing counts the files)",
        **by_cgroup,
    }
    if "--size" not in able:
        if "memory" not in by_cgroup:
            raise UnavailableError(
                f"sandbox.tier=namespace cannot hold a box to sandbox.tmpfs_mb={spec.tmpfs_mb}: {bwrap} knows no "
                "--size and no memory cgroup can be made here; install bubblewrap 0.7, or use sandbox.tier=docker"
            )
        limits["disk"] = f"{by_cgroup['memory']} (with the memory; each file by rlimit)"
    if "--seccomp" not in able:
        limits["seccomp"] = f"none: {bwrap} knows no --seccomp"
    elif seccomp.program(platform.machine()) is None:
        limits["seccomp"] = f"none: no table of system calls for {platform.machine()}"
    else:
        limits["seccomp"] = "filter"
    return limits


def _kernel() -> tuple[int, ...]:
    return tuple(int(part) for part in platform.release().split("-")[0].split(".")[:2] if part.isdigit())


def _rlimits(spec: SandboxSpec, limits: Mapping[str, str]) -> dict[str, int]:
    """What the worker limits for itself and its children: always the small things, and what no cgroup holds."""
    rlimits = {"CORE": 0, "NOFILE": 1024, "FSIZE": spec.tmpfs_mb * 2**20}
    if limits["memory"].startswith("rlimit"):
        rlimits["AS"] = spec.memory_mb * 2**20
    if limits["pids"] == "rlimit":
        rlimits["NPROC"] = spec.pids
    return rlimits
