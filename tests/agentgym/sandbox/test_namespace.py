"""The bubblewrap tier: its limits, its cgroups, and machines that lack what it needs."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest

from agentgym.errors import UnavailableError
from agentgym.sandbox import SandboxSpec, cgroup, open_sandbox
from agentgym.sandbox.namespace import namespace_problem

pytestmark = pytest.mark.bubblewrap


def cgroups_of_this_process() -> list[Path]:
    return list(Path("/sys/fs/cgroup").glob(f"**/agentgym-{os.getpid()}-*"))


def test_a_box_says_what_enforces_its_limits_and_leaves_no_cgroup() -> None:
    with open_sandbox("namespace", SandboxSpec(pids=33)) as box:
        assert set(box.limits) == {"memory", "pids", "cpus", "disk"}
        if "cgroup" in box.limits["pids"]:
            limits = [file.read_text() for folder in cgroups_of_this_process() for file in folder.glob("pids.max")]
            assert limits == ["33\n"]
    assert cgroups_of_this_process() == []


def test_cgroup_version_2_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """This machine may have version 1 only; the files that version 2 has are played by a folder."""
    monkeypatch.setattr(cgroup, "ROOT", tmp_path)
    monkeypatch.setattr(cgroup, "_own_cgroups", lambda: {"": "/"})
    (tmp_path / "cgroup.controllers").write_text("cpu memory pids")
    (tmp_path / "cgroup.procs").write_text("")
    assert cgroup.Cgroup.create("agentgym-1-a", SandboxSpec()) is None, "no controller files appeared in the new cgroup"
    assert not (tmp_path / "agentgym-1-a").exists()
    assert (tmp_path / "cgroup.subtree_control").read_text() == "+cpu", "the last of three writes"

    make = Path.mkdir

    def kernel_mkdir(path: Path, *args: object, **kwargs: object) -> None:
        make(path)
        for name in ("memory.max", "memory.swap.max", "pids.max", "cpu.max", "cgroup.procs"):
            (path / name).write_text("max")

    monkeypatch.setattr(Path, "mkdir", kernel_mkdir)
    made = cgroup.Cgroup.create("agentgym-1-b", SandboxSpec(memory_mb=64, pids=20, cpus=1.5))
    assert made is not None
    assert made.limits == {"memory": "cgroup v2", "pids": "cgroup v2", "cpus": "cgroup v2"}
    folder = tmp_path / "agentgym-1-b"
    written = {name: (folder / name).read_text() for name in ("memory.max", "memory.swap.max", "pids.max", "cpu.max")}
    assert written == {
        "memory.max": str(64 * 2**20),
        "memory.swap.max": "0",
        "pids.max": "20",
        "cpu.max": "150000 100000",
    }
    made.add(123)
    assert (folder / "cgroup.procs").read_text() == "123"


def test_a_machine_without_bubblewrap(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UnavailableError, match=r"bwrap.*apt-get install bubblewrap"):
        open_sandbox("namespace")


def test_a_machine_that_forbids_namespaces(monkeypatch: pytest.MonkeyPatch) -> None:
    with tempfile.TemporaryDirectory() as folder:
        refuse(Path(folder), monkeypatch)
        assert "No permissions" in str(namespace_problem())
        with pytest.raises(UnavailableError, match=r"No permissions.*sandbox\.tier=docker"):
            open_sandbox("namespace")
    assert cgroups_of_this_process() == []


def refuse(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refusing = folder / "bwrap"
    refusing.write_text("#!/bin/sh\necho 'bwrap: No permissions to create new namespace' >&2\nexit 1\n")
    refusing.chmod(0o755)
    folder.chmod(0o755)  # a root owner starts it as another user
    monkeypatch.setenv("PATH", str(folder))
