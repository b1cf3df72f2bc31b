"""What boxes may leave on a machine, counted from outside: from the daemon, /proc, cgroups and temporary folders."""

from __future__ import annotations

import os
import re
import socket
import tempfile
from pathlib import Path
from typing import Any

_OF_A_CONTAINER = ("containerd-shim", "runsc")  # their command lines hold the container's id
_CONTAINER_ID = re.compile(r"[0-9a-f]{64}")
_CGROUPS = Path("/sys/fs/cgroup")


def count(client: Any, mark: str) -> dict[str, int]:
    """Containers and folders whose name begins with `mark`, volumes, processes of boxes that nobody has any more, and
    descriptors of this process. What a benchmark leaves is the difference of two counts."""
    containers = client.api.containers(all=True, filters={"name": mark})
    return {
        "containers": len(containers),
        "volumes": len(client.api.volumes()["Volumes"] or ()),
        "processes": _abandoned({entry["Id"] for entry in client.api.containers(all=True)}),
        "folders": len(_folders(mark)),
        "fds": sum(not _is_kept(int(fd)) for fd in os.listdir("/proc/self/fd")),
    }


def _is_kept(fd: int) -> bool:
    """Whether it is an idle connection to the daemon: Docker's client keeps a bounded number of them, one for each URL
    that it asked last."""
    try:
        if not os.readlink(f"/proc/self/fd/{fd}").startswith("socket:"):
            return False
        with socket.socket(fileno=os.dup(fd)) as connection:
            return connection.family == socket.AF_UNIX and str(connection.getpeername()).endswith("docker.sock")
    except OSError:  # not connected, or closed since it was listed
        return False


def difference(before: dict[str, int], after: dict[str, int]) -> dict[str, int]:
    """`{"leaked_containers": 0, ...}`"""
    return {f"leaked_{name}": after[name] - before[name] for name in before}


def _abandoned(containers: set[str]) -> int:
    """Shims and gVisors of containers that the daemon does not know, and bubblewraps without a parent."""
    found = 0
    for process in Path("/proc").iterdir():
        if not process.name.isdigit():
            continue
        try:
            command = (process / "cmdline").read_bytes().decode(errors="replace")
            parent = (process / "stat").read_text().rpartition(")")[2].split()[1]
        except OSError:  # it has ended
            continue
        name = command.partition("\0")[0].rpartition("/")[2]
        if name.startswith(_OF_A_CONTAINER):
            ids = set(_CONTAINER_ID.findall(command))
            found += bool(ids) and ids.isdisjoint(containers)
        elif name == "bwrap":
            found += parent == "1"
    return found


def _folders(mark: str) -> list[str]:
    found = [str(path) for path in Path(tempfile.gettempdir()).iterdir() if path.name.startswith(mark)]
    for folder, names, _ in os.walk(_CGROUPS):
        if folder.count("/") > 6:
            names.clear()
        found += [f"{folder}/{name}" for name in names if name.startswith(mark)]
    return found
