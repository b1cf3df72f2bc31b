"""The report of a staleness lab: one HTML file that needs no other, and the same figures as JSON. Must never compute
one: what it shows is in the JSON.
"""

from __future__ import annotations

import base64
import html
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from agentgym.errors import InputError
from agentgym_trainer.lab import plots
from agentgym_trainer.lab.cell import Conditions
from agentgym_trainer.lab.figures import curves, diagnostic_rows, reward_rows
from agentgym_trainer.lab.grid import Grid, write_whole
from agentgym_trainer.settings import TrainConfig

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; margin: .8rem 0; font-size: 13px }
td, th { padding: .15rem .7rem; text-align: right } td:first-child, th:first-child { text-align: left }
th { border-bottom: 1px solid #888 } tr:hover td { background: #f3f3f3 }
img { max-width: 100% } pre { background: #f5f5f5; padding: .6rem; overflow-x: auto } .note { color: #555 }
"""
# Of them the lab runs `snapshot`: the other two need a rollout service that samples meanwhile.
EXACT_AGREE = (
    "<code>snapshot</code> stands for all three exact anchors: the old logprobs of <code>snapshot</code>, "
    "<code>old_logit_model</code> and <code>interrupt</code> (which takes one optimizer step per batch) are equal to "
    "the bit where rows are laid out alike; <code>test_the_routes_agree_to_the_bit_and_a_killed_scorer_loses_nothing"
    "</code> in tests/agentgym_trainer/anchors/test_exact_routes.py holds them to that."
)
HOW_TO_FLOOR = "python -m benchmarks logprob_conformance --out benchmarks/results/logprob_conformance.json"


def make_report(
    config: TrainConfig, grid: Grid, conditions: Conditions, command: str, results: Sequence[Mapping[str, Any]],
    law_f: Mapping[str, Any], floor: Mapping[str, Any] | None, costs: Mapping[str, Any],
) -> dict[str, Any]:  # fmt: skip
    """Every figure of the report. `floor` is that of a real engine (`read_floor`), None where nobody measured it;
    `costs` what `measure_cost` found."""
    return {
        "command": command,
        "made": time.strftime("%Y-%m-%d %H:%M", time.gmtime()),
        "model": config.model.name,
        "env": config.env.id,
        "config": config.model_dump(mode="json", exclude_defaults=True),
        "grid": asdict(grid),
        "conditions": asdict(conditions),
        "num_runs": len(results),
        "run_seconds": sum(result["seconds"] for result in results),
        "failed_episodes": sum(result["failed_episodes"] for result in results),
        "law_f": law_f,
        "floor": floor,
        "reward": reward_rows(results),
        "diagnostics": diagnostic_rows(results),
        "cost": costs,
        "curves": [
            {"lag": lag, "updates": updates, "correction": correction, "anchor": anchor, "reward": rewards}
            for (lag, updates, correction, anchor), rewards in curves(results).items()
        ],
    }


def read_floor(path: Path) -> dict[str, Any] | None:
    """A real engine's own mismatch, from the stored line of `logprob_conformance`; None if there is no such file."""
    try:
        figures = json.loads(path.read_text(encoding="utf-8"))["figures"]
        return {name: figures[name] for name in ("engine", "tokens", "mean_abs", "max_abs")}
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is not the stored line of `logprob_conformance`: {error}") from error


def write_report(folder: Path, report: Mapping[str, Any]) -> Path:
    """Writes report.json and report.html, each whole or not at all; returns the HTML's path."""
    write_whole(folder / "report.json", json.dumps(_short(report), indent=1) + "\n")
    page = folder / "report.html"
    write_whole(page, render(report))
    return page


def render(report: Mapping[str, Any]) -> str:
    """The page."""
    drawn = {(one["lag"], one["updates"], one["correction"], one["anchor"]): one["reward"] for one in report["curves"]}
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8><title>Staleness lab</title>",
        f"<style>{_STYLE}</style><h1>Staleness lab: {_text(report['model'])} on {_text(report['env'])}</h1>",
        f"<p>Made {report['made']} UTC by</p><pre>{_text(report['command'])}</pre>",
        f"<p>{report['num_runs']} runs, {report['run_seconds'] / 60:.0f} minutes of them; engine mismatch "
        f"<code>{_text(report['conditions']['mismatch'])}</code>; rows hold "
        f"{'several versions' if report['conditions']['partial'] else 'one version each'}; "
        f"{report['failed_episodes']} episodes failed.</p>",
        *_law_f_section(report),
        *_reward_section(report, drawn),
        *_diagnostics_section(report),
        *_cost_section(report),
        f"<h2>Configuration</h2><pre>{_text(json.dumps(report['config'], indent=1))}</pre></html>",
    ]
    return "\n".join(parts) + "\n"


def _law_f_section(report: Mapping[str, Any]) -> list[str]:
    law_f, floor = report["law_f"], report["floor"]
    header = ["anchor", *(f"W = {window}" for window in law_f["windows"])]
    rows = [[anchor, *(f"{value:.4f}" for value in values)] for anchor, values in law_f["outside"].items()]
    if floor is None:
        said = f"A real engine's own mismatch, the floor, was not measured here; get it by <code>{HOW_TO_FLOOR}</code>."
    else:
        engines = zip(floor["engine"], floor["mean_abs"], floor["max_abs"], strict=True)
        said = "The floor, a real engine's own mismatch of logprobs (SmolLM2-135M, fp32, on the CPU): " + "; ".join(
            f"{name} {mean:.1e} on average, {most:.1e} at most" for name, mean, most in engines
        )
    return [
        "<h2>Semantic separation (law F)</h2>",
        "<p>One frozen stream, weights of a real training run; every anchor scores the same tokens. Shown is the "
        f"fraction of tokens whose discrepancy ratio leaves [1/{law_f['bound']:g}, {law_f['bound']:g}]. r_d should "
        f"show the engine's mismatch (<code>{_text(law_f['mismatch'])}</code>) and nothing else.</p>",
        _image(plots.law_f_plot(law_f), "law F"),
        _table(header, rows),
        f"<p class=note>{said}</p>",
        "<p>The same stream under the default token mask (c = 2), by window:</p>",
        _table(
            ["anchor, W", "active", "mask pass", "clip pass", "ESS r_d", "ESS r_s", "k3 r_d", "k3 r_s"],
            [
                [f"{anchor}, {window}", *(_figure(figures[name][place]) for name in _STREAM_COLUMNS)]
                for anchor, figures in law_f["figures"].items()
                for place, window in enumerate(law_f["windows"])
            ],
        ),
    ]


_STREAM_COLUMNS = (
    "policy/active_fraction", "policy/mask_pass_fraction", "policy/clip_pass_fraction", "discrepancy/ess_fraction",
    "staleness/ess_fraction", "discrepancy/k3", "staleness/k3",
)  # fmt: skip


def _reward_section(report: Mapping[str, Any], drawn: Mapping[plots.Arm, Sequence[float]]) -> list[str]:
    rows = [
        [
            f"lag {row['lag']}, {row['anchor']}, {row['correction']}, updates {row['updates']}",
            _interval(row["heldout_reward"]), _interval(row["late_reward"]),
            "" if row["minus_exact"] is None else _interval(row["minus_exact"], "{:+.3f}"),
            row["heldout_reward"]["num_seeds"],
        ]
        for row in report["reward"]
    ]  # fmt: skip
    return [
        "<h2>Reward</h2>",
        "<p>Held-out reward after the last step (temperature 1), reward of the last quarter of the steps, and the "
        "difference of the held-out reward to <code>snapshot</code>'s under the same lag, updates and correction, seed "
        "by seed. Intervals are Student's, 95 %, over seeds. Few seeds: a ranking that an interval does not carry is "
        f"none. {EXACT_AGREE}</p>",
        _image(plots.reward_plot(report["reward"]), "held-out reward"),
        _table(["run", "held-out", "late in training", "minus snapshot", "seeds"], rows),
        _image(plots.curve_plot(drawn), "reward in training"),
    ]


def _diagnostics_section(report: Mapping[str, Any]) -> list[str]:
    columns = {
        "active": "policy/active_fraction", "mask pass": "policy/mask_pass_fraction",
        "clip pass": "policy/clip_pass_fraction", "ESS r_d": "discrepancy/ess_fraction",
        "ESS r_s": "staleness/ess_fraction", "ESS R": "total/ess_fraction", "k3 r_d": "discrepancy/k3",
        "k3 r_s": "staleness/k3", "entropy": "policy/entropy", "resets": "anchor/ewma_resets",
    }  # fmt: skip
    rows = [
        [
            f"lag {row['lag']}, {row['anchor']}, {row['correction']}, updates {row['updates']}",
            *(_figure(row[name]) for name in columns.values()),
        ]
        for row in report["diagnostics"]
    ]
    return [
        "<h2>What became of the tokens</h2>",
        "<p>Means over the steps that train on stale tokens, and over seeds.</p>",
        _image(plots.active_plot(report["diagnostics"]), "stopped tokens"),
        _table(["run", *columns], rows),
    ]


def _cost_section(report: Mapping[str, Any]) -> list[str]:
    measured = report["cost"]
    plan = measured["plan"]
    rows = [
        [
            f"{row['case']}, {row['anchor']}", f"{row['weight_copies']:.2f}", f"{row['extra_mb']:.2f}",
            f"{row['step_s']:.3f}", f"{row['ratio']:.2f}", f"{row['cpu_ratio']:.2f}",
            f"{row['scored_tokens_ratio']:.2f}",
        ]
        for row in measured["costs"]
    ]  # fmt: skip
    return [
        "<h2>Cost</h2>",
        f"<p>One optimizer step of the lab's model ({measured['parameters']:,} parameters) on {plan['rows']} rows of "
        f"up to {plan['tokens']} tokens and one to {plan['versions']} versions, anchors interleaved, medians of "
        f"{plan['repetitions']}. <code>recompute</code> is the usual inexact way: a forward by the trainer's present "
        "weights. <code>stale</code>: no token is of the trainer's version; <code>fresh</code>: every row ends with "
        "such tokens. A model so small spends its time outside its matrices: <code>agentgym lab cost</code> measures a "
        "larger one.</p>",
        _table(
            ["case, anchor", "weight copies", "extra memory MB", "seconds per step", "ratio to recompute", "of CPU s",
             "scored tokens"],
            rows,
        ),
    ]  # fmt: skip


def _table(header: Sequence[object], rows: Sequence[Sequence[object]]) -> str:
    def line(cells: Sequence[object], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{_text(cell)}</{tag}>" for cell in cells) + "</tr>"

    return "<table>" + line(header, "th") + "".join(line(row, "td") for row in rows) + "</table>"


def _image(png: bytes, about: str) -> str:
    return f'<p><img alt="{_text(about)}" src="data:image/png;base64,{base64.b64encode(png).decode()}"></p>'


def _interval(interval: Mapping[str, Any], form: str = "{:.3f}") -> str:
    mean = form.format(interval["mean"])
    if interval["low"] is None:
        return mean
    return f"{mean} [{form.format(interval['low'])}, {form.format(interval['high'])}]"


def _figure(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.1e}" if 0 < abs(value) < 1e-3 else f"{value:.3f}"


def _text(value: object) -> str:
    return html.escape(str(value))


def _short(value: Any) -> Any:
    """Six significant digits: the JSON is read by people, too."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, Mapping):
        return {key: _short(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_short(part) for part in value]
    return value
