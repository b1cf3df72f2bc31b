"""Guess a number from 1 to 32 in seven guesses; the answers say higher or lower.

Reward 1 if found, else 0. Binary search finds every number in six guesses.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar

import numpy as np

from agentgym.env import Split, ToolEnv
from agentgym.errors import InputError
from agentgym.messages import Message, call
from agentgym.tools import Range, tool

HIGHEST = 32


class GuessNumber(ToolEnv):
    """The task id is the secret; the split is by its hash."""

    reward_weights = {"correct": 1.0}  # noqa: RUF012
    calls_per_message: ClassVar[int | None] = 1  # else one message could guess them all

    secret: int

    @classmethod
    def task_ids(cls, split: Split) -> Sequence[str]:
        numbers = [str(number) for number in range(1, HIGHEST + 1)]
        return [number for number in numbers if (zlib.crc32(number.encode()) % 4 == 0) == (split == "heldout")]

    def reset_task(self, task: str, rng: np.random.Generator) -> str:
        if not task.isdecimal() or not 1 <= int(task) <= HIGHEST:
            raise InputError(f"a guess_number task is a number from 1 to {HIGHEST}, got {task!r}")
        self.secret = int(task)
        return f"I think of a number from 1 to {HIGHEST}."

    @tool
    def guess(self, x: Annotated[int, Range(1, HIGHEST)]) -> str:
        """Guess the number.

        Args:
            x: your guess.
        """
        if x == self.secret:
            self.finish(correct=1.0)
            return "correct"
        return "higher" if x < self.secret else "lower"


def binary_search(env: Any, history: Sequence[Message], rng: np.random.Generator) -> Message:
    """Halves what is left; reads the answers only."""
    low, high = 1, HIGHEST
    for message in history:
        if message.role == "tool":
            middle = (low + high) // 2
            low, high = (middle + 1, high) if message.content == "higher" else (low, middle - 1)
    return call("guess", x=(low + high) // 2)


def count_up(env: Any, history: Sequence[Message], rng: np.random.Generator) -> Message:
    """Guesses 1, 2, 3, ...: the habit, which finds seven numbers of 32."""
    return call("guess", x=1 + sum(message.role == "tool" for message in history))
