"""rollout.drop_zero_variance: a group without a gradient makes room for another; every batch is full; and a policy that
no task tells apart is said to be one."""

from __future__ import annotations

import asyncio
from collections import Counter
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from agentgym.engine.gate import VersionedPolicy
from agentgym.engine.protocol import WeightUpdate
from agentgym.env import AgentEnv
from agentgym.errors import EnvError
from agentgym.messages import Message
from agentgym.policy import Completion
from agentgym.render import ChatTemplateRenderer
from agentgym.rewards import Score
from agentgym.rollout.batch import CollectedBatch, CollectorSettings
from agentgym.rollout.buffer import DiscardReason, GroupBuffer
from agentgym.rollout.collector import Collector
from agentgym.rollout.environments import EnvironmentPool
from agentgym.rollout.limits import EpisodeLimits
from agentgym.rollout.schedule import Schedule
from agentgym.rollout.store import TrajectoryStore
from agentgym.testing.scripted_engine import ScriptedEngine, hashed_logits
from agentgym.trajectory import EpisodeStatus, Trajectory, Turn


def member(score: float | None, version: int = 0, group: str = "g") -> Trajectory:
    """None: the grader said nothing."""
    completion = Completion((7,), (-0.5,), (version,), (version,), "stop")
    turn = Turn((1,), completion, Message("assistant", ""), (), 0.0)
    verdict = Score.invalid("grader died") if score is None else Score.of({"r": score})
    return Trajectory("t", group, "my/Env-v0", "task", 0, (), (turn,), EpisodeStatus.TERMINATED, verdict, {}, None)


def completed(scores: list[float | None], *, drop: bool = True, version: int = 0) -> tuple[GroupBuffer, Any]:
    buffer = GroupBuffer(len(scores), groups_per_step=1, max_staleness=0, drop_zero_variance=drop)
    buffer.start("g", 0)
    return buffer, [buffer.put(member(score), version) for score in scores][-1]


@pytest.mark.parametrize(
    ("scores", "reason"),
    [
        ([1.0, 1.0, 1.0], DiscardReason.ZERO_VARIANCE),
        ([0.0, 0.0, None], DiscardReason.ZERO_VARIANCE),  # what the grader did not say is no difference
        ([1.0, 0.0, 1.0], None),
        ([1.0, 1.0, 1.0 - 1e-9], None),
        ([1.0, None, None], DiscardReason.TOO_FEW_VALID),
    ],
)
def test_only_groups_of_one_score_are_dropped(scores: list[float | None], reason: DiscardReason | None) -> None:
    buffer, discard = completed(scores)
    assert (discard and discard.reason) is reason
    assert buffer.num_ready == (reason is None)
    assert buffer.may_start == (reason is not None)  # room for the start of another


def test_a_group_that_is_too_old_is_dropped_for_its_age() -> None:
    _, discard = completed([1.0, 1.0], version=3)
    assert discard.reason is DiscardReason.STALE_AT_ADMISSION


def test_without_the_option_groups_of_one_score_are_trained_on() -> None:
    buffer, discard = completed([1.0, 1.0], drop=False)
    assert discard is None
    assert buffer.num_ready == 1
    assert buffer.zero_variance_in_a_row == 0


def test_what_was_dropped_since_one_was_kept_is_counted() -> None:
    buffer = GroupBuffer(2, groups_per_step=9, max_staleness=0, drop_zero_variance=True)
    counts = []
    for number, scores in enumerate([(1.0, 1.0), (0.0, 0.0), (1.0, 0.0), (0.0, 0.0)]):
        buffer.start(f"g{number}", 0)
        for score in scores:
            buffer.put(member(score, group=f"g{number}"), 0)
        counts.append(buffer.zero_variance_in_a_row)
    assert counts == [1, 2, 0, 1]


# ------------------------------------------------------------------------------------------------------- collecting


class Third(AgentEnv):
    """Every third task scores its members in turn 0 and 1; the others score all of theirs the same, and where it is
    `hopeless` every task does."""

    played: ClassVar[Counter[str]] = Counter()
    hopeless: ClassVar[bool] = False

    def reset_task(self, task: str, rng: np.random.Generator) -> str:
        Third.played[task] += 1
        self.number, self.turn = int(task.split("-")[1]), Third.played[task]
        return "1 up"

    def reply(self, action: Message) -> str:
        tells_apart = self.number % 3 == 0 and not Third.hopeless
        self.finish(won=float(self.turn % 2 if tells_apart else self.number % 2))
        return "goal"


async def collected(
    renderer: ChatTemplateRenderer, folder: Path, num_batches: int, **options: Any
) -> tuple[list[CollectedBatch], Collector]:
    engine = ScriptedEngine(hashed_logits(max(renderer.encoder.control_ids) + 1), max_context=100)
    environments = EnvironmentPool(Third, most=16, max_call_s=5.0)
    numbers: dict[str, Any] = {"group_size": 3, "groups_per_step": 2, "max_staleness": 1, "in_flight": 6} | options
    limits = EpisodeLimits(max_turns=2, max_tokens_per_turn=5, max_episode_tokens=100)
    collector = Collector(
        CollectorSettings("my/Third-v0", **numbers), environments, renderer, VersionedPolicy(engine), limits,
        Schedule(environments.task_ids("train"), 0), TrajectoryStore(folder),
    )  # fmt: skip
    batches = []
    try:
        collector.collect(True)
        for version in range(num_batches):
            batch = await collector.take(version, 200.0, step=version + 1)
            assert batch is not None
            batches.append(batch)
            await collector.publish(WeightUpdate(version + 1, Path("unread")))
    finally:
        await collector.close()
        await environments.close()
    return batches, collector


@pytest.fixture(autouse=True)
def _fresh() -> None:
    Third.played.clear()
    Third.hopeless = False


def spread(batch: CollectedBatch) -> list[float]:
    scores = [[m.score.value for m in group.members if m.score] for group in batch.groups]
    return [max(values) - min(values) for values in scores]


def test_every_batch_is_full_of_groups_with_a_gradient(renderer: ChatTemplateRenderer, tmp_path: Path) -> None:
    batches, collector = asyncio.run(collected(renderer, tmp_path, 4, drop_zero_variance=True))
    assert [spread(batch) for batch in batches] == [[1.0, 1.0]] * 4
    dropped = sum(batch.metrics["discarded_zero_variance"] for batch in batches)
    assert dropped >= 4  # two thirds of what is played
    assert all(batch.metrics["discarded_groups"] == batch.metrics["discarded_fraction"] == 0.0 for batch in batches)
    assert collector.discarded[DiscardReason.ZERO_VARIANCE.value] >= dropped
    assert max(batch.metrics["staleness_max"] for batch in batches) <= 1
    for batch in batches:  # what was dropped is dealt with: a resumed run does not play it again
        taken = {task.index for task in batch.tasks}  # type: ignore[union-attr]
        assert not taken & set(batch.data_position["pending"])


def test_without_the_option_batches_hold_groups_without_one(renderer: ChatTemplateRenderer, tmp_path: Path) -> None:
    batches, _ = asyncio.run(collected(renderer, tmp_path, 4))
    assert any(0.0 in spread(batch) for batch in batches)
    assert not any(batch.metrics["discarded_zero_variance"] for batch in batches)


def test_tasks_that_tell_no_two_episodes_apart_end_the_wait(renderer: ChatTemplateRenderer, tmp_path: Path) -> None:
    Third.hopeless = True
    with pytest.raises(EnvError, match=r"32 groups in a row had members of one score .*drop_zero_variance = false"):
        asyncio.run(collected(renderer, tmp_path, 1, drop_zero_variance=True, max_staleness=4, in_flight=16))
