"""Which trajectories of a batch may be learned from. Must never know a tensor.

Law: whatever leaves a batch leaves by a reason that is counted; a batch that cannot be right is an error that says why,
raised before anything is learned from it, on every rank alike.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from agentgym.errors import BadLogprobsError, MixedModelsError
from agentgym.trajectory import ScoredSequences
from agentgym_trainer.batch import StepRows


@dataclass(frozen=True, slots=True)
class Admission:
    """The trajectories that may be learned from, and what was left out for its lag.

    Example: of three trajectories one holds a token of version 1 while the trainer is at 4 and the bound is 2:
    two admitted, num_stale 1.
    """

    trajectories: tuple[ScoredSequences, ...]
    num_stale: int  # trajectories with a token that is older than the bound
    num_stale_tokens: int  # their sampled tokens

    def figures(self) -> dict[str, float]:
        return {
            "trajectory/num_stale": float(self.num_stale),
            "trajectory/num_stale_tokens": float(self.num_stale_tokens),
        }


def admit(
    trajectories: Sequence[ScoredSequences], *, trainer_version: int, max_staleness: int, model: str = ""
) -> Admission:
    """Leaves out trajectories with a token of more than `max_staleness` versions ago: the service bounds the lag, so
    that they come from a service that does not. Raises MixedModelsError if they were sampled by several models, or by
    another one than `model` ("" where the trainer does not say)."""
    _check_models(trajectories, model)
    oldest_allowed = trainer_version - max_staleness
    fresh, stale = [], []
    for trajectory in trajectories:
        (fresh if _oldest(trajectory, trainer_version) >= oldest_allowed else stale).append(trajectory)
    return Admission(tuple(fresh), len(stale), sum(trajectory.num_sampled_tokens for trajectory in stale))


def check_logprobs(updates: Sequence[StepRows], max_dropped_fraction: float) -> None:
    """Raises BadLogprobsError if more loss tokens lack a finite behavior logprob than may be dropped."""
    dropped = sum(rows.num_dropped for rows in updates)
    total = dropped + sum(rows.num_loss_tokens for rows in updates)
    if dropped > max_dropped_fraction * total:
        raise BadLogprobsError(
            f"{dropped} of {total} loss tokens have no finite behavior logprob, more than loss.max_dropped_fraction = "
            f"{max_dropped_fraction:g}: the engine's logprobs are broken; look at it, or allow more"
        )


def _check_models(trajectories: Sequence[ScoredSequences], own: str) -> None:
    found = Counter(trajectory.model for trajectory in trajectories)
    if len(found) > 1:
        each = ", ".join(f"{count} of {name or 'a model not named'}" for name, count in found.most_common())
        raise MixedModelsError(f"the batch mixes models: {each} trajectories; give the trainer a service of one model")
    (name,) = found or {""}
    if name and own and name != own:
        raise MixedModelsError(
            f"the batch was sampled by model {name} and the one in training is {own}; start service and trainer with "
            "one model.name"
        )


def _oldest(trajectory: ScoredSequences, otherwise: int) -> int:
    # A sampled token without a version is not old: `batch.collect_rows` refuses it.
    return min(
        (v for row in trajectory.sequences for v, loss in zip(row.policy_versions, row.loss_mask) if loss and v >= 0),
        default=otherwise,
    )
