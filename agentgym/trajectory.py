"""An episode as data, and its flattening into token sequences. Must never know torch.

Law: no sampled token is ever re-encoded, and each one is delivered to the trainer exactly once. Index t always
concerns token t itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from agentgym.errors import InputError
from agentgym.messages import Message
from agentgym.policy import Completion
from agentgym.rewards import Score

NO_VERSION = -1  # the version of a token that no policy sampled


class EpisodeStatus(StrEnum):
    """How an episode ended: Gymnasium's two, plus our own failure."""

    TERMINATED = "terminated"
    TRUNCATED = "truncated"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Turn:
    """One model reply and what the environment answered.

    Example: `Turn(prompt_ids=(1, 7, 8), completion=Completion((5, 2), (-0.1, -0.2), (0, 0), (0, 0), "stop"),
    action=call("move", dir="up"), observation=(Message("tool", "1 left", tool_call_id="call_0"),), reward=0.0)`.
    """

    prompt_ids: tuple[int, ...]  # [P] the whole context that the completion continued
    completion: Completion
    action: Message
    observation: tuple[Message, ...]
    reward: float


@dataclass(frozen=True, slots=True)
class Trajectory:
    """One episode, built once when it has ended.

    Example: `Trajectory("t-0007", "g-0001", "agentgym/Maze-v0", "3121", 17, opening=(Message("user", "..."),),
    turns=(turn,), status=EpisodeStatus.TERMINATED, score=Score(1.0, {"reached": 1.0}, True, ""),
    metrics={"seconds": 0.2}, error=None)`. `score` is None exactly when the episode failed.
    """

    trajectory_id: str
    group_id: str
    env_id: str
    task_id: str
    seed: int
    opening: tuple[Message, ...]  # the conversation before the first reply
    turns: tuple[Turn, ...]
    status: EpisodeStatus
    score: Score | None
    metrics: Mapping[str, float]
    error: str | None

    @property
    def oldest_version(self) -> int | None:
        """The version of the oldest sampled token, or None if nothing was sampled."""
        return min((v for turn in self.turns for v in turn.completion.policy_versions), default=None)

    @property
    def num_sampled_tokens(self) -> int:
        return sum(len(turn.completion.token_ids) for turn in self.turns)


@dataclass(frozen=True, slots=True)
class TokenSequence:
    """A row of the trainer: parallel tuples of one length T. Where nothing was sampled: mask False, logprob 0.0,
    versions -1. There is no split into prompt and completion.

    Example: `TokenSequence((1, 7, 5, 2), (False, False, True, True), (0.0, 0.0, -0.1, -0.2), (-1, -1, 3, 3),
    (-1, -1, 3, 3))`.
    """

    token_ids: tuple[int, ...]
    loss_mask: tuple[bool, ...]  # True = the policy sampled this token
    behavior_logprobs: tuple[float, ...]
    policy_versions: tuple[int, ...]
    kv_versions: tuple[int, ...]

    def __post_init__(self) -> None:
        columns = (self.loss_mask, self.behavior_logprobs, self.policy_versions, self.kv_versions)
        if any(len(column) != len(self.token_ids) for column in columns):
            lengths = [len(self.token_ids), *(len(column) for column in columns)]
            raise InputError(f"the arrays of a token sequence must be of one length, got {lengths}")

    def __len__(self) -> int:
        return len(self.token_ids)

    @property
    def num_loss_tokens(self) -> int:
        return sum(self.loss_mask)


@dataclass(frozen=True, slots=True)
class ScoredSequences:
    """One trajectory as the trainer takes it: its rows and what it earned, without a message.

    Example: `ScoredSequences("t-0007", "g-0001", "agentgym/Maze-v0", "terminated", 1.0, True, {"reached": 1.0},
    (sequence,), 12)`. `delivered_fraction` of a batch is loss tokens in rows / `num_sampled_tokens`.
    """

    trajectory_id: str
    group_id: str
    env_id: str
    status: EpisodeStatus
    score: float
    valid: bool
    components: Mapping[str, float]
    sequences: tuple[TokenSequence, ...]
    num_sampled_tokens: int
    model: str = ""  # which model sampled it (`agentgym.server.models.model_id`); "": its source does not say


def to_sequences(trajectory: Trajectory) -> tuple[TokenSequence, ...]:
    """Flattens an episode: turns whose prompt continues the row before them extend it, any other turn (a history
    that the agent rewrote) begins one more row, in which earlier tokens are context without loss."""
    rows: list[_Row] = []
    for turn in trajectory.turns:
        if not rows or not rows[-1].is_prefix_of(turn.prompt_ids):
            rows.append(_Row())
        rows[-1].extend(turn)
    return tuple(row.freeze() for row in rows)


def to_scored_sequences(trajectory: Trajectory, model: str = "") -> ScoredSequences:
    """The trainer's view of a trajectory that has not failed. Raises InputError for one that has."""
    if trajectory.score is None:
        raise InputError(f"trajectory {trajectory.trajectory_id} failed and has no score: {trajectory.error}")
    score = trajectory.score
    return ScoredSequences(
        trajectory.trajectory_id, trajectory.group_id, trajectory.env_id, trajectory.status, score.value, score.valid,
        dict(score.components), to_sequences(trajectory), trajectory.num_sampled_tokens, model,
    )  # fmt: skip


class _Row:
    """A token sequence under construction."""

    def __init__(self) -> None:
        self.token_ids: list[int] = []
        self.loss_mask: list[bool] = []
        self.logprobs: list[float] = []
        self.policy_versions: list[int] = []
        self.kv_versions: list[int] = []

    def is_prefix_of(self, prompt_ids: Sequence[int]) -> bool:
        return tuple(prompt_ids[: len(self.token_ids)]) == tuple(self.token_ids)

    def extend(self, turn: Turn) -> None:
        context = turn.prompt_ids[len(self.token_ids) :]
        self.token_ids += context
        self.loss_mask += [False] * len(context)
        self.logprobs += [0.0] * len(context)
        self.policy_versions += [NO_VERSION] * len(context)
        self.kv_versions += [NO_VERSION] * len(context)
        sampled = turn.completion
        self.token_ids += sampled.token_ids
        self.loss_mask += [True] * len(sampled.token_ids)
        self.logprobs += sampled.logprobs
        self.policy_versions += sampled.policy_versions
        self.kv_versions += sampled.kv_versions

    def freeze(self) -> TokenSequence:
        return TokenSequence(
            tuple(self.token_ids), tuple(self.loss_mask), tuple(self.logprobs), tuple(self.policy_versions),
            tuple(self.kv_versions),
        )  # fmt: skip
