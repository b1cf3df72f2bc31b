"""The numbers of a run that collecting obeys, and what it hands over. Must never know how episodes are played."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from agentgym.rollout.buffer import ReadyGroup
from agentgym.rollout.cipo import CipoSection
from agentgym.rollout.correction import Correction
from agentgym.rollout.schedule import ScheduledTask


@dataclass(frozen=True, slots=True)
class CollectorSettings:
    """The numbers of a run that concern collecting. Example: `CollectorSettings("agentgym/Maze-v0", 8, 48, 2, 64)`."""

    env_id: str
    group_size: int
    groups_per_step: int
    max_staleness: int
    in_flight: int
    temperature: float = 1.0
    max_retries: int = 2
    stall_warning_s: float = 30.0
    seed: int = 0
    drop_zero_variance: bool = False
    cipo: CipoSection | None = None


class Outside(Protocol):
    """The episodes that outside agents play, as far as a batch depends on them."""

    def live_versions(self) -> set[int]:
        """The versions that their tokens carry or may carry."""
        ...

    def waiting_for(self) -> str:
        """What their groups lack, in one line."""
        ...


@dataclass(frozen=True, slots=True)
class OutsideTask:
    """The task and seed of a group that outside agents play. Example: `OutsideTask("django__django-11099", 0)`."""

    task_id: str
    seed: int


@dataclass(frozen=True, slots=True)
class CollectedBatch:
    """A batch as the service has it: whole trajectories. `tasks` are parallel to `groups`."""

    groups: tuple[ReadyGroup, ...]
    tasks: tuple[ScheduledTask | Correction | OutsideTask, ...]
    metrics: Mapping[str, float]
    live_versions: tuple[int, ...]
    data_position: Mapping[str, Any]
