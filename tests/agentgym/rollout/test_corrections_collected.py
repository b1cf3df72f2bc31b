"""rollout.cipo in the collector: plain groups and correction groups in one batch, and what a restart keeps."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agentgym.engine.gate import VersionedPolicy
from agentgym.engine.protocol import WeightUpdate
from agentgym.env import AgentEnv
from agentgym.errors import InputError
from agentgym.messages import Message
from agentgym.render import ChatTemplateRenderer
from agentgym.rollout.batch import CollectedBatch, CollectorSettings
from agentgym.rollout.cipo import CipoSection
from agentgym.rollout.collector import Collector
from agentgym.rollout.correction import COMPONENT, Correction
from agentgym.rollout.environments import EnvironmentPool
from agentgym.rollout.limits import EpisodeLimits
from agentgym.rollout.schedule import Schedule, ScheduledTask
from agentgym.rollout.store import TrajectoryStore
from agentgym.rollout.summary import succeeded
from agentgym.testing.scripted_engine import ScriptedEngine, hashed_logits
from agentgym.trajectory import Trajectory

CIPO = CipoSection(share=0.5, penalty=0.25, correct_min=0.5, correct_max=0.5, instruction="up")


class Parity(AgentEnv):
    """Two replies; correct where both together have an even number of letters."""

    def reset_task(self, task: str, rng: np.random.Generator) -> str:
        self.letters, self.left = 0, 2
        return "1 up"

    def reply(self, action: Message) -> str:
        self.letters += len(action.content)
        self.left -= 1
        if not self.left:
            self.finish(even=float(self.letters % 2 == 0))
            return ""
        return "goal"


async def collected(
    renderer: ChatTemplateRenderer,
    folder: Path,
    num_batches: int,
    position: Mapping[str, Any] | None = None,
    **options: Any,
) -> list[CollectedBatch]:
    engine = ScriptedEngine(hashed_logits(max(renderer.encoder.control_ids) + 1), max_context=100)
    environments = EnvironmentPool(Parity, most=16, max_call_s=5.0)
    numbers: dict[str, Any] = {"group_size": 4, "groups_per_step": 4, "max_staleness": 1, "in_flight": 6} | options
    collector = Collector(
        CollectorSettings("my/Parity-v0", **numbers), environments, renderer, VersionedPolicy(engine),
        EpisodeLimits(max_turns=2, max_tokens_per_turn=5, max_episode_tokens=100),
        Schedule(environments.task_ids("train"), 0), TrajectoryStore(folder),
    )  # fmt: skip
    batches = []
    try:
        if position is not None:
            collector.restore(position)
        collector.collect(True)
        for version in range(num_batches):
            batch = await collector.take(version, 200.0, step=version + 1)
            assert batch is not None
            batches.append(batch)
            await collector.publish(WeightUpdate(version + 1, Path("unread")))
    finally:
        await collector.close()
        await environments.close()
    return batches


def of(batches: list[CollectedBatch], kind: type) -> list[tuple[Any, tuple[Trajectory, ...]]]:
    return [
        (task, group.members)
        for batch in batches
        for task, group in zip(batch.tasks, batch.groups, strict=True)
        if isinstance(task, kind)
    ]


def said(trajectory: Trajectory) -> tuple[Message, ...]:
    return tuple(message for turn in trajectory.turns for message in (turn.action, *turn.observation))


def test_batches_hold_corrections_of_what_the_policy_lately_did(renderer: ChatTemplateRenderer, tmp_path: Path) -> None:
    batches = asyncio.run(collected(renderer, tmp_path, 8, cipo=CIPO))
    corrections, plain = of(batches, Correction), of(batches, ScheduledTask)
    assert len(corrections) >= 8
    assert len(plain) >= len(corrections)  # a half at most
    assert {task.original.correct for task, _ in corrections} == {False, True}
    seen = {(m.task_id, m.seed, said(m)): m for _, members in plain for m in members}
    begun_under = []
    for task, members in corrections:
        assert {m.group_id for m in members} == {task.group_id}
        assert {(m.task_id, m.seed) for m in members} == {(task.task_id, task.seed)}
        original = seen.get((task.task_id, task.seed, task.original.said))  # None: its group came too late for a batch
        if original is not None:
            assert not original.group_id.startswith("c-")
            assert succeeded(original) is task.original.correct
            oldest = min(v for m in members for t in m.turns for v in t.completion.policy_versions)
            begun_under.append(oldest - task.original.oldest_version)
        for member in members:
            assert member.opening == task.opening((Message("user", "1 up"),))
            assert member.score is not None
            wrong = member.score.components["even"] == 0.0
            assert member.score.components[COMPONENT] == (-0.25 if wrong and task.original.correct else 0.0)
    assert len(begun_under) >= 4
    assert all(0 <= lag <= 1 for lag in begun_under)
    assert all(COMPONENT not in m.score.components for _, members in plain for m in members if m.score)


def test_the_figures_tell_corrections_apart(renderer: ChatTemplateRenderer, tmp_path: Path) -> None:
    batches = asyncio.run(collected(renderer, tmp_path, 6, cipo=CIPO))
    for batch in batches:
        plain = [m.score.value for _, members in of([batch], ScheduledTask) for m in members if m.score]
        assert batch.metrics["reward_mean"] == pytest.approx(np.mean(plain))
        assert batch.metrics["cipo/groups"] == len(of([batch], Correction))
        assert batch.metrics["cipo/correct_share"] == 0.5
    assert any("cipo/wrong_to_correct" in batch.metrics for batch in batches)
    assert any("cipo/correct_to_wrong" in batch.metrics for batch in batches)


def test_the_ratio_learns_from_revisions(renderer: ChatTemplateRenderer, tmp_path: Path) -> None:
    adaptive = CIPO.model_copy(update={"correct_min": 0.0, "correct_max": 1.0})
    batches = asyncio.run(collected(renderer, tmp_path, 6, cipo=adaptive))
    states = [batch.data_position["corrections"] for batch in batches]
    assert states[-1]["wrong_errors"] != 0.5
    assert states[-1]["correct_errors"] != 0.5


def test_without_the_option_there_is_nothing_of_it(renderer: ChatTemplateRenderer, tmp_path: Path) -> None:
    batches = asyncio.run(collected(renderer, tmp_path, 3))
    assert of(batches, Correction) == []
    assert not any(name.startswith("cipo/") for batch in batches for name in batch.metrics)
    assert all("corrections" not in batch.data_position for batch in batches)


def test_a_restart_goes_on_with_the_ratio_and_plays_no_correction_again(
    renderer: ChatTemplateRenderer, tmp_path: Path
) -> None:
    before = asyncio.run(collected(renderer, tmp_path, 5, cipo=CIPO))
    position = before[-1].data_position
    after = asyncio.run(collected(renderer, tmp_path, 5, position, cipo=CIPO))
    numbers = [task.number for task, _ in of(before, Correction)]
    again = [task.number for task, _ in of(after, Correction)]
    assert again
    assert not set(numbers) & set(again)
    assert min(again) >= position["corrections"]["next"] > max(numbers)
    tasks = [task.index for task, _ in of([*before, *after], ScheduledTask)]
    assert len(tasks) == len(set(tasks))
    asyncio.run(collected(renderer, tmp_path, 1, position))  # turned off: nothing of it is needed


def test_a_position_whose_corrections_cannot_be_read_is_refused(renderer: ChatTemplateRenderer, tmp_path: Path) -> None:
    position = {"seed": 0, "tasks": 1000, "next": 0, "pending": [], "corrections": {"next": "x"}}
    with pytest.raises(InputError, match="the state of corrections"):
        asyncio.run(collected(renderer, tmp_path, 1, position, cipo=CIPO))
