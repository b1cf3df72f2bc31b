"""Attacks on what the machine has: processes, memory, disk, descriptors, time, and the patience of who reads output."""

from __future__ import annotations

import contextlib
import resource
import threading

from agentgym.errors import SandboxDiedError, SandboxError, SandboxLimitError, SandboxTimeoutError
from agentgym.sandbox.spec import Sandbox
from agentgym.testing.sandbox_abuse.attack import (
    Attack,
    Escaped,
    Scene,
    attack,
    available_mb,
    hostile,
    require,
    stopped_at_the_deadline,
    told,
    within,
)

FORK = "import os\nwhile True:\n try: os.fork()\n except OSError: pass"
COUNT = """
import os, time
children = []
try:
    while len(children) < 200:
        child = os.fork()
        if child == 0: time.sleep(60)
        children.append(child)
except OSError: pass
print(len(children), flush=True)
for child in children: os.kill(child, 9)
"""
DAEMONS = """
import os, signal, time
for _ in range(4):
    if os.fork() == 0:
        os.setsid()
        for number in range(1, 32):
            if number not in (9, 19, 17): signal.signal(number, signal.SIG_IGN)
        if os.fork() == 0:
            for fd in range(3): os.close(fd)
            while True: %s
        os._exit(0)
print("started", flush=True)
while True: %s
"""
PROCESSES = "import os, json; print(json.dumps(sum(name.isdigit() for name in os.listdir('/proc'))))"


@attack("forks until it cannot, then on: from Python, and from the shell")
def fork_bomb(scene: Scene) -> str:
    box = scene.box(pids=40)
    forked = told(box, COUNT)
    require(forked < 40, f"{forked} children were born in a box with pids=40")
    peak: list[int] = [0]
    over = threading.Event()

    def watch() -> None:
        while not over.wait(0.02):
            peak[0] = max(peak[0], len(scene.processes(box)))

    watching = threading.Thread(target=watch)
    watching.start()
    try:
        with contextlib.suppress(SandboxLimitError, SandboxDiedError), stopped_at_the_deadline("a fork bomb"):
            hostile(box, FORK, timeout_s=1.0)
        with contextlib.suppress(SandboxError):  # or its shell ends, because it cannot fork any more
            box.exec("f() { f | f & }; f; sleep 60", timeout_s=0.7)
    finally:
        over.set()
        watching.join()
    require(peak[0] <= 42, f"the host saw {peak[0]} processes of a box with pids=40")
    seen = f"the host saw at most {peak[0]}" if scene.sees(box) else f"{forked + 2} by its own count"
    return f"ended at the deadline, pids=40 held ({seen}); {scene.check_usable(box)}"


@attack("allocates 3 GiB in a box of 96 MiB, in one process and in several")
def memory_bomb(scene: Scene) -> str:
    eat = "a = []\nfor _ in range(3072): a.append(b'x' * 2**20)\nprint('ATE ALL')"
    several = f"import os\nfor _ in range(3): os.fork()\n{eat}"
    box, taken = scene.box(memory_mb=96), 0
    for _ in range(3):  # others may take memory at the same time, but hardly each time
        taken = _taken_by(box, (eat, several))
        if taken < 1536:
            return f"killed or refused at its limit; {scene.check_usable(box)}"
        box = scene.box(memory_mb=96)
    raise Escaped(f"the host had {taken} MiB less while it went on")


def _taken_by(box: Sandbox, bombs: tuple[str, ...]) -> int:
    """How many MiB less the host had while they went off."""
    before, least = available_mb(), available_mb()
    for code in bombs:
        results: list[bytes] = []

        def run(code: str = code, results: list[bytes] = results) -> None:
            with contextlib.suppress(SandboxError):
                results.append(hostile(box, code, timeout_s=20).stdout)

        eating = threading.Thread(target=run)
        eating.start()
        while eating.is_alive():
            least = min(least, available_mb())
            eating.join(0.02)
        require(b"ATE ALL" not in b"".join(results), "it got 32 times its memory")
    return before - least


@attack("fills every writable folder, shared memory and the memory behind them")
def disk_fill(scene: Scene) -> str:
    box = scene.box(tmpfs_mb=8)
    fill = """
import json, os
taken = {}
for folder in ("/work", "/tmp", "/dev/shm", "/var/tmp", "/run", "/dev", "/"):
    taken[folder] = 0
    try:
        for i in range(100):
            with open(f"{folder}/fill{i}", "wb", buffering=0) as file:
                while True: taken[folder] += file.write(bytes(2**20))
    except OSError: pass
print(json.dumps(taken))
"""
    with contextlib.suppress(SandboxTimeoutError, SandboxDiedError, SandboxLimitError):
        taken = told(box, fill)
        writable = {folder: size for folder, size in taken.items() if size}
        limit = {"/work": 8, "/tmp": 8, "/dev/shm": 16}
        for folder, size in writable.items():
            require(size <= limit.get(folder, 0) * 2**20, f"wrote {size} bytes to {folder}")
        return f"each folder ended at its size ({', '.join(writable)}); {scene.check_usable(box)}"
    return f"ended with the memory of the box; {scene.check_usable(box)}"


@attack("makes 200,000 empty files, and folders 2,000 deep")
def inode_fill(scene: Scene) -> str:
    files = "import os\ntry:\n for i in range(200_000): os.close(os.open(f'/work/{i}', 64))\nexcept OSError: pass"
    deep = (
        "import os\nos.chdir('/tmp')\ntry:\n for i in range(2000): os.mkdir('d'); os.chdir('d')\nexcept OSError: pass"
    )
    for _ in range(3):  # others may take memory at the same time, but hardly each time
        box, before = scene.box(tmpfs_mb=4, memory_mb=96), available_mb()
        for code in (files, deep):
            with contextlib.suppress(SandboxTimeoutError, SandboxLimitError, SandboxDiedError):
                hostile(box, code, timeout_s=8)
        if before - available_mb() < 1024:
            return f"ended at the limit of the folder or of memory; {scene.check_usable(box)}"
    raise Escaped("the host lost more than 1 GiB of memory to inodes")


@attack("opens descriptors, pipes and sockets until it cannot, in several processes")
def descriptor_fill(scene: Scene) -> str:
    box = scene.box(pids=32)
    code = """
import json, os, socket
counts = []
for make in (lambda: os.dup(0), lambda: os.pipe(), lambda: socket.socketpair(), lambda: os.memfd_create("x")):
    read, write = os.pipe()
    if os.fork() == 0:
        kept = []
        try:
            while len(kept) < 100_000: kept.append(make())
        except OSError: pass
        os.write(write if write < 1024 else 1, str(len(kept)).encode()); os._exit(0)
    os.close(write)
    counts.append(int(os.read(read, 100)))
print(json.dumps(counts))
"""
    counts = told(box, code)
    require(max(counts) < 1024, f"one process held {max(counts)} descriptors")
    return f"at most {max(counts)} at once in a process; {scene.check_usable(box)}"


def _outlives(scene: Scene, doing: str) -> str:
    box = scene.box()
    before = set(scene.processes(box))
    quiet = told(box, PROCESSES)
    with stopped_at_the_deadline("a command with daemons"):
        hostile(box, DAEMONS % (doing, doing), timeout_s=1.0)
    # what was killed does nothing more, but may take a while to be gone
    require(within(lambda: set(scene.processes(box)) <= before), "processes outlived the deadline")
    require(within(lambda: told(box, PROCESSES) <= quiet), "the box has more processes than before")
    return f"killed at the deadline with its 4 double-forked, signal-deaf daemons; {scene.check_usable(box)}"


@attack("spins past its deadline, with double-forked daemons that spin too")
def spin_past_the_deadline(scene: Scene) -> str:
    return _outlives(scene, "pass")


@attack("sleeps past its deadline, with double-forked daemons that sleep too")
def sleep_past_the_deadline(scene: Scene) -> str:
    return _outlives(scene, "time.sleep(0.01)")


@attack("leaves 600 dead children to whoever has to reap them")
def zombie_flood(scene: Scene) -> str:
    box = scene.box(pids=64)
    code = "import os\nfor _ in range(30):\n if os.fork() == 0:\n  if os.fork() == 0: os._exit(0)\n  os._exit(0)"
    for _ in range(10):
        with contextlib.suppress(SandboxLimitError):
            hostile(box, code)

    def reaped() -> bool:
        with contextlib.suppress(SandboxLimitError):  # so many of them live that no other can begin
            return b") Z " not in box.exec("cat /proc/[0-9]*/stat").stdout and told(box, PROCESSES) < 8
        return False

    require(within(reaped), "zombies or processes are left")
    return f"all were reaped; {scene.check_usable(box)}"


@attack("prints 1 GB on both outputs, without a newline")
def output_flood(scene: Scene) -> str:
    box = scene.box(output_limit=10_000)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    flood = "import os\nfor _ in range(1000): os.write(%d, bytes(2**20))"
    dropped, printed = 0, 0
    for fd, count in ((1, 900), (2, 124)):
        with contextlib.suppress(SandboxTimeoutError):
            result = hostile(box, (flood % fd).replace("1000", str(count)), timeout_s=15)
            require(len(result.stdout) + len(result.stderr) < 21_000, "more output came back than its limit")
            dropped, printed = dropped + result.dropped_bytes, printed + count * 2**20
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024
    require(grown < 128, f"the host's process grew by {grown} MiB")
    require(dropped >= printed - 30_000, f"only {dropped} of {printed} bytes are accounted for")
    said = "cut to head and tail, every byte counted" if printed == 2**30 else "stopped at the deadline"
    return f"{said}; {scene.check_usable(box)}"


@attack("prints invalid UTF-8, NUL, ANSI sequences and other tiers' frames")
def hostile_bytes(scene: Scene) -> str:
    box = scene.box()
    data = bytes(range(256)) + b"\xed\xa0\x80\xf5\xff \x1b[2J\x1b]0;title\x07\x1b[6n\r\x1b[1A \0\0\0\x02\0\0\0\0{}" * 20
    result = box.exec("cat; cat /work/x >&2 2>/dev/null", stdin=data)
    require(result.stdout == data, "the bytes were changed, or taken for something else than output")
    require(isinstance(result.text, str) and "\ufffd" in result.text, "invalid UTF-8 is not shown as such")
    return f"came back as the same bytes; {scene.check_usable(box)}"


ATTACKS: tuple[Attack, ...] = (
    fork_bomb,
    memory_bomb,
    disk_fill,
    inode_fill,
    descriptor_fill,
    spin_past_the_deadline,
    sleep_past_the_deadline,
    zombie_flood,
    output_flood,
    hostile_bytes,
)
