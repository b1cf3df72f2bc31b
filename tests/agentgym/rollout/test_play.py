"""Episodes without tokens."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from agentgym import agents, registry
from agentgym.env import AgentEnv
from agentgym.errors import InputError, SandboxError, ServiceError, UnavailableError
from agentgym.messages import Message
from agentgym.rewards import Score
from agentgym.rollout.play import PlayedEpisode, PlayLimits, PlaySummary, evaluate_agent, play
from agentgym.trajectory import EpisodeStatus


class Moody(AgentEnv):
    """Does what its task says, at the step or at the reset."""

    reward_weights = {"good": 1.0}  # noqa: RUF012
    closed = False

    @classmethod
    def task_ids(cls, split: str) -> list[str]:
        return ["good", "bad", "bug", "invalid"] if split == "train" else []

    def reset_task(self, task: str, rng: np.random.Generator) -> str:
        if task == "no start":
            raise SandboxError("box b1 is gone")
        if task == "no docker":
            raise UnavailableError("no Docker daemon answers")
        return f"{task} {rng.integers(1000)}"

    def reply(self, action: Message) -> str:
        match self.task_id:
            case "bug":
                raise ZeroDivisionError("a bug")
            case "invalid":
                self.finish_invalid("the grader failed")
            case "good" | "bad":
                self.finish(good=self.task_id == "good")
        return "on"

    def score_unfinished(self) -> Score:
        return Score.of({"good": 0.25})

    def close(self) -> None:
        type(self).closed = True


def talk(env: Any, history: Any, rng: np.random.Generator) -> Message:
    return Message("assistant", f"{len(history)} {rng.integers(1000)}")


LIMITS = PlayLimits(3)


def test_an_episode_that_ends():
    episode = play(Moody(), talk, "good", 5, LIMITS)
    assert (episode.task_id, episode.seed, episode.turns) == ("good", 5, 1)
    assert (episode.status, episode.error) == (EpisodeStatus.TERMINATED, None)
    assert episode.score == Score(1.0, {"good": 1.0}, True, "")
    assert [message.role for message in episode.messages] == ["user", "assistant", "user"]
    again = play(Moody(), talk, "good", 5, LIMITS)
    assert again.messages == episode.messages
    other = play(Moody(), talk, "good", 6, LIMITS)
    assert other.messages[0] != episode.messages[0]  # the environment's generator and
    assert other.messages[1].content != episode.messages[1].content  # the agent's both follow the seed


def test_limits_truncate_and_the_environment_scores_it(monkeypatch: pytest.MonkeyPatch):
    episode = play(Moody(), talk, "endless", 0, LIMITS)
    assert (episode.status, episode.turns) == (EpisodeStatus.TRUNCATED, 3)
    assert episode.score == Score(0.25, {"good": 0.25}, True, "")

    class Clock:
        now = 0.0

        def monotonic(self) -> float:
            return self.now

    clock = Clock()
    monkeypatch.setattr("agentgym.rollout.play.time", clock)

    def slow(env: Any, history: Any, rng: Any) -> Message:
        clock.now += 30.0
        return Message("assistant", "")

    episode = play(Moody(), slow, "endless", 0, PlayLimits(1000, max_s=100.0))
    assert (episode.status, episode.turns, episode.seconds) == (EpisodeStatus.TRUNCATED, 4, 120.0)


@pytest.mark.parametrize(
    ("task", "error", "turns"),
    [("bug", "ZeroDivisionError: a bug", 0), ("no start", "SandboxError: box b1 is gone", 0)],
)
def test_a_failure_of_the_environment_is_data(task: str, error: str, turns: int):
    episode = play(Moody(), talk, task, 0, LIMITS)
    assert (episode.status, episode.score, episode.error) == (EpisodeStatus.FAILED, None, error)
    assert episode.turns == turns


def test_the_persons_turn_and_the_agents_failures_go_up():
    with pytest.raises(UnavailableError):
        play(Moody(), talk, "no docker", 0, LIMITS)

    def dead(env: Any, history: Any, rng: Any) -> Message:
        raise ServiceError("http://127.0.0.1:9 is gone")

    with pytest.raises(ServiceError):
        play(Moody(), dead, "good", 0, LIMITS)


@pytest.fixture
def moody(monkeypatch: pytest.MonkeyPatch) -> str:
    registry.load_plugins()
    monkeypatch.setattr(registry, "_records", dict(registry._records))
    monkeypatch.setattr(Moody, "closed", False)
    registry.register("test_play/Moody-v0", Moody, max_turns=3)
    return "test_play/Moody-v0"


def test_failed_and_invalid_episodes_are_counted_and_in_no_mean(moody: str):
    heard: list[PlayedEpisode] = []
    summary = evaluate_agent(moody, talk, 8, split="train", report=heard.append)
    assert (summary.valid, summary.invalid, summary.failed, summary.truncated) == (4, 2, 2, 0)
    assert (summary.mean_reward, summary.mean_turns, summary.components) == (0.5, 1.0, {"good": 0.5})
    assert sorted(episode.task_id for episode in summary.episodes) == sorted(Moody.task_ids("train") * 2)
    assert tuple(heard) == summary.episodes
    assert len({episode.seed for episode in heard}) == 8
    assert Moody.closed


def test_nothing_valid_has_no_mean():
    summary = PlaySummary.of("x", (play(Moody(), talk, "bug", 0, LIMITS),), 1.0)
    assert (summary.mean_reward, summary.mean_turns, summary.failed) == (None, None, 1)


def test_evaluations_follow_their_seed():
    one, two, other = (evaluate_agent("maze", agents.random_agent, 20, seed=seed) for seed in (1, 1, 2))
    assert [episode.messages for episode in one.episodes] == [episode.messages for episode in two.episodes]
    assert [episode.task_id for episode in one.episodes] != [episode.task_id for episode in other.episodes]
    assert {episode.task_id for episode in one.episodes} <= set(registry.make("maze").task_ids("heldout"))


def test_each_task_comes_once_before_any_comes_again():
    tasks = registry.make("guess_number").task_ids("train")
    played = [episode.task_id for episode in evaluate_agent("guess_number", agents.nop, 48, split="train").episodes]
    first, second = played[: len(tasks)], played[len(tasks) :]
    assert sorted(first) == sorted(tasks)
    assert first[: len(second)] != second


def test_bad_input(moody: str):
    with pytest.raises(InputError, match="episodes must be >= 1"):
        evaluate_agent("maze", talk, 0)
    with pytest.raises(InputError, match="no heldout tasks"):
        evaluate_agent(moody, talk, 1)
    assert Moody.closed
    for wrong in ((0, 1.0), (1, 0.0), (1, float("nan"))):
        with pytest.raises(InputError, match="max_turns"):
            PlayLimits(*wrong)
