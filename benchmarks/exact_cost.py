"""What exact old logprobs cost an optimizer step. `agentgym lab cost` writes the same as a page.

One list entry an anchor; ratios are to `recompute`, the usual forward of the whole batch by the trainer's present
weights. Without a prefix: no token is of the trainer's version; `fresh_`: every row ends with such tokens. `cpu_`: of
CPU seconds, where other work shared the machine.
"""

from __future__ import annotations

import sys

from agentgym_trainer.lab.cost import CASES, CostPlan, measure_cost

PREFIXES = dict(zip(CASES, ("", "fresh_"), strict=True))


def run(quick: bool) -> dict[str, object]:
    plan = CostPlan(model="small", rows=4, tokens=48, repetitions=1) if quick else CostPlan()
    measured = measure_cost(plan, lambda line: print(line, file=sys.stderr))
    figures: dict[str, object] = {
        "model": plan.model,
        "parameters": measured["parameters"],
        "rows": plan.rows,
        "anchors": list(plan.anchors),
    }
    for case, prefix in PREFIXES.items():
        rows = [row for row in measured["costs"] if row["case"] == case]
        figures |= {
            f"{prefix}score_tokens_ratio": [row["scored_tokens_ratio"] for row in rows],
            f"{prefix}step_s": [row["step_s"] for row in rows],
            f"{prefix}step_time_ratio": [row["ratio"] for row in rows],
            f"{prefix}cpu_step_time_ratio": [row["cpu_ratio"] for row in rows],
            f"{prefix}beside_s": [row["beside_s"] for row in rows],
        }
    stale = [row for row in measured["costs"] if row["case"] == CASES[0]]
    return figures | {
        "weight_copies": [row["weight_copies"] for row in stale],
        "extra_memory_mb": [row["extra_mb"] for row in stale],
        "delta_mb": measured["log"]["delta_mb"],
        "record_s": measured["log"]["record_s"],
    }
