"""The reward plot of a run, from its metrics file. Law: it draws what the file holds and nothing else, without a
display."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from agentgym.errors import CheckpointError, InputError


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl; a last line that a crash cut short is left out.

    Raises InputError, naming the line, for anything else that is not JSON.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise InputError(f"cannot read the metrics {path}: {error.strerror}") from error
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number == len(lines):
                break
            raise InputError(f"{path}:{number} is not JSON: {error}") from error
    return rows


def plot_rewards(
    metrics_path: Path,
    out: Path,
    *,
    before: float | None = None,
    after: float | None = None,
    title: str = "reward",
) -> None:
    """Draws `reward_mean` of every step of `metrics_path` to `out` (PNG), its moving mean, and, where given, held-out
    success before and after the run. Written whole or not at all.

    Raises InputError if the file holds no step, CheckpointError if `out` cannot be written.
    """
    points = [
        (float(row["step"]), float(row["reward_mean"]))
        for row in read_metrics(metrics_path)
        if isinstance(row.get("reward_mean"), int | float) and math.isfinite(row["reward_mean"])
    ]
    if not points:
        raise InputError(f"{metrics_path} holds no step with a reward_mean to plot")
    steps = [step for step, _ in points]
    rewards = [reward for _, reward in points]

    from matplotlib.backends.backend_agg import FigureCanvasAgg  # half a second, so only when something is drawn
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.plot(steps, rewards, color="tab:blue", alpha=0.35, linewidth=1, marker=".", markersize=3, label="each step")
    axes.plot(steps, moving_mean(rewards, 5), color="tab:blue", linewidth=2, label="mean of 5 steps")
    for value, where, name in ((before, steps[0], "before"), (after, steps[-1], "after")):
        if value is not None:
            label = f"held-out {name}: {value:.3f}"
            axes.plot([where], [value], marker="D", markersize=8, linestyle="none", color="tab:orange", label=label)
    axes.set(xlabel="step", ylabel="mean reward", title=title)
    axes.grid(alpha=0.3)
    axes.legend(loc="best", fontsize="small")
    partial = out.with_name(out.name + ".partial")
    try:
        figure.savefig(partial, format="png")
        partial.replace(out)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise CheckpointError(f"cannot write the plot {out}: {error.strerror}") from error


def moving_mean(values: Sequence[float], width: int) -> list[float]:
    """The mean of each value and of up to `width - 1` before it.

    >>> moving_mean([1.0, 3.0, 5.0], 2)
    [1.0, 2.0, 4.0]
    """
    return [math.fsum(values[max(0, i - width + 1) : i + 1]) / min(i + 1, width) for i in range(len(values))]
