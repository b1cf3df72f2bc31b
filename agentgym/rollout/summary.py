"""The figures of one batch. Pure.

Law: means of rewards are over valid episodes alone; what failed or was discarded is a figure of its own, never a zero.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from agentgym.rewards import Score
from agentgym.rollout.buffer import DiscardReason, ReadyGroup
from agentgym.trajectory import EpisodeStatus, Trajectory

SUCCESS = 1.0  # an episode succeeded when its score reached this


@dataclass(slots=True)
class StepCounts:
    """What happened since the last batch, delivered or not."""

    failed: int = 0
    retried: int = 0
    sampled_tokens: int = 0
    discarded: Counter[str] = field(default_factory=Counter)
    began: float = field(default_factory=time.monotonic)


def is_success(score: Score) -> bool:
    return score.valid and score.value >= SUCCESS - 1e-9


def succeeded(trajectory: Trajectory) -> bool:
    return trajectory.score is not None and is_success(trajectory.score)


def summarize(
    groups: Sequence[ReadyGroup], trainer_version: int, counts: StepCounts, outside: Sequence[ReadyGroup] = (),
    revised: Sequence[ReadyGroup] = (),
) -> dict[str, float]:  # fmt: skip
    """The metrics of a batch; `outside` are those of its groups that outside agents played, `revised` correction
    groups, which are in no mean of rewards: their episodes have seen an original. Lags are counted a token; a reward
    mean over no valid episode is left out."""
    members = [member for group in groups for member in group.members]
    valid = _valid(members)
    sessions = _valid([member for group in outside for member in group.members])
    seconds = max(time.monotonic() - counts.began, 1e-9)
    discarded = sum(n for reason, n in counts.discarded.items() if reason != DiscardReason.ZERO_VARIANCE.value)
    lags = Counter(trainer_version - v for member in members for v in _versions(member))
    tokens = sum(lags.values())
    metrics: dict[str, float] = {
        "groups": len(groups),
        "session_groups": len(outside),
        "episodes": len(members),
        "valid": len(valid),
        "failed": counts.failed,
        "retried": counts.retried,
        "discarded_groups": discarded,
        "discarded_fraction": discarded / (discarded + len(groups)),
        "truncated_fraction": _mean([member.status is EpisodeStatus.TRUNCATED for member in members]),
        "sampled_tokens": tokens,
        "tokens_per_s": counts.sampled_tokens / seconds,
        "seconds": seconds,
        "staleness_mean": sum(lag * count for lag, count in lags.items()) / tokens if tokens else 0.0,
        "staleness_max": max(lags, default=0),
        "versions_per_trajectory": _mean([len(set(_versions(member))) for member in members]),
        "partial_fraction": _mean([len(set(_versions(member))) > 1 for member in members]),
    }
    corrections = {group.group_id for group in revised}
    plain = [member for member in valid if member.group_id not in corrections]
    if plain:
        metrics["reward_mean"] = _mean([member.score.value for member in plain if member.score])
        metrics["success_rate"] = _mean([succeeded(member) for member in plain])
    if sessions:
        metrics["session_reward_mean"] = _mean([member.score.value for member in sessions if member.score])
    for reason in DiscardReason:
        metrics[f"discarded_{reason.value}"] = counts.discarded[reason.value]
    for name in ("turns", "tool_errors", "seconds", "env_s", "sampling_s"):
        metrics[f"episode_{name}_mean"] = _mean([member.metrics[name] for member in members])
    return {name: float(value) for name, value in metrics.items()}


def _valid(members: Sequence[Trajectory]) -> list[Trajectory]:
    return [member for member in members if member.score is not None and member.score.valid]


def _versions(member: Trajectory) -> list[int]:
    return [v for turn in member.turns for v in turn.completion.policy_versions]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
