"""One try at one member of a group: its name, its plan, and the next try. Must never know how episodes run."""

from __future__ import annotations

import dataclasses
import zlib
from dataclasses import dataclass

from agentgym.rollout.batch import CollectorSettings
from agentgym.rollout.correction import Correction
from agentgym.rollout.episode import EpisodePlan
from agentgym.rollout.schedule import ScheduledTask


@dataclass(frozen=True, slots=True)
class Attempt:
    """Each try has a name of its own, and with it a sampling seed of its own: a retry is no repetition.

    Example: the second try at the third member of group g-000004 is trajectory "g-000004.2r1".
    """

    task: ScheduledTask | Correction
    group_id: str
    member: int
    retry: int = 0

    @property
    def trajectory_id(self) -> str:
        return f"{self.group_id}.{self.member}" + (f"r{self.retry}" if self.retry else "")

    def again(self) -> Attempt:
        """The next try."""
        return dataclasses.replace(self, retry=self.retry + 1)

    def plan(self, settings: CollectorSettings) -> EpisodePlan:
        return EpisodePlan(
            self.trajectory_id,
            self.group_id,
            settings.env_id,
            self.task.task_id,
            self.task.seed,
            sampling_seed=zlib.crc32(f"{settings.seed} {self.trajectory_id}".encode()),
            temperature=settings.temperature,
            correction=self.task if isinstance(self.task, Correction) else None,
        )
