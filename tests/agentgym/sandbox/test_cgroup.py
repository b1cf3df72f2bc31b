"""Cgroups of both versions. This machine has one of them; the other's files are played by a folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from agentgym.sandbox import SandboxSpec
from agentgym.sandbox.namespace import cgroup

VERSION_2 = ("memory.max", "memory.swap.max", "pids.max", "cpu.max", "cgroup.procs", "cgroup.subtree_control")
VERSION_1 = {
    "memory": ("memory.limit_in_bytes", "memory.memsw.limit_in_bytes", "tasks", "cgroup.procs"),
    "pids": ("pids.max", "tasks", "cgroup.procs"),
    "cpu": ("cpu.cfs_period_us", "cpu.cfs_quota_us", "tasks", "cgroup.procs"),
}
SPEC = SandboxSpec(memory_mb=64, pids=20, cpus=1.5)


@pytest.fixture
def kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[Path], tuple[str, ...]]], Path]:
    """Plays the kernel: a new folder holds at once the files that `appearing` names, and goes with them."""

    def play(appearing: Callable[[Path], tuple[str, ...]]) -> Path:
        make, remove = Path.mkdir, Path.rmdir

        def mkdir(path: Path, *args: object, **kwargs: object) -> None:
            make(path)
            for name in appearing(path):
                (path / name).write_text("max")

        def rmdir(path: Path) -> None:
            for file in path.iterdir():
                if file.is_file():
                    file.unlink()
            remove(path)

        monkeypatch.setattr(Path, "mkdir", mkdir)
        monkeypatch.setattr(Path, "rmdir", rmdir)
        return tmp_path

    monkeypatch.setattr(cgroup, "ROOT", tmp_path)
    return play


def written(folder: Path, *names: str) -> dict[str, str]:
    return {name: (folder / name).read_text() for name in names}


def test_version_2(kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    (root := kernel(lambda _: VERSION_2)).joinpath("cgroup.controllers").write_text("cpu memory pids")
    (root / "cgroup.procs").write_text("")
    monkeypatch.setattr(cgroup, "_own_cgroups", lambda: {"": "/"})
    made = cgroup.Cgroup.create("agentgym-1-b", SPEC)
    assert made is not None
    assert made.limits == {"memory": "cgroup v2", "pids": "cgroup v2", "cpus": "cgroup v2"}
    assert (root / "cgroup.subtree_control").read_text() == "+cpu", "the last of three writes"
    assert made.entrances == [], "there, a process cannot go in without waiting"
    folder = root / "agentgym-1-b"
    assert written(folder, "memory.max", "memory.swap.max", "pids.max", "cpu.max") == {
        "memory.max": str(64 * 2**20),
        "memory.swap.max": "0",
        "pids.max": "20",
        "cpu.max": "150000 100000",
    }
    made.add(123)
    assert (folder / "cgroup.procs").read_text() == "123"
    made.remove()
    made.remove()
    assert not folder.exists()


def test_version_2_takes_the_parent_where_only_leaves_hold_processes(kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    """A service's own cgroup holds its processes, so the kernel gives its children no controllers."""
    root = kernel(lambda path: VERSION_2 if path.parent.name != "me.service" else ("cgroup.procs",))
    (root / "cgroup.controllers").write_text("cpu memory pids")
    (root / "user.slice").mkdir()
    (root / "user.slice" / "me.service").mkdir()
    monkeypatch.setattr(cgroup, "_own_cgroups", lambda: {"": "/user.slice/me.service"})
    made = cgroup.Cgroup.create("agentgym-1-b", SPEC)
    assert made is not None
    assert (root / "user.slice" / "agentgym-1-b" / "memory.max").read_text() == str(64 * 2**20)
    assert not (root / "user.slice" / "me.service" / "agentgym-1-b").exists()
    made.remove()
    assert not (root / "user.slice" / "agentgym-1-b").exists()


def test_version_2_without_controllers_is_none(kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    root = kernel(lambda _: ("cgroup.procs",))
    (root / "cgroup.controllers").write_text("")
    monkeypatch.setattr(cgroup, "_own_cgroups", lambda: {"": "/"})
    assert cgroup.Cgroup.create("agentgym-1-a", SPEC) is None
    assert not (root / "agentgym-1-a").exists()


@pytest.mark.parametrize("swap", [True, False])
def test_version_1(kernel, monkeypatch: pytest.MonkeyPatch, swap: bool) -> None:
    appearing = {
        kind: tuple(name for name in names if swap or "memsw" not in name) for kind, names in VERSION_1.items()
    }
    root = kernel(lambda path: appearing.get(path.parent.name, ()) + appearing.get(path.parent.parent.name, ()))
    for controller in VERSION_1:
        (root / controller).mkdir()
    (root / "memory" / "mine").mkdir()
    monkeypatch.setattr(cgroup, "_own_cgroups", lambda: {"memory": "/mine", "pids": "/", "cpu": "/"})
    made = cgroup.Cgroup.create("agentgym-1-b", SPEC)
    assert made is not None
    assert made.limits == {"memory": "cgroup v1", "pids": "cgroup v1", "cpus": "cgroup v1"}
    folders = {"memory": root / "memory" / "mine", "pids": root / "pids", "cpu": root / "cpu"}
    limit = str(64 * 2**20)
    memory = folders["memory"] / "agentgym-1-b"
    assert (memory / "memory.limit_in_bytes").read_text() == limit
    assert not swap or (memory / "memory.memsw.limit_in_bytes").read_text() == limit
    assert (folders["pids"] / "agentgym-1-b" / "pids.max").read_text() == "21", "bubblewrap's own is one of them"
    assert written(folders["cpu"] / "agentgym-1-b", "cpu.cfs_period_us", "cpu.cfs_quota_us") == {
        "cpu.cfs_period_us": "100000",
        "cpu.cfs_quota_us": "150000",
    }
    assert made.entrances == [str(folder / "agentgym-1-b" / "tasks") for folder in folders.values()]
    made.remove()
    assert not any((folder / "agentgym-1-b").exists() for folder in folders.values())


def test_version_1_with_one_hierarchy_only(kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    root = kernel(lambda path: VERSION_1.get(path.parent.name, ()))
    (root / "pids").mkdir()
    monkeypatch.setattr(cgroup, "_own_cgroups", dict)
    made = cgroup.Cgroup.create("agentgym-1-b", SPEC)
    assert made is not None
    assert made.limits == {"pids": "cgroup v1"}


def test_a_cgroup_that_stays_in_use_is_left_to_the_reaper(kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    root = kernel(lambda path: VERSION_1.get(path.parent.name, ()))
    (root / "pids").mkdir()
    monkeypatch.setattr(cgroup, "_own_cgroups", dict)
    slept: list[float] = []
    monkeypatch.setattr(cgroup, "time", SimpleNamespace(monotonic=lambda: sum(slept), sleep=slept.append))
    made = cgroup.Cgroup.create("agentgym-1-b", SPEC)
    assert made is not None

    def busy(path: Path) -> None:
        raise OSError(16, "Device or resource busy")

    monkeypatch.setattr(Path, "rmdir", busy)
    made.remove()
    assert cgroup.LEAVING_S <= sum(slept) < 2 * cgroup.LEAVING_S


def test_no_cgroups_at_all(kernel) -> None:
    kernel(lambda _: ())
    assert cgroup.Cgroup.create("agentgym-1-b", SPEC) is None


def test_what_ran_out_is_an_error_and_no_lesser_limit(kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    root = kernel(lambda path: VERSION_1.get(path.parent.name, ()))
    for controller in VERSION_1:
        (root / controller).mkdir()
    monkeypatch.setattr(cgroup, "_own_cgroups", dict)
    write = Path.write_text

    def write_text(path: Path, text: str) -> int:
        if path.name == "cpu.cfs_quota_us" and text != "max":
            raise OSError(24, "Too many open files")
        return write(path, text)

    monkeypatch.setattr(Path, "write_text", write_text)
    with pytest.raises(OSError, match="Too many open files"):
        cgroup.Cgroup.create("agentgym-1-b", SPEC)
    assert not any((root / controller / "agentgym-1-b").exists() for controller in VERSION_1)
