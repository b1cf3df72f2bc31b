"""Write a few words backwards, in one turn without tools. The reward is how much of it is right, from 0 to 1."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any

import numpy as np

from agentgym.env import AgentEnv
from agentgym.messages import Message

_ONSETS = ("b", "d", "f", "g", "k", "l", "m", "n", "p", "r", "s", "t", "st", "tr")
_VOWELS = ("a", "e", "i", "o", "u")
_ENDS = ("", "n", "r", "s", "l")


class ReverseText(AgentEnv):
    """The words come from the episode's generator, so that the number of texts has no end."""

    reward_weights = {"overlap": 1.0}  # noqa: RUF012

    text: str

    def reset_task(self, task: str, rng: np.random.Generator) -> str:
        self.text = " ".join(_word(rng) for _ in range(int(rng.integers(2, 5))))
        return f"Write this text backwards, character by character, and nothing else: {self.text}"

    def reply(self, action: Message) -> str:
        self.finish(overlap=_overlap(action.content.strip(), self.text[::-1]))
        return ""


def oracle(env: Any, history: Sequence[Message], rng: np.random.Generator) -> Message:
    """Writes the text backwards."""
    return Message("assistant", env.unwrapped.text[::-1])


def _overlap(answer: str, wanted: str) -> float:
    """2 M / T of the longest common blocks: 1 for equal texts, 0 for texts without a common character."""
    return difflib.SequenceMatcher(None, answer[: 4 * len(wanted)], wanted, autojunk=False).ratio()


def _word(rng: np.random.Generator) -> str:
    return "".join(
        _ONSETS[rng.integers(len(_ONSETS))] + _VOWELS[rng.integers(len(_VOWELS))] + _ENDS[rng.integers(len(_ENDS))]
        for _ in range(int(rng.integers(1, 4)))
    )
