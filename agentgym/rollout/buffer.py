"""The group buffer: which groups are being played, which may be trained on, and which are too old. Pure; no clock, no
tasks, no files.

Laws: a group is delivered once or discarded once, never both and never silently; no delivered token is older than
`max_staleness` versions; and the number of groups started and not yet consumed is bounded.

Why the bound and the window leave next to nothing to discard. Let S = max_staleness and g = groups_per_step, one batch
of g groups per version. A group may be started only while fewer than (S + 1) g groups are started and not consumed,
where a batch counts as consumed when its update is published. So at version v at most (S + 1) g - 1 others are ahead of
it, they leave g at a time, and it is itself in the batch of version v + S at the latest: a lag of at most S.
That holds if batches take the oldest groups first, which slow episodes break: younger groups are ready before them.
So `take` looks ahead: those that will be too old after k more versions must fit the k batches until then (at most k g
of them). If the groups that are ready would leave more than that behind, it waits for the slow ones.
Only groups whose episodes fail, or a trainer that skips versions, are then left to discard.

With `drop_zero_variance` (DAPO's dynamic sampling, arXiv 2503.14476) a group whose valid members all scored the same is
discarded when it is complete, which makes room for the start of another: batches are full of groups with a gradient.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from agentgym.errors import EnvError, InputError
from agentgym.trajectory import EpisodeStatus, Trajectory

MIN_VALID = 2  # a baseline needs a sibling


class DiscardReason(StrEnum):
    STALE_AT_ADMISSION = "stale_at_admission"
    STALE_AT_CONSUMPTION = "stale_at_consumption"
    TOO_FEW_VALID = "too_few_valid"
    ZERO_VARIANCE = "zero_variance"  # all valid members scored the same: no gradient in it (drop_zero_variance)
    INCOMPLETE = "incomplete"  # outside agents opened it and did not finish enough episodes


@dataclass(frozen=True, slots=True)
class Discard:
    """A group that will not be trained on, and why.

    Example: `Discard("g-000004", DiscardReason.STALE_AT_CONSUMPTION, "oldest token of version 1, trainer at 4")`.
    """

    group_id: str
    reason: DiscardReason
    detail: str


@dataclass(frozen=True, slots=True)
class ReadyGroup:
    """A complete group: its episodes that did not fail, in the order of their ends, at least two of them valid.

    Example: `ReadyGroup("g-000004", oldest_version=2, members=(trajectory, trajectory))`.
    """

    group_id: str
    oldest_version: int
    members: tuple[Trajectory, ...]


@dataclass(frozen=True, slots=True)
class Taken:
    """What `take` found: a batch, or None while there is none; and what had become too old.

    Example: `Taken(groups=None, discarded=())`.
    """

    groups: tuple[ReadyGroup, ...] | None
    discarded: tuple[Discard, ...]


@dataclass(slots=True)
class _OpenGroup:
    order: int
    start_version: int
    awaited: bool
    members: list[Trajectory] = field(default_factory=list)


class GroupBuffer:
    """Groups of `group_size` siblings between their start and their consumption.

    >>> buffer = GroupBuffer(group_size=2, groups_per_step=1, max_staleness=1)
    >>> buffer.start("g-0", version=0)
    >>> buffer.put(trajectory, version=0), buffer.put(sibling, version=0)
    (None, None)
    >>> buffer.take(num_groups=1, trainer_version=0).groups
    (ReadyGroup(group_id='g-0', ...),)
    """

    def __init__(
        self, group_size: int, groups_per_step: int, max_staleness: int, *, drop_zero_variance: bool = False
    ) -> None:
        if group_size < MIN_VALID or groups_per_step < 1 or max_staleness < 0:
            raise InputError(
                f"a group buffer needs group_size >= {MIN_VALID}, groups_per_step >= 1 and max_staleness >= 0, got "
                f"{group_size}, {groups_per_step} and {max_staleness}"
            )
        self.group_size = group_size
        self.max_staleness = max_staleness
        self.drop_zero_variance = drop_zero_variance
        self.zero_variance_in_a_row = 0  # groups dropped for it since one was kept
        self.most_groups = (max_staleness + 1) * groups_per_step
        self._open: dict[str, _OpenGroup] = {}
        self._ready: dict[str, tuple[int, ReadyGroup]] = {}  # with the order of its start
        self._in_training = 0
        self._started = 0

    # ------------------------------------------------------------------------------------------------- questions

    @property
    def num_ready(self) -> int:
        return len(self._ready)

    def ready(self, group_id: str) -> ReadyGroup | None:
        """The group of that name, if it is complete and waits for its batch."""
        return self._ready[group_id][1] if group_id in self._ready else None

    @property
    def num_unconsumed(self) -> int:
        """Groups started and not yet consumed, those in training included."""
        return len(self._open) + len(self._ready) + self._in_training

    @property
    def may_start(self) -> bool:
        return self.num_unconsumed < self.most_groups

    def live_versions(self) -> set[int]:
        """The versions that tokens of finished episodes carry which may still be delivered."""
        waiting = [member for group in self._open.values() for member in group.members]
        waiting += [member for _, group in self._ready.values() for member in group.members]
        return {v for member in waiting for turn in member.turns for v in turn.completion.policy_versions}

    # ---------------------------------------------------------------------------------------------------- orders

    def start(self, group_id: str, version: int, *, awaited: bool = True) -> None:
        """A group whose first episode starts now, under `version`. One that is not `awaited` holds up no batch: outside
        agents may be gone, and then the trainer would wait for nobody."""
        if group_id in self._open or group_id in self._ready:
            raise InputError(f"group {group_id} was started already")
        if not self.may_start:
            raise InputError(f"{self.num_unconsumed} groups are started and not consumed; no more may start")
        self._open[group_id] = _OpenGroup(self._started, version, awaited)
        self._started += 1

    def put(self, trajectory: Trajectory, version: int) -> Discard | None:
        """Adds an ended episode, which is not going to be retried. The last one of its group completes it: it becomes
        ready, or is discarded; `version` is the one served now."""
        group = self._open.get(trajectory.group_id)
        if group is None:
            raise EnvError(f"trajectory {trajectory.trajectory_id} belongs to no open group ({trajectory.group_id})")
        group.members.append(trajectory)
        if len(group.members) < self.group_size:
            return None
        group_id = trajectory.group_id
        del self._open[group_id]
        members = tuple(member for member in group.members if member.status is not EpisodeStatus.FAILED)
        valid = sum(member.score is not None and member.score.valid for member in members)
        if valid < MIN_VALID:
            return Discard(group_id, DiscardReason.TOO_FEW_VALID, _why_few(group.members, valid))
        oldest = min((v for member in members if (v := member.oldest_version) is not None), default=group.start_version)
        if version - oldest > self.max_staleness:
            return Discard(
                group_id, DiscardReason.STALE_AT_ADMISSION, f"oldest token of version {oldest}, now {version}"
            )
        if self.drop_zero_variance:
            scores = [member.score.value for member in members if member.score is not None and member.score.valid]
            if min(scores) == max(scores):
                self.zero_variance_in_a_row += 1
                return Discard(group_id, DiscardReason.ZERO_VARIANCE, f"{valid} valid members scored {scores[0]:g}")
            self.zero_variance_in_a_row = 0
        self._ready[group_id] = (group.order, ReadyGroup(group_id, oldest, members))
        return None

    def is_too_old(self, group_id: str, version: int) -> bool:
        """Whether an open group holds an episode that is too old already, so that it will be discarded in any case."""
        oldest = [member.oldest_version for member in self._open[group_id].members]
        return any(v is not None and version - v > self.max_staleness for v in oldest)

    def give_up(self, group_id: str, reason: DiscardReason, detail: str) -> Discard:
        """An open group that nobody will complete."""
        if self._open.pop(group_id, None) is None:
            raise InputError(f"there is no open group {group_id}")
        return Discard(group_id, reason, detail)

    def take(self, num_groups: int, trainer_version: int) -> Taken:
        """`num_groups` groups to train on at `trainer_version`, oldest first, or None while there are too few or while
        it is worth waiting for slow ones (see above). Asking again ends the training of the batch before."""
        self._in_training = 0
        oldest_allowed = trainer_version - self.max_staleness
        stale = [group for _, group in self._ready.values() if group.oldest_version < oldest_allowed]
        for group in stale:
            del self._ready[group.group_id]
        discarded = tuple(
            Discard(
                group.group_id,
                DiscardReason.STALE_AT_CONSUMPTION,
                f"oldest token of version {group.oldest_version}, trainer at {trainer_version}",
            )
            for group in stale
        )
        if len(self._ready) < num_groups:
            return Taken(None, discarded)
        in_order = sorted(self._ready.values(), key=lambda entry: (entry[1].oldest_version, entry[0]))
        chosen = tuple(group for _, group in in_order[:num_groups])
        if self._leaves_too_many(chosen[-1].oldest_version, num_groups, oldest_allowed):
            return Taken(None, discarded)
        for group in chosen:
            del self._ready[group.group_id]
        self._in_training = num_groups
        return Taken(chosen, discarded)

    def publish(self) -> None:
        """New weights are served: the batch in training is consumed."""
        self._in_training = 0

    def _leaves_too_many(self, newest_chosen: int, num_groups: int, oldest_allowed: int) -> bool:
        """Whether a slow group older than a chosen one would be left with no batch to be in before it is too old."""
        starts = [group.start_version for group in self._open.values() if group.awaited]
        for k in range(self.max_staleness + 1):
            late = sum(start <= oldest_allowed + k for start in starts)
            if late > k * num_groups and newest_chosen > oldest_allowed + k:
                return True
        return False


def _why_few(members: list[Trajectory], valid: int) -> str:
    whys = [member.error or (member.score.why if member.score else "") for member in members]
    reasons = sorted({why for why in whys if why})
    return f"{valid} of {len(members)} valid: {'; '.join(reasons)[:500]}"
