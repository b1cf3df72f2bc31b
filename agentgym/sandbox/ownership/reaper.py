"""The process that outlives an owner of boxes and takes them away. Law: it trusts nothing but the kernel's word that
the owner ended, holds nothing of the owner's (no descriptor, no session, no folder), and is small until then.

`lease.py` runs this file as a program of its own, `python -I -S reaper.py FOLDER PID START_TIME`: only what stands here
is loaded until there is something to take away. It also looks for owners whose reaper was killed with them: at its
start and once a minute.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import signal
import sys
import time
from types import ModuleType

LOOK_S = 60.0  # for other owners that ended without a reaper
RETRY_S, TRIES = 30.0, 120  # with a daemon that does not answer
LOOKED_AT = 100  # tries, of 0.05 s, to take a lock that somebody only looks at
POLL_S = 1.0  # where the kernel knows no pidfd


def main(folder: str, pid: int, started: str) -> None:
    if os.fork():
        os._exit(0)  # the owner's child is gone, its grandchild is nobody's
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # it ends when its owner has ended, and by itself
    lock = take_lock(os.path.join(folder, "reaper"))
    if lock is None:
        return  # there is one already
    watch(folder, pid, started)
    take_away(folder)


def take_away(folder: str) -> None:
    """All that the owner held. A daemon that is down may come back with its containers, so it is tried for a while."""
    for _ in range(TRIES):
        leftovers().collect_owner(folder)
        if not os.path.exists(folder):
            return
        time.sleep(RETRY_S)


def take_lock(file: str) -> int | None:
    """The lock of a file, None if another reaper holds it. Tried again, because looking at it takes it for a moment."""
    try:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except FileNotFoundError:
        return None  # the owner ended, and its folder is gone
    for _ in range(LOOKED_AT):
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(0.05)
        else:
            return descriptor
    os.close(descriptor)
    return None


def watch(folder: str, pid: int, started: str) -> None:
    """Returns when the owner has ended, or has become another program."""
    descriptor = open_pidfd(pid)
    poll = select.poll()
    if descriptor is not None:
        poll.register(descriptor, select.POLLIN)
    lease = os.path.join(folder, "lease")
    look = 0.0
    while start_time(pid) == started and is_locked(lease):
        if time.monotonic() >= look:
            take_away_orphans(os.path.dirname(folder), os.path.basename(folder))
            look = time.monotonic() + LOOK_S
        wait_s = LOOK_S if descriptor is not None else POLL_S
        if poll.poll(wait_s * 1000):
            return


def open_pidfd(pid: int) -> int | None:
    """None: the kernel knows no such thing, or the process has ended; then its start time tells."""
    try:
        return os.pidfd_open(pid)
    except (OSError, AttributeError):
        return None


def take_away_orphans(runtime: str, own: str) -> None:
    """What owners left behind whose reaper was killed, too. In a child, so that this process stays small."""
    found = []
    for name in sorted(os.listdir(runtime)):
        folder = os.path.join(runtime, name)
        if name[0] != "." and name != own and os.path.isdir(folder):
            held = is_locked(os.path.join(folder, "lease")) or is_locked(os.path.join(folder, "reaper"))
            if not held:
                found.append(folder)
    if not found:
        return
    child = os.fork()
    if child == 0:
        try:
            for folder in found:
                leftovers().collect_orphan(folder)
        finally:
            os._exit(0)
    with contextlib.suppress(ChildProcessError):
        os.waitpid(child, 0)


def leftovers() -> ModuleType:
    """The module that takes away; it and what it imports need the standard library only."""
    root = os.path.abspath(os.path.join(os.path.dirname(__file__), "..", "..", ".."))
    if root not in sys.path:
        sys.path.insert(0, root)
    from agentgym.sandbox.ownership import leftovers

    return leftovers


def start_time(pid: int) -> str:
    """When the process began, in the kernel's ticks since the boot; "" if it is not there any more. The pid and this
    name one process for ever. One that is dead and not waited for counts as gone."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in (b"Z", b"X") else fields[19].decode()


def is_locked(file: str | os.PathLike[str]) -> bool:
    """Whether some process holds the lock of that file."""
    try:
        descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    else:
        return False
    finally:
        os.close(descriptor)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3])
