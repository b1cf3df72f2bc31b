"""Episodes that outside agents play, on their way into the buffer. Must never know HTTP or a conversation.

Laws: an episode belongs to the group of the task and seed that its caller declared, and to one group alone; a place
that an episode leaves without a score is free for another one; and whatever never reaches the trainer (an episode that
expired, a group that stayed incomplete) is counted by why, never scored as zero.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from agentgym.errors import InputError
from agentgym.rollout.buffer import DiscardReason
from agentgym.rollout.collector import Collector
from agentgym.trajectory import Trajectory


@dataclass(frozen=True, slots=True)
class Declared:
    """What a caller says an episode is: siblings agree in all of it. `group` tells apart groups of one task and seed.

    Example: `Declared("django__django-11099", seed=0, group="")`.
    """

    task_id: str
    seed: int
    group: str = ""


@dataclass(slots=True)
class _Group:
    group_id: str
    declared: Declared
    open: set[str] = field(default_factory=set)  # episodes under way
    finished: int = 0
    touched: float = 0.0


class Intake:
    """Assigns outside episodes to groups and hands them to the collector.

    >>> intake = Intake(collector, group_ttl_s=3600.0)
    >>> group_id = intake.open("ses-1", Declared("django__django-11099", 0))
    >>> intake.finish("ses-1", trajectory)
    """

    def __init__(self, collector: Collector, group_ttl_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._collector = collector
        self._group_size = collector.settings.group_size
        self._group_ttl_s = group_ttl_s
        self._clock = clock
        self._groups: dict[str, _Group] = {}  # incomplete, by id
        self._of: dict[str, _Group] = {}  # the group of each episode under way
        self._begun = 0

    @property
    def num_open(self) -> int:
        return len(self._of)

    def waiting_for(self) -> str:
        """What these groups lack, in one line."""
        missing = sum(self._group_size - group.finished for group in self._groups.values())
        return f"{self.num_open} open, {len(self._groups)} groups incomplete, which lack {missing} episodes"

    def open(self, episode_id: str, declared: Declared) -> str:
        """The group of an episode that begins now. Raises ServiceError while no further group may begin."""
        if episode_id in self._of:
            raise InputError(f"episode {episode_id} was opened already")
        group = next((group for group in self._groups.values() if self._takes(group, declared)), None)
        if group is None:
            group = _Group(f"s-{self._begun:06d}", declared)
            self._collector.begin_outside(group.group_id, declared.task_id, declared.seed)
            self._begun += 1
            self._groups[group.group_id] = group
        group.open.add(episode_id)
        group.touched = self._clock()
        self._of[episode_id] = group
        self._collector.feed.begin(episode_id, group.group_id)
        return group.group_id

    def finish(self, episode_id: str, trajectory: Trajectory) -> None:
        """An episode that has its score takes its place in its group."""
        group = self._leave(episode_id)
        group.finished += 1
        if group.finished == self._group_size:
            del self._groups[group.group_id]
        self._collector.put(trajectory)

    def fail(self, episode_id: str, trajectory: Trajectory) -> None:
        """An episode that ended without a score; its place is free again."""
        group = self._leave(episode_id)
        self._collector.put_failed(trajectory)
        if not group.open and not group.finished:
            self._give_up(group, f"its only episode ended without a score: {trajectory.error}")

    def sweep(self) -> None:
        """Gives up groups that nobody completes."""
        now = self._clock()
        for group in list(self._groups.values()):
            if group.open:
                continue
            if self._collector.is_too_old(group.group_id):
                self._give_up(group, "its first episodes are too old by now", DiscardReason.STALE_AT_ADMISSION)
            elif now - group.touched >= self._group_ttl_s:
                many = f"{group.finished} of {self._group_size} finished"
                self._give_up(group, f"{many}, and none opened for {self._group_ttl_s:g} s")

    def _takes(self, group: _Group, declared: Declared) -> bool:
        return group.declared == declared and group.finished + len(group.open) < self._group_size

    def _leave(self, episode_id: str) -> _Group:
        group = self._of.pop(episode_id, None)
        if group is None:
            raise InputError(f"episode {episode_id} is not open")
        group.open.remove(episode_id)
        group.touched = self._clock()
        return group

    def _give_up(self, group: _Group, why: str, reason: DiscardReason = DiscardReason.INCOMPLETE) -> None:
        del self._groups[group.group_id]
        self._collector.give_up(group.group_id, reason, f"task {group.declared.task_id!r}: {why}")
