"""How many boxes live at once on this machine, each of which answers a call at the end, and what one of them costs in
memory; beside as many plain containers."""

from __future__ import annotations

import contextlib
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from agentgym.sandbox import Sandbox, SandboxSpec, open_sandbox
from benchmarks.plain_docker import available_tiers, plain_client, start_plain

_BOXES = {"docker": 64, "gvisor": 16, "namespace": 200}
_STARTERS = 4


def run(quick: bool) -> dict[str, object]:
    figures: dict[str, object] = {}
    memory: dict[str, float] = {}
    for tier in available_tiers():
        count = 3 if quick else _BOXES[tier]
        live, memory[tier], seconds = _live_at_once(tier, count)
        figures |= {f"{tier}_live": live, f"{tier}_starts_per_s": round(count / seconds, 1)}
    with plain_client() as client:
        count = 3 if quick else 16
        before = _used_mb()
        with ThreadPoolExecutor(_STARTERS) as threads:
            list(threads.map(lambda _: start_plain(client), range(count)))
        memory["plain"] = (_used_mb() - before) / count
    return {**figures, "mb_per_box": {name: round(value, 1) for name, value in memory.items()}}


def _live_at_once(tier: str, count: int) -> tuple[int, float, float]:
    """(boxes that answered while all were live, MB of memory for each, seconds to start them)"""
    before = _used_mb()
    with contextlib.ExitStack() as stack, ThreadPoolExecutor(_STARTERS) as threads:
        started = time.monotonic()
        boxes: list[Sandbox] = []
        for box in threads.map(lambda _: open_sandbox(tier, SandboxSpec()), range(count)):
            boxes.append(stack.enter_context(box))
        seconds = time.monotonic() - started
        answers = sum(box.exec(["echo", str(number)]).text == f"{number}\n" for number, box in enumerate(boxes))
        return answers, (_used_mb() - before) / count, seconds


def _used_mb() -> float:
    """Memory of all processes, what they share divided among them: the boxes, the daemon and its shims. (The machine's
    available memory says more of its file cache.) What may not be read does not count."""
    total = 0
    for process in Path("/proc").iterdir():
        if process.name.isdigit():
            with contextlib.suppress(OSError):
                lines = (process / "smaps_rollup").read_text(encoding="utf-8").splitlines()
                total += sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return total / 1024
