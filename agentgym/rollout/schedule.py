"""In which order tasks are played. Law: the order is a pure function of (seed, index), so a position is a few numbers
and a resumed run neither skips a task nor plays one twice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from agentgym.errors import InputError


@dataclass(frozen=True, slots=True)
class ScheduledTask:
    """The task and seed that all siblings of a group share. Example: `ScheduledTask(4, "train-3121", 1836311903)`."""

    index: int  # place in the endless order
    task_id: str
    seed: int

    @property
    def group_id(self) -> str:
        return f"g-{self.index:06d}"


class Schedule:
    """An endless order over `task_ids`: a fresh permutation of all of them each epoch.

    A task that was handed out stays pending until `finish` says that a batch consumed it (or that it was given up);
    pending ones come first again after `restore`.

    >>> schedule = Schedule(["a", "b", "c"], seed=0)
    >>> [schedule.next().task_id for _ in range(3)]
    ['c', 'a', 'b']
    """

    def __init__(self, task_ids: Sequence[str], seed: int) -> None:
        if not task_ids:
            raise InputError("the environment has no training tasks; task_ids('train') is empty")
        self._task_ids = task_ids
        self._seed = seed
        self._next = 0
        self._again: list[int] = []  # handed out before a restart and never consumed
        self._pending: set[int] = set()
        self._epoch = -1
        self._order = np.empty(0, np.int64)

    def next(self) -> ScheduledTask:
        """The next task, which is pending from now on."""
        if self._again:
            index = self._again.pop(0)
        else:
            index = self._next
            self._next += 1
        self._pending.add(index)
        return self._task(index)

    def finish(self, index: int) -> None:
        """The task at `index` is dealt with and will not come again after a restart."""
        self._pending.discard(index)

    def state(self) -> dict[str, Any]:
        """Where the order stands. `{"seed": 0, "tasks": 3, "next": 7, "pending": [5, 6]}`."""
        pending = sorted(self._pending.union(self._again))
        return {"seed": self._seed, "tasks": len(self._task_ids), "next": self._next, "pending": pending}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continues from `state`. Raises InputError if it is another order's, whose indices mean other tasks."""
        mine = {"seed": self._seed, "tasks": len(self._task_ids)}
        theirs = {key: state.get(key) for key in mine}
        if mine != theirs:
            raise InputError(f"the saved data position belongs to {theirs}, this run has {mine}; resume with the same")
        following, pending = state.get("next"), state.get("pending")
        if not isinstance(following, int) or not isinstance(pending, list | tuple):
            raise InputError(f"a data position needs 'next' and 'pending', got {dict(state)!r}")
        if not all(isinstance(index, int) and 0 <= index < following for index in pending):
            raise InputError(f"pending indices must lie in [0, {following}), got {pending!r}")
        self._next = following
        self._again = sorted(set(pending))
        self._pending = set()

    def _task(self, index: int) -> ScheduledTask:
        epoch, place = divmod(index, len(self._task_ids))
        if epoch != self._epoch:
            self._order = np.random.default_rng([self._seed, epoch]).permutation(len(self._task_ids))
            self._epoch = epoch
        seed = int(np.random.default_rng([self._seed, epoch, place, 1]).integers(2**31))
        return ScheduledTask(index, self._task_ids[int(self._order[place])], seed)
