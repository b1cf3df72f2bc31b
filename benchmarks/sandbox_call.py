"""What one tool call costs: `true` through the worker of a Docker, gVisor and namespace box, beside `docker exec` in a
plain container, call by call in turns. Then one line of Python in the stateful interpreter."""

from __future__ import annotations

import contextlib
import statistics

from agentgym.sandbox import PythonInterpreter, Sandbox, SandboxSpec, open_sandbox
from benchmarks.plain_docker import available_tiers, milliseconds, plain_client, start_plain


def run(quick: bool) -> dict[str, object]:
    rounds, calls = (3, 3) if quick else (40, 25)  # docker exec once in `calls`, or it would take all the time
    with contextlib.ExitStack() as stack:
        boxes: dict[str, Sandbox] = {}
        for tier in available_tiers():
            boxes[tier] = stack.enter_context(open_sandbox(tier, SandboxSpec()))
        plain = start_plain(stack.enter_context(plain_client()))
        interpreter = PythonInterpreter(boxes["docker"])
        times: dict[str, list[float]] = {name: [] for name in (*boxes, "exec", "interpreter")}
        for box in boxes.values():
            box.exec(["true"])
        interpreter.run("x = 1")
        for _ in range(rounds):
            times["exec"].append(milliseconds(lambda: plain.exec_run(["true"])))
            for tier, box in boxes.items():
                for _ in range(calls):
                    times[tier].append(milliseconds(lambda box=box: box.exec(["true"])))
            times["interpreter"] += [milliseconds(lambda: interpreter.run("x += 1")) for _ in range(calls)]
    worker, plain_p50 = statistics.median(times["docker"]), statistics.median(times["exec"])
    return {
        "worker_p50_ms": round(worker, 3),
        "worker_p99_ms": round(_percentile(times["docker"], 99), 3),
        "docker_exec_p50_ms": round(plain_p50, 1),
        "ratio": round(plain_p50 / worker, 1),
        "namespace_p50_ms": _median(times, "namespace"),
        "namespace_ratio": round(plain_p50 / statistics.median(times["namespace"]), 1)
        if "namespace" in times
        else None,
        "gvisor_p50_ms": _median(times, "gvisor"),
        "interpreter_p50_ms": round(statistics.median(times["interpreter"]), 3),
        "calls": len(times["docker"]),
    }


def _median(times: dict[str, list[float]], name: str) -> float | None:
    return round(statistics.median(times[name]), 3) if name in times else None


def _percentile(values: list[float], percent: int) -> float:
    return statistics.quantiles(values, n=100)[percent - 1]
