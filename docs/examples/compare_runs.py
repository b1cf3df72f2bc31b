"""Learning curves of finished runs against sampled tokens: `python docs/examples/compare_runs.py OUT NAME=FOLDER ...`
writes OUT.json and OUT.png."""

import json
import statistics
import sys
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

_MEDIANS = ("tokens_per_s", "time/wait_s", "time/train_s", "time/publish_s", "time/pause_s")


def curve(folder: Path) -> dict:
    """Sampled tokens so far and the mean reward of every step, held-out results, and what differs between engines."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    evaluations = [json.loads(line) for line in (folder / "evaluations.jsonl").read_text().splitlines()]
    tokens, total = [], 0
    for row in rows:
        total += int(row["sampled_tokens"])
        tokens.append(total)
    return {
        "sampled_tokens": tokens,
        "reward_mean": [round(row["reward_mean"], 4) for row in rows],
        "heldout_before": evaluations[0]["mean_reward"],
        "heldout_after": evaluations[-1]["mean_reward"],
        "largest_discrepancy_log_ratio": max(row["discrepancy/max_abs_log_ratio"] for row in rows),
        "medians": {name: round(statistics.median(row[name] for row in rows), 4) for name in _MEDIANS},
        "seconds": round(rows[-1]["seconds"], 1),
    }


def main(out: str, *runs: str) -> None:
    curves = {name: curve(Path(folder)) for name, _, folder in (run.partition("=") for run in runs)}
    Path(f"{out}.json").write_text(json.dumps(curves, indent=1) + "\n")
    figure = Figure(figsize=(7, 4))
    axes = figure.subplots()
    for name, points in curves.items():
        thousands = [tokens / 1000 for tokens in points["sampled_tokens"]]
        axes.plot(thousands, points["reward_mean"], marker=".", label=name)
    axes.set(xlabel="sampled tokens, thousands", ylabel="mean reward of a step", ylim=(0, 1))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    FigureCanvasAgg(figure).print_png(f"{out}.png")


if __name__ == "__main__":
    main(*sys.argv[1:])
