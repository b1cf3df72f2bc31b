"""The reaper: small, holding nothing of its owner's, one of it, and patient with daemons."""

from __future__ import annotations

import contextlib
import fcntl
import http.server
import json
import os
import socketserver
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from dead_owners import kill_with_reaper

from agentgym.sandbox.ownership import lease, leftovers, reaper
from agentgym.sandbox.ownership.lease import REAPER, host_identity, runtime_folder
from agentgym.sandbox.ownership.leftovers import Lease, collect_orphan, collect_owner
from agentgym.sandbox.ownership.reaper import is_locked, start_time

OWNER = """
import json, sys
from agentgym.sandbox import SandboxSpec
from agentgym.sandbox.ownership.lease import owner
inherited = open("/etc/hostname"); __import__("os").set_inheritable(inherited.fileno(), True)
for daemon in sys.argv[1:]:
    owner().new_name("docker", SandboxSpec(), daemon)
print(owner().folder, flush=True)
sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    return runtime_folder()


def gone(what: Callable[[], object], seconds: float = 60.0) -> None:
    until = time.monotonic() + seconds
    while left := what():
        assert time.monotonic() < until, left
        time.sleep(0.02)


class OwnerProcess:
    """An owner that says where its lease is, and ends when it is told."""

    def __init__(self, *daemons: str) -> None:
        command = [sys.executable, "-c", OWNER, *daemons]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self.folder = Path(self.process.stdout.readline().strip())
        gone(lambda: len(self.reapers()) != 1 or not is_locked(self.folder / "reaper"))

    def reapers(self) -> list[int]:
        found = []
        for folder in Path("/proc").iterdir():
            if folder.name.isdigit():
                try:
                    arguments = (folder / "cmdline").read_bytes().split(b"\0")
                    parent = (folder / "stat").read_bytes().rpartition(b")")[2].split()[1]
                except OSError:
                    continue
                is_reaper = str(REAPER).encode() in arguments and str(self.folder).encode() in arguments
                if is_reaper and int(parent) != self.process.pid:  # the launcher has gone
                    found.append(int(folder.name))
        return found

    def __enter__(self) -> OwnerProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()


def opened_by(process: Path) -> set[str]:
    """What its descriptors are."""
    found = set()
    for file in (process / "fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            found.add(os.readlink(file))
    return found


def test_it_holds_nothing_of_its_owner_and_is_small():
    with OwnerProcess() as owner:
        (pid,) = owner.reapers()
        place = Path("/proc", str(pid))
        kept = {"/dev/null", "anon_inode:[pidfd]", f"{owner.folder}/reaper"}
        gone(lambda: opened_by(place) - kept)  # at its start it looks at others' leases
        assert os.readlink(place / "cwd") == "/"
        assert os.getsid(pid) != os.getsid(owner.process.pid)
        names = {entry.split("=")[0] for entry in (place / "environ").read_text().split("\0") if entry}
        assert names <= {"PATH", "HOME", "SSH_AUTH_SOCK", "LC_CTYPE"}
        status = (place / "status").read_text()
        memory_kb = int(status.split("RssAnon:")[1].split()[0])
        assert memory_kb < 12_000, "what it needs at the end is loaded at the end"
        modules = (place / "maps").read_text()
        assert "_ssl" not in modules


def test_there_is_one_however_many_are_started():
    with OwnerProcess() as owner:
        (first,) = owner.reapers()
        pid = owner.process.pid
        for _ in range(3):
            command = [sys.executable, "-I", "-S", str(REAPER), str(owner.folder), str(pid), start_time(pid)]
            subprocess.run(command, check=True, timeout=120)
        gone(lambda: owner.reapers() != [first])


def test_another_is_started_when_it_is_killed(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(lease, "_owner", None)
    mine = lease.owner()
    gone(lambda: not is_locked(mine.folder / "reaper"))
    mine.ensure_reaper()
    found = [pid for pid in map(int, filter(str.isdigit, os.listdir("/proc"))) if _is_reaper_of(pid, mine.folder)]
    for pid in found:  # the launcher may be about to end
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, 9)
    gone(lambda: is_locked(mine.folder / "reaper"))
    mine.ensure_reaper()
    gone(lambda: not is_locked(mine.folder / "reaper"))
    mine.let_go()


def _is_reaper_of(pid: int, folder: Path) -> bool:
    try:
        return f"{REAPER}\0{folder}".encode() in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


def test_a_kernel_without_pidfd(monkeypatch: pytest.MonkeyPatch, runtime: Path):
    """Polls; tried on a process that ends while it is watched."""

    def none(pid: int) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(os, "pidfd_open", none)
    monkeypatch.setattr(reaper, "POLL_S", 0.02)
    folder = runtime / "1-00000000"
    folder.mkdir()
    with (folder / "lease").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        process = subprocess.Popen(["cat"], stdin=subprocess.PIPE)
        assert process.stdin is not None
        is_ending = threading.Event()

        def end() -> None:
            is_ending.set()
            process.communicate()

        threading.Timer(0.3, end).start()
        began = time.monotonic()
        reaper.watch(str(folder), process.pid, start_time(process.pid))
        assert is_ending.is_set(), "it lives"
        assert time.monotonic() - began < reaper.LOOK_S, "it polls"
        process.wait()


def test_an_owner_that_ended_before_it_was_watched(runtime: Path):
    ended = subprocess.Popen(["true"])
    ended.wait()
    reaper.watch(str(runtime / "gone"), ended.pid, "12345")  # returns


def test_a_lease_without_boxes_goes_at_once_even_if_its_daemon_is_gone():
    with OwnerProcess("unix:///nowhere/docker.sock") as owner:
        for file in (owner.folder / "boxes").iterdir():
            file.unlink()
        owner.process.kill()
        gone(owner.folder.exists)


def test_a_lease_with_boxes_waits_for_its_daemon_a_day(runtime: Path):
    with OwnerProcess("tcp://127.0.0.1:1") as owner:
        kill_with_reaper(owner.process, owner.reapers()[0], owner.folder)
    removed = collect_owner(owner.folder, settle_s=0.1)
    assert "tcp://127.0.0.1:1" in removed.problems[0]
    assert "may still hold 1 sandboxes" in removed.problems[0]
    assert owner.folder.exists()
    assert collect_orphan(owner.folder).problems == []  # it was tried just now
    assert owner.folder.exists()
    long_ago = time.time() - 100_000
    for name in ("tried", "lease"):
        os.utime(owner.folder / name, (long_ago, long_ago))
    assert collect_orphan(owner.folder).leases == [owner.folder.name]
    assert not owner.folder.exists()


def test_a_lease_waits_for_a_socket_that_is_gone_as_long_as_its_boxes_can_live():
    with OwnerProcess("unix:///nowhere/docker.sock") as owner:
        kill_with_reaper(owner.process, owner.reapers()[0], owner.folder)
    assert "/nowhere" in collect_owner(owner.folder, settle_s=0.1).problems[0]
    os.utime(owner.folder / "lease", (0, time.time() - 100))  # a minute is the lease of its boxes
    assert collect_owner(owner.folder).leases == [owner.folder.name]


def test_a_daemon_that_comes_back_is_asked_again(runtime: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    place = tmp_path / "docker.sock"
    with OwnerProcess(f"unix://{place}") as owner:
        kill_with_reaper(owner.process, owner.reapers()[0], owner.folder)
    monkeypatch.setattr(reaper, "RETRY_S", 0.05)
    monkeypatch.setattr(reaper, "TRIES", 10_000)
    monkeypatch.setattr(leftovers, "FRESH_S", 0.0)  # nothing can be in the making any more
    monkeypatch.setattr(leftovers, "SETTLE_S", 600.0)  # and yet the socket may come back
    thread = threading.Thread(target=reaper.take_away, args=(str(owner.folder),), daemon=True)
    thread.start()
    gone(lambda: not (owner.folder / "tried").exists())
    assert thread.is_alive()
    with socketserver.ThreadingUnixStreamServer(str(place), _EmptyDaemon) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        thread.join(60)
        server.shutdown()
    assert not owner.folder.exists()


class _EmptyDaemon(http.server.BaseHTTPRequestHandler):
    """Holds nothing."""

    client_address = ("", 0)

    def do_GET(self) -> None:
        body = b'{"Volumes": []}' if self.path.startswith("/volumes") else b"[]"
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None: ...


def test_a_living_owner_is_no_orphan(runtime: Path):
    with OwnerProcess() as owner:
        assert collect_orphan(owner.folder).leases == []
        assert Lease.read(owner.folder).alive
        reaper.take_away_orphans(str(runtime), "another")
        assert Lease.read(owner.folder).alive


def test_orphans_are_looked_for_by_a_child(runtime: Path):
    orphan = runtime / "1-00000000"
    (orphan / "boxes").mkdir(parents=True)
    (orphan / "lease").write_text(json.dumps({"pid": 1, "start_time": "1"}))
    reaper.take_away_orphans(str(runtime), "another")
    assert orphan.exists(), "it is another host's as far as its lease says"
    (orphan / "lease").write_text(json.dumps({"pid": 1, "start_time": "1", "host": host_identity(runtime)}))
    reaper.take_away_orphans(str(runtime), "another")
    assert not orphan.exists()
