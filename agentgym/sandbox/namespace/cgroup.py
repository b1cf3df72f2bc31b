"""Memory, process and cpu limits of a namespace box through cgroups, version 1 or 2, where this process may make some.
Must never know what runs in them.

Where it may not (an ordinary user without delegation), `Cgroup.create` gives None and rlimits have to do.

Moving another process into a cgroup makes the kernel wait for all processors to pass a quiet point, 8 to 15 ms here. A
single thread that moves *itself* waits for nothing, but only version 1 knows that (`tasks`); so there a box is born in
its cgroups, and in version 2 its first process is moved while it starts.
"""

from __future__ import annotations

import contextlib
import errno
import os
import time
from collections.abc import Sequence
from pathlib import Path

from agentgym.errors import SandboxError
from agentgym.sandbox.spec import SandboxSpec

ROOT = Path("/sys/fs/cgroup")
CPU_PERIOD_US = 100_000
RAN_OUT = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOSPC, errno.EAGAIN)
LEAVING_S = 10.0  # how long the last processes may take to leave


class Cgroup:
    """One cgroup (version 2), or one in each hierarchy (version 1).

    Example: `Cgroup.create("agentgym-1a2b", SandboxSpec()).limits == {"memory": "cgroup v2", "pids": "cgroup v2"}`.
    """

    def __init__(self, folders: Sequence[Path], limits: dict[str, str], *, joined_by_itself: bool) -> None:
        self._folders = folders
        self._joined_by_itself = joined_by_itself
        self.limits = limits

    @classmethod
    def create(cls, name: str, spec: SandboxSpec) -> Cgroup | None:
        """Makes what may be made; None if neither memory nor processes can be limited. OSError where something ran out:
        a box must not start with less because there are many."""
        unified = (ROOT / "cgroup.controllers").exists()
        made: list[Path] = []
        try:
            limits = _version_2(name, spec, made) if unified else _version_1(name, spec, made)
        except OSError:
            for folder in made:
                folder.rmdir()
            raise
        return cls(made, limits, joined_by_itself=not unified) if limits else None

    @property
    def entrances(self) -> list[str]:
        """The files to which a process of one thread writes 0 to go in; [] if it has to be moved by `add`."""
        return [str(folder / "tasks") for folder in self._folders] if self._joined_by_itself else []

    def add(self, pid: int) -> None:
        """Moves a process in; what it forks from then on is in too."""
        try:
            for folder in self._folders:
                with contextlib.suppress(ProcessLookupError):  # it ended at once; the start that follows says why
                    (folder / "cgroup.procs").write_text(str(pid))
        except OSError as error:
            raise SandboxError(f"a box cannot be moved into its cgroup {error.filename}: {error.strerror}") from error

    def remove(self) -> None:
        """Takes the empty cgroups away. Retries, because the last processes take a moment to leave; what is left after
        all is the reaper's."""
        until = time.monotonic() + LEAVING_S
        for folder in self._folders:
            pause_s = 0.0005
            while True:
                try:
                    folder.rmdir()
                except FileNotFoundError:
                    break
                except OSError:
                    if time.monotonic() >= until:
                        break
                    time.sleep(pause_s)
                    pause_s = min(2 * pause_s, 0.05)
                else:
                    break


def _version_2(name: str, spec: SandboxSpec, made: list[Path]) -> dict[str, str]:
    settings = {
        "memory": {"memory.max": str(spec.memory_mb * 2**20), "memory.swap.max": "0"},
        "pids": {"pids.max": str(spec.pids)},
        "cpus": {"cpu.max": f"{int(spec.cpus * CPU_PERIOD_US)} {CPU_PERIOD_US}"},
    }
    own = ROOT / _own_cgroups().get("", "/").lstrip("/")
    # processes may live only in leaves, so a child of our own cgroup gets controllers only if that is a root
    for parent in dict.fromkeys((own, own.parent if own != ROOT else ROOT)):
        for controller in ("memory", "pids", "cpu"):
            with contextlib.suppress(OSError):
                (parent / "cgroup.subtree_control").write_text(f"+{controller}")
        folder = parent / name
        if not _make(folder, made):
            continue
        limits = {kind: "cgroup v2" for kind, files in settings.items() if _write(folder, files)}
        if "memory" in limits and "pids" in limits and os.access(parent / "cgroup.procs", os.W_OK):
            return limits
        made.remove(folder)
        folder.rmdir()
    return {}


def _version_1(name: str, spec: SandboxSpec, made: list[Path]) -> dict[str, str]:
    memory = str(spec.memory_mb * 2**20)
    settings = {
        "memory": ("memory", {"memory.limit_in_bytes": memory, "memory.memsw.limit_in_bytes": memory}),
        "pids": ("pids", {"pids.max": str(spec.pids + 1)}),  # one more: bubblewrap itself was born in it
        "cpus": (
            "cpu",
            {"cpu.cfs_period_us": str(CPU_PERIOD_US), "cpu.cfs_quota_us": str(int(spec.cpus * CPU_PERIOD_US))},
        ),
    }
    limits: dict[str, str] = {}
    own = _own_cgroups()
    for kind, (controller, files) in settings.items():
        folder = ROOT / controller / own.get(controller, "/").lstrip("/") / name
        if not _make(folder, made):
            continue
        if _write(folder, files) and os.access(folder / "tasks", os.W_OK):
            limits[kind] = "cgroup v1"
        else:
            made.remove(folder)
            folder.rmdir()
    return limits


def _make(folder: Path, made: list[Path]) -> bool:
    try:
        folder.mkdir()
    except OSError as error:
        if error.errno in RAN_OUT:
            raise
        return False
    made.append(folder)
    return True


def _write(folder: Path, files: dict[str, str]) -> bool:
    """Writes the settings; swap accounting may be compiled out, everything else must be there."""
    for file, value in files.items():
        if not (folder / file).exists():
            if "sw" in file:
                continue
            return False
        try:
            (folder / file).write_text(value)
        except OSError as error:
            if error.errno in RAN_OUT:
                raise
            return False
    return True


def _own_cgroups() -> dict[str, str]:
    """{controller: path} of this process; the unified hierarchy is the controller ""."""
    found: dict[str, str] = {}
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        found.update(dict.fromkeys(controllers.split(","), path))
    return found
