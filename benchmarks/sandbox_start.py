"""How long until a box has answered its first command: out of a warm pool, and cold in each tier, beside a plain
container (`docker run`, then `docker exec`), in turns. Closing is not in the time."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

from agentgym.sandbox import Sandbox, SandboxSpec, open_sandbox
from agentgym.sandbox.warm.pool import SandboxPool
from benchmarks.plain_docker import available_tiers, milliseconds, plain_client, start_plain

_WARM = 4
_REFILL_S = 60.0
_QUIET_S = 0.5  # the daemon is busy with what was closed before, also after its answer
_AWAKE_S = 0.1  # the kernel takes a closed box's network apart for some 50 ms, and meanwhile no other loopback comes up


def run(quick: bool) -> dict[str, object]:
    rounds = 2 if quick else 15
    tiers = available_tiers()
    times: dict[str, list[float]] = {name: [] for name in (*tiers, "pool", "plain")}
    for tier in tiers:
        _open(tier).close()  # what a tier finds out once for a process is found out now
    with plain_client() as client, SandboxPool("docker", warm=_WARM) as pool:
        for _ in range(rounds):
            for tier in tiers:
                time.sleep(_QUIET_S)
                _open(tier).close()  # the processors wake up: after half a second of nothing the first start is slower
                _stay_awake(_AWAKE_S)
                box, spent = _timed(lambda tier=tier: _open(tier))
                times[tier].append(spent)
                box.close()
            time.sleep(_QUIET_S)
            times["plain"].append(milliseconds(lambda: start_plain(client)))
        spec = SandboxSpec()
        for _ in range(rounds):
            _fill(pool, spec)
            box, spent = _timed(lambda: pool.open(spec))
            times["pool"].append(spent)
            box.close()
        hit_rate = pool.metrics().hit_rate
    return {
        "pool_acquire_p50_ms": round(statistics.median(times["pool"]), 2),
        "pool_hit_rate": round(hit_rate, 3),
        **{f"{tier}_cold_p50_ms": round(statistics.median(times[tier]), 1) for tier in tiers},
        "plain_docker_cold_p50_ms": round(statistics.median(times["plain"]), 1),
        "rounds": rounds,
    }


def _open(tier: str) -> Sandbox:
    box = open_sandbox(tier, SandboxSpec())
    box.exec(["true"])
    return box


def _timed(call: Callable[[], Sandbox]) -> tuple[Sandbox, float]:
    started = time.perf_counter()
    box = call()
    return box, (time.perf_counter() - started) * 1e3


def _stay_awake(seconds: float) -> None:
    until = time.perf_counter() + seconds
    while time.perf_counter() < until:
        pass


def _fill(pool: SandboxPool, spec: SandboxSpec) -> None:
    """Waits until as many boxes are warm as the pool keeps; what is measured is the hand-out."""
    pool.prefetch(spec)
    until = time.monotonic() + _REFILL_S
    while pool.metrics().warm < _WARM:
        if time.monotonic() > until:
            raise TimeoutError(f"the pool did not fill within {_REFILL_S:g} s: {pool.metrics()}")
        time.sleep(0.01)
