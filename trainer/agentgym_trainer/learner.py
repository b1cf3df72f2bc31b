"""What one batch does to the weights: advantages, rows, proximal logprobs, loss, optimizer. Must never know the
rollout service.

Law: with any number of ranks and any cut into micro-batches, the gradient is that of the whole step: the sum over all
loss tokens divided by their original number over all ranks.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator
from torch.optim.lr_scheduler import LRScheduler
from transformers import AutoModelForCausalLM, PreTrainedModel, get_scheduler

from agentgym.errors import InputError, TrainingError
from agentgym.trajectory import ScoredSequences
from agentgym_trainer.admission import admit, check_logprobs
from agentgym_trainer.advantages import Advantages, Overlong, trajectory_advantages
from agentgym_trainer.alarm import EXACT_ANCHORS, DiscrepancyAlarm, examine
from agentgym_trainer.anchors import Resolvable, VersionSource, make_anchor
from agentgym_trainer.anchors.fallback import stood_in
from agentgym_trainer.anchors.scoring import frozen_copy
from agentgym_trainer.batch import MicroBatch, StepRows, build_micro_batches, collect_rows
from agentgym_trainer.correction import Correction
from agentgym_trainer.logprobs import token_logprobs, unwrap
from agentgym_trainer.lora import adapt, checkpoint_adapter_only, is_adapted
from agentgym_trainer.loss import decoupled_loss, split_by_finiteness
from agentgym_trainer.loss_settings import BOUNDS_OF_CORRECTION, LossSection
from agentgym_trainer.metrics import StepMetrics, trajectory_metrics
from agentgym_trainer.objectives import Cispo, Gspo, M2po, Objective, Ppo, Topr, TruncatedReinforce
from agentgym_trainer.publish import Publication, as_published, published_metadata, published_weights
from agentgym_trainer.settings import TrainConfig

# By transformers' names; its "constant" has no warmup.
_SCHEDULES = {"constant": "constant_with_warmup", "linear": "linear", "cosine": "cosine"}


def make_accelerator(config: TrainConfig) -> Accelerator:
    """One process, or one of those that `accelerate launch` started; CPU where there is no GPU."""
    trainer = config.trainer
    on_cpu = not torch.cuda.is_available()
    if on_cpu:
        torch.set_num_threads(trainer.threads)
    return Accelerator(
        cpu=on_cpu,
        mixed_precision="bf16" if trainer.dtype == "bfloat16" else "no",
        log_with=list(trainer.trackers) or None,
        project_dir=str(config.run.dir / config.run.name),
    )


def load_model(folder: Path, config: TrainConfig) -> PreTrainedModel:
    """The causal language model in `folder`, fp32 masters, with the adapter that `trainer.lora` asks for. Its forward
    is the engine's: nothing is dropped, whatever its config.json says. Raises InputError if transformers cannot load
    it."""
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"model.name: {folder} does not hold a causal language model: {error}") from error
    _drop_nothing(model)
    if config.trainer.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    if config.trainer.lora is not None:
        model = cast(  # PEFT's wrapper is a PreTrainedModel to everybody here
            PreTrainedModel,
            adapt(model, config.trainer.lora, base_dtype=config.engine.dtype, compute_dtype=config.trainer.dtype),
        )
    # Transformers checkpoints gradients in training mode alone; without that there is no need of the mode, in which
    # some mixtures of experts route at random.
    return model.train(config.trainer.gradient_checkpointing)


def _drop_nothing(model: torch.nn.Module) -> None:
    """Shares of units to drop (`nn.Dropout`, `attention_dropout`) become 0. Where the policy's forward drops units and
    the engine's does not, R is noise."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for name, value in list(vars(module).items()):
            if "drop" in name and isinstance(value, float):
                setattr(module, name, 0.0)


class Learner:
    """Model, optimizer, schedule and anchor of this rank."""

    def __init__(
        self, accelerator: Accelerator, model: PreTrainedModel, config: TrainConfig, versions: VersionSource,
        model_id: str = "",
    ) -> None:  # fmt: skip
        """`model_id` (`agentgym.server.models`) refuses trajectories of other models; "" takes any one model's."""
        self._accelerator = accelerator
        self._model_id = model_id
        self._config = config
        trainer = config.trainer
        optimizer = torch.optim.AdamW(
            [parameter for parameter in model.parameters() if parameter.requires_grad],
            lr=trainer.learning_rate, betas=trainer.betas, weight_decay=trainer.weight_decay,
        )  # fmt: skip
        self._model, self._optimizer = accelerator.prepare(model, optimizer)
        self._schedule: LRScheduler = get_scheduler(
            _SCHEDULES[trainer.schedule], optimizer, num_warmup_steps=trainer.warmup_steps,
            num_training_steps=trainer.steps * trainer.updates_per_batch,
        )  # fmt: skip
        accelerator.register_for_checkpointing(self._schedule)
        if is_adapted(self.module):
            checkpoint_adapter_only(accelerator, self.module)
        with self._as_published():  # an average begins with what engines serve
            self.anchor = make_anchor(
                trainer.anchor, self._model, versions, temperature=config.rollout.temperature,
                max_staleness=config.rollout.max_staleness, interpolation_weight=trainer.interpolation_weight,
                fallback=trainer.anchor_fallback,
            )  # fmt: skip
            # The initial weights, on a resumed run too: its checkpoint is loaded later.
            self._reference = frozen_copy(self._model) if config.loss.reference_coefficient else None
        limit, over = config.rollout.max_episode_tokens, trainer.overlong_tokens
        self._overlong = Overlong(limit, over, trainer.overlong_penalty) if over else None
        self._corrections = corrections_of(config.loss)
        self._versions = versions
        self._alarm = DiscrepancyAlarm.of(config, loud=accelerator.is_main_process)
        self._objective = objective_of(config.loss)

    @property
    def module(self) -> PreTrainedModel:
        """The model without wrappers."""
        return cast(PreTrainedModel, unwrap(self._model))

    def published(self) -> Publication:
        """The present weights as engines are given them."""
        weights = published_weights(self.module, self._config.trainer.publish_dtype)
        return Publication(weights, published_metadata(self.module))

    def state(self) -> dict[str, Any]:
        """What a checkpoint must hold beside model, optimizer and schedule."""
        return self.anchor.state_dict()

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.anchor.load_state_dict(state)

    def learn(
        self, trajectories: Sequence[ScoredSequences], trainer_version: int,
        before_update: Callable[[int], None] | None = None,
    ) -> dict[str, float]:  # fmt: skip
        """One batch: `updates_per_batch` optimizer steps. Returns metrics over all ranks; every rank calls it.
        `before_update` is called with `trainer_version` just before an optimizer step, the weights as published.

        Raises TrainingError for a gradient that is not finite, and where `trainer.on_discrepancy` stops a run; then the
        weights are as before.
        """
        began = time.perf_counter()
        trainer = self._config.trainer
        metrics = StepMetrics()
        admission = admit(
            trajectories, trainer_version=trainer_version, max_staleness=self._config.rollout.max_staleness,
            model=self._model_id,
        )  # fmt: skip
        advantages = self.advantages_of(admission.trajectories)  # a baseline may be of the whole batch
        updates = [
            self.rows_of([admission.trajectories[index] for index in part], advantages.of(part))
            for part in _split(admission.trajectories, trainer.updates_per_batch)
        ]
        check_logprobs(updates, self._config.loss.max_dropped_fraction)
        whole = StepRows.joined(updates)
        updates = [rows for rows in updates if rows.num_loss_tokens]
        if not updates:
            raise TrainingError(
                f"none of the batch's {len(trajectories)} trajectories has a token to learn from; "
                f"{admission.num_stale} were older than rollout.max_staleness allows"
            )
        batches = [self.micro_batches_of(rows) for rows in updates]
        flat = [batch for part in batches for batch in part]
        with self._as_published():
            proximal = self.anchor.proximal(flat, trainer_version=trainer_version, reuse_policy=len(updates) == 1)
        scored_s = time.perf_counter() - began
        norms = []
        first, mismatch = None, {}
        for rows, part in zip(updates, batches):
            with self._as_published():
                step = self.accumulate(rows, part, proximal[: len(part)], trainer_version)
                if first is None:  # over ranks at once, and not again at the end
                    first = self.over_ranks(step)
                    mismatch = self._look_for_mismatch(first, rows, trainer_version)
                else:
                    metrics.merge(step)
            proximal = proximal[len(part) :]
            if before_update is not None:
                with self._as_published():
                    before_update(trainer_version)
            norms.append(self._step())
        if len(updates) > 1:
            metrics = self.over_ranks(metrics)
        assert first is not None, "a batch has an update"
        metrics.merge(first)
        active_fraction, mean_lag = metrics.active_fraction, metrics.mean_lag
        with self._as_published():
            self.anchor.published(trainer_version + 1, active_fraction=active_fraction, mean_lag=mean_lag)
        trajectories = admission.trajectories
        figures = metrics.finalise()
        anchor_figures = self._anchor_metrics()
        self._alarm.look_at_resets(anchor_figures.get("anchor/ewma_resets", 0.0))
        return {
            **figures,
            "loss": figures["policy/loss"],
            **trajectory_metrics(trajectories, whole, trainer_version=trainer_version),
            **admission.figures(),
            **(self._overlong.figures(trajectories) if self._overlong else {}),
            "trajectory/num_zero_variance_groups": float(advantages.num_zero_variance_groups),
            **anchor_figures,
            **mismatch,
            "gradient_norm": sum(norms) / len(norms),
            "learning_rate": float(self._schedule.get_last_lr()[0]),
            "time/anchor_s": scored_s,
            "time/train_s": time.perf_counter() - began,
        }

    def advantages_of(self, trajectories: Sequence[ScoredSequences]) -> Advantages:
        return trajectory_advantages(self._config.trainer.advantages, trajectories, self._overlong)

    def rows_of(self, trajectories: Sequence[ScoredSequences], advantages: Advantages | None = None) -> StepRows:
        """The rows of an optimizer step. `advantages`: of these trajectories; None: they are the whole batch."""
        limit = self._config.trainer.max_sequence_tokens or self._config.max_context
        return collect_rows(trajectories, advantages or self.advantages_of(trajectories), max_seq_len=limit)

    def micro_batches_of(self, rows: StepRows) -> list[MicroBatch]:
        accelerator = self._accelerator
        batches = build_micro_batches(
            rows.rows, max_tokens=self._config.trainer.micro_batch_tokens, rank=accelerator.process_index,
            world_size=accelerator.num_processes,
        )  # fmt: skip
        return [batch.to(accelerator.device) for batch in batches]

    def accumulate(
        self, rows: StepRows, batches: Sequence[MicroBatch], proximal: Sequence[Resolvable], trainer_version: int
    ) -> StepMetrics:
        """Adds the gradient of one optimizer step to the parameters; ranks agree on it at the end."""
        section = self._config.loss
        metrics = StepMetrics()
        objective = self._settled(batches)
        num_ranks = self._accelerator.num_processes  # ranks average their gradients
        for number, (batch, anchor) in enumerate(zip(batches, proximal, strict=True)):
            last = number == len(batches) - 1
            with contextlib.nullcontext() if last else self._accelerator.no_sync(self._model):
                policy = token_logprobs(
                    self._model, batch, self._config.rollout.temperature,
                    with_entropy=section.entropy_coefficient != 0.0,
                )  # fmt: skip
                loss, terms = decoupled_loss(
                    policy.logprobs, anchor.resolve(policy.logprobs), batch.behavior_logprobs, batch.advantages,
                    batch.loss_mask, correction=self._corrections, objective=objective,
                    entropy=policy.entropy, entropy_coefficient=section.entropy_coefficient,
                    reference_logprobs=self._reference_logprobs(batch),
                    reference_coefficient=section.reference_coefficient,
                    denominator=rows.num_loss_tokens / num_ranks, row_denominator=rows.num_loss_rows / num_ranks,
                )  # fmt: skip
                self._accelerator.backward(loss)
            metrics.add(terms, batch, trainer_version=trainer_version, fallbacks=stood_in(anchor))
        return metrics

    @torch.no_grad()
    def _settled(self, batches: Sequence[MicroBatch]) -> Objective:
        """The objective of one optimizer step. One that must see the whole step before its first micro-batch pays a
        forward for that, and the ranks agree."""
        if not isinstance(self._objective, M2po):
            return self._objective
        squares = []
        for batch in batches:
            # Without the wrapper: its forward may talk to the other ranks.
            policy = token_logprobs(unwrap(self._model), batch, self._config.rollout.temperature).logprobs
            counted, _ = split_by_finiteness(batch.behavior_logprobs, batch.loss_mask)
            squares.append(M2po.squares(policy, batch.behavior_logprobs)[counted])
        own = torch.cat(squares)
        if self._accelerator.num_processes > 1:
            padded = self._accelerator.pad_across_processes(own, pad_index=-1)  # a square is never negative
            own = cast(torch.Tensor, self._accelerator.gather(padded))
        return dataclasses.replace(self._objective, cut=self._objective.cut_of(own[own >= 0.0]))

    @torch.no_grad()
    def _reference_logprobs(self, batch: MicroBatch) -> torch.Tensor | None:
        if self._reference is None:
            return None
        return token_logprobs(self._reference, batch, self._config.rollout.temperature).logprobs

    def _as_published(self) -> contextlib.AbstractContextManager[None]:
        """Forwards see the weights as engines and the version log do; the optimizer steps the masters."""
        return as_published(self.module, self._config.trainer.publish_dtype)

    def _step(self) -> float:
        """Clips and applies the gradient; returns its norm before clipping."""
        clipped = self._accelerator.clip_grad_norm_(self._model.parameters(), self._config.trainer.max_grad_norm)
        norm = float(cast(torch.Tensor, clipped))
        if not math.isfinite(norm):
            self._optimizer.zero_grad()
            raise TrainingError(f"the gradient's norm is {norm}; lower trainer.learning_rate or look at the metrics")
        self._optimizer.step()
        self._schedule.step()
        self._optimizer.zero_grad()
        return norm

    def _look_for_mismatch(self, step: StepMetrics, rows: StepRows, trainer_version: int) -> dict[str, float]:
        """Before the first optimizer step on a batch, `step` over all ranks: the weights are still what engines were
        given."""
        return self._alarm.look(
            step.engine_mismatch(self.anchor.name in EXACT_ANCHORS),
            lambda: examine(
                self._model, [row.sequence for row in rows.rows], trainer_version, self._config.rollout.temperature,
                self._versions, self._alarm.floor,
            ),
        )  # fmt: skip

    def over_ranks(self, metrics: StepMetrics) -> StepMetrics:
        accelerator = self._accelerator
        if accelerator.num_processes == 1:
            return metrics
        sums = accelerator.reduce(metrics.sums.to(accelerator.device), "sum")
        maxima = accelerator.gather(metrics.maxima[None].to(accelerator.device))
        return StepMetrics.of(cast(torch.Tensor, sums), cast(torch.Tensor, maxima).amax(0))

    def _anchor_metrics(self) -> dict[str, float]:
        """Counts add over ranks; the other figures are equal on all."""
        figures = self.anchor.metrics()
        counts = sorted(name for name in figures if name.startswith("anchor/num_"))
        if counts and self._accelerator.num_processes > 1:
            own = torch.tensor([figures[name] for name in counts], device=self._accelerator.device)
            total = cast(torch.Tensor, self._accelerator.reduce(own, "sum"))
            figures |= dict(zip(counts, total.tolist()))
        return figures


def corrections_of(section: LossSection) -> tuple[Correction, ...]:
    """The handling of r_d that the configuration names."""
    chosen = []
    for kind in section.correction:
        bounds = [getattr(section, name) for name in BOUNDS_OF_CORRECTION[kind]]  # (low, high), or one
        chosen.append(Correction(kind, *bounds[-1:], low=bounds[0] if len(bounds) == 2 else 0.0))
    if section.veto:
        chosen.append(Correction("veto", section.veto))
    return tuple(chosen)


def objective_of(section: LossSection) -> Objective:
    """The objective that the configuration names."""
    match section.objective:
        case "ppo":
            return Ppo(section.clip_low, section.clip_high)
        case "ppo_dual_clip":
            return Ppo(section.clip_low, section.clip_high, section.dual_clip)
        case "gspo":
            return Gspo(section.gspo_clip_low, section.gspo_clip_high)
        case "cispo":
            return Cispo(section.cispo_low, section.cispo_high)
        case "reinforce_truncated":
            return TruncatedReinforce(section.total_truncate_max)
        case "topr":
            return Topr()
        case "m2po":
            return M2po(section.m2po_max_second_moment)


def _split(trajectories: Sequence[ScoredSequences], num_parts: int) -> list[list[int]]:
    """Whole groups dealt to `num_parts` updates: the places of each update's trajectories."""
    parts: list[list[int]] = [[] for _ in range(num_parts)]
    part_of: dict[str, int] = {}
    for index, trajectory in enumerate(trajectories):
        part = part_of.setdefault(trajectory.group_id, len(part_of) % num_parts)
        parts[part].append(index)
    return parts
