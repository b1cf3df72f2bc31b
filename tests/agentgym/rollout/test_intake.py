"""Outside episodes on their way into the buffer: whose group, when ready, and how those end that never are."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest

from agentgym.engine.gate import VersionedPolicy
from agentgym.engine.protocol import WeightUpdate
from agentgym.errors import EngineDiedError, InputError, NotNowError
from agentgym.messages import Message
from agentgym.policy import Completion
from agentgym.render import ChatTemplateRenderer
from agentgym.rewards import Score
from agentgym.rollout.collector import Collector, CollectorSettings
from agentgym.rollout.intake import Declared, Intake
from agentgym.rollout.limits import EpisodeLimits
from agentgym.rollout.store import TrajectoryStore, read_trajectories, step_file
from agentgym.testing.scripted_engine import ScriptedEngine, hashed_logits
from agentgym.trajectory import EpisodeStatus, Trajectory, Turn

TASK = Declared("task-1", 7)


class World:
    """A collector that plays nothing itself, its intake, and a clock."""

    def __init__(self, folder: Path, renderer: ChatTemplateRenderer, **settings: int) -> None:
        numbers = {"group_size": 3, "groups_per_step": 1, "max_staleness": 1} | settings
        self.engine = ScriptedEngine(hashed_logits(8))
        self.run_dir = folder
        self.now = 0.0
        self.collector = Collector(
            CollectorSettings("agentgym/Maze-v0", in_flight=4, **numbers),
            None,
            renderer,
            VersionedPolicy(self.engine),
            EpisodeLimits(5, 5, 100),
            None,
            TrajectoryStore(folder),
        )
        self.intake = Intake(self.collector, group_ttl_s=60.0, clock=lambda: self.now)

    def play(self, name: str, declared: Declared, value: float | None, version: int = 0) -> str:
        group_id = self.intake.open(name, declared)
        self.end(name, group_id, declared, value, version)
        return group_id

    def end(self, name: str, group_id: str, declared: Declared, value: float | None, version: int = 0) -> None:
        turn = Turn((1,), Completion((2, 3), (-0.1, -0.2), (version,) * 2, (version,) * 2, "stop"),
                    Message("assistant", "x"), (), 0.0)  # fmt: skip
        score = None if value is None else Score(value, {"r": value}, True, "")
        status = EpisodeStatus.FAILED if value is None else EpisodeStatus.TERMINATED
        metrics = {"turns": 1.0, "seconds": 0.0, "env_s": 0.0, "sampling_s": 0.0, "tool_errors": 0.0}
        error = None if value is not None else "SessionExpired: not finished"
        trajectory = Trajectory(name, group_id, "e", declared.task_id, declared.seed, (), (turn,), status, score,
                                metrics, error)  # fmt: skip
        (self.intake.finish if value is not None else self.intake.fail)(name, trajectory)


@pytest.fixture
def world(tmp_path: Path, renderer: ChatTemplateRenderer) -> Callable[..., World]:
    return lambda **settings: World(tmp_path, renderer, **settings)


def test_siblings_of_one_declaration_become_a_batch(world):
    async def main() -> None:
        it = world()
        it.collector.collect(True)
        assert [it.play(f"a{i}", TASK, float(i)) for i in range(3)] == ["s-000000"] * 3
        assert it.play("b", Declared("task-1", 8), 1.0) == "s-000001"
        batch = await it.collector.take(0, 0.0, step=1)
        assert batch is not None
        (group,) = batch.groups
        assert [member.trajectory_id for member in group.members] == ["a0", "a1", "a2"]
        assert (batch.tasks[0].task_id, batch.tasks[0].seed) == ("task-1", 7)
        assert batch.metrics["reward_mean"] == 1.0
        assert len(list(read_trajectories(step_file(it.run_dir, 1)))) == 3

    asyncio.run(main())


def test_a_full_group_is_followed_by_another_of_the_same_task(world):
    async def main() -> None:
        it = world(groups_per_step=2)
        it.collector.collect(True)
        assert [it.intake.open(f"a{i}", TASK) for i in range(4)] == ["s-000000"] * 3 + ["s-000001"]
        assert it.intake.open("b", Declared("task-1", 7, "another")) == "s-000002"

    asyncio.run(main())


def test_a_place_left_without_a_score_is_free_again_and_counted(world):
    async def main() -> None:
        it = world()
        it.collector.collect(True)
        it.play("a0", TASK, 0.0)
        it.play("lost", TASK, None)
        it.play("a1", TASK, 1.0)
        it.play("a2", TASK, 1.0)
        batch = await it.collector.take(0, 0.0, step=1)
        assert batch is not None
        assert [member.trajectory_id for member in batch.groups[0].members] == ["a0", "a1", "a2"]
        assert batch.metrics["failed"] == 1
        assert it.collector.failed == 1
        lost = [t for t in read_trajectories(step_file(it.run_dir, 1)) if t.status is EpisodeStatus.FAILED]
        assert [(t.trajectory_id, t.score, t.error) for t in lost] == [("lost", None, "SessionExpired: not finished")]

    asyncio.run(main())


def test_an_incomplete_group_is_given_up_in_time_and_by_name(world):
    async def main() -> None:
        it = world()
        it.collector.collect(True)
        it.play("a0", TASK, 1.0)
        under_way = it.intake.open("a1", TASK)
        it.now = 1000.0
        it.intake.sweep()
        assert it.collector.discarded == {}  # one of its episodes is still open
        it.end("a1", under_way, TASK, None)
        it.now += 59.0
        it.intake.sweep()
        assert it.collector.started_groups == 1
        it.now += 1.0
        it.intake.sweep()
        assert it.collector.started_groups == 0
        assert it.collector.discarded == {"incomplete": 1}
        assert "0 open, 0 groups incomplete" in it.intake.waiting_for()

    asyncio.run(main())


def test_no_more_groups_than_staleness_allows_and_none_while_paused(world):
    async def main() -> None:
        it = world(group_size=2)
        with pytest.raises(NotNowError, match="collecting is paused"):
            it.intake.open("early", TASK)
        it.collector.collect(True)
        for number in range(2):  # (max_staleness + 1) * groups_per_step
            it.intake.open(f"a{number}", Declared(f"task-{number}", 0))
        with pytest.raises(NotNowError, match="2 groups are started and not trained on yet"):
            it.intake.open("b", Declared("task-9", 0))
        it.intake.open("sibling", Declared("task-1", 0))  # a place in a group that was begun is no new group
        with pytest.raises(InputError, match="opened already"):
            it.intake.open("sibling", Declared("task-1", 0))

    asyncio.run(main())


def test_outside_episodes_grow_stale_like_any_other(world):
    async def main() -> None:
        it = world(group_size=2)
        it.collector.collect(True)
        it.play("old", TASK, 1.0, version=0)
        slow = it.intake.open("slow", TASK)
        for version in (1, 2):
            await it.collector.publish(WeightUpdate(version, Path("unused.safetensors")))
        it.end("slow", slow, TASK, 1.0, version=2)
        assert it.collector.discarded == {"stale_at_admission": 1}

    asyncio.run(main())


def test_agents_that_are_gone_hold_up_no_batch_and_keep_no_place(world):
    """One group stays incomplete for ever; batches go on, and its place is free once it is too old to be trained on."""

    async def main() -> None:
        it = world(group_size=2, max_staleness=1)
        it.collector.collect(True)
        it.play("left alone", Declared("gone", 0), 1.0)
        for version in range(4):
            it.play(f"a{version}", TASK, 1.0, version)
            it.play(f"b{version}", TASK, 0.0, version)
            assert await it.collector.take(version, 0.0, step=version + 1) is not None
            await it.collector.publish(WeightUpdate(version + 1, Path("unused.safetensors")))
            it.intake.sweep()
            assert it.collector.discarded == ({} if version < 1 else {"stale_at_admission": 1})
        assert it.collector.started_groups == 0

    asyncio.run(main())


def test_the_death_of_the_engine_is_told_to_whoever_waits_for_a_batch(world):
    async def main() -> None:
        it = world()
        it.collector.collect(True)
        assert await it.collector.take(0, 0.0, step=1) is None
        await it.engine.close()
        with pytest.raises(EngineDiedError):
            await it.collector.take(0, 5.0, step=1)

    asyncio.run(main())
