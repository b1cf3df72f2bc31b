"""Landlock: what the worker's module holds a process to on this kernel, what a box says it has, and lesser kernels."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from agentgym.sandbox import SandboxSpec, open_sandbox, seccomp
from agentgym.sandbox.inside import worker_landlock

# As root or not, a process of the host restricts itself and then tries; nothing else than Landlock stands in its way.
RESTRICTED = """
import ctypes, errno, json, os, socket, sys
from agentgym.sandbox.inside import worker_landlock
ctypes.CDLL(None).prctl(38, 1, 0, 0, 0)
base, outsider, abstract = sys.argv[1:]
read, write, other = (f"{base}/{name}" for name in ("read", "write", "other"))
system = dict.fromkeys(("/usr", "/lib", "/lib64", "/bin", "/etc", sys.base_prefix), "read")
own = {base: "list", read: "read", write: "write"}
said = worker_landlock.apply({**system, **own, "/dev": "device", "/absent": "read"})
found = {"said": said}
def attempt(name, call):
    try:
        call()
        found[name] = "done"
    except OSError as error:
        found[name] = errno.errorcode[error.errno]
def connect():
    with socket.socket(socket.AF_UNIX) as stream: stream.connect(abstract.replace("@", chr(0)))
def pair():
    server = socket.socket(socket.AF_UNIX); server.bind(chr(0) + abstract + "-own"); server.listen()
    with socket.socket(socket.AF_UNIX) as stream: stream.connect(chr(0) + abstract + "-own")
attempt("list base", lambda: os.listdir(base))
attempt("read read", lambda: open(f"{read}/file").read())
attempt("write read", lambda: open(f"{read}/file", "a"))
attempt("truncate read", lambda: os.truncate(f"{read}/file", 0))
attempt("make in read", lambda: os.mkdir(f"{read}/new"))
attempt("remove in read", lambda: os.unlink(f"{read}/file"))
attempt("read other", lambda: open(f"{other}/file").read())
attempt("run other", lambda: os.execv(f"{other}/program", ["x"]))
attempt("write write", lambda: open(f"{write}/file", "w").write("x"))
attempt("move within write", lambda: (os.mkdir(f"{write}/a"), os.rename(f"{write}/file", f"{write}/a/file")))
attempt("link out of read", lambda: os.link(f"{read}/file", f"{write}/linked"))
attempt("pipe file", lambda: os.mkfifo(f"{write}/fifo"))
attempt("device file", lambda: os.mknod(f"{write}/device", 0o20600, os.makedev(1, 3)))
attempt("write /dev/null", lambda: open("/dev/null", "w").write("x"))
attempt("make in /dev/shm", lambda: os.mkdir("/dev/shm/agentgym-landlock-test"))
attempt("signal outsider", lambda: os.kill(int(outsider), 0))
attempt("signal child", lambda: os.kill(os.getpid(), 0))
attempt("outsider's abstract socket", connect)
attempt("own abstract socket", pair)
print(json.dumps(found))
"""


def restricted(base: Path, outsider: int, abstract: str) -> dict[str, str]:
    command = [sys.executable, "-c", RESTRICTED, str(base), str(outsider), abstract]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    for name in ("read", "write", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    program = tmp_path / "other" / "program"
    program.write_text("#!/bin/sh\nexit 0\n")
    program.chmod(0o755)
    return tmp_path


def test_a_process_keeps_to_its_folders(base: Path) -> None:
    outsider = subprocess.Popen(["sleep", "600"])
    abstract = f"@agentgym-test-{os.getpid()}"
    try:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(abstract.replace("@", "\0"))
            server.listen()
            found = restricted(base, outsider.pid, abstract)
    finally:
        outsider.send_signal(signal.SIGKILL)
        outsider.wait()
    if found["said"].startswith("none: "):  # then it holds to nothing, and the box says so
        assert found["read other"] == "done"
        return
    abi = int(found.pop("said").removeprefix("ABI "))
    scoped = "EPERM" if abi >= 6 else "done"
    assert found == {
        "list base": "done",
        "read read": "done",
        "write read": "EACCES",
        "truncate read": "EACCES" if abi >= 3 else "done",
        "make in read": "EACCES",
        "remove in read": "EACCES",
        "read other": "EACCES",
        "run other": "EACCES",
        "write write": "done",
        "move within write": "done" if abi >= 2 else "EXDEV",
        "link out of read": "EXDEV",
        "pipe file": "done",
        "device file": "EACCES",
        "write /dev/null": "done",
        "make in /dev/shm": "EACCES",
        "signal outsider": scoped,
        "signal child": "done",
        "outsider's abstract socket": scoped,
        "own abstract socket": "done",
    }


def test_a_lesser_kernel_is_asked_for_what_it_knows() -> None:
    fields = {abi: worker_landlock.ruleset_attributes(abi) for abi in range(1, 9)}
    assert [len(fields[abi]) for abi in range(1, 9)] == [8, 8, 8, 16, 16, 24, 24, 24]
    files = [int.from_bytes(fields[abi][:8], "little") for abi in range(1, 9)]
    assert files == [0x1FFF, 0x3FFF, 0x7FFF, 0x7FFF, 0xFFFF, 0xFFFF, 0xFFFF, 0xFFFF]
    assert {fields[abi][8:16] for abi in range(4, 9)} == {bytes(8)}, "TCP is left to the box's own network"
    assert {fields[abi][16:] for abi in range(6, 9)} == {b"\3" + bytes(7)}


@pytest.mark.bubblewrap
def test_a_box_runs_under_it() -> None:
    with open_sandbox("namespace", SandboxSpec()) as box:
        if box.limits["landlock"].startswith("none"):
            pytest.skip(box.limits["landlock"])
        assert box.limits["landlock"].startswith("ABI ")
        code = "import os; os.mknod('/work/device', 0o20600, os.makedev(1, 3))"
        result = box.exec(["python3", "-I", "-c", code])
        assert b"PermissionError: [Errno 13]" in result.stderr, (
            "Landlock's EACCES comes before the missing capability's"
        )
        assert box.exec("mkfifo /work/fifo; mkdir /work/a; echo x > f; mv f a/; ls a; echo > /dev/null").exit_code == 0


@pytest.mark.bubblewrap
@pytest.mark.parametrize(
    ("missing", "reason"),
    [
        ("UNKNOWN", "none: this kernel has no Landlock"),
        ("", "none: Landlock is refused here (Operation not permitted)"),
    ],
)
def test_a_box_starts_without_it(monkeypatch: pytest.MonkeyPatch, missing: str, reason: str) -> None:
    """The filter of system calls plays a kernel that has none, and a container around us that refuses it."""
    monkeypatch.setattr(seccomp, "ALLOWED", seccomp.ALLOWED - {"landlock_create_ruleset"})
    if missing:
        monkeypatch.setattr(seccomp, missing, getattr(seccomp, missing) | {"landlock_create_ruleset"})
    seccomp.program.cache_clear()
    try:
        with open_sandbox("namespace", SandboxSpec()) as box:
            assert box.limits["landlock"] == reason
            assert box.exec("echo alive").stdout == b"alive\n"
    finally:
        seccomp.program.cache_clear()
