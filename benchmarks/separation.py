"""Law F on the trainer's own code: the semantic separation. `agentgym lab staleness` shows the same beside its runs.

One list entry a lag window. The engine has an injected mismatch, so that there is something to see at window 0.
"""

from __future__ import annotations

import sys

from agentgym_trainer.lab.cell import use_one_core
from agentgym_trainer.lab.staleness import lab_config
from agentgym_trainer.lab.stream import StreamPlan, measure_stream

MISMATCH = "logits:0.08"
QUICK = ("rollout.groups_per_step=3", "engine.slots=24")


def run(quick: bool) -> dict[str, object]:
    use_one_core()
    config = lab_config(QUICK if quick else ())
    plan = StreamPlan(windows=(0, 2, 4), versions=1, groups=2) if quick else StreamPlan()
    plan = StreamPlan(plan.windows, plan.anchors, plan.versions, plan.groups, MISMATCH, plan.seed)
    measured = measure_stream(config, plan, lambda line: print(line, file=sys.stderr))
    active = {
        f"{name}_active_fraction": figures["policy/active_fraction"] for name, figures in measured["figures"].items()
    }
    return {
        "window": measured["windows"], "tokens": measured["tokens"], "mismatch": MISMATCH, **measured["outside"],
        **active,
    }  # fmt: skip
