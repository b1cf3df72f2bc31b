"""Law F on real trainer code: one frozen stream of rollouts, seen by every anchor. Must never know a report.

Law: the weights are those of a real training run, sampled by a real engine with an injected mismatch; every anchor
follows the same publications and scores exactly the same tokens. What differs between windows is only how old the
tokens are: within a row of window W the versions rise, turn by turn, from v - W to v.

The quantity is the fraction of tokens whose discrepancy ratio leaves [1/BOUND, BOUND]: under exact old logprobs it is
the engine's mismatch and does not depend on W, under `resident` staleness leaks into it.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import set_seed
from transformers import PreTrainedModel

from agentgym.server.models import resolve_model
from agentgym.versions import BFLOAT16, VersionLog
from agentgym_trainer.advantages import trajectory_advantages
from agentgym_trainer.anchors import Anchor, make_anchor
from agentgym_trainer.batch import StepRows, build_micro_batches, collect_rows
from agentgym_trainer.correction import Correction
from agentgym_trainer.lab.cell import open_lockstep, publish, rising, scored
from agentgym_trainer.lab.distortion import Distortion
from agentgym_trainer.lab.memory import extra_bytes, model_bytes
from agentgym_trainer.learner import Learner, load_model, make_accelerator
from agentgym_trainer.logprobs import token_logprobs
from agentgym_trainer.loss import decoupled_loss
from agentgym_trainer.metrics import StepMetrics
from agentgym_trainer.settings import TrainConfig

WINDOWS = (0, 4, 8, 16)
BOUND = 1.2
FIGURES = (
    "policy/active_fraction", "policy/mask_pass_fraction", "policy/clip_pass_fraction", "discrepancy/k3",
    "discrepancy/ess_fraction", "discrepancy/max_abs_log_ratio", "staleness/k3", "staleness/ess_fraction",
    "total/ess_fraction", "policy/mean_lag",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class StreamPlan:
    """How long a stream is and who sees it.

    The run is as long as the largest window and `versions` more: those are what is measured.

    Example: `StreamPlan(windows=(0, 4, 8, 16), anchors=("snapshot", "ewma", "resident"), versions=8, groups=12,
    mismatch="bf16", seed=0)`.
    """

    windows: tuple[int, ...] = WINDOWS
    anchors: tuple[str, ...] = ("snapshot", "ewma", "resident")
    versions: int = 8
    groups: int = 12  # of each batch of the stream
    mismatch: str = "bf16"
    seed: int = 0


@dataclass(slots=True)
class _Seen:
    """What one anchor made of one window."""

    anchor: Anchor
    outside: int = 0
    counted: int = 0
    seconds: float = 0.0
    metrics: StepMetrics = field(default_factory=StepMetrics)  # over all measured versions


def measure_stream(config: TrainConfig, plan: StreamPlan, report: Callable[[str], None]) -> dict[str, Any]:
    """`{"windows": [...], "outside": {anchor: [...]}, "figures": {anchor: {name: [...]}}, ...}`: one entry a window."""
    began = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="agentgym-lab-") as scratch:
        log = VersionLog(Path(scratch))
        model = _record_run(config, plan, log, report)
        by_window = []
        for window in plan.windows:
            by_window.append(_see_window(config, plan, log, model, window))
            outside = {name: seen.outside / seen.counted for name, seen in by_window[-1].items()}
            report(f"window {window}: " + ", ".join(f"{name} {value:.4f}" for name, value in outside.items()))
    finalised = {
        name: [seen[name].metrics.finalise() for seen in by_window] for name in plan.anchors
    }  # fmt: skip
    return {
        "windows": list(plan.windows),
        "bound": BOUND,
        "mismatch": plan.mismatch,
        "tokens": [next(iter(seen.values())).counted for seen in by_window],
        "outside": {name: [seen[name].outside / seen[name].counted for seen in by_window] for name in plan.anchors},
        "figures": {
            name: {key: [figures.get(key) for figures in rows] for key in FIGURES} for name, rows in finalised.items()
        },
        "anchor_s": {name: [seen[name].seconds for seen in by_window] for name in plan.anchors},
        "ewma_resets": [seen["ewma"].anchor.metrics()["anchor/ewma_resets"] for seen in by_window if "ewma" in seen],
        "weight_copies": {
            name: extra_bytes(by_window[-1][name].anchor, model) / model_bytes(model) for name in plan.anchors
        },
        "seconds": time.perf_counter() - began,
    }


def _record_run(
    config: TrainConfig, plan: StreamPlan, log: VersionLog, report: Callable[[str], None]
) -> PreTrainedModel:
    """Trains on fresh data without a mismatch; the log keeps every version. Returns the model, to be given others."""
    last = max(plan.windows) + plan.versions
    values = config.model_dump()
    values["run"]["seed"] = values["model"]["seed"] = values["rollout"]["seed"] = plan.seed
    values["trainer"] |= {"steps": max(last, config.trainer.steps), "anchor": "resident", "updates_per_batch": 1}
    values["trainer"]["on_discrepancy"] = "ignore"
    values["loss"]["correction"] = "none"
    config = TrainConfig.model_validate(values)
    set_seed(plan.seed)
    folder = resolve_model(config.model.name, config.env.id, config.model.seed)
    learner = Learner(make_accelerator(config), load_model(folder, config), config, log)
    publish(learner, log)
    lockstep = open_lockstep(config, folder, log, Distortion("none"))
    try:
        for version in range(last):
            log.hold("lab", range(version + 1))
            plans = lockstep.next_groups(config.rollout.groups_per_step, config.rollout.group_size)
            batch, _ = scored(lockstep.play(plans, lambda episode, turn, version=version: version))
            learner.learn(batch, trainer_version=version)
            publish(learner, log)
    finally:
        lockstep.close()
    log.hold("lab", range(last + 1))
    report(f"law F: recorded {last + 1} versions of a run at lag 0")
    return learner.module


def _see_window(
    config: TrainConfig, plan: StreamPlan, log: VersionLog, model: PreTrainedModel, window: int
) -> dict[str, _Seen]:
    """The whole stream of one window: the anchors follow every version, each with its batch; those from the largest
    window on are measured."""
    first = max(plan.windows)
    _become(model, log, 0)
    seen = {
        name: _Seen(make_anchor(name, model, log, temperature=config.rollout.temperature, max_staleness=max(window, 1)))
        for name in plan.anchors
    }
    distortion = Distortion.parse(plan.mismatch)
    folder = resolve_model(config.model.name, config.env.id, plan.seed)
    lockstep = open_lockstep(config, folder, log, distortion)
    try:
        with distortion.on(lockstep.model, plan.seed):
            for version in range(first + plan.versions):
                plans = lockstep.next_groups(plan.groups, config.rollout.group_size)
                batch, _ = scored(lockstep.play(plans, rising(max(0, version - window), version, lockstep.max_turns)))
                rows = collect_rows(
                    batch, trajectory_advantages(config.trainer.advantages, batch), max_seq_len=config.max_context
                )  # fmt: skip
                told = _see(config, seen, model, rows, version, measured=version >= first)
                _become(model, log, version + 1)
                for name, one in seen.items():
                    one.anchor.published(
                        version + 1, active_fraction=told[name].active_fraction, mean_lag=told[name].mean_lag
                    )
    finally:
        lockstep.close()
    return seen


@torch.no_grad()
def _see(
    config: TrainConfig, seen: dict[str, _Seen], model: PreTrainedModel, rows: StepRows, version: int, *, measured: bool
) -> dict[str, StepMetrics]:
    """Each anchor scores the same micro-batches; what its run would have been told of them."""
    batches = build_micro_batches(rows.rows, max_tokens=config.trainer.micro_batch_tokens)
    policy = [token_logprobs(model, batch, config.rollout.temperature).logprobs for batch in batches]
    told = {}
    for name, one in seen.items():
        began = time.perf_counter()
        proximal = one.anchor.proximal(batches, trainer_version=version, reuse_policy=True)
        seconds = time.perf_counter() - began
        told[name] = StepMetrics()
        for batch, logprobs, part in zip(batches, policy, proximal, strict=True):
            old = part.resolve(logprobs)
            _, terms = decoupled_loss(
                logprobs, old, batch.behavior_logprobs, batch.advantages, batch.loss_mask,
                correction=Correction("token_mask", 2.0), denominator=float(max(1, rows.num_loss_tokens)),
            )  # fmt: skip
            told[name].add(terms, batch, trainer_version=version)
            if measured:
                off = (old - batch.behavior_logprobs).abs() > math.log(BOUND)
                one.outside += int((terms.counted & off).sum())
                one.counted += int(terms.counted.sum())
        if measured:
            one.seconds += seconds
            one.metrics.merge(told[name])
    return told


def _become(model: PreTrainedModel, log: VersionLog, version: int) -> None:
    state = model.state_dict(keep_vars=True)
    with torch.no_grad():
        for name, array in log.read(version).items():
            bits = array.dtype == BFLOAT16
            tensor = torch.from_numpy(array.view(np.int16) if bits else array)
            state[name].copy_(tensor.view(torch.bfloat16) if bits else tensor)
