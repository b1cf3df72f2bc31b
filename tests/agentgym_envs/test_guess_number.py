"""Guessing a number."""

from __future__ import annotations

import pytest

from agentgym import agents, registry
from agentgym.env import Split
from agentgym.errors import InputError
from agentgym.messages import Message, ToolCall, call
from agentgym.rollout.play import evaluate_agent
from agentgym.testing.env_checks import check_environment
from agentgym_envs.guess_number import GuessNumber


def test_it_passes_the_public_checks():
    check_environment("guess_number")


def test_the_answers():
    env = GuessNumber()
    env.reset(seed=0, options={"task": "17"})
    assert [env.step(call("guess", x=x))[0][0].content for x in (1, 32, 16)] == ["higher", "lower", "higher"]
    assert "an integer from 1 to 32, got 33" in env.step(call("guess", x=33))[0][0].content
    observation, reward, terminated, _, _ = env.step(call("guess", x=17))
    assert (observation[0].content, reward, terminated) == ("correct", 1.0, True)


def test_one_message_is_one_guess():
    env = GuessNumber()
    env.reset(seed=0, options={"task": "17"})
    everything = tuple(ToolCall(str(x), "guess", f'{{"x": {x}}}') for x in range(1, 33))
    assert not env.step(Message("assistant", "", everything))[2]


def test_every_number_is_in_one_split_and_the_oracle_finds_it():
    train, heldout = GuessNumber.task_ids("train"), GuessNumber.task_ids("heldout")
    assert sorted(map(int, [*train, *heldout])) == list(range(1, 33))
    record = registry.lookup("guess_number")
    splits: tuple[Split, ...] = ("train", "heldout")
    for split in splits:
        number = len(GuessNumber.task_ids(split))
        summary = evaluate_agent("guess_number", agents.oracle(record), number, split=split)
        assert summary.mean_reward == 1.0
        assert max(episode.turns for episode in summary.episodes) <= 6


@pytest.mark.parametrize("task", ["0", "33", "x", "-1", ""])
def test_bad_tasks(task: str):
    with pytest.raises(InputError, match="from 1 to 32"):
        GuessNumber().reset(seed=0, options={"task": task})
