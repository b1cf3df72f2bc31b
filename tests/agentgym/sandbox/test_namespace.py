"""The bubblewrap tier: its limits, what it shows of the host, and machines that lack what it needs."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest

from agentgym.errors import UnavailableError
from agentgym.sandbox import SandboxSpec, open_sandbox
from agentgym.sandbox.namespace import namespace_problem

pytestmark = pytest.mark.bubblewrap


def cgroups_of_this_process() -> list[Path]:
    return list(Path("/sys/fs/cgroup").glob(f"**/agentgym-{os.getpid()}-*"))


def test_a_box_says_what_enforces_its_limits_and_leaves_no_cgroup() -> None:
    with open_sandbox("namespace", SandboxSpec(pids=33)) as box:
        assert set(box.limits) == {"memory", "pids", "cpus", "disk", "seccomp", "landlock"}
        if "cgroup" in box.limits["pids"]:
            limits = [file.read_text() for folder in cgroups_of_this_process() for file in folder.glob("pids.max")]
            assert limits == ["34\n" if box.limits["pids"] == "cgroup v1" else "33\n"]
    assert cgroups_of_this_process() == []


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
