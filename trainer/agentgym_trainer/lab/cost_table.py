"""The cost of exact old logprobs as a page, in the columns of the paper's table. A pure function of measurements."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

_CASES = {
    "stale": "No token is of the trainer's present version (training is a version behind).",
    "fresh": "Every row ends with tokens of the trainer's present version, the usual case of an asynchronous run.",
}
_NAMES = {
    "recompute": "resident, recomputed (the usual inexact way)", "resident": "resident, from the policy's own forward",
    "snapshot": "snapshot (exact)", "old_logit_model": "old_logit_model (exact)", "interrupt": "interrupt (exact)",
    "ewma": "ewma",
}  # fmt: skip
PAPER = """| model, route | weight copies | extra memory | seconds per step |
|---|---|---|---|
| Qwen3-4B, snapshots | 5 | 40 GB | +25 |
| Qwen3-4B, EWMA | 1 | 7.9 GB | +8 |
| Qwen3-30B-A3B, snapshots | 5 | 76.4 GB | +150 |
| Qwen3-30B-A3B, EWMA | 1 | 15.2 GB | +34 |"""


def render_costs(measured: Mapping[str, Any], machine: str, command: str) -> str:
    """Markdown: one table a case, the log's own cost, the paper's figures beside."""
    plan, log = measured["plan"], measured["log"]
    parts = [
        "# What exact old logits cost",
        f"Written by `{command}` on {machine}; one thread, ratios of interleaved runs, medians of "
        f"{plan['repetitions']}. Model {plan['model']} ({measured['parameters'] / 1e6:.1f}M parameters, "
        f"{measured['model_mb']:.0f} MiB in fp32), weights published as {plan['publish_dtype']}; {plan['rows']} rows "
        f"of up to {plan['tokens']} tokens, each of one to {plan['versions']} versions; one optimizer step per batch.",
        "A step is everything that the trainer does with a batch: old logprobs, forward, backward, optimizer, and what "
        "the anchor does when weights are published. The ratio is to the usual recompute: one forward of the whole "
        "batch by the trainer's present weights. CPU seconds stand beside wall seconds because other work may have "
        "shared the machine.",
    ]
    for case, about in _CASES.items():
        rows = [row for row in measured["costs"] if row["case"] == case]
        if rows:
            parts += [f"## {case}", about, _table(rows)]
    parts += [
        "`beside the step` is scoring that no optimizer step waits for: `old_logit_model` does it in a process of its "
        "own that holds the weight copy, while training goes on; `interrupt` does it before the weights change, the "
        "part for episodes in flight while sampling is paused, and stores no weights.",
        "On a CPU weights published as bfloat16 are computed in fp32, so the one scoring copy of `snapshot` is as "
        "large as that of `ewma`; the versions behind it are deltas on disk, not copies:",
        _log_table(log),
        "`snapshot` also switches its copy from version to version along those deltas, back and forth in each step: a "
        "cost of every version and not of every token, so it weighs most on a batch as small as this one.",
        "The paper's table (arXiv 2605.12070), for comparison; its snapshots are a ring of five full copies:",
        PAPER,
    ]
    return "\n\n".join(parts) + "\n"


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    lines = [
        "| anchor | weight copies | extra memory | seconds per step (CPU) | ratio to recompute (CPU) | scored tokens | "
        "beside the step |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {_NAMES[row['anchor']]} | {row['weight_copies']:.2f} | {row['extra_mb']:.0f} MiB | "
        f"{row['step_s']:.2f} ({row['step_cpu_s']:.2f}) | {row['ratio']:.2f} ({row['cpu_ratio']:.2f}) | "
        f"{row['scored_tokens_ratio']:.2f} | {row['beside_s']:.2f} s |"
        for row in rows
    ]
    return "\n".join(lines)


def _log_table(log: Mapping[str, float]) -> str:
    return (
        "| changed elements per version | delta on disk | full copy on disk | seconds to record |\n|---|---|---|---|\n"
        f"| {log['changed_fraction']:.2%} | {log['delta_mb']:.1f} MiB | {log['full_mb']:.0f} MiB | "
        f"{log['record_s']:.2f} |"
    )
