"""Trajectories on disk: whole files, readable lines, and a full disk that is said."""

from __future__ import annotations

import dataclasses
import math
import os
from pathlib import Path

import pytest

from agentgym.errors import CheckpointError, InputError
from agentgym.messages import Message, call
from agentgym.policy import Completion
from agentgym.rewards import Score
from agentgym.rollout.store import TrajectoryStore, read_trajectories, step_file
from agentgym.trajectory import EpisodeStatus, Trajectory, Turn

TURN = Turn(
    (1, 2), Completion((3,), (-0.25,), (1,), (0,), "stop"), call("move", dir="up"), (Message("tool", "ü\n"),), 1.0
)
GOOD = Trajectory(
    "t-1", "g-1", "my/Env-v0", "a", 3, (Message("user", "go"),), (TURN,), EpisodeStatus.TERMINATED,
    Score.of({"r": 1.0}), {"turns": 1.0}, None,
)  # fmt: skip
FAILED = Trajectory("t-2", "g-1", "my/Env-v0", "a", 3, (), (), EpisodeStatus.FAILED, None, {}, "OSError: gone")


def test_one_file_a_step_one_line_a_trajectory(tmp_path: Path) -> None:
    store = TrajectoryStore(tmp_path)
    store.put(GOOD)
    store.put(FAILED)
    store.write(12)
    store.put(FAILED)
    store.write(13)
    file = tmp_path / "trajectories" / "step-000012.jsonl"
    assert len(file.read_text(encoding="utf-8").splitlines()) == 2
    assert list(read_trajectories(file)) == [GOOD, FAILED]
    assert list(read_trajectories(step_file(tmp_path, 13))) == [FAILED]


def test_a_logprob_that_is_no_number_comes_back_as_nan(tmp_path: Path) -> None:
    """JSON has none; such a token is dropped from the loss and counted, and its trajectory can be looked at."""
    completion = Completion((3, 4, 5), (-0.25, math.nan, -math.inf), (1,) * 3, (0,) * 3, "stop")
    store = TrajectoryStore(tmp_path)
    store.put(dataclasses.replace(GOOD, turns=(TURN, dataclasses.replace(TURN, completion=completion))))
    store.write(1)
    (read,) = read_trajectories(step_file(tmp_path, 1))
    assert read.turns[0] == TURN
    first, *broken = read.turns[1].completion.logprobs
    assert first == -0.25
    assert all(math.isnan(value) for value in broken)


def test_a_second_batch_of_a_step_is_appended_and_an_earlier_runs_file_is_replaced(tmp_path: Path) -> None:
    for _ in range(2):
        store = TrajectoryStore(tmp_path)
        store.put(GOOD)
        store.write(1)
        store.put(FAILED)
        store.write(1)
        assert list(read_trajectories(step_file(tmp_path, 1))) == [GOOD, FAILED]


def test_a_failed_write_leaves_the_old_file_and_keeps_the_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = TrajectoryStore(tmp_path)
    store.put(GOOD)
    store.write(1)
    store.put(FAILED)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", full)
        with pytest.raises(CheckpointError, match=r"step 1 .*No space left on device"):
            store.write(1)
    assert list(read_trajectories(step_file(tmp_path, 1))) == [GOOD]
    assert not list(tmp_path.rglob("*.partial"))
    store.write(1)
    assert list(read_trajectories(step_file(tmp_path, 1))) == [GOOD, FAILED]


@pytest.mark.parametrize("line", ["{}", "not json", '{"trajectory_id": 3}', '{"turns": [null]}', "3"])
def test_what_is_no_trajectory_is_named_by_its_line(tmp_path: Path, line: str) -> None:
    store = TrajectoryStore(tmp_path)
    store.put(GOOD)
    store.write(1)
    with step_file(tmp_path, 1).open("a") as file:
        file.write(line + "\n")
    with pytest.raises(InputError, match=r"step-000001\.jsonl line 2 is not a trajectory"):
        list(read_trajectories(step_file(tmp_path, 1)))
    with pytest.raises(InputError, match="cannot read"):
        list(read_trajectories(tmp_path / "missing.jsonl"))
