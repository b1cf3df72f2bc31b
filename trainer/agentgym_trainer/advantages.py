"""From scores to advantages. Must never know a token, a tensor or a model.

Law: a member that is not valid (a failed episode, a verdict that says nothing) is no zero: it is in no baseline, and
its own advantage does not exist (0.0 and `included` False). A baseline needs at least two valid members.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import numpy as np

from agentgym.errors import InputError, UnknownNameError
from agentgym.trajectory import EpisodeStatus, ScoredSequences

AdvantageKind = Literal["group_mean", "group_mean_std", "leave_one_out", "batch_mean"]
_STD_FLOOR = 1e-6  # the field's: scores that differ by rounding alone must not become advantages of order one
ADVANTAGES: tuple[str, ...] = get_args(AdvantageKind)


@dataclass(frozen=True, slots=True)
class Advantages:
    """The advantages of N trajectories, in their order.

    Example: scores (1, 0, 1, 1) of groups (a, a, b, b), the third not valid, by `group_mean`: values
    (0.5, -0.5, 0.0, 0.0), included (True, True, False, False), refused_groups ("b",): one valid member is no baseline.
    """

    values: np.ndarray  # [N] float64, 0.0 where not included
    included: np.ndarray  # [N] bool
    refused_groups: tuple[Hashable, ...]  # groups with fewer than two valid members, in order of appearance
    num_zero_variance_groups: int  # groups whose valid members all earned the same: no gradient from them

    def of(self, indices: Sequence[int]) -> Advantages:
        """Those of some of the trajectories, by the baselines of all; what is counted of groups is of all."""
        chosen = np.asarray(indices, dtype=np.int64)
        return replace(self, values=self.values[chosen], included=self.included[chosen])


def compute_advantages(
    kind: AdvantageKind, scores: Sequence[float], group_ids: Sequence[Hashable], valid: Sequence[bool]
) -> Advantages:
    """Advantages of N scores in groups.

    * `group_mean` (the default; Dr.GRPO): s - mean of the group
    * `group_mean_std` (GRPO): the same divided by the group's sample standard deviation + 1e-6
    * `leave_one_out` (RLOO): s - mean of the other members = n/(n-1) times `group_mean`
    * `batch_mean` (REINFORCE with a baseline): s - mean of the whole batch
    """
    if kind not in ADVANTAGES:
        raise UnknownNameError.of("advantage", kind, ADVANTAGES)
    if not len(scores) == len(group_ids) == len(valid):
        raise InputError(
            f"scores, group_ids and valid must be of one length, got {len(scores)}, {len(group_ids)}, {len(valid)}"
        )
    score = np.asarray(scores, dtype=np.float64)
    included = np.asarray(valid, dtype=bool).copy()
    if (odd := np.flatnonzero(included & ~np.isfinite(score))).size:
        raise InputError(
            f"a valid score must be finite, got {score[odd[0]]} in group {group_ids[odd[0]]!r} (number {odd[0]} of the "
            f"batch's {len(score)}); whoever scores must call such an episode invalid, which is in no baseline"
        )
    values = np.zeros(len(score))
    members = _members_by_group(group_ids)
    refused, zero_variance = [], 0
    for group_id, indices in members.items():
        chosen = indices[included[indices]]
        zero_variance += bool(len(chosen) >= 2 and np.ptp(score[chosen]) == 0.0)
        if kind == "batch_mean":
            continue
        if len(chosen) < 2:
            refused.append(group_id)
            included[indices] = False
        else:
            values[chosen] = _from_group(kind, score[chosen])
    if kind == "batch_mean":
        if included.sum() < 2:
            refused, included = list(members), np.zeros_like(included)
        else:
            values[included] = score[included] - score[included].mean()
    return Advantages(values, included, tuple(refused), zero_variance)


@dataclass(frozen=True, slots=True)
class Overlong:
    """DAPO's soft overlong punishment (arXiv 2503.14476): what is added to a score, 0 up to `buffer` tokens below the
    `limit` of an episode, falling in a straight line to -penalty at the limit.

    Example: `Overlong(limit=1000, buffer=200)` adds 0 at 800 tokens, -0.5 at 900, -1 at 1000.
    """

    limit: int
    buffer: int
    penalty: float = 1.0

    def of(self, length: int) -> float:
        return -self.penalty * min(max(length - (self.limit - self.buffer), 0) / self.buffer, 1.0)

    def figures(self, trajectories: Sequence[ScoredSequences]) -> dict[str, float]:
        """How many trajectories are punished, and by how much on average."""
        added = [self.of(episode_tokens(trajectory)) for trajectory in trajectories]
        return {
            "trajectory/overlong_fraction": sum(value < 0 for value in added) / max(len(added), 1),
            "trajectory/overlong_mean": sum(added) / max(len(added), 1),
        }


def episode_tokens(trajectory: ScoredSequences) -> int:
    """The tokens of its longest row, prompt and completions together: what the limit of an episode counts."""
    return max((len(sequence) for sequence in trajectory.sequences), default=0)


def trajectory_advantages(
    kind: AdvantageKind, trajectories: Sequence[ScoredSequences], overlong: Overlong | None = None
) -> Advantages:
    """The same from trajectories as the trainer takes them, their scores shaped by `overlong`; failed and invalid ones
    are not included."""
    return compute_advantages(
        kind,
        [
            trajectory.score + (overlong.of(episode_tokens(trajectory)) if overlong else 0.0)
            for trajectory in trajectories
        ],
        [trajectory.group_id for trajectory in trajectories],
        [trajectory.valid and trajectory.status is not EpisodeStatus.FAILED for trajectory in trajectories],
    )


def _members_by_group(group_ids: Sequence[Hashable]) -> dict[Hashable, np.ndarray]:
    members: dict[Hashable, list[int]] = {}
    for index, group_id in enumerate(group_ids):
        members.setdefault(group_id, []).append(index)
    return {group_id: np.asarray(indices) for group_id, indices in members.items()}


def _from_group(kind: AdvantageKind, scores: np.ndarray) -> np.ndarray:
    centred = scores - scores.mean()
    if np.ptp(scores) == 0.0:
        return np.zeros_like(scores)  # the mean of equal numbers may round away from them
    if kind == "group_mean_std":
        return centred / (scores.std(ddof=1) + _STD_FLOOR)
    if kind == "leave_one_out":
        return centred * len(scores) / (len(scores) - 1)
    return centred
