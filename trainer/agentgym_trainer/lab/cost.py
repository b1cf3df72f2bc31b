"""What exact old logprobs cost: one optimizer step of the trainer under each anchor, interleaved. Must never know a
rollout.

Law: every anchor takes the same batch through the same Learner; only where its proximal logprobs come from differs.
`recompute` is what others do and call old logprobs: one forward of the whole batch by the trainer's present weights.
It is the 1 of every ratio. (Our `resident` anchor computes the same numbers without that forward where a batch gets one
optimizer step.)

What a recorded anchor (`old_logit_model`, `interrupt`) does outside the step, scoring tokens as they arrive, is timed
apart: it overlaps training in a process of its own, or stalls sampling while training waits.
"""

from __future__ import annotations

import gc
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from agentgym.errors import ConfigError
from agentgym.server.models import resolve_model
from agentgym.trajectory import NO_VERSION, EpisodeStatus, ScoredSequences, TokenSequence
from agentgym.versions import VersionLog
from agentgym_trainer.anchors import ANCHORS as KNOWN_ANCHORS
from agentgym_trainer.anchors import Anchor, Proximal, make_anchor
from agentgym_trainer.anchors.direct import ResidentAnchor
from agentgym_trainer.anchors.followed import Passage
from agentgym_trainer.anchors.passages import score_passages
from agentgym_trainer.anchors.recorded import RecordedAnchor
from agentgym_trainer.anchors.records import runs_of
from agentgym_trainer.anchors.scoring import ScoringModel
from agentgym_trainer.batch import MicroBatch
from agentgym_trainer.lab.cell import publish
from agentgym_trainer.lab.memory import extra_bytes, model_bytes
from agentgym_trainer.learner import Learner, load_model, make_accelerator
from agentgym_trainer.publish import as_published
from agentgym_trainer.settings import TrainConfig

BASELINE = "recompute"
ANCHORS = (BASELINE, "resident", "snapshot", "old_logit_model", "interrupt", "ewma")
CASES = ("stale", "fresh")  # the newest tokens are of the version before the trainer's, or of the trainer's own
SIZES: Mapping[str, tuple[int, int, int]] = {"medium": (512, 8, 8192), "small": (64, 2, 512)}  # width, layers, vocab

_MICRO_BATCH = 4096  # tokens


@dataclass(frozen=True, slots=True)
class CostPlan:
    """What is measured.

    Example: `CostPlan(model="smollm2-135m", rows=8, tokens=96, repetitions=3)`: eight rows of up to 96 tokens, each
    of one to four versions, weights published as bf16.
    """

    model: str = "smollm2-135m"  # or a folder, or a random one of SIZES
    anchors: tuple[str, ...] = ANCHORS
    rows: int = 8
    tokens: int = 96  # of the longest row
    versions: int = 4  # of a row, at most
    repetitions: int = 3
    learning_rate: float = 5e-6
    publish_dtype: str = "bfloat16"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.rows < 2 or self.tokens < 16 or self.versions < 1 or self.repetitions < 1:
            raise ConfigError(f"a cost plan needs rows >= 2, tokens >= 16, versions and repetitions >= 1, got {self}")
        known = (BASELINE, *KNOWN_ANCHORS)
        if not set(self.anchors) <= set(known) or BASELINE not in self.anchors:
            raise ConfigError(f"anchors must be of {', '.join(known)} and hold {BASELINE}, got {self.anchors}")


@dataclass(frozen=True, slots=True)
class Cost:
    """What one anchor's optimizer step came to in one case; medians.

    Example: `Cost("snapshot", "fresh", scored_tokens_ratio=0.8, anchor_s=1.9, step_s=8.1, step_cpu_s=8.0,
    ratio=1.05, cpu_ratio=1.04, beside_s=0.0, weight_copies=1.0, extra_mb=513.0)`.
    """

    anchor: str
    case: str
    scored_tokens_ratio: float  # forwards for old logprobs, padding included, by those of the baseline
    anchor_s: float
    step_s: float
    step_cpu_s: float
    ratio: float  # of step_s to the baseline's
    cpu_ratio: float
    beside_s: float  # scoring outside the step
    weight_copies: float  # fp32 copies beside the trained model, wherever they are
    extra_mb: float


def measure_cost(plan: CostPlan, report: Callable[[str], None]) -> dict[str, Any]:
    """`{"plan", "parameters", "costs": [...], "log": {...}}`."""
    torch.set_num_threads(1)
    torch.manual_seed(plan.seed)
    with tempfile.TemporaryDirectory(prefix="agentgym-cost-") as scratch:
        config = _config(plan)
        log = VersionLog(Path(scratch) / "versions")
        learner = Learner(make_accelerator(config), _model(plan, config, report), config, log)
        recorded = _publish_some(learner, log, plan)
        newest = plan.versions + 1
        costs: list[Cost] = []
        for case in CASES:
            last = newest if case == "fresh" else newest - 1
            batch = _exact(learner, log, _batch(plan, learner.module.config.vocab_size, last))
            costs += _case(plan, learner, log, batch, case, newest, report)
        return {
            "plan": asdict(plan),
            "parameters": sum(parameter.numel() for parameter in learner.module.parameters()),
            "model_mb": model_bytes(learner.module) / 2**20,
            "costs": [asdict(cost) for cost in costs],
            "log": recorded,
        }


# ---------------------------------------------------------------------------------------------------- one case


@dataclass(slots=True)
class _Arm:
    """One anchor in one case, and what it took."""

    anchor: Anchor
    scored_tokens: int = 0  # in forwards for old logprobs, padding included
    beside_s: float = 0.0
    beside_bytes: int = 0  # held by whoever scores beside the step
    anchor_s: list[float] = field(default_factory=list)
    step_s: list[float] = field(default_factory=list)
    step_cpu_s: list[float] = field(default_factory=list)


class _Recompute(ResidentAnchor):
    """The usual recompute: always a forward, also where the policy's own would do."""

    def proximal(
        self, micro_batches: Sequence[MicroBatch], *, trainer_version: int, reuse_policy: bool
    ) -> list[Proximal]:
        return super().proximal(micro_batches, trainer_version=trainer_version, reuse_policy=False)


def _case(
    plan: CostPlan, learner: Learner, log: VersionLog, batch: list[ScoredSequences], case: str, newest: int,
    report: Callable[[str], None],
) -> list[Cost]:  # fmt: skip
    whole = sum(one.num_tokens for one in learner.micro_batches_of(learner.rows_of(batch)))
    arms = {name: _arm(name, plan, learner, log, batch, whole) for name in plan.anchors}
    for repetition in range(plan.repetitions + 1):  # the first one warms up
        for name, arm in arms.items():
            learner.anchor = arm.anchor
            gc.collect()
            cpu, began = time.process_time(), time.perf_counter()
            figures = learner.learn(batch, trainer_version=newest)
            step_s, step_cpu_s = time.perf_counter() - began, time.process_time() - cpu
            if "anchor/num_scored_tokens" in figures:
                arm.scored_tokens = int(figures["anchor/num_scored_tokens"])
            if repetition:
                arm.anchor_s.append(figures["time/anchor_s"])
                arm.step_s.append(step_s)
                arm.step_cpu_s.append(step_cpu_s)
                report(f"{case} {repetition}/{plan.repetitions} {name}: step {step_s:.1f} s")
    median = statistics.median
    base = arms[BASELINE]
    costs = []
    for name, arm in arms.items():
        held = extra_bytes(arm.anchor, learner.module) + arm.beside_bytes
        costs.append(
            Cost(
                name, case, arm.scored_tokens / base.scored_tokens, median(arm.anchor_s), median(arm.step_s),
                median(arm.step_cpu_s), median(arm.step_s) / median(base.step_s),
                median(arm.step_cpu_s) / median(base.step_cpu_s), arm.beside_s, held / model_bytes(learner.module),
                held / 2**20,
            )
        )  # fmt: skip
    return costs


def _arm(
    name: str, plan: CostPlan, learner: Learner, log: VersionLog, batch: Sequence[ScoredSequences], whole: int
) -> _Arm:
    model, bound = learner.module, plan.versions + 1
    if name == BASELINE:
        return _Arm(_Recompute(model, 1.0), scored_tokens=whole)
    with as_published(model, plan.publish_dtype):
        anchor = make_anchor(name, model, log, temperature=1.0, max_staleness=bound)
    arm = _Arm(anchor, scored_tokens=whole if name == "ewma" else 0)
    if isinstance(anchor, RecordedAnchor):
        _score_beside(arm, anchor, learner, log, batch, own_copy=name == "old_logit_model")
    return arm


def _score_beside(
    arm: _Arm, anchor: RecordedAnchor, learner: Learner, log: VersionLog, batch: Sequence[ScoredSequences], *,
    own_copy: bool,
) -> None:  # fmt: skip
    """Scores every token under its version and records it, as the scorer's process does with its own copy, or the
    trainer itself when it is interrupted: it then still has those weights, and loading them is not timed."""
    scorer = ScoringModel(learner.module, 1.0)
    for version in sorted({v for one in batch for row in one.sequences for v in row.policy_versions} - {NO_VERSION}):
        passages = _passages(batch, version)
        began = time.perf_counter()
        scorer.bring(log, version)
        if not own_copy:
            began = time.perf_counter()
        with torch.no_grad():
            records, num_tokens = score_passages(
                passages, scorer.score, max_tokens=_MICRO_BATCH, device="cpu", anchor=anchor.name
            )
        arm.beside_s += time.perf_counter() - began
        arm.scored_tokens += num_tokens
        anchor.records.extend(records)
    arm.beside_bytes = extra_bytes(scorer, learner.module) if own_copy else 0


def _passages(batch: Sequence[ScoredSequences], version: int) -> list[Passage]:
    """What the rows hold of `version`, each up to the last such token."""
    passages = []
    for one in batch:
        for number, row in enumerate(one.sequences):
            own = np.asarray(row.policy_versions) == version
            if own.any():
                runs = [(start, stop) for start, stop, _ in runs_of(np.where(own, version, NO_VERSION))]
                ids = row.token_ids[: runs[-1][1]]
                passages.append(Passage(one.trajectory_id, 0, number, version, ids, tuple(runs)))
    return passages


# ------------------------------------------------------------------------------------------- weights and tokens


def _config(plan: CostPlan) -> TrainConfig:
    return TrainConfig.model_validate(
        {
            "env": {"id": "maze"},  # nothing is played
            "rollout": {"max_episode_tokens": plan.tokens, "max_staleness": plan.versions + 1},
            "trainer": {
                "learning_rate": plan.learning_rate, "publish_dtype": plan.publish_dtype, "anchor": "resident",
                "micro_batch_tokens": _MICRO_BATCH, "on_discrepancy": "ignore", "steps": 1000,
            },
        }
    )  # fmt: skip


def _model(plan: CostPlan, config: TrainConfig, report: Callable[[str], None]) -> PreTrainedModel:
    if plan.model not in SIZES:
        return load_model(resolve_model(plan.model, config.env.id, plan.seed, report=report), config)
    width, layers, vocabulary = SIZES[plan.model]
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers,
            num_attention_heads=8, num_key_value_heads=4, max_position_embeddings=1024, tie_word_embeddings=True,
        )
    ).train()  # fmt: skip


def _publish_some(learner: Learner, log: VersionLog, plan: CostPlan) -> dict[str, float]:
    """Versions 0 to `plan.versions + 1`, each an optimizer step from the last, all kept; what one took to record."""
    small = replace(plan, rows=2, tokens=24)
    publish(learner, log)
    batch = _exact(learner, log, _batch(small, learner.module.config.vocab_size, 0))
    taken = []
    for version in range(plan.versions + 1):
        learner.learn(batch, trainer_version=version)
        log.hold("lab", range(version + 1))
        publish(learner, log)
        assert log.last is not None, "a version was just recorded"
        taken.append(log.last)
    return {
        "changed_fraction": statistics.median(one.changed_fraction for one in taken),
        "delta_mb": statistics.median(one.delta_bytes for one in taken) / 2**20,
        "full_mb": taken[-1].full_bytes / 2**20,
        "record_s": statistics.median(one.seconds for one in taken),
    }


def _batch(plan: CostPlan, vocabulary: int, last: int) -> list[ScoredSequences]:
    """Rows of one to `plan.versions` versions, the newest of each row `last`: a prompt, then replies of twelve tokens
    with four of observation between them. Groups of two, one of each won."""
    rng = np.random.default_rng(plan.seed)
    rows = []
    for number in range(plan.rows):
        length = int(rng.integers(plan.tokens * 5 // 8, plan.tokens + 1)) if number else plan.tokens
        mask = np.arange(length) >= max(4, plan.tokens // 8)
        mask &= (np.arange(length) - plan.tokens // 8) % 16 < 12
        span = min(1 + number % plan.versions, last + 1)
        parts = np.minimum(np.cumsum(mask) * span // (mask.sum() + 1), span - 1)
        versions = np.where(mask, last - span + 1 + parts, NO_VERSION)
        rows.append(_row(rng.integers(3, vocabulary, length).tolist(), mask.tolist(), versions.tolist(), number))
    return rows


def _row(token_ids: list[int], mask: list[bool], versions: list[int], number: int) -> ScoredSequences:
    sequence = TokenSequence(
        tuple(token_ids), tuple(mask), (0.0,) * len(mask), tuple(versions), tuple(versions)
    )  # fmt: skip
    return ScoredSequences(
        f"t-{number}", f"g-{number // 2}", "lab", EpisodeStatus.TERMINATED, float(number % 2), True, {}, (sequence,),
        sum(mask),
    )  # fmt: skip


def _exact(learner: Learner, log: VersionLog, batch: list[ScoredSequences]) -> list[ScoredSequences]:
    """The same rows with the logprobs of an engine that computes as the trainer does: nothing is masked."""
    scorer = ScoringModel(learner.module, 1.0)
    logprobs = [np.zeros(len(one.sequences[0])) for one in batch]
    place = {one.trajectory_id: number for number, one in enumerate(batch)}
    for version in sorted({v for one in batch for v in one.sequences[0].policy_versions} - {NO_VERSION}):
        scorer.bring(log, version)
        records, _ = score_passages(
            _passages(batch, version), scorer.score, max_tokens=_MICRO_BATCH, device="cpu", anchor="snapshot"
        )
        for record in records:
            logprobs[place[record.trajectory_id]][record.start : record.stop] = record.logprobs
    return [
        replace(one, sequences=(replace(one.sequences[0], behavior_logprobs=tuple(line.tolist())),))
        for one, line in zip(batch, logprobs, strict=True)
    ]
