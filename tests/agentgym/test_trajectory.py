"""Flattening: each sampled token is delivered exactly once, with its own logprob and versions."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentgym.errors import InputError
from agentgym.messages import Message, call
from agentgym.policy import Completion
from agentgym.rewards import Score
from agentgym.trajectory import (
    NO_VERSION,
    EpisodeStatus,
    TokenSequence,
    Trajectory,
    Turn,
    to_scored_sequences,
    to_sequences,
)

ids = st.lists(st.integers(0, 9), max_size=6).map(tuple)


@st.composite
def completions(draw: st.DrawFn, first: int) -> Completion:
    """Sampled tokens, each with a logprob that is its own: -(its number in the episode)."""
    tokens = draw(ids)
    versions = sorted(draw(st.lists(st.integers(0, 4), min_size=len(tokens), max_size=len(tokens))))
    logprobs = tuple(-1.0 - first - i for i in range(len(tokens)))
    kv = tuple(max(0, v - draw(st.integers(0, 1))) for v in versions)
    return Completion(tokens, logprobs, tuple(versions), kv, "stop")


@st.composite
def episodes(draw: st.DrawFn) -> tuple[Trajectory, list[bool]]:
    """An episode, and for each turn after the first whether its agent rewrote the history."""
    turns: list[Turn] = []
    broken: list[bool] = []
    prompt = draw(ids)
    sampled = 0
    for index in range(draw(st.integers(0, 5))):
        if index:
            history = turns[-1].prompt_ids + turns[-1].completion.token_ids
            if draw(st.booleans()) or not history:
                prompt = history + draw(ids)
                broken.append(False)
            else:
                place = draw(st.integers(0, len(history) - 1))
                prompt = (*history[:place], (history[place] + 1) % 10, *history[place + 1 :], *draw(ids))
                broken.append(True)
        completion = draw(completions(sampled))
        sampled += len(completion.token_ids)
        turns.append(Turn(prompt, completion, Message("assistant", "x"), (), 0.0))
    return _trajectory(turns), broken


def _trajectory(turns: list[Turn], score: Score | None = None) -> Trajectory:
    score = score or Score.of({"r": 1.0})
    return Trajectory("t", "g", "my/Env-v0", "task", 3, (), tuple(turns), EpisodeStatus.TERMINATED, score, {}, None)


def _loss_tokens(rows: tuple[TokenSequence, ...]) -> list[tuple[int, float, int, int]]:
    return [
        (token, logprob, version, kv)
        for row in rows
        for token, loss, logprob, version, kv in zip(
            row.token_ids, row.loss_mask, row.behavior_logprobs, row.policy_versions, row.kv_versions
        )
        if loss
    ]


@given(episodes())
def test_every_sampled_token_is_delivered_exactly_once(case: tuple[Trajectory, list[bool]]) -> None:
    trajectory, _ = case
    sampled = [
        token
        for turn in trajectory.turns
        for token in zip(
            turn.completion.token_ids,
            turn.completion.logprobs,
            turn.completion.policy_versions,
            turn.completion.kv_versions,
        )
    ]
    assert _loss_tokens(to_sequences(trajectory)) == sampled  # the logprobs number the tokens, so none is there twice


@given(episodes())
def test_rows_are_what_the_policy_saw_and_fork_where_history_was_rewritten(case: tuple[Trajectory, list[bool]]) -> None:
    trajectory, broken = case
    rows = to_sequences(trajectory)
    assert len(rows) == (1 + sum(broken) if trajectory.turns else 0)
    last_of_row = [i for i, fork in enumerate([*broken, True]) if fork] if trajectory.turns else []
    for row, index in zip(rows, last_of_row, strict=True):
        turn = trajectory.turns[index]
        assert row.token_ids == turn.prompt_ids + turn.completion.token_ids


@given(episodes())
def test_what_nobody_sampled_carries_neither_loss_nor_version(case: tuple[Trajectory, list[bool]]) -> None:
    for row in to_sequences(case[0]):
        columns = zip(row.loss_mask, row.behavior_logprobs, row.policy_versions, row.kv_versions, strict=True)
        assert all(column == (False, 0.0, NO_VERSION, NO_VERSION) for column in columns if not column[0])
        assert len(row) == len(row.loss_mask)
        assert row.num_loss_tokens == sum(v != NO_VERSION for v in row.policy_versions)


def test_a_conversation_by_hand() -> None:
    """Two turns on one row; then the agent drops the first turn and begins another."""
    one = Completion((5, 2), (-0.1, -0.2), (3, 3), (3, 3), "stop")
    two = Completion((6, 2), (-0.3, -0.4), (3, 4), (3, 4), "stop")
    three = Completion((8,), (-0.5,), (4,), (4,), "length")
    turns = [
        Turn((1, 7), one, call("move", dir="up"), (), 0.0),
        Turn((1, 7, 5, 2, 9), two, call("move", dir="up"), (), 0.0),
        Turn((1, 9), three, Message("assistant", ""), (), 1.0),
    ]
    first, second = to_sequences(_trajectory(turns))
    assert first == TokenSequence(
        (1, 7, 5, 2, 9, 6, 2),
        (False, False, True, True, False, True, True),
        (0.0, 0.0, -0.1, -0.2, 0.0, -0.3, -0.4),
        (-1, -1, 3, 3, -1, 3, 4),
        (-1, -1, 3, 3, -1, 3, 4),
    )
    assert second == TokenSequence((1, 9, 8), (False, False, True), (0.0, 0.0, -0.5), (-1, -1, 4), (-1, -1, 4))
    trajectory = _trajectory(turns, Score.of({"reached": 1.0, "format": 0.5}))
    scored = to_scored_sequences(trajectory)
    assert (scored.score, scored.valid, scored.components) == (1.5, True, {"reached": 1.0, "format": 0.5})
    assert (scored.num_sampled_tokens, scored.sequences) == (5, (first, second))
    assert trajectory.oldest_version == 3


def test_a_failed_episode_has_no_scored_sequences() -> None:
    failed = Trajectory("t-9", "g", "e", "task", 0, (), (), EpisodeStatus.FAILED, None, {}, "EngineError: gone")
    assert failed.oldest_version is None
    with pytest.raises(InputError, match=r"t-9 failed.*EngineError: gone"):
        to_scored_sequences(failed)


def test_arrays_of_unequal_length_are_refused() -> None:
    with pytest.raises(InputError, match="one length"):
        TokenSequence((1, 2), (True,), (0.0, 0.0), (0, 0), (0, 0))


@given(episodes())
def test_json_on_disk_gives_the_same_trajectory_back(case: tuple[Trajectory, list[bool]]) -> None:
    encoded = msgspec.json.encode(case[0])
    assert msgspec.json.decode(encoded, type=Trajectory) == case[0]
