"""Baselines: what each kind computes, and who is in none of them."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentgym.errors import InputError, UnknownNameError
from agentgym.trajectory import EpisodeStatus, ScoredSequences, TokenSequence
from agentgym_trainer.advantages import ADVANTAGES, Overlong, compute_advantages, trajectory_advantages

SCORES = [1.0, 0.0, 0.0, 1.0, 0.5, 0.0]
GROUPS = ["a", "a", "a", "b", "b", "b"]


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("group_mean", [2 / 3, -1 / 3, -1 / 3, 0.5, 0.0, -0.5]),
        ("group_mean_std", [2 / math.sqrt(3), -1 / math.sqrt(3), -1 / math.sqrt(3), 1.0, 0.0, -1.0]),
        ("leave_one_out", [1.0, -0.5, -0.5, 0.75, 0.0, -0.75]),
        ("batch_mean", [1 - 5 / 12, -5 / 12, -5 / 12, 1 - 5 / 12, 0.5 - 5 / 12, -5 / 12]),
    ],
)
def test_each_kind_by_hand(kind: str, expected: list[float]) -> None:
    result = compute_advantages(kind, SCORES, GROUPS, [True] * 6)  # type: ignore[arg-type]
    np.testing.assert_allclose(result.values, expected, atol=3e-6 if kind == "group_mean_std" else 1e-12)
    assert result.included.all()
    assert (result.refused_groups, result.num_zero_variance_groups) == ((), 0)


@pytest.mark.parametrize("kind", ADVANTAGES)
@given(data=st.data())
def test_who_is_not_valid_changes_nobodys_advantage(kind: str, data: st.DataObject) -> None:
    n = data.draw(st.integers(0, 14))
    scores = data.draw(st.lists(st.floats(-3, 3), min_size=n, max_size=n))
    groups = data.draw(st.lists(st.sampled_from("abc"), min_size=n, max_size=n))
    valid = data.draw(st.lists(st.booleans(), min_size=n, max_size=n))
    result = compute_advantages(kind, scores, groups, valid)  # type: ignore[arg-type]
    # Whatever stands in the place of an invalid score: the same advantages.
    poisoned = [score if ok else math.nan for score, ok in zip(scores, valid)]
    again = compute_advantages(kind, poisoned, groups, valid)  # type: ignore[arg-type]
    np.testing.assert_array_equal(result.values, again.values)
    np.testing.assert_array_equal(result.included, again.included)
    # And the same again as if they had never been there.
    kept = [i for i in range(n) if valid[i]]
    alone = compute_advantages(
        kind,
        [scores[i] for i in kept],
        [groups[i] for i in kept],
        [True] * len(kept),  # type: ignore[arg-type]
    )
    np.testing.assert_allclose(result.values[kept], alone.values, atol=1e-12)
    assert not result.values[~result.included].any()
    assert not (result.included & ~np.array(valid, dtype=bool)).any()


@pytest.mark.parametrize("kind", ["group_mean", "group_mean_std", "leave_one_out"])
@given(st.lists(st.floats(-3, 3), min_size=2, max_size=8))
def test_a_groups_advantages_sum_to_zero(kind: str, scores: list[float]) -> None:
    values = compute_advantages(kind, scores, [0] * len(scores), [True] * len(scores)).values  # type: ignore[arg-type]
    assert abs(values.sum()) < 1e-9
    assert np.isfinite(values).all()


def test_leave_one_out_leaves_one_out() -> None:
    values = compute_advantages("leave_one_out", SCORES[:3], GROUPS[:3], [True] * 3).values
    for i in range(3):
        others = [SCORES[j] for j in range(3) if j != i]
        assert values[i] == pytest.approx(SCORES[i] - sum(others) / 2)


@pytest.mark.parametrize("kind", ["group_mean", "group_mean_std", "leave_one_out"])
def test_a_group_with_one_valid_member_is_refused_and_named(kind: str) -> None:
    result = compute_advantages(kind, SCORES, GROUPS, [True] * 3 + [False, True, False])  # type: ignore[arg-type]
    assert result.refused_groups == ("b",)
    assert result.included.tolist() == [True, True, True, False, False, False]


@pytest.mark.parametrize("kind", ADVANTAGES)
def test_equal_scores_give_exact_zeros(kind: str) -> None:
    result = compute_advantages(kind, [0.1] * 7, ["a"] * 7, [True] * 7)  # type: ignore[arg-type]
    assert result.num_zero_variance_groups == 1
    assert result.included.all()
    if kind != "batch_mean":
        assert not result.values.any()


def test_a_batch_with_one_valid_member_has_no_baseline() -> None:
    result = compute_advantages("batch_mean", [1.0, 0.0], ["a", "b"], [True, False])
    assert not result.included.any()
    assert result.refused_groups == ("a", "b")


def test_failed_and_invalid_trajectories_are_in_no_baseline() -> None:
    def member(score: float, valid: bool, status: EpisodeStatus = EpisodeStatus.TERMINATED) -> ScoredSequences:
        return ScoredSequences("t", "g", "env", status, score, valid, {}, (), 0)

    members = [member(1.0, True), member(0.0, True), member(1.0, False), member(9.0, True, EpisodeStatus.FAILED)]
    result = trajectory_advantages("group_mean", members)
    assert result.values.tolist() == [0.5, -0.5, 0.0, 0.0]
    assert result.included.tolist() == [True, True, False, False]
    truncated = [member(1.0, True), member(0.0, True, EpisodeStatus.TRUNCATED)]
    assert trajectory_advantages("group_mean", truncated).included.all()


def test_bad_input_is_named() -> None:
    with pytest.raises(UnknownNameError, match="unknown advantage 'group_maen'; did you mean 'group_mean'"):
        compute_advantages("group_maen", [], [], [])  # type: ignore[arg-type]
    message = r"must be finite, got nan in group 'b' \(number 3 of the batch's 4\); .* invalid"
    with pytest.raises(InputError, match=message):
        compute_advantages("group_mean", [math.nan, 1.0, 1.0, math.nan], [*"aabb"], [False, True, True, True])
    with pytest.raises(InputError, match="of one length, got 1, 2, 2"):
        compute_advantages("group_mean", [1.0], ["a", "a"], [True, True])


def test_rounding_is_no_signal() -> None:
    scores = [0.3, 0.1 + 0.2, 0.3, 0.3]
    values = compute_advantages("group_mean_std", scores, ["a"] * 4, [True] * 4).values
    assert np.abs(values).max() < 1e-9


# ------------------------------------------------------------------------------------------------- overlong shaping


def episode(score: float, num_tokens: int, *shorter: int) -> ScoredSequences:
    """An episode whose longest row has so many tokens, of which its policy sampled the last one."""

    def row(length: int) -> TokenSequence:
        blank = (0,) * (length - 1)
        mask = (False,) * (length - 1) + (True,)
        return TokenSequence((*blank, 1), mask, (*map(float, blank), -1.0), (*blank, 0), (*blank, 0))

    rows = tuple(row(length) for length in (num_tokens, *shorter))
    return ScoredSequences("t", "g", "env", EpisodeStatus.TERMINATED, score, True, {}, rows, len(rows))


@pytest.mark.parametrize(
    ("length", "added"), [(1, 0.0), (800, 0.0), (801, -0.005), (900, -0.5), (1000, -1.0), (1001, -1.0), (9999, -1.0)]
)
def test_the_punishment_grows_from_the_buffer_to_the_limit(length: int, added: float) -> None:
    assert Overlong(limit=1000, buffer=200).of(length) == pytest.approx(added)
    assert Overlong(limit=1000, buffer=200, penalty=0.3).of(length) == pytest.approx(0.3 * added)


def test_the_punishment_is_in_the_score_that_the_baseline_is_made_of() -> None:
    overlong = Overlong(limit=100, buffer=20)
    members = [episode(1.0, 80), episode(1.0, 90, 3), episode(0.0, 100), episode(0.0, 5)]
    shaped = trajectory_advantages("group_mean", members, overlong)
    np.testing.assert_allclose(shaped.values, np.array([1.0, 0.5, -1.0, 0.0]) - 0.125)
    assert trajectory_advantages("group_mean", members).values.tolist() == [0.5, 0.5, -0.5, -0.5]
    assert overlong.figures(members) == {"trajectory/overlong_fraction": 0.5, "trajectory/overlong_mean": -0.375}


def test_one_score_at_other_lengths_is_a_gradient() -> None:
    members = [episode(1.0, 80), episode(1.0, 100)]
    assert trajectory_advantages("group_mean", members).num_zero_variance_groups == 1
    shaped = trajectory_advantages("group_mean", members, Overlong(limit=100, buffer=20))
    assert shaped.num_zero_variance_groups == 0
    assert shaped.values.tolist() == [0.5, -0.5]
