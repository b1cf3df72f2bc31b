"""What boxes may leave on a machine, counted from outside: from the daemon, /proc, cgroups and temporary folders."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

_NAMES = {"bwrap", "containerd-shim", "containerd-shim-runc-v2", "runc", "runsc", "runsc-sandbox", "runsc-gofer"}
_CGROUPS = Path("/sys/fs/cgroup")


def count(client: Any, mark: str) -> dict[str, int]:
    """Containers and folders whose name begins with `mark`, volumes, processes of the kinds that boxes are made of, and
    descriptors of this process. What a benchmark leaves is the difference of two counts."""
    containers = client.api.containers(all=True, filters={"name": mark})
    return {
        "containers": len(containers),
        "volumes": len(client.api.volumes()["Volumes"] or ()),
        "processes": sum(_name(entry) in _NAMES for entry in Path("/proc").iterdir() if entry.name.isdigit()),
        "folders": len(_folders(mark)),
        "fds": len(os.listdir("/proc/self/fd")),
    }


def difference(before: dict[str, int], after: dict[str, int]) -> dict[str, int]:
    """`{"leaked_containers": 0, ...}`"""
    return {f"leaked_{name}": after[name] - before[name] for name in before}


def _name(process: Path) -> str:
    try:
        return (process / "comm").read_text().strip()
    except OSError:  # it has ended
        return ""


def _folders(mark: str) -> list[str]:
    found = [str(path) for path in Path(tempfile.gettempdir()).iterdir() if path.name.startswith(mark)]
    for folder, names, _ in os.walk(_CGROUPS):
        if folder.count("/") > 6:
            names.clear()
        found += [f"{folder}/{name}" for name in names if name.startswith(mark)]
    return found
