"""The quickstart as a newcomer runs it, after installation: real processes and HTTP, an empty model cache for every
seed, so that building and warm-starting the tiny model is part of every time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from benchmarks.machine import ROOT

SEEDS = (1, 2, 3, 4, 5)
CONFIG = ROOT / "configs" / "quickstart.toml"
GOAL = 0.90  # mean reward of one training step
QUICK = ("trainer.steps=2", "rollout.groups_per_step=2", "rollout.in_flight=16", "evaluation.episodes=8")


def run(quick: bool) -> dict[str, object]:
    """Every list is in the order of `seeds`. `seconds_to_90` counts from the command, the warm start included, to the
    end of the first step whose mean reward is at least 0.90; None if there is none."""
    seeds = SEEDS[:1] if quick else SEEDS
    results = [_one(seed, QUICK if quick else ()) for seed in seeds]
    figures: dict[str, object] = {"seeds": list(seeds)}
    for key in ("reward_before", "reward_after", "seconds_to_90", "seconds_total"):
        figures[key] = [result[key] for result in results]
    figures["peak_rss_mb"] = max(result["peak_rss_mb"] for result in results)
    return figures


def _one(seed: int, overrides: tuple[str, ...]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="agentgym-quickstart-") as scratch:
        runs = Path(scratch) / "runs"
        command = [
            *(sys.executable, "-m", "agentgym.cli", "train", str(CONFIG)),
            *(f"run.seed={seed}", f'run.dir="{runs}"', *overrides),
        ]
        environment = {**os.environ, "XDG_CACHE_HOME": str(Path(scratch) / "cache")}
        started = time.perf_counter()
        with subprocess.Popen(command, stdout=sys.stderr, env=environment, cwd=ROOT) as process:
            sampler = MemorySampler(process.pid)
            code = process.wait()
            peak_mb = sampler.stop()
        seconds = time.perf_counter() - started
        if code:
            raise SystemExit(f"{' '.join(command)} ended with exit code {code}")
        folder = runs / "quickstart"
        summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return {
        "reward_before": summary["reward_before"],
        "reward_after": summary["reward_after"],
        "seconds_to_90": seconds_to(GOAL, rows),
        "seconds_total": round(seconds, 1),
        "peak_rss_mb": round(peak_mb),
    }


def seconds_to(goal: float, rows: list[dict[str, Any]]) -> float | None:
    """When the first step reached `goal`, by the run's own clock.

    >>> seconds_to(0.9, [{"seconds": 1.0, "reward_mean": 0.5}, {"seconds": 2.04, "reward_mean": 0.91}])
    2.0
    """
    reached = (row["seconds"] for row in rows if row.get("reward_mean") is not None and row["reward_mean"] >= goal)
    first = next(reached, None)
    return None if first is None else round(first, 1)


class MemorySampler:
    """Samples the resident memory of a process and all its descendants, in a thread."""

    def __init__(self, pid: int, every_s: float = 0.25) -> None:
        self._pid = pid
        self._every_s = every_s
        self._peak = 0
        self.samples = 0  # taken so far
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()

    def stop(self) -> float:
        """Ends sampling; the peak of the sum over all processes, in MiB. Pages shared by two count twice."""
        self._ended.set()
        self._thread.join()
        return self._peak / 2**20

    def _sample(self) -> None:
        import psutil

        while True:
            total = 0
            try:
                root = psutil.Process(self._pid)
                for process in (root, *root.children(recursive=True)):
                    try:
                        total += process.memory_info().rss
                    except psutil.NoSuchProcess:
                        continue
            except psutil.NoSuchProcess:
                return
            self._peak = max(self._peak, total)
            self.samples += 1
            if self._ended.wait(self._every_s):
                return
