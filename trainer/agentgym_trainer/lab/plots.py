"""The plots of a staleness report, as PNG bytes. Law: they draw the figures they are given, without a display."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

COLOURS = {
    "snapshot": "#1b7837", "old_logit_model": "#5aae61", "interrupt": "#a6dba0", "auto": "#00441b", "ewma": "#2166ac",
    "resident": "#b2182b", "behavior": "#7f7f7f", "linear": "#e08214", "loglinear": "#8073ac",
}  # fmt: skip
_STYLES = ("-", "--", ":", "-.")
Arm = tuple[int, int, str, str]  # lag, updates, correction, anchor


def law_f_plot(law_f: Mapping[str, Any]) -> bytes:
    """Fraction of tokens outside the bound against the lag window, one line an anchor."""
    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = figure.subplots()
    for anchor, fractions in law_f["outside"].items():
        axes.plot(law_f["windows"], fractions, marker="o", label=anchor, color=_colour(anchor))
    axes.set_xlabel("lag window W (policy versions)")
    axes.set_ylabel(f"tokens with r_d outside\n[1/{law_f['bound']:g}, {law_f['bound']:g}]")
    axes.set_xticks(law_f["windows"])
    axes.legend(frameon=False)
    return _png(figure)


def reward_plot(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """Held-out reward of each arm with its interval and its seeds, one panel for each lag and updates."""
    panels = sorted({(row["updates"], row["lag"]) for row in rows})
    most = max(sum((row["updates"], row["lag"]) == panel for row in rows) for panel in panels)
    figure, grid = _panels(panels, 0.32 * most + 1.6)
    for axes, (updates, lag) in zip(grid, panels, strict=False):
        chosen = [row for row in rows if (row["updates"], row["lag"]) == (updates, lag)][::-1]
        for place, row in enumerate(chosen):
            interval, colour = row["heldout_reward"], _colour(row["anchor"])
            if interval["low"] is not None:
                axes.plot([interval["low"], interval["high"]], [place, place], color=colour, lw=2.5)
            axes.plot(row["values"], [place] * len(row["values"]), "|", color="black", ms=7, alpha=0.6)
            axes.plot([interval["mean"]], [place], "o", color=colour)
        axes.set_yticks(range(len(chosen)), [f"{row['anchor']}, {row['correction']}" for row in chosen], fontsize=8)
        low, high = (end(value for row in chosen for value in row["values"]) for end in (min, max))
        margin = max(0.05, high - low)  # two seeds may have an interval that would hide everything else
        axes.set_xlim(low - margin, high + margin)
        axes.set_xlabel("held-out reward")
    return _png(figure)


def curve_plot(curves: Mapping[Arm, Sequence[float]]) -> bytes:
    """Reward in training, smoothed over five steps: colour is the anchor, the line's style the correction."""
    panels = sorted({(updates, lag) for lag, updates, _, _ in curves})
    corrections = list(dict.fromkeys(correction for _, _, correction, _ in curves))
    figure, grid = _panels(panels, 3.2)
    for axes, (updates, lag) in zip(grid, panels, strict=False):
        for (arm_lag, arm_updates, correction, anchor), rewards in curves.items():
            if (arm_updates, arm_lag) == (updates, lag):
                style = _STYLES[corrections.index(correction) % len(_STYLES)]
                axes.plot(_smooth(rewards), style, color=_colour(anchor), label=f"{anchor}, {correction}", lw=1.3)
        axes.set_xlabel("step")
        axes.set_ylabel("reward of the batch")
        axes.legend(frameon=False, fontsize=7)
    return _png(figure)


def active_plot(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """What the mask and the clip stop, of each arm."""
    figure = Figure(figsize=(8.0, 0.24 * len(rows) + 1.2), layout="constrained")
    axes = figure.subplots()
    for place, row in enumerate(reversed(rows)):
        masked, clipped = 1.0 - row["policy/mask_pass_fraction"], 1.0 - row["policy/clip_pass_fraction"]
        axes.barh(place, masked, color="#b2182b", label="stopped by the mask on r_d" if place == 0 else None)
        axes.barh(place, clipped, left=masked, color="#2166ac", label="by the clip on r_s" if place == 0 else None)
    names = [f"lag {r['lag']}, {r['anchor']}, {r['correction']}, updates {r['updates']}" for r in reversed(rows)]
    axes.set_yticks(range(len(rows)), names, fontsize=7)
    axes.set_xlabel("fraction of tokens")
    axes.legend(frameon=False, fontsize=8)
    return _png(figure)


def _panels(panels: Sequence[tuple[int, int]], height: float) -> tuple[Figure, list[Axes]]:
    """One panel for each (updates, lag): a row for each number of updates."""
    num_rows = len({updates for updates, _ in panels})
    num_columns = -(-len(panels) // num_rows)
    figure = Figure(figsize=(5.2 * num_columns, height * num_rows), layout="constrained")
    grid = list(figure.subplots(num_rows, num_columns, squeeze=False).flat)
    for axes, (updates, lag) in zip(grid, panels, strict=False):
        steps = "one optimizer step" if updates == 1 else f"{updates} optimizer steps"
        axes.set_title(f"lag {lag}, {steps} per batch", fontsize=10)
    for axes in grid[len(panels) :]:
        axes.set_visible(False)
    return figure, grid


def _smooth(values: Sequence[float]) -> list[float]:
    return [sum(values[max(0, i - 4) : i + 1]) / len(values[max(0, i - 4) : i + 1]) for i in range(len(values))]


def _colour(anchor: str) -> str:
    return COLOURS.get(anchor, "#000000")


def _png(figure: Figure) -> bytes:
    out = io.BytesIO()
    FigureCanvasAgg(figure).print_png(out)
    return out.getvalue()
