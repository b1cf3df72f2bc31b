"""Two kinds of players and one buffer: neither keeps the other out."""

from __future__ import annotations

import pytest

from agentgym.rollout.shares import WISH_S, Shares


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize("most", [2, 3, 8, 9])
def test_the_environment_has_every_place_that_nobody_outside_asks_for(most: int) -> None:
    clock = Clock()
    shares = Shares(most, clock)
    assert all(shares.may_play(playing) for playing in range(most))
    shares.refused()
    clock.now += 0.9 * WISH_S
    own = sum(shares.may_play(playing) for playing in range(most))
    assert own == (most + 1) // 2
    clock.now += 0.2 * WISH_S  # nobody came back
    assert all(shares.may_play(playing) for playing in range(most))


@pytest.mark.parametrize("most", [2, 3, 8, 9])
def test_what_outside_agents_leave_half_played_still_lets_the_environment_fill_a_batch(most: int) -> None:
    shares = Shares(most)
    opened = 0
    while shares.may_open(opened):
        opened += 1
    assert opened >= 1
    assert most - opened >= most / 2  # max_staleness >= 1, so that half of the buffer is a batch at least
