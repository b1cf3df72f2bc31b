"""The pool over real boxes."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from memory_boxes import SPEC, eventually

from agentgym.errors import InputError
from agentgym.sandbox.spec import SandboxSpec
from agentgym.sandbox.warm.pool import SandboxPool, box_source

TIERS = [
    pytest.param("docker", marks=pytest.mark.docker),
    pytest.param("namespace", marks=pytest.mark.bubblewrap),
]


def test_a_tier_that_does_not_exist():
    with pytest.raises(InputError, match="dokcer"):
        box_source("dokcer")


@pytest.mark.parametrize("tier", TIERS)
def test_real_boxes(tier: str):
    with SandboxPool(tier, warm=2, answer_s=60) as pool:
        assert pool.tier == tier
        pool.prefetch(SandboxSpec(memory_mb=64))
        eventually(lambda: pool.metrics().warm == 2)
        names = set()
        for _ in range(3):
            with pool.open(SandboxSpec(memory_mb=64)) as box:
                names.add(box.name)
                assert box.exec("cat /work/note").exit_code
                box.write_file("/work/note", b"dirty")
        assert len(names) == 3
        assert pool.metrics().hits >= 2


@pytest.mark.parametrize("tier", TIERS)
def test_a_real_box_that_was_killed_on_the_shelf(tier: str):
    with SandboxPool(tier, warm=1, answer_s=60) as pool:
        pool.prefetch(SPEC)
        eventually(lambda: pool.metrics().warm == 1)
        (shelf,) = pool._shelves.values()
        shelf.warm[0].close()
        with pool.open(SPEC) as box:
            assert box.exec("echo hi").text == "hi\n"
        assert pool.metrics().dead_at_handout == 1


def stop(box) -> None:
    """Stops the box's worker, from outside."""
    process = box.start_process(["env", "-i", f"BOX={box.name}", "sleep", "600"])
    mark = f"BOX={box.name}\0".encode()
    eventually(lambda: any(mark in environment(folder) for folder in Path("/proc").glob("[0-9]*")))
    inside = next(folder for folder in Path("/proc").glob("[0-9]*") if mark in environment(folder))
    parent = int((inside / "stat").read_text().rpartition(")")[2].split()[1])
    box.stop_process(process)
    os.kill(parent, signal.SIGSTOP)


def environment(process: Path) -> bytes:
    try:
        return (process / "environ").read_bytes()
    except OSError:
        return b""


@pytest.mark.parametrize("tier", TIERS)
def test_a_real_box_that_stands_still_on_the_shelf(tier: str, caplog: pytest.LogCaptureFixture):
    with SandboxPool(tier, warm=1, answer_s=2) as pool:
        pool.prefetch(SPEC)
        eventually(lambda: pool.metrics().warm == 1)
        (shelf,) = pool._shelves.values()
        stopped = shelf.warm[0]
        stop(stopped)
        with pool.open(SPEC) as box:
            assert box.name != stopped.name
            assert box.exec("echo hi").text == "hi\n"
        assert pool.metrics().dead_at_handout >= 1, "more, where this machine stands still as well"
        assert f"{stopped.name} died: it did not answer 'ping' within 2.0 s" in caplog.text
