"""One short training run at a fixed lag: a cell of the staleness lab. Must never know a report.

Law: the batch of step t was sampled by version max(0, t - lag) and no other (or, `partial`, by versions that rise from
there to t within each row); what learns from it is the trainer's own Learner, anchor, loss and version log. Equal cells
give equal figures, but for their times.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import set_seed

from agentgym.errors import TrainingError
from agentgym.rollout.limits import EpisodeLimits
from agentgym.rollout.lockstep import Lockstep, VersionOf, registered_turns
from agentgym.server.models import resolve_model
from agentgym.trajectory import EpisodeStatus, ScoredSequences, Trajectory, to_scored_sequences
from agentgym.versions import VersionLog
from agentgym_trainer.lab.distortion import Distortion
from agentgym_trainer.lab.memory import extra_bytes, model_bytes
from agentgym_trainer.learner import Learner, load_model, make_accelerator
from agentgym_trainer.settings import TrainConfig

KEPT = (
    "policy/active_fraction", "policy/mask_pass_fraction", "policy/clip_pass_fraction", "policy/entropy",
    "policy/mean_lag", "discrepancy/k3", "discrepancy/ess_fraction", "discrepancy/max_abs_log_ratio", "staleness/k3",
    "staleness/ess_fraction", "total/k3", "total/ess_fraction", "total/ess_row_fraction", "anchor/ewma_age",
    "anchor/ewma_resets", "anchor/num_fallbacks", "gradient_norm", "time/anchor_s", "time/train_s",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Cell:
    """What distinguishes one run of a lab from its others.

    Example: `Cell(lag=8, anchor="snapshot", correction="token_mask", updates=1, seed=0)`.
    """

    lag: int
    anchor: str
    correction: str
    updates: int  # optimizer steps per batch
    seed: int

    @property
    def name(self) -> str:
        return f"lag{self.lag}-{self.anchor}-{self.correction}-updates{self.updates}-seed{self.seed}"


@dataclass(frozen=True, slots=True)
class Conditions:
    """What all cells of a lab share beside the configuration.

    Example: `Conditions(mismatch="bf16", partial=False)`.
    """

    mismatch: str = "bf16"
    partial: bool = False


def cell_config(base: TrainConfig, cell: Cell) -> TrainConfig:
    """`base` with what the cell sets. Raises what the configuration refuses, as pydantic says it."""
    values = base.model_dump()
    values["run"] |= {"name": cell.name, "seed": cell.seed}
    values["model"]["seed"] = values["rollout"]["seed"] = cell.seed
    values["rollout"]["max_staleness"] = cell.lag
    values["trainer"] |= {"anchor": cell.anchor, "updates_per_batch": cell.updates}
    values["trainer"]["on_discrepancy"] = "ignore"  # what is injected on purpose needs no alarm
    values["loss"]["correction"] = cell.correction
    return TrainConfig.model_validate(values)


def run_cell(config: TrainConfig, cell: Cell, conditions: Conditions) -> dict[str, Any]:
    """Trains; returns the cell, its held-out reward after the last step, and one row of figures a step."""
    began = time.perf_counter()
    set_seed(cell.seed)
    model_folder = resolve_model(config.model.name, config.env.id, config.model.seed)
    with tempfile.TemporaryDirectory(prefix="agentgym-lab-") as scratch:
        log = VersionLog(Path(scratch))
        learner = Learner(make_accelerator(config), load_model(model_folder, config), config, log)
        publish(learner, log)
        distortion = Distortion.parse(conditions.mismatch)
        lockstep = open_lockstep(config, model_folder, log, distortion)
        try:
            with distortion.on(lockstep.model, cell.seed):
                steps = [_step(number, config, cell, conditions, log, learner, lockstep) for number in
                         range(config.trainer.steps)]  # fmt: skip
            copies = extra_bytes(learner.anchor, learner.module) / model_bytes(learner.module)
            reward, failed = _held_out(config, lockstep, log.versions[-1])
        finally:
            lockstep.close()
    return {
        "cell": asdict(cell), "conditions": asdict(conditions), "heldout_reward": reward,
        "heldout_episodes": config.evaluation.episodes, "failed_episodes": failed + sum(s["failed"] for s in steps),
        "weight_copies": copies, "parameter_mb": model_bytes(learner.module) / 2**20,
        "seconds": time.perf_counter() - began, "steps": steps,
    }  # fmt: skip


def open_lockstep(config: TrainConfig, model_folder: Path, log: VersionLog, distortion: Distortion) -> Lockstep:
    """The environment, renderer and engine of `config`, sampling with what `distortion` makes of the log's weights."""
    rollout = config.rollout
    limits = EpisodeLimits(
        rollout.max_turns or registered_turns(config.env.id), rollout.max_tokens_per_turn,
        rollout.max_episode_tokens, rollout.max_episode_s, rollout.max_env_call_s,
    )  # fmt: skip
    return Lockstep(
        model_folder, config.env.id, limits, slots=config.engine.slots, weights=distortion.weights(log),
        seed=rollout.seed, temperature=rollout.temperature, env_kwargs=config.env.kwargs,
        tool_format=config.render.tool_format,
    )  # fmt: skip


def publish(learner: Learner, log: VersionLog) -> None:
    """The learner's present weights become the log's next version."""
    publication = learner.published()
    log.append(publication.weights, publication.metadata)


def rising(oldest: int, newest: int, max_turns: int) -> VersionOf:
    """Partial rollouts: turn 0 by `oldest`, the last possible turn by `newest`, evenly between."""
    return lambda _, turn: oldest + (newest - oldest) * min(turn, max_turns - 1) // max(1, max_turns - 1)


def scored(trajectories: Sequence[Trajectory]) -> tuple[list[ScoredSequences], int]:
    """What the trainer learns from, and how many episodes failed. Raises TrainingError if all did."""
    good = [to_scored_sequences(one) for one in trajectories if one.status is not EpisodeStatus.FAILED]
    if not good:
        raise TrainingError(f"every episode of a batch failed; the first: {trajectories[0].error}")
    return good, len(trajectories) - len(good)


def mean_reward(trajectories: Sequence[ScoredSequences]) -> float:
    valid = [one.score for one in trajectories if one.valid]
    return sum(valid) / len(valid) if valid else float("nan")


def _step(
    number: int, config: TrainConfig, cell: Cell, conditions: Conditions, log: VersionLog, learner: Learner,
    lockstep: Lockstep,
) -> dict[str, float]:  # fmt: skip
    oldest = max(0, number - cell.lag)
    log.hold("lab", range(oldest, number + 1))
    versions = rising(oldest, number if conditions.partial else oldest, lockstep.max_turns)
    began = time.perf_counter()
    batch, failed = scored(
        lockstep.play(lockstep.next_groups(config.rollout.groups_per_step, config.rollout.group_size), versions)
    )
    sampled_s = time.perf_counter() - began
    figures = learner.learn(batch, trainer_version=number)
    publish(learner, log)
    kept: Mapping[str, float] = {name: figures[name] for name in KEPT if name in figures}
    return {"reward": mean_reward(batch), "failed": failed, "time/sample_s": sampled_s, **kept}


def _held_out(config: TrainConfig, lockstep: Lockstep, version: int) -> tuple[float, int]:
    """Mean reward of the trained weights on tasks that no step has seen, and how many episodes failed."""
    if config.evaluation.episodes == 0:
        return float("nan"), 0
    plans = lockstep.evaluation(config.evaluation.episodes, "heldout", config.evaluation.temperature, seed=0)
    played, failed = scored(lockstep.play(plans, lambda episode, turn: version))
    return mean_reward(played), failed


def use_one_core() -> None:
    """Tiny matrices are slower in several threads, and other workers want the other cores."""
    torch.set_num_threads(1)
