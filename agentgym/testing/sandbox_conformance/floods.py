"""Too much of everything: a box hits its limits and goes on."""

from __future__ import annotations

import contextlib

from agentgym.errors import SandboxDiedError, SandboxLimitError, SandboxTimeoutError
from agentgym.sandbox.spec import SandboxSpec
from agentgym.testing.sandbox_conformance.questions import Opener, answer, python, raises


def survives_a_fork_bomb(open_box: Opener) -> None:
    with open_box(SandboxSpec(pids=40)) as box:
        count = """
import os, time
children = 0
try:
    while children < 200:
        if os.fork() == 0: time.sleep(60)
        children += 1
except OSError: pass
print(children, flush=True)
os.killpg(0, 9)
"""
        # whatever is killed on the way: fewer processes than asked for, and the box goes on
        assert 20 < int(python(box, count).stdout) < 40
        bomb = "import os\nwhile True:\n try: os.fork()\n except OSError: pass"
        raises(SandboxTimeoutError, lambda: python(box, bomb, timeout_s=0.5))
        assert box.exec("echo alive; echo /proc/[0-9]* | wc -w").stdout.split()[0] == b"alive"
        with contextlib.suppress(SandboxTimeoutError):  # or its shell ends, because it cannot fork any more
            box.exec("f() { f | f & }; f; sleep 60", timeout_s=0.5)
        with contextlib.suppress(SandboxLimitError):  # what it left behind may hold every process there is
            assert box.exec("echo alive").exit_code in (0, 2)
        assert box.read_file("/proc/version").startswith(b"Linux"), "the worker goes on in any case"


def survives_a_memory_bomb(open_box: Opener) -> None:
    """The bomb ends, and the box goes on; a tier that cannot hit the bomb alone says so in its limits, and its box is
    dead for that reason."""
    with open_box(SandboxSpec(memory_mb=64, tmpfs_mb=128)) as box:
        eat = "a = []\nwhile True: a.append(b'x' * 1_000_000)"
        if "the whole box ends" in box.limits["memory"]:
            assert "memory" in str(raises(SandboxDiedError, lambda: python(box, eat)))
            return
        result = python(box, eat)
        assert result.exit_code == -9 or b"MemoryError" in result.stderr, result
        assert box.exec("echo alive").stdout == b"alive\n"


def survives_a_full_disk(open_box: Opener) -> None:
    with open_box(SandboxSpec(tmpfs_mb=8)) as box:
        for folder in ("/work", "/tmp"):
            box.exec(f"for i in 1 2 3; do head -c 5000000 /dev/zero > {folder}/f$i; done")
            used = int(box.exec(f"cat {folder}/f* | wc -c").stdout)
            assert used <= 8 * 2**20, folder
        assert b"No space left" in box.exec("head -c 5000000 /dev/zero > /work/more").stderr
        raises(SandboxLimitError, lambda: box.write_file("/work/more", bytes(5_000_000)))
        assert box.exec("rm /work/f*; echo alive").stdout == b"alive\n"


def survives_descriptor_and_inode_floods(open_box: Opener) -> None:
    with open_box(SandboxSpec(tmpfs_mb=4)) as box:
        opened = answer(box, "import os\nn = 0\ntry:\n while True: os.dup(1); n += 1\nexcept OSError: print(n)")
        assert isinstance(opened, int)
        assert opened < 1024
        code = "import os\ntry:\n for i in range(30_000): os.close(os.open(f'/work/{i}', 64))\nexcept OSError: pass"
        with contextlib.suppress(SandboxTimeoutError):
            python(box, code, timeout_s=5)
        assert box.exec("echo alive").stdout == b"alive\n"
