"""The public checks find what they are there to find."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest

from agentgym import registry
from agentgym.env import ToolEnv
from agentgym.messages import Message, call
from agentgym.testing.env_checks import check_environment
from agentgym.tools import tool


class Sound(ToolEnv):
    """Press the button that the opening names."""

    reward_weights = {"pressed": 1.0}  # noqa: RUF012

    def reset_task(self, task: str, rng: np.random.Generator) -> str:
        self.wanted = int(rng.integers(2))
        return f"Press {self.wanted}."

    @tool
    def press(self, button: int) -> str:
        """Press."""
        self.finish(pressed=float(button == self.wanted))
        return "pressed"


def solve(env: Any, history: Any, rng: Any) -> Message:
    return call("press", button=env.unwrapped.wanted)


class GlobalRandomness(Sound):
    def reset_task(self, task: str, rng: np.random.Generator) -> str:
        super().reset_task(task, rng)
        return f"Press {self.wanted}. {random.random()}"


class Leak(Sound):
    presses = 0

    def reset_task(self, task: str, rng: np.random.Generator) -> str:
        return f"{super().reset_task(task, rng)} Pressed {self.presses} times."

    @tool
    def press(self, button: int) -> str:
        """Press."""
        self.presses += 1
        return super().press(button)


class WallClock(Sound):
    count = 0

    @tool
    def press(self, button: int) -> str:
        """Press."""
        type(self).count += 1
        super().press(button)
        return f"pressed at {self.count}"


class NotANumber(Sound):
    @tool
    def press(self, button: int) -> str:
        """Press."""
        self.finish(pressed=float("nan"))
        return "pressed"


class PaysForNothing(Sound):
    def on_text(self, text: str) -> str:
        self.finish(pressed=1.0)
        return "thanks"


class SharedTask(Sound):
    @classmethod
    def task_ids(cls, split: str) -> list[str]:
        return ["both", split]


class NothingHeldOut(Sound):
    @classmethod
    def task_ids(cls, split: str) -> list[str]:
        return ["a"] if split == "train" else []


@pytest.fixture(autouse=True)
def _own_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_records", dict(registry._records))


def test_a_sound_environment_passes():
    registry.register("test_env_checks/Sound-v0", Sound, max_turns=2, oracle=solve)
    check_environment("test_env_checks/Sound-v0")


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (GlobalRandomness, "non-deterministic"),
        (Leak, "starts as"),
        (WallClock, "not equivalent|same actions"),
        (NotANumber, "without a valid score"),
        (PaysForNothing, "oracle reaches 1.000 and saying nothing 1.000"),
        (SharedTask, "both splits, 'both'"),
        (NothingHeldOut, "heldout.* is empty"),
    ],
)
def test_a_broken_environment_is_caught(broken: type[Sound], message: str):
    env_id = f"test_env_checks/{broken.__name__}-v0"
    registry.register(env_id, broken, max_turns=2, oracle=solve)
    with pytest.raises(AssertionError, match=message):
        check_environment(env_id)
