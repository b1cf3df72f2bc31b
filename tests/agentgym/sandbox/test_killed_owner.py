"""An owner that ends as nobody would wish leaves nothing: no container, process, cgroup, folder or lease."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from dead_owners import kill_with_reaper

from agentgym.sandbox.ownership.daemon_http import DaemonHttp
from agentgym.sandbox.ownership.lease import default_daemon, runtime_folder
from agentgym.sandbox.ownership.leftovers import cgroup_folders
from agentgym.sandbox.ownership.reaper import is_locked

TIERS = [pytest.param("docker", marks=pytest.mark.docker), pytest.param("namespace", marks=pytest.mark.bubblewrap)]
OWNER = """
import json, os, sys, threading, time
from concurrent.futures import ThreadPoolExecutor
from agentgym.sandbox import SandboxSpec, open_sandbox
from agentgym.sandbox.ownership.lease import owner
tier, mark, live, starting, lease_s, forks = json.loads(sys.argv[1])
spec = SandboxSpec(memory_mb=64, lease_s=lease_s)
with ThreadPoolExecutor(8) as threads:
    boxes = list(threads.map(lambda _: open_sandbox(tier, spec), range(live)))
for box in boxes:
    box.exec(f"sleep 600 {mark} 2>/dev/null || sh -c 'while :; do sleep 1; done' {mark} >/dev/null 2>&1 &")
busy = "trap '' TERM HUP INT; while :; do :; done"
threading.Thread(target=lambda: boxes[0].exec(busy, timeout_s=600), daemon=True).start()
if tier == "docker":  # one that was made and never started cannot end itself
    import docker
    name = owner().new_name(tier, spec)
    docker.from_env().api.create_container(spec.image, ["true"], name=name, labels=owner().labels(name, spec))
child = 0
if forks:  # a child that holds all sockets of the boxes open
    child = os.fork()
    if child == 0:
        time.sleep(600)
for _ in range(starting):
    threading.Thread(target=open_sandbox, args=(tier, spec), daemon=True).start()
print(json.dumps([owner().owner_id, child]), flush=True)
time.sleep(600)
"""


class OwnerProcess:
    """A process that holds `live` boxes and is about to make `starting` more."""

    def __init__(self, tier: str, live: int = 2, starting: int = 2, lease_s: float = 60.0, forks: bool = False) -> None:
        self.tier, self.mark = tier, f"mark-{uuid.uuid4().hex}"
        arguments = json.dumps([tier, self.mark, live, starting, lease_s, forks])
        self.process = subprocess.Popen([sys.executable, "-c", OWNER, arguments], stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        with self.process.stdout:
            line = self.process.stdout.readline()
        assert line, "the owner did not start"
        self.owner_id, self.child = json.loads(line)
        self.folder = runtime_folder() / self.owner_id
        assert len(self.left()["processes"]) >= live, "the boxes should be running something"

    def reaper(self) -> int:
        """Once what launched it has gone."""
        mark = f"reaper.py\0{self.folder}"
        gone(lambda: len(running(mark)) != 1 or not is_locked(self.folder / "reaper"))
        (pid,) = running(mark)
        return pid

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def left(self) -> dict[str, list[str]]:
        """What is there of it beside itself and its child."""
        ours = {self.process.pid, self.child}
        containers: list[str] = []
        if self.tier == "docker":
            label = f"agentgym.owner={self.owner_id}"
            daemon = DaemonHttp(*default_daemon())
            containers = [f"{found['Names']} {found['State']}" for found in daemon.containers(label)]
            containers += [found["Name"] for found in daemon.volumes(label)]
        found = {
            "containers": containers,
            "processes": [str(pid) for pid in running(self.mark) if pid not in ours],
            "cgroups": [str(folder) for folder in cgroup_folders(f"agentgym-{self.owner_id}")],
            "lease": [f"{folder}: {files}" for folder, _, files in os.walk(self.folder)],  # which may go at any moment
            "reaper": [str(pid) for pid in running(str(self.folder)) if pid not in ours],
        }
        return {name: values for name, values in found.items() if values}

    def close(self) -> None:
        for pid in (self.process.pid, self.child):
            if pid:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        self.process.wait()
        gc()


def gc() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "agentgym.cli", "sandbox", "gc"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def running(mark: str) -> list[int]:
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                if mark.encode() in (folder / "cmdline").read_bytes():
                    found.append(int(folder.name))
            except OSError:
                continue
    return found


def gone(what: Callable[[], object], seconds: float = 150.0) -> None:
    until = time.monotonic() + seconds
    while left := what():
        assert time.monotonic() < until, left
        time.sleep(0.1)


@pytest.fixture(autouse=True)
def own_leases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A runtime folder of their own, so that these tests see and remove nobody else's boxes."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))


@pytest.fixture(params=TIERS)
def tier(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def start() -> Iterator[Callable[..., OwnerProcess]]:
    owners: list[OwnerProcess] = []

    def start(*args: object, **kwargs: object) -> OwnerProcess:
        owners.append(OwnerProcess(*args, **kwargs))
        return owners[-1]

    yield start
    for owner in owners:
        owner.close()


def test_sixteen_boxes_live_and_four_being_made(tier: str, start: Callable[..., OwnerProcess]):
    owner = start(tier, live=16, starting=4)
    owner.kill()
    gone(owner.left)


def test_the_reaper_was_killed_too_and_gc_is_run(tier: str, start: Callable[..., OwnerProcess]):
    owner = start(tier)
    kill_with_reaper(owner.process, owner.reaper(), owner.folder)
    gone(lambda: owner.left().get("processes"))  # those end with their input
    assert "lease" in owner.left()
    gc()
    assert owner.left() == {}


def test_the_reaper_was_killed_too_and_the_next_owner_starts(tier: str, start: Callable[..., OwnerProcess]):
    owner = start(tier)
    kill_with_reaper(owner.process, owner.reaper(), owner.folder)
    program = "from agentgym.sandbox.ownership.lease import owner; owner(); import time; time.sleep(600)"
    following = subprocess.Popen([sys.executable, "-c", program])
    try:
        gone(owner.left)
    finally:
        following.kill()
        following.wait()


def test_a_process_group_is_killed_and_a_session_hung_up(start: Callable[..., OwnerProcess], tier: str):
    """The reaper is in neither, and no polite signal ends it while its owner lives."""
    owner = start(tier, starting=0)
    reaper = owner.reaper()
    assert os.getpgid(reaper) != os.getpgid(owner.process.pid)
    assert os.getsid(reaper) != os.getsid(owner.process.pid)
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
        os.kill(reaper, number)
    owner.kill()
    gone(owner.left)


def test_a_stopped_owner_loses_its_boxes_when_their_lease_is_over(tier: str, start: Callable[..., OwnerProcess]):
    owner = start(tier, live=3, starting=0, lease_s=12.0)
    time.sleep(13.0)
    assert len(owner.left()["processes"]) >= 3, "while it lives, its leases are renewed"
    owner.process.send_signal(signal.SIGSTOP)
    gone(lambda: owner.left().get("processes"))
    gone(lambda: [found for found in owner.left().get("containers", ()) if "running" in found])
    owner.kill()
    gone(owner.left)


def test_a_child_that_inherited_the_sockets_lives_on(tier: str, start: Callable[..., OwnerProcess]):
    owner = start(tier, forks=True)
    owner.kill()
    gone(owner.left)
    os.kill(owner.child, 0)


def test_an_owner_that_ends_in_peace_leaves_nothing_either(tier: str):
    program = (
        "import sys; from agentgym.sandbox import open_sandbox; from agentgym.sandbox.ownership.lease import owner\n"
        "box = open_sandbox(sys.argv[1]); print(owner().folder)"
    )
    done = subprocess.run([sys.executable, "-c", program, tier], capture_output=True, text=True, check=True)
    folder = Path(done.stdout.strip())
    gone(folder.exists)
    gone(lambda: running(str(folder)))
