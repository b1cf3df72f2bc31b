"""`agentgym sandbox list` and `agentgym sandbox gc`: every box that this machine's leases and daemons know of, and the
end of those that nobody holds. Law as in leftovers.py: living owners and what is not ours are left alone.
"""

from __future__ import annotations

import contextlib
import re
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from agentgym.errors import AgentGymError
from agentgym.sandbox.ownership.daemon_http import DaemonHttp
from agentgym.sandbox.ownership.lease import default_daemon, host_identity, runtime_folder
from agentgym.sandbox.ownership.leftovers import (
    ABANDONED_S,
    CGROUPS,
    SETTLE_S,
    Lease,
    Removed,
    box_name,
    cgroup_folders,
    collect_owner,
    image_name,
    leases,
    remove_cgroups,
    remove_container,
)

Holder = Literal["alive", "dead", "unknown"]
TASK_IMAGE = "agentgym.image=task"  # what images.py labels an image with that it built from a task's folder
HALF_MADE_S = 60.0
OWNER = re.compile(r"\d+-[0-9a-f]{8}")
OWNER_OF_BOX = re.compile(r"agentgym-(\d+-[0-9a-f]{8})[0-9a-f]{6}(?![0-9a-f])")


@dataclass(frozen=True, slots=True)
class BoxRow:
    """One box. `owner` is "unknown" for another machine's or container's: whether it lives cannot be told here.

    Example: `BoxRow("agentgym-71-0f3a9b1cd0e1f2", "docker", "running", "agentgym/base:bookworm", (), 12.5, 60.0,
    "71-0f3a9b1c", "alive", "unix:///var/run/docker.sock")`.
    """

    name: str
    tier: str
    state: str  # "begun", "live" for one without a daemon; else the container's
    image: str
    relaxed: tuple[str, ...]
    age_s: float
    lease_s: float
    owner_id: str
    owner: Holder
    daemon: str  # "" without one


def list_boxes() -> tuple[list[BoxRow], list[str]]:
    """All boxes, oldest first, and what could not be asked."""
    surveyed = _Survey()
    rows: dict[str, BoxRow] = {}
    for lease in surveyed.leases:
        for name, box in lease.boxes().items():
            rows[name] = _row_of_record(name, box, lease)
    for daemon, containers in surveyed.containers("agentgym.box"):
        for container in containers:
            row = _row_of_container(container, daemon.url, surveyed)
            known = rows.get(row.name)
            rows[row.name] = replace(row, image=known.image) if known else row  # by its name, not by its id
    return sorted(rows.values(), key=lambda row: -row.age_s), surveyed.problems


def collect_garbage(
    *, images: bool = False, volumes: bool = False, others_older_than_s: float | None = None, settle_s: float = SETTLE_S
) -> Removed:
    """Takes away what no living owner holds. `images`: also those built for tasks, which are built again when needed;
    `volumes`: also labelled ones that no container uses; `others_older_than_s`: also boxes of other machines' owners
    that are older, running or not (of those that do not run, the ones whose lease is long over go in any case)."""
    removed = Removed()
    runtime = runtime_folder()
    for lease in leases(runtime):
        if lease.readable and not lease.alive:
            collect_owner(lease.folder, settle_s, removed)
    _remove_half_made(runtime, removed)
    surveyed = _Survey()
    for daemon, containers in surveyed.containers("agentgym.box"):
        try:
            for container in containers:
                if _is_abandoned(container, surveyed, others_older_than_s):
                    remove_container(daemon, container, removed)
            _remove_images(daemon, surveyed, removed, tasks=images)
            if volumes:
                for volume in daemon.volumes("agentgym.owner"):
                    if surveyed.holder(volume.get("Labels") or {}) == "dead" and daemon.remove_volume(volume["Name"]):
                        removed.volumes.append(volume["Name"])
        except AgentGymError as error:
            removed.problems.append(str(error))
    removed.problems += surveyed.problems
    _remove_empty_cgroups(surveyed, removed)
    return removed


class _Survey:
    """Who lives, and which daemons there are."""

    def __init__(self) -> None:
        self.runtime = runtime_folder()
        self.host = host_identity(self.runtime)
        self.leases = leases(self.runtime)
        self.alive = {lease.owner_id for lease in self.leases if lease.alive or not lease.readable}
        self.problems: list[str] = []

    def containers(self, label: str) -> Iterator[tuple[DaemonHttp, list[dict[str, Any]]]]:
        """Of every daemon that holds boxes, and of the environment's. Where none is, nothing is ours."""
        url, tls = default_daemon()
        daemons: dict[str, DaemonHttp] = {}
        for lease in self.leases:
            used = {box.get("daemon") for box in lease.boxes().values()}
            daemons |= {daemon.url: daemon for name, daemon in lease.daemons().items() if name in used}
        daemons.setdefault(url, DaemonHttp(url, tls))
        for daemon in daemons.values():
            try:
                yield daemon, daemon.containers(label)
            except AgentGymError as error:
                if not daemon.is_absent:
                    self.problems.append(str(error))

    def holder(self, labels: dict[str, str]) -> Holder:
        if labels.get("agentgym.host") != self.host:
            return "unknown"
        return "alive" if self.lives(labels.get("agentgym.owner", "")) else "dead"

    def lives(self, owner_id: str) -> bool:
        """Also of one that came after the leases were read, and before the daemon was asked."""
        if owner_id in self.alive:
            return True
        if not OWNER.fullmatch(owner_id):
            return False
        lease = Lease.read(self.runtime / owner_id)
        return lease.folder.is_dir() and (lease.alive or not lease.readable)


def _row_of_record(name: str, box: dict[str, Any], lease: Lease) -> BoxRow:
    holder: Holder = "alive" if lease.alive else "dead"
    return BoxRow(
        name,
        str(box.get("tier", "")),
        "begun" if box["begun"] else "live",
        str(box.get("image", "")),
        tuple(box.get("relaxed", ())),
        _age(box.get("created")),
        float(box.get("lease_s", 0.0)),
        lease.owner_id,
        holder if lease.readable else "unknown",
        "",
    )


def _row_of_container(container: dict[str, Any], url: str, surveyed: _Survey) -> BoxRow:
    labels = container.get("Labels") or {}
    return BoxRow(
        box_name(container),
        labels.get("agentgym.tier", "docker"),
        str(container.get("State", "")),
        str(container.get("Image", "")),
        tuple(name for name in labels.get("agentgym.relaxed", "").split(",") if name),
        _age(labels.get("agentgym.created") or container.get("Created")),
        _number(labels.get("agentgym.lease_s")),
        labels.get("agentgym.owner", ""),
        surveyed.holder(labels),
        url,
    )


def _is_abandoned(container: dict[str, Any], surveyed: _Survey, others_older_than_s: float | None) -> bool:
    labels = container.get("Labels") or {}
    holder = surveyed.holder(labels)
    if holder != "unknown":
        return holder == "dead"
    age_s = _age(labels.get("agentgym.created") or container.get("Created"))
    if others_older_than_s is not None and age_s > others_older_than_s:
        return True
    # one that runs is renewed by somebody, or its worker would have ended it
    is_idle = container.get("State") in ("created", "exited", "dead")
    return is_idle and age_s > _number(labels.get("agentgym.lease_s")) + ABANDONED_S


def _remove_images(daemon: DaemonHttp, surveyed: _Survey, removed: Removed, *, tasks: bool) -> None:
    """Those that were of use to a dead owner alone; with `tasks` also what can be built again."""
    owned = daemon.images("agentgym.owner")
    found = [image for image in owned if surveyed.holder(image["Labels"]) == "dead"]
    if tasks:
        kept = {image["Id"] for image in owned}  # of one who lives, or may live
        found += [image for image in daemon.images(TASK_IMAGE) if image["Id"] not in kept]
    for image in found:
        if daemon.remove_image(image["Id"]):
            removed.images.append(image_name(image))


def _remove_empty_cgroups(surveyed: _Survey, removed: Removed) -> None:
    """Of owners that are nobody's any more: not ours that live, and nothing runs in them."""
    for folder in cgroup_folders("agentgym-"):
        match = OWNER_OF_BOX.match(folder.name)
        try:
            is_old = time.time() - folder.stat().st_mtime > HALF_MADE_S
        except FileNotFoundError:
            continue
        if is_old and folder.parent.is_relative_to(CGROUPS) and match and not surveyed.lives(match[1]):
            remove_cgroups(folder.name, removed, with_processes=False)


def _remove_half_made(runtime: Path, removed: Removed) -> None:
    """Leases whose owner was killed while it made them."""
    for folder in runtime.glob(".*"):
        with contextlib.suppress(FileNotFoundError):  # its owner has made all of it now, and renamed it
            if time.time() - folder.stat().st_mtime > HALF_MADE_S:
                shutil.rmtree(folder, ignore_errors=True)
                removed.leases.append(folder.name)


def _age(created: Any) -> float:
    return max(0.0, time.time() - _number(created))


def _number(text: Any) -> float:
    try:
        return float(text)
    except (TypeError, ValueError):
        return 0.0
