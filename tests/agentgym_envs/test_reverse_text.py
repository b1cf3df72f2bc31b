"""Writing backwards."""

from __future__ import annotations

import pytest

from agentgym.messages import Message
from agentgym.testing.env_checks import check_environment
from agentgym_envs.reverse_text import ReverseText


def test_it_passes_the_public_checks():
    check_environment("reverse_text")


def test_texts_vary_and_are_in_the_prompt():
    texts = set()
    for seed in range(50):
        env = ReverseText()
        opening, _ = env.reset(seed=seed)
        assert opening[0].content.endswith(f": {env.text}")
        texts.add(env.text)
    assert len(texts) == 50


@pytest.mark.parametrize(
    ("written", "low", "high"),
    [
        (lambda text: text[::-1], 1.0, 1.0),
        (lambda text: f" {text[::-1]}\n", 1.0, 1.0),
        (lambda text: text[::-1][:-1], 0.8, 0.999),
        (lambda text: text, 0.05, 0.8),
        (lambda text: "#" * len(text), 0.0, 0.0),
        (lambda text: "", 0.0, 0.0),
        (lambda text: text[::-1] + "x" * 100_000, 0.0, 0.5),
    ],
)
def test_the_reward_is_the_overlap(written, low: float, high: float):
    for seed in range(10):
        env = ReverseText()
        env.reset(seed=seed)
        _, reward, terminated, _, _ = env.step(Message("assistant", written(env.text)))
        assert terminated
        assert low <= reward <= high
