"""Start, one call, close, a thousand times in each tier (two hundred times in gVisor's, which starts slowest), and what
of it is left on the machine; beside the pace of a plain container (`docker run`, `docker exec`, `docker rm -f`)."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from agentgym.sandbox import SandboxSpec, open_sandbox
from benchmarks.leftovers import count, difference
from benchmarks.plain_docker import available_tiers, plain_client, start_plain

_CYCLES = {"namespace": 1000, "docker": 1000, "gvisor": 200}
_AT_ONCE = 4
_SETTLE_S = 60.0


def run(quick: bool) -> dict[str, object]:
    cycles: dict[str, int] = {}
    pace: dict[str, float] = {}
    leaks: dict[str, dict[str, int]] = {}
    mark = f"agentgym-{os.getpid()}-"
    with plain_client() as client:
        for tier in available_tiers():
            _pace(tier, lambda tier=tier: _cycle(tier), 2)  # what is kept for a process is no leak
            before = count(client, mark)
            cycles[tier] = 4 if quick else _CYCLES[tier]
            pace[tier] = _pace(tier, lambda tier=tier: _cycle(tier), cycles[tier])
            leaks[tier] = _settled(before, lambda: count(client, mark))
        pace["plain_docker"] = _pace(
            "plain", lambda: start_plain(client).remove(force=True, v=True), 2 if quick else 40
        )
    totals = {name: sum(tier[name] for tier in leaks.values()) for name in next(iter(leaks.values()))}
    return {
        "cycles": sum(cycles.values()),
        **{f"{tier}_cycles": number for tier, number in cycles.items()},
        **totals,
        **{f"{tier}_cycles_per_s": round(value, 2) for tier, value in pace.items()},
    }


def _cycle(tier: str) -> None:
    with open_sandbox(tier, SandboxSpec()) as box:
        box.exec(["true"])


def _pace(name: str, cycle: Callable[[], object], cycles: int) -> float:
    started = time.monotonic()
    with ThreadPoolExecutor(_AT_ONCE) as threads:
        for done, _ in enumerate(threads.map(lambda _: cycle(), range(cycles)), 1):
            if done % 100 == 0:
                print(f"{name}: {done} of {cycles} cycles", file=sys.stderr)
    return cycles / (time.monotonic() - started)


def _settled(before: dict[str, int], measure: Callable[[], dict[str, int]]) -> dict[str, int]:
    """The difference once nothing more ends by itself: a shim outlives its container by a moment."""
    until = time.monotonic() + _SETTLE_S
    while True:
        left = difference(before, measure())
        if time.monotonic() > until or not any(number > 0 for number in left.values()):
            return left
        time.sleep(0.2)
