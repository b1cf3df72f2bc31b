"""Leases: what is written down, who can be told alive, what is renewed, and folders that are not ours."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from agentgym.errors import SandboxDiedError, UnavailableError
from agentgym.sandbox import SandboxSpec
from agentgym.sandbox.ownership import lease
from agentgym.sandbox.ownership.lease import Owner, default_daemon, host_identity, owner, runtime_folder
from agentgym.sandbox.ownership.leftovers import Lease, leases
from agentgym.sandbox.ownership.reaper import is_locked, start_time

SPEC = SandboxSpec(memory_mb=64)


def gone(what: Callable[[], object], seconds: float = 60.0) -> None:
    until = time.monotonic() + seconds
    while left := what():
        assert time.monotonic() < until, left
        time.sleep(0.02)


@pytest.fixture
def runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    return runtime_folder()


@pytest.fixture
def mine(runtime: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Owner]:
    """An owner of this process in a folder of its own."""
    monkeypatch.setattr(lease, "_owner", None)
    mine = owner()
    yield mine
    mine.let_go()


def in_a_child(function: Callable[[], object]) -> object:
    """What the function gives in a forked child."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(write, json.dumps(function()).encode())
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read) as answer:
        text = answer.read()
    os.waitpid(child, 0)
    return json.loads(text)


# ------------------------------------------------------------------------------------------------------- the record


def test_a_box_is_written_down_before_it_exists_and_struck_out_when_it_is_gone(mine: Owner):
    name = mine.new_name("docker", SandboxSpec(network="bridge", lease_s=7))
    (found,) = leases(mine.folder.parent)
    assert (found.owner_id, found.alive, found.readable) == (mine.owner_id, True, True)
    box = found.boxes()[name]
    assert (box["tier"], box["begun"], box["relaxed"], box["lease_s"]) == ("docker", True, ["network=bridge"], 7)
    mine.keep(name, lambda: None, 7)
    assert not found.boxes()[name]["begun"]
    mine.forget(name)
    mine.forget(name)
    assert found.boxes() == {}


def test_names_differ_and_say_whose_they_are(mine: Owner):
    names = {mine.new_name("namespace", SPEC) for _ in range(50)}
    assert len(names) == 50
    assert all(name.startswith(f"agentgym-{mine.owner_id}") for name in names)


def test_labels_tell_everything_without_this_process(mine: Owner):
    name = mine.new_name("gvisor", SPEC)
    labels = mine.labels(name, SandboxSpec(writable_root=True, run_as_root=True, lease_s=12.5))
    assert labels.pop("agentgym.created").isdigit()
    assert labels == {
        "agentgym.box": name,
        "agentgym.tier": "gvisor",
        "agentgym.owner": mine.owner_id,
        "agentgym.host": mine.host,
        "agentgym.lease_s": "12.5",
        "agentgym.relaxed": "writable_root,run_as_root",
    }


def test_the_daemons_of_an_owner_are_written_down_once(mine: Owner, tmp_path: Path):
    for _ in range(2):
        mine.new_name("docker", SPEC, "unix:///run/other.sock")
        mine.new_name("docker", SPEC, "tcp://10.0.0.2:2376", tmp_path)
        mine.new_name("namespace", SPEC)
    found = Lease.read(mine.folder)
    assert [daemon.url for daemon in found.daemons().values()] == ["unix:///run/other.sock", "tcp://10.0.0.2:2376"]
    assert {box["daemon"] for box in found.boxes().values()} == {"0", "1", None}


def test_the_daemon_of_the_environment(monkeypatch: pytest.MonkeyPatch):
    for name in ("DOCKER_HOST", "DOCKER_TLS_VERIFY", "DOCKER_TLS", "DOCKER_CERT_PATH"):
        monkeypatch.delenv(name, raising=False)
    assert default_daemon() == ("unix:///var/run/docker.sock", None)
    monkeypatch.setenv("DOCKER_HOST", "tcp://10.0.0.2:2376")
    monkeypatch.setenv("DOCKER_TLS_VERIFY", "1")
    monkeypatch.setenv("DOCKER_CERT_PATH", "/certificates")
    assert default_daemon() == ("tcp://10.0.0.2:2376", Path("/certificates"))


# ----------------------------------------------------------------------------------------------------- who is alive


def test_there_is_one_owner_in_a_process(mine: Owner):
    found: list[Owner] = []
    threads = [threading.Thread(target=lambda: found.append(owner())) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {id(one) for one in found} == {id(mine)}


def test_a_forked_child_has_its_own_and_does_not_hold_the_parents(mine: Owner):
    child_id, parent_lives = in_a_child(lambda: [owner().owner_id, is_locked(mine.folder / "lease")])
    assert child_id != mine.owner_id
    assert child_id.split("-")[0] != str(os.getpid())
    assert parent_lives
    gone(lambda: (mine.folder.parent / child_id).exists())  # its own reaper saw it end
    assert Lease.read(mine.folder).alive


def test_an_owner_is_dead_although_a_child_holds_its_lock(runtime: Path):
    """A child that a C library forked runs no hook of Python."""
    program = (
        "import os, sys; from agentgym.sandbox.ownership import lease; mine = lease.owner()\n"
        "os.set_inheritable(mine._descriptor, True)\n"
        "import subprocess; child = subprocess.Popen(['sleep', '600'], close_fds=False)\n"
        "print(mine.owner_id, child.pid, flush=True); os._exit(0)"
    )
    done = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert done.stdout is not None
    owner_id, child = done.stdout.readline().split()
    try:
        gone((runtime / owner_id).exists)  # the reaper goes by the process
    finally:
        os.kill(int(child), signal.SIGKILL)
        done.stdout.close()
        done.wait()


def test_a_pid_that_was_given_to_another_process_is_not_the_owner(mine: Owner):
    who = json.loads((mine.folder / "lease").read_text())
    other = mine.folder.parent / "1-00000000"
    (other / "boxes").mkdir(parents=True)
    (other / "lease").write_text(json.dumps(who | {"start_time": "1"}))
    with (other / "lease").open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert not Lease.read(other).alive


def test_a_lease_of_another_pid_namespace_is_not_judged(mine: Owner):
    other = mine.folder.parent / "1-00000000"
    other.mkdir()
    (other / "lease").write_text(json.dumps({"pid": 1, "start_time": "5", "host": "elsewhere"}))
    assert not Lease.read(other).readable


def test_the_start_time_of_a_process():
    assert start_time(os.getpid()).isdigit()
    ended = subprocess.Popen(["true"])
    gone(lambda: start_time(ended.pid))  # also before it is waited for
    ended.wait()


# --------------------------------------------------------------------------------------------------------- renewals


def test_what_is_kept_is_renewed_and_what_is_forgotten_is_not(mine: Owner):
    calls: list[float] = []
    name = mine.new_name("namespace", SPEC)
    began = time.monotonic()
    mine.keep(name, lambda: calls.append(time.monotonic()), 0.4)
    gone(lambda: len(calls) < 4)
    assert calls[3] - began >= 4 * 0.1, "a quarter of the lease apart"
    mine.forget(name)
    count = len(calls)
    time.sleep(0.3)
    assert len(calls) <= count + 1


def test_one_that_fails_is_told_once_and_does_not_disturb_the_others(mine: Owner, caplog: pytest.LogCaptureFixture):
    calls: list[int] = []
    bad, good = mine.new_name("namespace", SPEC), mine.new_name("namespace", SPEC)

    def fail() -> None:
        raise SandboxDiedError("it is gone")

    with caplog.at_level(logging.WARNING):
        mine.keep(bad, fail, 0.2)
        mine.keep(good, lambda: calls.append(1), 0.2)
        gone(lambda: len(calls) < 5)
    said = [record.getMessage() for record in caplog.records if "not renewed" in record.getMessage()]
    assert said == [f"the lease of sandbox {bad} is not renewed any more: it is gone"]


def test_a_reaper_that_starts_slowly_holds_up_no_renewal(
    runtime: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    slow = tmp_path / "slow.py"
    slow.write_text("import time; time.sleep(600)")
    monkeypatch.setattr(lease, "REAPER", slow)
    monkeypatch.setattr(lease, "_owner", None)
    mine, calls = owner(), list[int]()
    assert mine._reaper_start is not None
    try:
        mine.keep(mine.new_name("namespace", SPEC), lambda: calls.append(1), 0.2)
        gone(lambda: len(calls) < 3)
        assert mine._reaper_start.poll() is None
    finally:
        mine._reaper_start.kill()
        mine._reaper_start.wait()
        mine.let_go()


# ------------------------------------------------------------------------------------------------------- the folder


def test_the_folder_is_this_users_alone(runtime: Path, tmp_path: Path):
    assert runtime == tmp_path / "agentgym"
    assert runtime.stat().st_mode & 0o777 == 0o700


def test_a_runtime_folder_of_the_session_that_others_can_write_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    tmp_path.chmod(0o770)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    assert runtime_folder() == Path(f"/tmp/agentgym-{os.geteuid()}")


@pytest.mark.parametrize("trap", ["open to all", "a link", "a file"])
def test_a_folder_that_somebody_else_laid_out_is_refused(runtime: Path, tmp_path: Path, trap: str):
    runtime.rmdir()
    if trap == "open to all":
        runtime.mkdir()
        runtime.chmod(0o777)
    elif trap == "a link":
        (tmp_path / "theirs").mkdir(mode=0o700)
        runtime.symlink_to(tmp_path / "theirs")
    else:
        runtime.touch()
    with pytest.raises(UnavailableError, match="XDG_RUNTIME_DIR"):
        runtime_folder()


def test_another_folder_is_another_host(runtime: Path, tmp_path: Path):
    other = tmp_path / "other"
    other.mkdir()
    assert host_identity(runtime) == host_identity(runtime)
    assert host_identity(runtime) != host_identity(other)


def test_who_never_opens_a_box_has_no_reaper_and_no_docker(runtime: Path):
    program = (
        "import sys, agentgym.sandbox, agentgym.sandbox.warm.pool, agentgym.server.service\n"
        "from agentgym import registry\n"
        "registry.make('maze'); print('docker' in sys.modules, flush=True)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
    assert list(runtime.iterdir()) == []
