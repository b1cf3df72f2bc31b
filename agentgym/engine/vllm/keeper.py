"""Keeps a vLLM server for as long as its owner lives. Law: when the owner is gone, however it went, so is the server
with all its processes.

Run as a script of the standard library only: `python keeper.py OWNER_PID COMMAND...`. The owner holds this
process's stdin open. A vLLM server is a tree of processes (HTTP, engine core, workers); one of them that dies alone
takes the others with it, and orphans come to this process, which ends their group: Python's resource tracker last, for
it gives back the shared memory (400 MB) of those that were killed.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import subprocess
import sys
import time

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_LOOK_S = 0.25
_POLITE_S = 5.0  # after SIGTERM
_TRACKER_S = 20.0  # for a resource tracker to end by itself, which it does at once; long, for a machine that is slow
_GROUP_S = 40.0  # for all that is left


def keep(owner: int, command: list[str]) -> int:
    """Runs `command` in a session of its own until it ends or the owner is gone; returns the exit code."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(_PR_SET_CHILD_SUBREAPER, 1)

    def die_with_the_keeper() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # what is ignored here would be there, too

    child = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True, preexec_fn=die_with_the_keeper)
    while child.poll() is None:
        readable, _, _ = select.select([0], [], [], _LOOK_S)
        if (readable and not os.read(0, 1)) or os.getppid() != owner:
            _signal(child.pid, signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(_POLITE_S)
            break
    _end_group(child.pid)
    return child.wait()


def _end_group(group: int) -> None:
    """Kills what is left of the group and reaps it, until nobody is left."""
    began = time.monotonic()
    passed = 0.0
    while passed < _GROUP_S and (members := _members(group)):
        passed = time.monotonic() - began  # looked at behind a kill of all, however long this process stood still
        for pid in members:
            if passed > _TRACKER_S or not _is_tracker(pid):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        time.sleep(0.02)


def _members(group: int) -> list[int]:
    """The processes of `group`, those that nobody has reaped yet too."""
    found: list[int] = []
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with contextlib.suppress(OSError):
                if os.getpgid(int(entry)) == group:
                    found.append(int(entry))
    return found


def _is_tracker(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            return b"from multiprocessing.resource_tracker import main" in file.read()
    except OSError:
        return False


def _signal(group: int, number: int) -> bool:
    try:
        os.killpg(group, number)
    except ProcessLookupError:
        return False
    return True


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the owner decides
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    code = keep(int(sys.argv[1]), sys.argv[2:])
    sys.exit(128 - code if code < 0 else code)
