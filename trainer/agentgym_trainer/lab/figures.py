"""From the results of cells to the figures of a report. Pure functions; must never know a file or a plot.

Law: runs are compared over seeds. An interval is Student's, 95 %, over the seeds' means; a difference of two anchors
is taken seed by seed (they had the same model, tasks and draws) before it is averaged.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

Result = Mapping[str, Any]
REFERENCE = "snapshot"  # what the others are compared with: it is exact
# Student's t at 97.5 %, one to ten degrees of freedom; beyond, an expansion that is good to the third digit
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
_DIAGNOSTICS = (
    "policy/active_fraction", "policy/mask_pass_fraction", "policy/clip_pass_fraction", "discrepancy/ess_fraction",
    "staleness/ess_fraction", "total/ess_fraction", "discrepancy/k3", "staleness/k3", "policy/entropy",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean over seeds and its 95 % interval, which one seed alone does not have (None).

    Example: `Interval.of([0.96, 0.97, 0.98])` is `Interval(0.97, 0.945, 0.995, 3)`, rounded.
    """

    mean: float
    low: float | None
    high: float | None
    num_seeds: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Interval:
        n = len(values)
        mean = math.fsum(values) / n
        if n < 2:
            return cls(mean, None, None, n)
        deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1))
        half = t_quantile(n - 1) * deviation / math.sqrt(n)
        return cls(mean, mean - half, mean + half, n)


def t_quantile(degrees: int) -> float:
    """Student's t at 97.5 %."""
    if degrees <= len(_T):
        return _T[degrees - 1]
    z = 1.959964
    return z + (z**3 + z) / (4 * degrees) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * degrees**2)


def arms(results: Iterable[Result]) -> dict[tuple[int, int, str, str], list[Result]]:
    """Results by (lag, updates, correction, anchor), each list in the order of its seeds."""
    found: dict[tuple[int, int, str, str], list[Result]] = {}
    for result in sorted(results, key=lambda one: one["cell"]["seed"]):
        cell = result["cell"]
        found.setdefault((cell["lag"], cell["updates"], cell["correction"], cell["anchor"]), []).append(result)
    return dict(sorted(found.items(), key=lambda item: item[0][:3]))


def reward_rows(results: Sequence[Result]) -> list[dict[str, Any]]:
    """One row an arm: held-out reward after the last step, reward in training over the last quarter of the steps, and
    the held-out reward's difference to the exact anchor's under the same lag, updates and correction."""
    by_arm = arms(results)
    rows = []
    for (lag, updates, correction, anchor), runs in by_arm.items():
        reference = by_arm.get((lag, updates, correction, REFERENCE), [])
        held_out = {run["cell"]["seed"]: run["heldout_reward"] for run in runs}
        exact = {run["cell"]["seed"]: run["heldout_reward"] for run in reference}
        shared = [held_out[seed] - exact[seed] for seed in held_out if seed in exact]
        rows.append(
            {
                "lag": lag, "updates": updates, "correction": correction, "anchor": anchor,
                "seeds": list(held_out), "heldout_reward": asdict(Interval.of(list(held_out.values()))),
                "values": list(held_out.values()),
                "late_reward": asdict(Interval.of([_late(run) for run in runs])),
                "minus_exact": asdict(Interval.of(shared)) if shared and anchor != REFERENCE else None,
            }
        )  # fmt: skip
    return rows


def diagnostic_rows(results: Sequence[Result]) -> list[dict[str, Any]]:
    """One row an arm: what its tokens went through, a mean over the steps behind the first `lag` and over seeds."""
    rows = []
    for (lag, updates, correction, anchor), runs in arms(results).items():
        means = {}
        for name in _DIAGNOSTICS:
            values = [step[name] for run in runs for step in run["steps"][lag:] if name in step]
            means[name] = math.fsum(values) / len(values) if values else None
        resets = [run["steps"][-1]["anchor/ewma_resets"] for run in runs if "anchor/ewma_resets" in run["steps"][-1]]
        means["anchor/ewma_resets"] = math.fsum(resets) / len(resets) if resets else None
        rows.append({"lag": lag, "updates": updates, "correction": correction, "anchor": anchor, **means})
    return rows


def curves(results: Sequence[Result]) -> dict[tuple[int, int, str, str], list[float]]:
    """Reward in training at each step, mean over seeds, by arm."""
    return {
        arm: [
            math.fsum(rewards) / len(rewards) for rewards in zip(*([s["reward"] for s in run["steps"]] for run in runs))
        ]
        for arm, runs in arms(results).items()
    }


def _late(run: Result) -> float:
    last = [step["reward"] for step in run["steps"]][-max(1, len(run["steps"]) // 4) :]
    return math.fsum(last) / len(last)
