"""One episode through a real renderer, real environments and an engine whose distribution is known."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentgym import registry
from agentgym.engine.gate import VersionedPolicy
from agentgym.engine.protocol import WeightUpdate
from agentgym.env import AgentEnv
from agentgym.messages import Message
from agentgym.policy import Completion, SamplingParams
from agentgym.render import ChatTemplateRenderer
from agentgym.rewards import Score
from agentgym.rollout.environments import EnvironmentPool
from agentgym.rollout.episode import EpisodePlan, EpisodeProgress, run_episode
from agentgym.rollout.limits import EpisodeLimits
from agentgym.testing.scripted_engine import ScriptedEngine, forced_logits, hashed_logits, log_distribution
from agentgym.trajectory import EpisodeStatus, Trajectory, to_sequences

LIMITS = EpisodeLimits(max_turns=7, max_tokens_per_turn=5, max_episode_tokens=128, max_episode_s=200.0)


class Echo(AgentEnv):
    """Says "goal" until it is told the task's number of replies; counts what is open."""

    alive: ClassVar[set[int]] = set()

    def __init__(self, replies: int = 3) -> None:
        self.replies = replies
        Echo.alive.add(id(self))

    def reset_task(self, task: str, rng: np.random.Generator) -> str:
        self.left = self.replies
        return "1 up 2 left"

    def reply(self, action: Message) -> str:
        self.left -= 1
        if not self.left:
            self.finish(done=1.0)
        return "goal"

    def score_unfinished(self) -> Score:
        return Score.of({"done": 0.25})

    def close(self) -> None:
        Echo.alive.discard(id(self))


class Raises(Echo):
    def reply(self, action: Message) -> str:
        if self.left == 1:
            raise ValueError("boom")
        return super().reply(action)


class NoScore(Echo):
    def step(self, action: Message) -> tuple[tuple[Message, ...], float, bool, bool, dict[str, Any]]:
        observation, reward, _, _, _ = super().step(action)
        return observation, reward, True, False, {}


class Blocks(Echo):
    blocking = True

    def __init__(self, seconds: float) -> None:
        super().__init__(replies=2)
        self.seconds = seconds
        self.threads: list[str] = []

    def reply(self, action: Message) -> str:
        self.threads.append(threading.current_thread().name)
        time.sleep(self.seconds)
        return super().reply(action)


class Clock:
    """What an episode takes for the time module: it goes on when the test says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("agentgym.rollout.episode.time", clock)
    return clock


@pytest.fixture(autouse=True)
def _nothing_left_open() -> None:
    Echo.alive.clear()


def vocabulary(renderer: ChatTemplateRenderer) -> int:
    return max(renderer.encoder.control_ids) + 1


def random_engine(renderer: ChatTemplateRenderer, **options: Any) -> ScriptedEngine:
    return ScriptedEngine(hashed_logits(vocabulary(renderer)), max_context=128, **options)


class Recites:
    """A policy that says given messages, one a turn."""

    def __init__(self, renderer: ChatTemplateRenderer, agent: Callable[[], Message], tools: Sequence[Any]) -> None:
        self.renderer, self.agent, self.tools = renderer, agent, tools

    async def complete(self, prompt_ids: Sequence[int], params: SamplingParams) -> Completion:
        reply = tuple(self.renderer.encode_reply(self.agent(), self.tools))
        n = len(reply)
        return Completion(reply, (-0.1,) * n, (0,) * n, (0,) * n, "stop")


def pool_of(make: Callable[[], AgentEnv], max_call_s: float = 200.0) -> EnvironmentPool:
    return EnvironmentPool(make, most=8, max_call_s=max_call_s)


def plan(task: str = "train-1", sampling_seed: int = 1) -> EpisodePlan:
    return EpisodePlan("t-1", "g-1", "my/Echo-v0", task, 5, sampling_seed)


def play(
    environments: EnvironmentPool,
    renderer: ChatTemplateRenderer,
    policy: Any,
    limits: EpisodeLimits = LIMITS,
    what: EpisodePlan | None = None,
) -> Trajectory:
    return asyncio.run(run_episode(what or plan(), environments, renderer, policy, limits))


def check_shape(trajectory: Trajectory) -> None:
    """What holds of every episode, however it ended."""
    for before, after in zip(trajectory.turns, trajectory.turns[1:], strict=False):
        said = before.prompt_ids + before.completion.token_ids
        assert after.prompt_ids[: len(said)] == said  # no sampled token was encoded again
    versions = [v for turn in trajectory.turns for v in turn.completion.policy_versions]
    assert versions == sorted(versions)
    rows = to_sequences(trajectory)
    assert len(rows) <= 1
    assert sum(row.num_loss_tokens for row in rows) == trajectory.num_sampled_tokens
    assert (trajectory.score is None) == (trajectory.status is EpisodeStatus.FAILED) == (trajectory.error is not None)


def test_an_oracle_walks_a_maze(renderer: ChatTemplateRenderer) -> None:
    record = registry.lookup("maze")
    env = registry.make("maze")
    environments = pool_of(lambda: env)
    oracle = record.oracle
    assert oracle is not None
    policy = Recites(renderer, lambda: oracle(env, (), np.random.default_rng(0)), env.tools)
    task = environments.task_ids("train")[0]
    trajectory = play(environments, renderer, policy, what=plan(task))
    check_shape(trajectory)
    assert (trajectory.status, trajectory.score) == (EpisodeStatus.TERMINATED, Score.of({"reached": 1.0}))
    assert 3 <= len(trajectory.turns) <= 5
    assert trajectory.turns[-1].reward == 1.0
    # the last prompt is what rendering the whole conversation would give: bridging loses nothing
    history = [*trajectory.opening]
    for turn in trajectory.turns[:-1]:
        history += [turn.action, *turn.observation]
    assert trajectory.turns[-1].prompt_ids == tuple(renderer.render(history, env.tools))
    assert trajectory.metrics["turns"] == len(trajectory.turns)
    assert trajectory.metrics["tool_errors"] == 0


def test_wrong_calls_are_counted(renderer: ChatTemplateRenderer) -> None:
    env = registry.make("maze")
    policy = Recites(renderer, lambda: Message("assistant", "goal"), env.tools)
    bad = renderer.parse(renderer.encoder.scaffold(" <call> goal"), env.tools)
    assert bad.tool_calls  # a call of a tool that does not exist
    policy.agent = lambda: bad
    task = env.task_ids("train")[0]
    trajectory = play(pool_of(lambda: env), renderer, policy, what=plan(task))
    assert trajectory.metrics["tool_errors"] == len(trajectory.turns) == 7


def test_the_turn_limit_truncates_and_asks_for_a_score(renderer: ChatTemplateRenderer) -> None:
    limits = EpisodeLimits(2, 5, 128)
    trajectory = play(pool_of(Echo), renderer, VersionedPolicy(random_engine(renderer)), limits)
    check_shape(trajectory)
    assert (trajectory.status, len(trajectory.turns)) == (EpisodeStatus.TRUNCATED, 2)
    assert trajectory.score == Score.of({"done": 0.25})
    assert trajectory.turns[-1].observation == (Message("user", "goal"),)


def test_a_completion_cut_by_its_own_limit_is_stepped_like_any_other(renderer: ChatTemplateRenderer) -> None:
    limits = EpisodeLimits(7, 2, 128)
    trajectory = play(pool_of(Echo), renderer, VersionedPolicy(random_engine(renderer)), limits)
    check_shape(trajectory)
    assert trajectory.status is EpisodeStatus.TERMINATED
    assert "length" in {turn.completion.finish_reason for turn in trajectory.turns}
    assert all(len(turn.completion.token_ids) <= 2 and turn.observation for turn in trajectory.turns)


def test_the_token_limit_ends_the_episode_in_the_middle_of_a_reply(renderer: ChatTemplateRenderer) -> None:
    opening = len(renderer.render((Message("user", "1 up 2 left"),), ()))
    word = renderer.encoder.scaffold("goal")[0]
    endless = ScriptedEngine(forced_logits(vocabulary(renderer), lambda prefix: word), max_context=128)
    trajectory = play(pool_of(Echo), renderer, VersionedPolicy(endless), EpisodeLimits(7, 50, opening + 4))
    check_shape(trajectory)
    assert trajectory.status is EpisodeStatus.TRUNCATED
    (turn,) = trajectory.turns
    assert (len(turn.completion.token_ids), turn.observation) == (4, ())
    assert trajectory.score == Score.of({"done": 0.25})


def test_an_opening_that_leaves_no_room_is_truncated_without_a_turn(renderer: ChatTemplateRenderer) -> None:
    trajectory = play(pool_of(Echo), renderer, VersionedPolicy(random_engine(renderer)), EpisodeLimits(7, 5, 3))
    assert (trajectory.status, trajectory.turns) == (EpisodeStatus.TRUNCATED, ())
    assert trajectory.score == Score.of({"done": 0.25})


def test_the_time_limit_is_looked_at_between_turns(renderer: ChatTemplateRenderer, clock: Clock) -> None:
    class Slow(Echo):
        def reply(self, action: Message) -> str:
            clock.now += 70.0
            return super().reply(action)

    limits = EpisodeLimits(7, 5, 128, max_episode_s=100.0)
    trajectory = play(pool_of(lambda: Slow(5)), renderer, VersionedPolicy(random_engine(renderer)), limits)
    assert (trajectory.status, len(trajectory.turns)) == (EpisodeStatus.TRUNCATED, 2)
    assert trajectory.metrics["env_s"] == 140.0


def test_a_failing_environment_is_data_and_is_not_used_again(renderer: ChatTemplateRenderer) -> None:
    environments = pool_of(Raises)
    (first,) = Echo.alive
    trajectory = play(environments, renderer, VersionedPolicy(random_engine(renderer)))
    check_shape(trajectory)
    assert (trajectory.status, trajectory.error) == (EpisodeStatus.FAILED, "ValueError: boom")
    assert len(trajectory.turns) == 3  # the reply that it failed on is kept, unanswered
    assert [bool(turn.observation) for turn in trajectory.turns] == [True, True, False]
    assert first not in Echo.alive


def test_an_end_without_a_score_is_a_failure_not_a_zero(renderer: ChatTemplateRenderer) -> None:
    trajectory = play(pool_of(NoScore), renderer, VersionedPolicy(random_engine(renderer)))
    assert trajectory.status is EpisodeStatus.FAILED
    assert trajectory.error is not None
    assert "NoScore.step ended the episode without a Score" in trajectory.error


def test_an_environment_that_cannot_be_made_fails_the_episode(renderer: ChatTemplateRenderer) -> None:
    made: list[AgentEnv] = []

    def make() -> AgentEnv:
        if made:
            raise OSError("no more boxes")
        made.append(Echo())
        return made[0]

    environments = pool_of(make)

    async def both() -> list[Trajectory]:
        policy = VersionedPolicy(random_engine(renderer))
        episodes = (run_episode(plan(), environments, renderer, policy, LIMITS) for _ in range(2))
        return await asyncio.gather(*episodes)

    statuses = [(t.status, t.error) for t in asyncio.run(both())]
    assert statuses == [(EpisodeStatus.TERMINATED, None), (EpisodeStatus.FAILED, "OSError: no more boxes")]


def test_a_dead_engine_fails_the_episode(renderer: ChatTemplateRenderer) -> None:
    engine = random_engine(renderer)
    asyncio.run(engine.close())
    trajectory = play(pool_of(Echo), renderer, VersionedPolicy(engine))
    assert trajectory.error is not None
    assert trajectory.error.startswith("EngineDiedError: ")


@pytest.mark.usefixtures("clock")  # the opening takes no time, however long it takes
def test_a_silent_engine_fails_the_episode_and_is_named(renderer: ChatTemplateRenderer) -> None:
    engine = random_engine(renderer, latency_s=lambda: 300.0)
    limits = EpisodeLimits(7, 5, 128, max_episode_s=0.05)
    trajectory = play(pool_of(Echo), renderer, VersionedPolicy(engine), limits)
    assert trajectory.error == "EngineError: the engine gave no completion within 0.05 s"


def test_blocking_environments_run_in_threads_side_by_side(renderer: ChatTemplateRenderer) -> None:
    threads: list[str] = []
    all_four = threading.Barrier(4)

    class Meets(Echo):
        blocking = True

        def reply(self, action: Message) -> str:
            threads.append(threading.current_thread().name)
            all_four.wait(100.0)  # whoever came one after the other would wait in vain
            return super().reply(action)

    environments = pool_of(lambda: Meets(2))

    async def four() -> list[Trajectory]:
        policy = VersionedPolicy(random_engine(renderer))
        episodes = (run_episode(plan(), environments, renderer, policy, LIMITS) for _ in range(4))
        return await asyncio.gather(*episodes)

    assert [(t.status, t.error) for t in asyncio.run(four())] == [(EpisodeStatus.TERMINATED, None)] * 4
    assert len(threads) == 4 * 2
    assert all(name.startswith("environment") for name in threads)


def test_a_hanging_environment_is_given_up_at_its_deadline(renderer: ChatTemplateRenderer) -> None:
    class Hangs(Echo):
        blocking = True

        def __init__(self) -> None:
            super().__init__()
            self.closed = threading.Event()

        def reset_task(self, task: str, rng: np.random.Generator) -> str:
            environments._max_call_s = 0.1  # only from here on: this call may be slow, and does not hang
            return super().reset_task(task, rng)

        def reply(self, action: Message) -> str:
            self.closed.wait(100.0)
            return super().reply(action)

        def close(self) -> None:
            super().close()
            self.closed.set()

    environments = pool_of(Hangs)
    trajectory = play(environments, renderer, VersionedPolicy(random_engine(renderer)))
    assert trajectory.error == "EnvError: step of Hangs did not return within 0.1 s"
    assert len(trajectory.turns) == 1
    assert not Echo.alive


@pytest.mark.parametrize("make", [Echo, lambda: Blocks(0.2)])
def test_cancellation_closes_the_environment(renderer: ChatTemplateRenderer, make: Callable[[], Echo]) -> None:
    async def cancelled() -> None:
        environments = pool_of(make)
        assert Echo.alive
        policy = VersionedPolicy(random_engine(renderer, latency_s=lambda: 0.05))
        task = asyncio.create_task(run_episode(plan(), environments, renderer, policy, LIMITS))
        await asyncio.sleep(0.12)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert not Echo.alive

    asyncio.run(cancelled())


def test_weights_that_change_in_the_middle_of_a_reply_are_seen_in_every_array(renderer: ChatTemplateRenderer) -> None:
    logits = hashed_logits(vocabulary(renderer))

    async def run() -> tuple[Trajectory, set[int]]:
        live: set[int] = set()

        def publish() -> None:
            live.update(progress.live_versions())
            publications.append(asyncio.ensure_future(policy.publish(WeightUpdate(1, None))))  # type: ignore[arg-type]

        publications: list[asyncio.Future[Any]] = []
        engine = ScriptedEngine(logits, max_context=128, script={2: publish})
        policy = VersionedPolicy(engine)
        progress = EpisodeProgress(lambda: policy.policy_version)
        trajectory = await run_episode(plan(), pool_of(Echo), renderer, policy, LIMITS, progress)
        live |= progress.live_versions()
        return trajectory, live

    trajectory, live = asyncio.run(run())
    check_shape(trajectory)
    versions = [v for turn in trajectory.turns for v in turn.completion.policy_versions]
    assert versions == [0] * 2 + [1] * (len(versions) - 2)
    assert live == {0, 1}
    (row,) = to_sequences(trajectory)
    for t, version in enumerate(row.policy_versions):
        if row.loss_mask[t]:  # each recorded logprob is its own version's
            expected = log_distribution(logits(version, row.token_ids[:t]), 1.0)[row.token_ids[t]]
            assert row.behavior_logprobs[t] == pytest.approx(expected, abs=1e-12)


def test_siblings_differ_and_the_same_plan_gives_the_same_episode(renderer: ChatTemplateRenderer) -> None:
    def tokens(seed: int) -> list[tuple[int, ...]]:
        policy = VersionedPolicy(random_engine(renderer))
        return [
            t.completion.token_ids for t in play(pool_of(Echo), renderer, policy, what=plan(sampling_seed=seed)).turns
        ]

    assert tokens(1) == tokens(1)
    assert tokens(1) != tokens(2)


@settings(max_examples=25, deadline=None)
@given(turns=st.integers(1, 5), per_turn=st.integers(1, 8), total=st.integers(1, 60), replies=st.integers(1, 4))
def test_no_limit_is_ever_exceeded(
    renderer: ChatTemplateRenderer, turns: int, per_turn: int, total: int, replies: int
) -> None:
    limits = EpisodeLimits(turns, per_turn, total)
    trajectory = play(pool_of(lambda: Echo(replies)), renderer, VersionedPolicy(random_engine(renderer)), limits)
    check_shape(trajectory)
    assert trajectory.error is None
    assert len(trajectory.turns) <= turns
    assert all(len(turn.completion.token_ids) <= per_turn for turn in trajectory.turns)
    assert all(len(turn.prompt_ids) + len(turn.completion.token_ids) <= total for turn in trajectory.turns)
    terminated = trajectory.status is EpisodeStatus.TERMINATED
    assert terminated == (len(trajectory.turns) == replies and bool(trajectory.turns[-1].observation))
