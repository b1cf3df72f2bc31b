"""The environment that the design shows first: written to a file as it stands there, then found and played."""

from __future__ import annotations

from pathlib import Path

import gymnasium
import pytest

from agentgym import agents, registry
from agentgym.messages import call
from agentgym.rollout.play import evaluate_agent
from agentgym.testing.env_checks import check_environment

FILE = '''
import agentgym as ag


class GuessNumber(ag.ToolEnv):                      # a real gymnasium.Env; passes gymnasium's check_env
    def reset_task(self, task, rng): self.secret = int(rng.integers(1, 33)); return "I think of a number from 1 to 32."
    @ag.tool
    def guess(self, x: int) -> str:
        """Guess the number.

        Args:
            x: your guess.
        """
        if x == self.secret: self.finish(correct=1.0)
        return "higher" if x < self.secret else "lower"


def binary_search(env, history, rng):
    low, high = 1, 32
    for message in history:
        if message.role == "tool":
            middle = (low + high) // 2
            low, high = (middle + 1, high) if message.content == "higher" else (low, middle - 1)
    return ag.call("guess", x=(low + high) // 2)


ag.register("my/GuessNumber-v0", GuessNumber, max_turns=7, oracle=binary_search)
'''


@pytest.fixture
def name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    registry.load_plugins()
    monkeypatch.setattr(registry, "_records", dict(registry._records))
    (tmp_path / "my_env.py").write_text(FILE)
    monkeypatch.chdir(tmp_path)
    return "my_env.py:my/GuessNumber-v0"


def test_it_is_a_whole_environment(name: str):
    check_environment(name)
    record = registry.lookup(name)
    assert evaluate_agent(name, agents.oracle(record), 50).mean_reward == 1.0
    assert evaluate_agent(name, agents.nop, 5).mean_reward == 0.0
    env = gymnasium.make("my/GuessNumber-v0")
    (opening,), _ = env.reset(seed=0)
    assert opening.content == "I think of a number from 1 to 32."
    (answer,), *_ = env.step(call("guess", x="12"))
    assert answer.content == "error: guess: argument 'x' must be an integer, got '12'"
