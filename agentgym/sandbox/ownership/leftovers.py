"""What owners left behind, found and taken away. Law: nothing that a living owner holds is touched, nor anything that
is not ours; and where nobody can tell whether an owner lives (another machine, another container), only age decides.

Needs the standard library only: the reaper runs this, too.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from agentgym.errors import AgentGymError
from agentgym.sandbox.ownership.daemon_http import DaemonHttp
from agentgym.sandbox.ownership.lease import host_identity
from agentgym.sandbox.ownership.reaper import is_locked, start_time

SETTLE_S = 10.0  # so long after the last one a container may still appear that the daemon was asked for
BUSY_S = 20.0  # so long what the daemon is removing already, or still needs, is waited for
FRESH_S = 60.0  # an owner that gave a sign of life so lately may have died just now
UNREACHABLE_S = 600.0  # between two tries with a daemon that does not answer
GIVEN_UP_S = 86_400.0  # a daemon that has not answered for so long will not; its boxes have ended by their leases
ABANDONED_S = 3600.0  # past its lease, a container of another machine that does not run has no owner any more
LEAVING_S = 10.0  # how long what was killed may take to leave its cgroups
CGROUPS = Path("/sys/fs/cgroup")


@dataclass(slots=True)
class Removed:
    """What was taken away, by name, and what could not be.

    Example: `Removed(containers=["agentgym-71-0f3a..."], leases=["71-0f3a..."])`.
    """

    containers: list[str] = field(default_factory=list)
    images: list[str] = field(default_factory=list)
    volumes: list[str] = field(default_factory=list)
    processes: list[str] = field(default_factory=list)
    cgroups: list[str] = field(default_factory=list)
    leases: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Lease:
    """One owner's folder, read.

    Example: `Lease(Path("/tmp/agentgym-0/71-0f3a9b1c"), {"pid": 71, ...}, alive=True, readable=True)`.
    """

    folder: Path
    who: dict[str, Any]
    alive: bool
    readable: bool  # False: another container's or machine's that shares the folder; whether it lives is unknown here

    @classmethod
    def read(cls, folder: Path) -> Lease:
        who = _json(folder / "lease")
        readable = not who or who.get("host") == host_identity(folder.parent)
        # a lock may be held by a child that inherited it, so the process must be there as well
        lives = is_locked(folder / "lease") and start_time(int(who.get("pid", 0))) == who.get("start_time")
        return cls(folder, who, lives, readable)

    @property
    def owner_id(self) -> str:
        return self.folder.name

    def boxes(self) -> dict[str, dict[str, Any]]:
        """{name: what it is}; "begun" is True while it has not answered yet."""
        found = {}
        for file in _entries(self.folder / "boxes"):
            name = file.name.removesuffix(".begun")
            found[name] = _json(file) | {"begun": file.name != name}
        return found

    def daemons(self) -> dict[str, DaemonHttp]:
        """{name in the lease: daemon} of those that it ever used."""
        records = {file.name: _json(file) for file in sorted(_entries(self.folder / "daemons"))}
        return {
            name: DaemonHttp(record["url"], Path(record["tls"]) if record.get("tls") else None)
            for name, record in records.items()
            if record.get("url")
        }

    def silent_s(self) -> float:
        """How long ago its owner gave a sign of life."""
        try:
            return time.time() - (self.folder / "lease").stat().st_mtime
        except OSError:
            return math.inf


def leases(runtime: Path) -> list[Lease]:
    """All owners of this user on this machine, the dead ones too."""
    return [Lease.read(folder) for folder in _entries(runtime) if folder.is_dir()]


# ---------------------------------------------------------------------------------------------------- after a death


def collect_owner(folder: str | Path, settle_s: float = SETTLE_S, removed: Removed | None = None) -> Removed:
    """Takes away all that a dead owner held, and its lease at last; the lease stays while a daemon that held boxes does
    not answer, for a day. Adds to `removed`."""
    lease, removed = Lease.read(Path(folder)), Removed() if removed is None else removed
    settle_s = settle_s if lease.silent_s() < FRESH_S else 0.0
    until = time.monotonic() + settle_s
    busy_until = time.monotonic() + BUSY_S
    pause = 0.05
    while True:
        known = len(removed.containers)
        silent, is_busy = _remove_of_daemons(lease, removed)
        if len(removed.containers) > known:
            until = time.monotonic() + settle_s
        remove_cgroups(f"agentgym-{lease.owner_id}", removed, with_processes=True)
        # only what was begun and not seen yet can still appear; a box without a daemon dies with its input
        late = [name for name, box in lease.boxes().items() if box["begun"] and box.get("tier") != "namespace"]
        if (not late or time.monotonic() >= until) and (not is_busy or time.monotonic() >= busy_until):
            break
        time.sleep(pause)
        pause = min(1.0, 1.5 * pause)
    if silent and lease.silent_s() < GIVEN_UP_S:
        removed.problems += silent
        with contextlib.suppress(OSError):
            (lease.folder / "tried").touch()
    else:
        shutil.rmtree(lease.folder, ignore_errors=True)
        removed.leases.append(lease.owner_id)
    return removed


def collect_orphan(folder: str | Path) -> Removed:
    """The same for an owner whose reaper is gone, if it is dead and the last try is long enough ago."""
    lease = Lease.read(Path(folder))
    with contextlib.suppress(OSError):
        if time.time() - (lease.folder / "tried").stat().st_mtime < UNREACHABLE_S:
            return Removed()
    return collect_owner(folder) if lease.readable and not lease.alive else Removed()


def _remove_of_daemons(lease: Lease, removed: Removed) -> tuple[list[str], bool]:
    """Containers, volumes and images of this owner: (why it could not be done where a daemon still holds boxes, whether
    something is still there, such as a container whose removal is under way and the image that it is made of)."""
    silent, is_busy = [], False
    for name, daemon in lease.daemons().items():
        held = [record for record in lease.boxes().values() if record.get("daemon") == name]
        label = f"agentgym.owner={lease.owner_id}"
        try:
            for container in daemon.containers(label):
                is_busy |= not remove_container(daemon, container, removed)
                (lease.folder / "boxes" / f"{box_name(container)}.begun").unlink(missing_ok=True)
            for volume in daemon.volumes(label):
                if daemon.remove_volume(volume["Name"]):
                    removed.volumes.append(volume["Name"])
            for image in daemon.images(label):
                if daemon.remove_image(image["Id"]):
                    removed.images.append(image_name(image))
                else:
                    is_busy = True
        except AgentGymError as error:
            over_s = max((float(record.get("lease_s", 0.0)) for record in held), default=0.0) + SETTLE_S
            if held and not (daemon.is_absent and lease.silent_s() > over_s):
                silent.append(f"{error}; it may still hold {len(held)} sandboxes of the dead owner {lease.owner_id}")
    return silent, is_busy


def remove_container(daemon: DaemonHttp, container: dict[str, Any], removed: Removed) -> bool:
    """Whether it was removed by this; else something else has removed it, or is about to."""
    if is_removed := daemon.remove_container(container["Id"]):
        removed.containers.append(box_name(container))
    return is_removed


def remove_cgroups(prefix: str, removed: Removed, *, with_processes: bool) -> None:
    """The cgroups whose names begin so, the inner ones first; with what runs in them, or only where nothing does."""
    until = time.monotonic() + LEAVING_S
    for folder in sorted(cgroup_folders(prefix), key=lambda found: -len(found.parts)):
        while True:
            if with_processes:
                removed.processes += [f"{pid} in {folder.name}" for pid in _kill(folder)]
            try:
                folder.rmdir()
            except FileNotFoundError:
                break
            except OSError:
                if not with_processes or time.monotonic() >= until:
                    break
                time.sleep(0.01)  # what was killed takes a moment to leave
            else:
                removed.cgroups.append(str(folder.relative_to(CGROUPS)))
                break


def cgroup_folders(prefix: str) -> Iterator[Path]:
    """Those whose names begin so, in all hierarchies, and what is in them."""
    for place, folders, _ in os.walk(CGROUPS):
        for name in folders:
            if name.startswith(prefix):
                yield from (Path(inner) for inner, _, _ in os.walk(os.path.join(place, name)))
        folders[:] = [name for name in folders if not name.startswith(prefix)]


def _kill(cgroup: Path) -> list[int]:
    killed = []
    with contextlib.suppress(OSError):
        for text in (cgroup / "cgroup.procs").read_text().split():
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(int(text), signal.SIGKILL)
                killed.append(int(text))
    return killed


# -------------------------------------------------------------------------------------------------------- one word


def box_name(container: dict[str, Any]) -> str:
    labels = container.get("Labels") or {}
    return labels.get("agentgym.box") or str((container.get("Names") or [container["Id"]])[0]).lstrip("/")


def image_name(image: dict[str, Any]) -> str:
    return str((image.get("RepoTags") or [image["Id"]])[0])


def _entries(folder: Path) -> list[Path]:
    try:
        return [file for file in folder.iterdir() if not file.name.startswith(".")]
    except FileNotFoundError:
        return []


def _json(file: Path) -> dict[str, Any]:
    """{} for what is gone or not whole."""
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
