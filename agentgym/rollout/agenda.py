"""Which groups are under way, and which task comes next: the schedule's, or a correction. Pure.

Law: a group's task is here from its beginning until its batch or its discard has settled it, and a restart plays again
what was begun of the schedule, nothing else: a correction's original would be of an older policy by then.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from agentgym.errors import InputError
from agentgym.rollout.batch import OutsideTask
from agentgym.rollout.buffer import ReadyGroup
from agentgym.rollout.cipo import Corrections
from agentgym.rollout.correction import Correction, correction_figures
from agentgym.rollout.schedule import Schedule, ScheduledTask
from agentgym.trajectory import Trajectory

Task = ScheduledTask | Correction | OutsideTask


class Agenda:
    """Use: `begin` or `begin_outside`, `see` for every episode that ended, `settle`.

    >>> agenda = Agenda(Schedule(["a", "b"], seed=0), None)
    >>> agenda.begin(version=0)
    ScheduledTask(index=0, task_id='a', seed=...)
    """

    def __init__(self, schedule: Schedule | None, corrections: Corrections | None) -> None:
        """`schedule` is None where outside agents play all episodes."""
        self._schedule = schedule
        self._corrections = corrections
        self._tasks: dict[str, Task] = {}  # of groups neither consumed nor discarded

    @property
    def has_schedule(self) -> bool:
        return self._schedule is not None

    @property
    def num_groups(self) -> int:
        return len(self._tasks)

    @property
    def num_outside(self) -> int:
        """Groups of outside agents that are neither in training nor discarded."""
        return sum(isinstance(task, OutsideTask) for task in self._tasks.values())

    def begin(self, version: int) -> ScheduledTask | Correction:
        """The task of the group that begins now, under `version`."""
        assert self._schedule is not None, "outside agents play"
        task = self._corrections.next(version) if self._corrections else None
        if task is None:
            task = self._schedule.next()
        self._tasks[task.group_id] = task
        return task

    def begin_outside(self, group_id: str, task: OutsideTask) -> None:
        self._tasks[group_id] = task

    def see(self, trajectory: Trajectory, ready: ReadyGroup | None) -> None:
        """An episode that ended, and its group if that became ready by it."""
        task = self._tasks.get(trajectory.group_id)
        if self._corrections is None:
            return
        if isinstance(task, Correction):
            self._corrections.note(task, trajectory)
        elif isinstance(task, ScheduledTask) and ready is not None:
            self._corrections.offer(ready)

    def settle(self, group_id: str) -> Task:
        """The task of a group that is dealt with; it will not come again after a restart."""
        task = self._tasks.pop(group_id)
        if isinstance(task, ScheduledTask) and self._schedule is not None:
            self._schedule.finish(task.index)
        return task

    def figures(self, tasks: Sequence[Task], groups: Sequence[ReadyGroup]) -> dict[str, float]:
        """Those of a batch's corrections; none without them."""
        if self._corrections is None:
            return {}
        revised = [(task, group) for task, group in zip(tasks, groups, strict=True) if isinstance(task, Correction)]
        return {**self._corrections.figures(), **correction_figures(revised)}

    def position(self) -> dict[str, Any]:
        """Where the order of tasks stands; for `restore`."""
        position = {} if self._schedule is None else self._schedule.state()
        return position if self._corrections is None else {**position, "corrections": self._corrections.state()}

    def restore(self, position: Mapping[str, Any]) -> None:
        """Continues a saved order. Raises InputError for another one's."""
        if self._schedule is None:
            if position:
                raise InputError("the saved data position belongs to a run on its environment, and outside agents play")
            return
        self._schedule.restore(position)
        if self._corrections is not None and position.get("corrections"):
            self._corrections.restore(position["corrections"])
