"""The plots of a run, from its metrics file: its reward, and its diagnostics by lag. Law: it draws what the file holds
and nothing else, without a display."""

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
    _write(figure, out)


DIAGNOSTICS = (  # name between its group and the bucket, what it is, on a logarithmic axis
    ("discrepancy", "k3", "k3 of the discrepancy ratio", True),
    ("staleness", "k3", "k3 of the staleness ratio", True),
    ("total", "ess_fraction", "ESS of the total ratio, of the tokens", False),
    ("policy", "active_fraction", "active tokens", False),
)


def plot_diagnostics(metrics_path: Path, out: Path, *, title: str = "diagnostics") -> bool:
    """Draws k3, ESS and active fraction of every step of `metrics_path` to `out` (PNG), a line for each lag bucket
    that held tokens; False, and nothing written, if none did. Written whole or not at all.

    Raises InputError for a file that cannot be read, CheckpointError if `out` cannot be written.
    """
    rows = read_metrics(metrics_path)
    lines = {(group, name): lag_lines(rows, group, name) for group, name, _, _ in DIAGNOSTICS}
    buckets = sorted({bucket for found in lines.values() for bucket in found}, key=_lag_of)
    if not buckets:
        return False

    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 7), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    colours = dict(zip(buckets, colormaps["viridis"]([index / max(len(buckets), 2) for index in range(len(buckets))])))
    for place, (group, name, label, logarithmic) in zip(figure.subplots(2, 2).flat, DIAGNOSTICS):
        for bucket, points in lines[group, name].items():
            points = [(step, max(value, 1e-16) if logarithmic else value) for step, value in points]
            place.plot(*zip(*points), color=colours[bucket], linewidth=1.2, marker=".", markersize=3, label=bucket)
        place.set(xlabel="step", title=label)
        if logarithmic:
            place.set_yscale("log")
        place.grid(alpha=0.3)
    figure.axes[0].legend(loc="best", fontsize="small")
    figure.suptitle(title)
    _write(figure, out)
    return True


def lag_lines(rows: Sequence[dict[str, Any]], group: str, name: str) -> dict[str, list[tuple[float, float]]]:
    """(step, value) of `group/BUCKET/name` by lag bucket, for the steps at which the bucket held tokens."""
    found: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        for key, value in row.items():
            parts = key.split("/")
            wanted = len(parts) == 3 and (parts[0], parts[2]) == (group, name) and parts[1].startswith("lag")
            if wanted and isinstance(value, int | float) and math.isfinite(value):
                found.setdefault(parts[1], []).append((float(row["step"]), float(value)))
    return found


def _lag_of(bucket: str) -> int:
    digits = bucket.removeprefix("lag").partition("_")[0]
    return int(digits) if digits.isdigit() else -1


def _write(figure: Any, out: Path) -> None:
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
