"""Episodes that are played to measure, not to train. Law: the same arguments mean the same tasks, seeds and draws, and
nothing of it reaches the buffer."""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import Callable

from agentgym.env import Split
from agentgym.errors import InputError
from agentgym.policy import Policy
from agentgym.render.protocol import Renderer
from agentgym.rollout.environments import EnvironmentPool
from agentgym.rollout.episode import EpisodePlan, run_episode
from agentgym.rollout.limits import EpisodeLimits
from agentgym.rollout.schedule import Schedule
from agentgym.trajectory import Trajectory


def plan_evaluation(
    env_id: str, environments: EnvironmentPool, episodes: int, split: Split, temperature: float, seed: int
) -> list[EpisodePlan]:
    """Tasks without repetition as long as the split has some. Raises InputError for a split that has none."""
    tasks = environments.task_ids(split)
    if not tasks:
        raise InputError(f"{env_id} has no {split} tasks")
    if episodes < 1:
        raise InputError(f"an evaluation needs episodes >= 1, got {episodes}")
    if not 0.0 <= temperature < float("inf"):
        raise InputError(f"temperature must be finite and >= 0, got {temperature}")
    if seed < 0:
        raise InputError(f"seed must be >= 0, got {seed}")
    schedule = Schedule(tasks, seed)
    plans = []
    for index in range(episodes):
        task = schedule.next()
        name = f"e-{split}-{seed}-{index:06d}"
        plans.append(
            EpisodePlan(name, name, env_id, task.task_id, task.seed, zlib.crc32(name.encode()), temperature)
        )  # fmt: skip
    return plans


async def run_evaluation(
    plans: list[EpisodePlan],
    environments: EnvironmentPool,
    renderer: Renderer,
    policy: Policy,
    limits: EpisodeLimits,
    in_flight: int,
    on_end: Callable[[Trajectory], None],
) -> None:
    """Plays `plans`, `in_flight` at a time, and hands each trajectory to `on_end` as it ends."""
    waiting = iter(plans)

    async def play() -> None:
        for plan in waiting:  # one iterator shared by all players
            on_end(await run_episode(plan, environments, renderer, policy, limits))

    async with asyncio.TaskGroup() as players:
        for _ in range(min(in_flight, len(plans))):
            players.create_task(play())
