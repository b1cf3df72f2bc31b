"""`agentgym sandbox list` and `gc`: what they see, what they take away, and what they leave alone."""

from __future__ import annotations

import contextlib
import http.server
import json
import os
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from dead_owners import kill_with_reaper

from agentgym.errors import SandboxError, UnavailableError
from agentgym.sandbox import SandboxSpec
from agentgym.sandbox.ownership import gc, lease
from agentgym.sandbox.ownership.daemon_http import DaemonHttp, ssh_command
from agentgym.sandbox.ownership.gc import collect_garbage, list_boxes
from agentgym.sandbox.ownership.lease import default_daemon, host_identity, runtime_folder
from agentgym.sandbox.ownership.leftovers import Removed, remove_cgroups
from agentgym.sandbox.ownership.reaper import is_locked

OWNER = """
import sys
from agentgym.sandbox import SandboxSpec, open_sandbox
from agentgym.sandbox.ownership.lease import owner
box = open_sandbox(sys.argv[1], SandboxSpec(memory_mb=64))
print(owner().owner_id, box.name, flush=True)
sys.stdin.read()
"""
TIERS = [pytest.param("docker", marks=pytest.mark.docker), pytest.param("namespace", marks=pytest.mark.bubblewrap)]


@pytest.fixture(autouse=True)
def runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Leases of their own: these tests see and remove nobody else's boxes."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    return runtime_folder()


@pytest.fixture
def living() -> Iterator[Callable[[str], tuple[subprocess.Popen[str], str, str]]]:
    """Starts owners: (process, owner, box)."""
    processes = []

    def start(tier: str) -> tuple[subprocess.Popen[str], str, str]:
        command = [sys.executable, "-c", OWNER, tier]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        processes.append(process)
        assert process.stdout is not None
        owner_id, name = process.stdout.readline().split()
        return process, owner_id, name

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "agentgym.cli", "sandbox", *arguments], capture_output=True, text=True, check=False
    )


# -------------------------------------------------------------------------------------------------- both tiers, whole


@pytest.mark.parametrize("tier", TIERS)
def test_boxes_of_a_living_owner_are_listed_and_left_alone(tier: str, living: Callable[..., Any]):
    process, owner_id, name = living(tier)
    (row,) = [json.loads(line) for line in command("list", "--json").stdout.splitlines() if name in line]
    assert (row["tier"], row["owner"], row["owner_id"]) == (tier, "alive", owner_id)
    assert row["state"] == ("running" if tier == "docker" else "live")
    assert row["image"] == (SandboxSpec().image if tier == "docker" else "")
    assert 0 <= row["age_s"] < 60
    done = command("gc", "--images", "--volumes", "--all-hosts-older-than", "86400")
    assert done.returncode == 0, done.stderr
    assert name not in done.stdout
    assert name in command("list", "--json").stdout
    process.communicate("")


def test_nothing_left_behind_is_said_so():
    until = time.monotonic() + 60  # other runs on this machine may leave something, which goes with the first tries
    while (done := command("gc")).stdout != "nothing was left behind\n" and time.monotonic() < until:
        assert done.returncode == 0, done.stderr
    assert (done.returncode, done.stdout) == (0, "nothing was left behind\n"), done.stderr
    while any(json.loads(command("gc", "--json").stdout).values()):
        assert time.monotonic() < until
    assert command("gc", "--all-hosts-older-than", "1").returncode == 2


def reapers(folder: Path) -> list[int]:
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            if f"reaper.py\0{folder}".encode() in Path("/proc", pid, "cmdline").read_bytes():
                found.append(int(pid))
    return found


@pytest.mark.parametrize("tier", TIERS)
def test_what_was_removed_is_named(tier: str, living: Callable[..., Any], runtime: Path):
    process, owner_id, _ = living(tier)
    until = time.monotonic() + 60
    while len(found := reapers(runtime / owner_id)) != 1 or not is_locked(runtime / owner_id / "reaper"):
        assert time.monotonic() < until, found  # what launched it goes first
    kill_with_reaper(process, found[0], runtime / owner_id)
    removed = json.loads(command("gc", "--json").stdout)
    assert removed["leases"] == [owner_id]
    assert not any(row.owner_id == owner_id for row in list_boxes()[0])


# ------------------------------------------------------------------------------------------------ containers by label


@pytest.fixture
def labelled() -> Iterator[Callable[..., str]]:
    """Makes containers that never start, with labels of the test's choice; their names."""
    docker = pytest.importorskip("docker")
    client = docker.from_env()
    names: list[str] = []

    def make(**labels: str) -> str:
        names.append(f"gc-test-{uuid.uuid4().hex[:12]}")
        given = {f"agentgym.{key}": value for key, value in labels.items()}
        client.api.create_container(SandboxSpec().image, ["true"], name=names[-1], labels=given)
        return names[-1]

    yield make
    for name in names:
        with contextlib.suppress(docker.errors.NotFound):
            client.api.remove_container(name, force=True, v=True)
    client.close()


def ours(removed: Removed) -> list[str]:
    """Of the containers that were removed, those of these tests: other runs may have left some as well."""
    return [name for name in removed.containers if name.startswith("gc-")]


def there(name: str) -> bool:
    return any(f"/{name}" in found["Names"] for found in DaemonHttp(*default_daemon()).containers())


@pytest.mark.docker
def test_a_container_of_this_host_whose_owner_has_no_lease_is_removed(labelled: Callable[..., str], runtime: Path):
    dead = labelled(box="gc-dead", host=host_identity(runtime), owner="1-00000000")
    assert ours(collect_garbage()) == ["gc-dead"]
    assert not there(dead)


def test_an_owner_that_came_after_the_leases_were_read_is_alive(runtime: Path, monkeypatch: pytest.MonkeyPatch):
    """As one that starts its first box while the daemon is asked."""
    surveyed = gc._Survey()
    monkeypatch.setattr(lease, "_owner", None)
    mine = lease.owner()
    try:
        assert surveyed.holder(mine.image_labels()) == "alive"
        assert surveyed.holder(mine.image_labels() | {"agentgym.owner": "1-00000000"}) == "dead"
    finally:
        mine.let_go()
    assert surveyed.holder(mine.image_labels()) == "dead"


@pytest.mark.docker
def test_what_is_not_ours_is_left_alone(labelled: Callable[..., str], runtime: Path):
    now = str(int(time.time()))
    plain = labelled()
    elsewhere = labelled(box="gc-elsewhere", host="another", owner="1-00000000", lease_s="60", created=now)
    removed = collect_garbage(images=True, volumes=True, others_older_than_s=600)
    assert ours(removed) == []
    assert there(plain)
    assert there(elsewhere)
    (row,) = [row for row in list_boxes()[0] if row.name == "gc-elsewhere"]
    assert (row.owner, row.state) == ("unknown", "created")


@pytest.mark.docker
def test_another_hosts_container_goes_when_its_lease_is_long_over(labelled: Callable[..., str]):
    hours_ago = str(int(time.time()) - 7200)
    idle = labelled(box="gc-idle", host="another", owner="1-00000000", lease_s="60", created=hours_ago)
    long_lease = labelled(box="gc-long", host="another", owner="1-00000000", lease_s="9000", created=hours_ago)
    assert ours(collect_garbage()) == ["gc-idle"]
    assert (there(idle), there(long_lease)) == (False, True)
    assert ours(collect_garbage(others_older_than_s=3600)) == ["gc-long"]


@pytest.mark.docker
def test_images_and_volumes_of_a_dead_owner(runtime: Path):
    docker = pytest.importorskip("docker")
    client = docker.from_env()
    name = f"agentgym-gc-test-{uuid.uuid4().hex[:8]}"
    labels = {"agentgym.owner": "1-00000000", "agentgym.host": host_identity(runtime)}
    container = client.api.create_container(SandboxSpec().image, ["true"], labels={})["Id"]
    try:
        changes = [f"LABEL {key}={value}" for key, value in labels.items()]
        client.api.commit(container, repository=name, tag="x", changes=changes)
    finally:
        client.api.remove_container(container)
    client.volumes.create(name, labels=labels)
    assert f"{name}:x" in collect_garbage().images
    assert name in collect_garbage(volumes=True).volumes
    assert client.images.list(name=name) == []
    client.close()


@pytest.mark.docker
def test_an_image_of_a_living_owner_is_not_of_the_past(runtime: Path, monkeypatch: pytest.MonkeyPatch):
    """Though it is a task's: it is its owner's alone."""
    docker = pytest.importorskip("docker")
    client = docker.from_env()
    monkeypatch.setattr(lease, "_owner", None)
    mine, name = lease.owner(), f"agentgym-gc-test-{uuid.uuid4().hex[:8]}"
    container = client.api.create_container(SandboxSpec().image, ["true"], labels={})["Id"]
    try:
        labels = {"agentgym.image": "task", **mine.image_labels()}
        changes = [f"LABEL {key}={value}" for key, value in labels.items()]
        client.api.commit(container, repository=name, tag="x", changes=changes)
        assert f"{name}:x" not in collect_garbage(images=True).images
        assert client.images.list(name=name) != []
    finally:
        mine.let_go()
        client.api.remove_container(container)
        with contextlib.suppress(docker.errors.ImageNotFound):  # its reaper was quicker
            client.api.remove_image(f"{name}:x", force=True)
        client.close()


# ------------------------------------------------------------------------------------------------------- the cgroups


def test_empty_cgroups_of_nobody_go_and_those_in_use_stay(monkeypatch: pytest.MonkeyPatch):
    roots = [Path("/sys/fs/cgroup/pids"), Path("/sys/fs/cgroup")]
    root = next((root for root in roots if os.access(root, os.W_OK) and (root / "cgroup.procs").exists()), None)
    if root is None or os.geteuid():
        pytest.skip("no cgroup can be made here")
    owner_id = f"1-{uuid.uuid4().hex[:8]}"
    empty, busy = (root / f"agentgym-{owner_id}{end:06x}" for end in (1, 2))
    sleeper = subprocess.Popen(["sleep", "600"])
    try:
        for folder in (empty, busy):
            folder.mkdir()
        (busy / "cgroup.procs").write_text(str(sleeper.pid))
        assert not [name for name in collect_garbage().cgroups if owner_id in name], "they are too young"
        monkeypatch.setattr(gc, "HALF_MADE_S", -1.0)  # and others' may be that young, whose boxes are being made
        found = gc.cgroup_folders
        monkeypatch.setattr(gc, "cgroup_folders", lambda mark: (one for one in found(mark) if owner_id in one.name))
        removed = [name for name in collect_garbage().cgroups if owner_id in name]
        assert removed == [str(empty.relative_to("/sys/fs/cgroup"))]
        assert sleeper.poll() is None
    finally:
        sleeper.kill()
        sleeper.wait()
        for folder in (empty, busy):
            remove_cgroups(folder.name, Removed(), with_processes=True)


# ------------------------------------------------------------------------------------------------------- the daemons


class _NoDocker(http.server.BaseHTTPRequestHandler):
    status, body = 200, b"<html>hello</html>"

    def do_GET(self) -> None:
        self.send_response(self.status)
        self.send_header("Content-Length", str(len(self.body)))
        self.end_headers()
        self.wfile.write(self.body)

    def log_message(self, format: str, *args: Any) -> None: ...


@pytest.fixture
def web() -> Iterator[tuple[type[_NoDocker], str]]:
    handler = type("Handler", (_NoDocker,), {})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield handler, f"tcp://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def test_what_answers_and_is_no_daemon(web: tuple[type[_NoDocker], str]):
    handler, url = web
    with pytest.raises(SandboxError, match="is no Docker daemon"):
        DaemonHttp(url).containers("x")
    handler.status, handler.body = 500, b'{"message": "no space left on device"}'
    with pytest.raises(SandboxError, match="no space left on device"):
        DaemonHttp(url).images("x")
    handler.status, handler.body = 200, b'{"Volumes": null}'
    assert DaemonHttp(url).volumes("x") == []


@pytest.mark.parametrize("url", ["unix:///nowhere.sock", "tcp://127.0.0.1:1", "carrier-pigeon://x", "ssh://"])
def test_a_daemon_that_is_not_there(url: str):
    with pytest.raises(UnavailableError, match=url.split(":")[0]):
        DaemonHttp(url).containers("x")


def test_gc_fails_if_a_daemon_that_was_asked_for_is_not_there(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("DOCKER_HOST", "tcp://127.0.0.1:1")
    done = command("gc")
    assert done.returncode == 1
    assert "127.0.0.1:1" in done.stderr
    assert "Traceback" not in done.stderr
    monkeypatch.setenv("DOCKER_HOST", "unix:///nowhere.sock")  # no Docker on this machine is no failure
    assert command("gc").returncode == 0


def test_the_way_through_ssh_asks_nothing():
    found = ssh_command("ssh://me@gpu1:2222")
    assert found[-5:] == ["--", "gpu1", "docker", "system", "dial-stdio"]
    assert "BatchMode=yes" in found
    assert found[found.index("-l") + 1] == "me"
    assert found[found.index("-p") + 1] == "2222"


@pytest.mark.docker
def test_a_daemon_behind_ssh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A stand-in for ssh that joins its streams to the daemon's socket, as `docker system dial-stdio` does there."""
    program = tmp_path / "ssh"
    program.write_text(
        f"#!{sys.executable}\n"
        "import os, socket, sys, threading\n"
        "assert sys.argv[-5:] == ['--', 'far.example', 'docker', 'system', 'dial-stdio'], sys.argv\n"
        "far = socket.socket(socket.AF_UNIX); far.connect('/var/run/docker.sock')\n"
        "def copy(read, write):\n"
        "    while data := read(65536): write(data)\n"
        "threading.Thread(target=copy, args=(lambda n: os.read(0, n), far.sendall), daemon=True).start()\n"
        "copy(far.recv, lambda data: os.write(1, data))\n"
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    far = DaemonHttp("ssh://me@far.example")
    assert isinstance(far.images("agentgym.base"), list)
    assert far.remove_container(f"never-{uuid.uuid4().hex}") is False
