"""The collector over real episodes: batches, retries, what stops it, and what it leaves behind."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from agentgym.engine.gate import VersionedPolicy
from agentgym.engine.protocol import WeightUpdate
from agentgym.env import AgentEnv
from agentgym.errors import CheckpointError, EngineDiedError, EnvError, InputError, ServiceError
from agentgym.messages import Message
from agentgym.render import ChatTemplateRenderer
from agentgym.rollout.collector import CollectedBatch, Collector, CollectorSettings
from agentgym.rollout.environments import EnvironmentPool
from agentgym.rollout.limits import EpisodeLimits
from agentgym.rollout.schedule import Schedule
from agentgym.rollout.store import TrajectoryStore, read_trajectories, step_file
from agentgym.testing.scripted_engine import ScriptedEngine, hashed_logits
from agentgym.trajectory import EpisodeStatus

LIMITS = EpisodeLimits(max_turns=4, max_tokens_per_turn=5, max_episode_tokens=100)


class Count(AgentEnv):
    """Three replies; the score is a function of the task. `fails(task, how often it was tried)` breaks an episode."""

    alive: ClassVar[set[int]] = set()
    tries: ClassVar[dict[str, int]] = {}
    fails: ClassVar[Callable[[str, int], bool]] = staticmethod(lambda task, tries: False)

    def __init__(self) -> None:
        Count.alive.add(id(self))

    def reset_task(self, task: str, rng: np.random.Generator) -> str:
        self.left = 3
        Count.tries[task] = Count.tries.get(task, 0) + 1
        if Count.fails(task, Count.tries[task]):
            raise OSError("the box is gone")
        return "1 up"

    def reply(self, action: Message) -> str:
        self.left -= 1
        if not self.left:
            self.finish(even=float(int(self.task_id.split("-")[1]) % 2 == 0))
        return "goal"

    def close(self) -> None:
        Count.alive.discard(id(self))


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    Count.alive.clear()
    Count.tries.clear()


class Rig:
    """A collector and what it runs on."""

    def __init__(self, renderer: ChatTemplateRenderer, folder: Path, seed: int = 0, **options: Any) -> None:
        engine_options = options.pop("engine", {})
        vocabulary = max(renderer.encoder.control_ids) + 1
        self.engine = ScriptedEngine(hashed_logits(vocabulary), max_context=100, **engine_options)
        self.policy = VersionedPolicy(self.engine)
        self.environments = EnvironmentPool(Count, most=16, max_call_s=5.0)
        numbers: dict[str, Any] = {"group_size": 3, "groups_per_step": 2, "max_staleness": 1, "in_flight": 5} | options
        self.settings = CollectorSettings("my/Count-v0", seed=seed, **numbers)
        self.schedule = Schedule(self.environments.task_ids("train"), seed)
        self.collector = Collector(
            self.settings, self.environments, renderer, self.policy, LIMITS, self.schedule, TrajectoryStore(folder)
        )

    async def batch(self, version: int, timeout_s: float = 200.0) -> CollectedBatch:
        batch = await self.collector.take(version, timeout_s, step=version + 1)
        assert batch is not None
        return batch

    async def publish(self, version: int) -> None:
        await self.collector.publish(WeightUpdate(version, Path("unread")))


@asynccontextmanager
async def rig(renderer: ChatTemplateRenderer, folder: Path, **options: Any) -> AsyncIterator[Rig]:
    made = Rig(renderer, folder, **options)
    try:
        yield made
    finally:
        await made.collector.close()
        await made.environments.close()
        assert not Count.alive


def test_batches_are_full_fresh_and_of_several_versions(renderer: ChatTemplateRenderer, tmp_path: Path) -> None:
    async def run() -> None:
        seen: set[str] = set()
        mixed = 0.0
        async with rig(renderer, tmp_path) as it:
            it.collector.collect(True)
            for version in range(6):
                batch = await it.batch(version)
                assert len(batch.groups) == 2
                names = {group.group_id for group in batch.groups}
                assert not names & seen
                seen |= names
                for group, task in zip(batch.groups, batch.tasks, strict=True):
                    assert len({member.trajectory_id for member in group.members}) == 3
                    assert {(m.task_id, m.seed) for m in group.members} == {(task.task_id, task.seed)}
                assert 0 <= batch.metrics["staleness_max"] <= 1
                assert batch.metrics["discarded_groups"] == batch.metrics["failed"] == 0
                rewards = [m.score.value for g in batch.groups for m in g.members if m.score]
                assert batch.metrics["reward_mean"] == pytest.approx(sum(rewards) / 6)
                mixed += batch.metrics["partial_fraction"]
                await it.publish(version + 1)
                assert it.collector.started_groups <= 4
        assert mixed > 0  # publications did fall into the middle of episodes

    asyncio.run(run())


def test_synchronous_collection_has_no_staleness_at_all(renderer: ChatTemplateRenderer, tmp_path: Path) -> None:
    async def run() -> None:
        async with rig(renderer, tmp_path, max_staleness=0) as it:
            it.collector.collect(True)
            for version in range(3):
                batch = await it.batch(version)
                assert batch.metrics["staleness_max"] == 0
                assert it.collector.in_flight == 0  # nothing is played while the trainer trains
                await it.publish(version + 1)

    asyncio.run(run())


def test_live_versions_cover_every_token_that_can_still_arrive(renderer: ChatTemplateRenderer, tmp_path: Path) -> None:
    async def run() -> None:
        promised: list[set[int]] = []
        async with rig(renderer, tmp_path, max_staleness=3, in_flight=9) as it:
            it.collector.collect(True)
            for version in range(8):
                batch = await it.batch(version)
                versions = {v for g in batch.groups for m in g.members for t in m.turns
                            for v in t.completion.policy_versions}  # fmt: skip
                for earlier, live in enumerate(promised):
                    assert {v for v in versions if v <= earlier} <= live
                promised.append(set(batch.live_versions))
                assert version in batch.live_versions
                await it.publish(version + 1)

    asyncio.run(run())


def test_the_stored_step_is_the_batch(renderer: ChatTemplateRenderer, tmp_path: Path) -> None:
    async def run() -> CollectedBatch:
        async with rig(renderer, tmp_path) as it:
            it.collector.collect(True)
            return await it.batch(0)

    batch = asyncio.run(run())
    members = [member for group in batch.groups for member in group.members]
    assert list(read_trajectories(step_file(tmp_path, 1))) == members
    assert not list(tmp_path.rglob("*.partial"))


def test_a_failed_member_is_retried_counted_and_stored(renderer: ChatTemplateRenderer, tmp_path: Path) -> None:
    Count.fails = staticmethod(lambda task, tries: tries == 1)  # of each task's siblings the first one fails

    async def run() -> CollectedBatch:
        async with rig(renderer, tmp_path, max_retries=1) as it:
            it.collector.collect(True)
            return await it.batch(0)

    try:
        batch = asyncio.run(run())
    finally:
        Count.fails = staticmethod(lambda task, tries: False)
    assert all(len(group.members) == 3 for group in batch.groups)
    assert batch.metrics["failed"] >= 2
    assert batch.metrics["retried"] >= 2
    stored = list(read_trajectories(step_file(tmp_path, 1)))
    failed = [t for t in stored if t.status is EpisodeStatus.FAILED]
    assert len(failed) >= 2
    assert {t.error for t in failed} == {"OSError: the box is gone"}
    retries = [m.trajectory_id for g in batch.groups for m in g.members if m.trajectory_id.endswith("r1")]
    assert len(retries) == 2


def test_groups_that_cannot_be_played_are_discarded_and_others_come(
    renderer: ChatTemplateRenderer, tmp_path: Path
) -> None:
    async def run() -> list[CollectedBatch]:
        batches = []
        async with rig(renderer, tmp_path, max_retries=0) as it:
            it.collector.collect(True)
            for version in range(4):
                batches.append(await it.batch(version))
                await it.publish(version + 1)
            assert set(it.collector.discarded) == {"too_few_valid"}
            assert it.collector.discarded.total() >= sum(b.metrics["discarded_too_few_valid"] for b in batches) > 0
        return batches

    Count.fails = staticmethod(lambda task, tries: int(task.split("-")[1]) % 2 == 1)
    try:
        batches = asyncio.run(run())
    finally:
        Count.fails = staticmethod(lambda task, tries: False)
    assert {batch.metrics["reward_mean"] for batch in batches} == {1.0}  # no failure became a zero
    assert max(batch.metrics["discarded_fraction"] for batch in batches) > 0
    trained = {task.index for batch in batches for task in batch.tasks}
    position = batches[-1].data_position
    assert len(trained) + len(position["pending"]) < position["next"]  # the discarded ones are dealt with, too


def test_an_environment_that_always_fails_ends_the_wait(renderer: ChatTemplateRenderer, tmp_path: Path) -> None:
    Count.fails = staticmethod(lambda task, tries: True)

    async def run() -> None:
        async with rig(renderer, tmp_path, max_retries=0, in_flight=40, group_size=8, max_staleness=8) as it:
            it.collector.collect(True)
            with pytest.raises(EnvError, match=r"episodes in a row failed; the last one: OSError: the box is gone"):
                await it.batch(0)
            assert "in a row failed" in it.collector.waiting_for()

    try:
        asyncio.run(run())
    finally:
        Count.fails = staticmethod(lambda task, tries: False)


def test_a_dead_engine_ends_the_wait(renderer: ChatTemplateRenderer, tmp_path: Path) -> None:
    async def run() -> None:
        async with rig(renderer, tmp_path) as it:
            it.collector.collect(True)
            await it.batch(0)
            await it.engine.close()
            with pytest.raises(EngineDiedError, match="closed"):
                await it.batch(9)  # whatever is buffered is too old for that
            with pytest.raises(EngineDiedError, match="closed"):
                await it.batch(9)

    asyncio.run(run())


def test_a_stall_is_explained_in_the_log(
    renderer: ChatTemplateRenderer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def run() -> str:
        async with rig(renderer, tmp_path, stall_warning_s=0.2, engine={"latency_s": lambda: 60.0}) as it:
            it.collector.collect(True)
            while "no episode has finished" not in caplog.text:
                assert await it.collector.take(0, 0.5, 1) is None
            return it.collector.waiting_for()

    with caplog.at_level(logging.WARNING, logger="agentgym.rollout.collector"):
        waiting = asyncio.run(run())
    assert "0 of 2 groups ready; episodes: 5 sampling" in waiting
    assert "g-000000.0 sampling for" in caplog.text
    assert "in turn 1" in caplog.text


def test_a_pause_plays_begun_groups_to_their_end(renderer: ChatTemplateRenderer, tmp_path: Path) -> None:
    async def run() -> None:
        async with rig(renderer, tmp_path, in_flight=2) as it:
            it.collector.collect(True)
            await asyncio.sleep(0)
            it.collector.collect(False)
            begun = it.collector.started_groups
            for _ in range(20_000):
                if it.collector.in_flight == 0:
                    break
                await asyncio.sleep(0.002)
            assert (it.collector.ready_groups, it.collector.started_groups) == (begun, begun)
            assert "collecting is paused" in it.collector.waiting_for()

    asyncio.run(run())


def test_a_resumed_run_plays_what_was_begun_and_never_trained_on(
    renderer: ChatTemplateRenderer, tmp_path: Path
) -> None:
    async def run() -> None:
        async with rig(renderer, tmp_path) as it:
            it.collector.collect(True)
            first = await it.batch(0)
        async with rig(renderer, tmp_path) as it:
            it.collector.restore(first.data_position)
            it.collector.collect(True)
            second = await it.batch(0)
            with pytest.raises(InputError, match="before collecting"):
                it.collector.restore(first.data_position)
            await it.publish(1)
            third = await it.batch(1)
        trained = [task.index for batch in (first, second, third) for task in batch.tasks]
        assert len(set(trained)) == len(trained)
        assert set(trained) | set(third.data_position["pending"]) == set(range(third.data_position["next"]))

    asyncio.run(run())


def test_a_disk_that_does_not_take_the_trajectories_is_said(renderer: ChatTemplateRenderer, tmp_path: Path) -> None:
    (tmp_path / "trajectories").write_text("in the way")

    async def run() -> None:
        async with rig(renderer, tmp_path) as it:
            it.collector.collect(True)
            with pytest.raises(CheckpointError, match="cannot write the trajectories of step 1"):
                await it.batch(0)

    asyncio.run(run())


def test_the_end_wakes_who_waits(renderer: ChatTemplateRenderer, tmp_path: Path) -> None:
    async def run() -> None:
        async with rig(renderer, tmp_path, engine={"latency_s": lambda: 60.0}) as it:
            it.collector.collect(True)
            waiting = asyncio.create_task(it.batch(0))
            await asyncio.sleep(0.05)
            it.collector.end_waiting()
            with pytest.raises(ServiceError, match="ending"):
                await asyncio.wait_for(waiting, 100.0)

    asyncio.run(run())
