"""The order of tasks: seeded, endless, and continued without a gap."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentgym.errors import InputError
from agentgym.rollout.schedule import Schedule

TASKS = ["a", "b", "c", "d", "e"]


def test_each_epoch_is_another_permutation_of_all_tasks() -> None:
    schedule = Schedule(TASKS, seed=3)
    epochs = [[schedule.next().task_id for _ in TASKS] for _ in range(20)]
    assert all(sorted(epoch) == TASKS for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 10


def test_the_order_is_the_seeds_alone() -> None:
    one, same, other = (Schedule(TASKS, seed) for seed in (1, 1, 2))
    first = [one.next() for _ in range(12)]
    assert first == [same.next() for _ in range(12)]
    assert first != [other.next() for _ in range(12)]
    assert len({task.seed for task in first}) == 12


@given(st.lists(st.booleans(), max_size=40), st.integers(0, 5))
def test_a_restored_schedule_plays_what_was_pending_and_then_goes_on(finished: list[bool], seed: int) -> None:
    """Whatever was consumed before the restart, consumed plus replayed is the order without a restart."""
    whole = Schedule(TASKS, seed)
    expected = [whole.next() for _ in range(len(finished) + 5)]
    before = Schedule(TASKS, seed)
    for done in finished:
        task = before.next()
        if done:
            before.finish(task.index)
    after = Schedule(TASKS, seed)
    after.restore(before.state())
    consumed = [task for task, done in zip(expected, finished) if done]
    replayed = [after.next() for _ in range(len(expected) - len(consumed))]
    assert sorted([*consumed, *replayed], key=lambda task: task.index) == expected


def test_a_position_saved_right_after_a_restore_loses_nothing() -> None:
    before = Schedule(TASKS, 0)
    handed_out = [before.next().index for _ in range(3)]
    after = Schedule(TASKS, 0)
    after.restore(before.state())
    assert after.state() == before.state()
    assert after.next().index == handed_out[0]
    assert after.state() == before.state()  # handed out again is still pending


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"seed": 9, "tasks": 5, "next": 0, "pending": []}, "resume with the same"),
        ({"seed": 0, "tasks": 4, "next": 0, "pending": []}, "resume with the same"),
        ({"seed": 0, "tasks": 5, "pending": []}, "'next' and 'pending'"),
        ({"seed": 0, "tasks": 5, "next": 2, "pending": [2]}, r"in \[0, 2\)"),
        ({"seed": 0, "tasks": 5, "next": 2, "pending": "x"}, "'next' and 'pending'"),
    ],
)
def test_another_runs_position_is_refused(state: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Schedule(TASKS, 0).restore(state)


def test_an_environment_without_tasks_is_refused() -> None:
    with pytest.raises(InputError, match="no training tasks"):
        Schedule([], 0)
