"""CIPO's law of selection: which finished episodes are shown again, and when."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentgym.config import parse_config
from agentgym.errors import ConfigError, InputError
from agentgym.messages import Message
from agentgym.policy import Completion
from agentgym.rewards import Score
from agentgym.rollout.buffer import ReadyGroup
from agentgym.rollout.cipo import FORGET, CipoSection, Corrections
from agentgym.rollout.correction import Correction
from agentgym.server.settings import ServiceConfig
from agentgym.trajectory import EpisodeStatus, Trajectory, Turn


def member(
    group: str, name: int, value: float | None, versions: tuple[int, ...] = (0,), num_prompt: int = 1
) -> Trajectory:
    """One turn with a token of each of `versions`; `value` None: the grader said nothing."""
    n = len(versions)
    completion = Completion((7,) * n, (-0.5,) * n, versions, versions, "stop")
    turn = Turn((1,) * num_prompt, completion, Message("assistant", f"said by {group}.{name}"), (), 0.0)
    score = Score.invalid("grader died") if value is None else Score.of({"r": value})
    return Trajectory(
        f"{group}.{name}", group, "my/Env-v0", f"task of {group}", 3, (), (turn,), EpisodeStatus.TERMINATED, score, {},
        None,
    )  # fmt: skip


def group(name: str, values: list[float | None], versions: tuple[int, ...] = (0,), num_prompt: int = 1) -> ReadyGroup:
    members = tuple(member(name, number, value, versions, num_prompt) for number, value in enumerate(values))
    return ReadyGroup(name, min(versions), members)


def corrections(max_staleness: int = 2, max_original_tokens: int = 50, **options: Any) -> Corrections:
    return Corrections(CipoSection(**options), max_staleness, max_original_tokens)


def drawn(it: Corrections, times: int, version: int = 0) -> list[Correction]:
    return [correction for _ in range(times) if (correction := it.next(version)) is not None]


def test_a_group_gives_one_original_of_each_kind_that_it_has() -> None:
    it = corrections(share=0.9, correct_min=0.5, correct_max=0.5)
    it.offer(group("a", [0.0, 1.0, 0.3, None, 1.0]))
    found = drawn(it, 20)
    assert sorted(one.original.correct for one in found) == [False, True]
    assert all(one.original.pass_rate == 0.5 for one in found)  # of four valid ones; 0.3 is not correct
    assert {(one.task_id, one.seed) for one in found} == {("task of a", 3)}
    for one in found:  # the kind is that of the very episode that is shown
        number = int(one.original.said[0].content.rpartition(".")[2])
        assert one.original.correct is ([0.0, 1.0, 0.3, None, 1.0][number] == 1.0)
        assert number != 3


def test_which_member_is_shown_does_not_hang_on_who_ended_first() -> None:
    forwards, backwards = corrections(share=0.9), corrections(share=0.9)
    whole = group("a", [0.0] * 6 + [1.0])
    forwards.offer(whole)
    backwards.offer(ReadyGroup("a", 0, whole.members[::-1]))
    assert drawn(forwards, 3)[0].original == drawn(backwards, 3)[0].original


def test_medium_pass_rates_go_first_and_then_the_newest() -> None:
    it = corrections(share=0.9, correct_max=0.1)
    it.offer(group("none", [0.0, 0.0, 0.0, 0.0], (1,)))
    it.offer(group("old half", [0.0, 0.0, 1.0, 1.0], (0, 1)))
    it.offer(group("most", [0.0, 1.0, 1.0, 1.0], (1,)))
    it.offer(group("half", [0.0, 0.0, 1.0, 1.0], (1,)))
    names = [one.task_id.removeprefix("task of ") for one in drawn(it, 5, version=1)]
    assert names == ["half", "old half", "most", "none"]


@pytest.mark.parametrize(("version", "expected"), [(4, 1), (5, 0)])
def test_an_original_is_of_no_older_policy_than_the_bound_allows(version: int, expected: int) -> None:
    it = corrections(share=0.9, max_staleness=2)
    it.offer(group("a", [0.0, 0.0], (2, 3)))  # its oldest token counts
    assert len(drawn(it, 3, version)) == expected
    assert it.figures()["cipo/waiting"] == 0.0
    assert drawn(it, 3, version) == []  # each is used once


@pytest.mark.parametrize(("num_prompt", "expected"), [(49, 1), (50, 0)])
def test_an_original_that_is_too_long_is_counted_and_not_shown(num_prompt: int, expected: int) -> None:
    it = corrections(share=0.9, max_original_tokens=50)
    it.offer(group("a", [0.0, 0.0], num_prompt=num_prompt))
    assert len(drawn(it, 3)) == expected
    assert it.figures()["cipo/too_long"] == 1 - expected


def test_an_episode_that_sampled_nothing_is_no_original() -> None:
    it = corrections(share=0.9)
    it.offer(ReadyGroup("a", 0, tuple(member("a", number, 0.0, ()) for number in range(2))))
    assert drawn(it, 3) == []


@given(share=st.floats(0.05, 0.95), correct=st.floats(0.0, 1.0), times=st.integers(1, 120))
def test_the_shares_hold_at_every_moment(share: float, correct: float, times: int) -> None:
    """Of n groups begun, n * share are corrections, and of those a share shows correct originals: neither more nor less
    by a whole one."""
    it = corrections(share=share, correct_min=correct, correct_max=correct)
    begun, shown_correct = 0, 0
    for number in range(times):
        it.offer(group(f"g{number}", [0.0, 1.0]))
        one = it.next(0)
        if one is not None:
            assert one.number == begun
            assert one.group_id == f"c-{begun:06d}"
            begun += 1
            shown_correct += one.original.correct
        assert abs(begun - share * (number + 1)) < 1.0 + 1e-6
        assert abs(shown_correct - correct * begun) < 1.0 + 1e-6


def test_what_was_missed_for_want_of_an_original_is_not_made_up_for() -> None:
    it = corrections(share=0.25, correct_max=0.1)
    assert drawn(it, 40) == []
    for number in range(20):
        it.offer(group(f"g{number}", [0.0, 0.0]))
    places = [place for place in range(20) if it.next(0) is not None]
    assert places == [0, 3, 7, 11, 15, 19]  # one was owed, not ten


def test_a_correct_original_never_takes_a_wrong_ones_place() -> None:
    it = corrections(share=0.9, correct_min=0.25, correct_max=0.25)
    for number in range(40):
        it.offer(group(f"g{number}", [1.0, 1.0]))
    assert drawn(it, 40) == []  # none is wrong: nothing is corrected
    it.offer(group("wrong", [0.0, 0.0]))
    assert [one.original.correct for one in drawn(it, 40)] == [False]


def test_a_wrong_original_takes_the_place_of_a_correct_one_that_is_missing() -> None:
    it = corrections(share=0.9, correct_min=0.5, correct_max=0.5)
    for number in range(20):
        it.offer(group(f"g{number}", [0.0, 0.0]))
    assert [one.original.correct for one in drawn(it, 11)] == [False] * 9
    for number in range(20):
        it.offer(group(f"correct{number}", [1.0, 1.0]))
    assert [one.original.correct for one in drawn(it, 6)] == [
        True,
        True,
        False,
        True,
        False,
        True,
    ]  # one owed, not five


# ----------------------------------------------------------------------------------------------- the adaptive ratio


def noted(it: Corrections, *, correct: bool, values: list[float | None]) -> None:
    it.offer(group("n", [1.0 if correct else 0.0] * 2))
    original = it._waiting.pop()
    for number, value in enumerate(values):
        it.note(Correction(0, original, "", 0.0), member("c", number, value))


def test_the_ratio_is_that_of_the_errors_within_its_bounds() -> None:
    it = corrections(correct_min=0.1, correct_max=0.9)
    assert it.correct_share == 0.5
    noted(it, correct=True, values=[1.0] * 10 + [None] * 99)  # what the grader did not say is no success
    kept = 0.5 * (1 - FORGET) ** 10
    assert it.correct_share == pytest.approx(kept / (kept + 0.5))
    noted(it, correct=False, values=[0.0] * 20)
    missed = 1.0 - 0.5 * (1 - FORGET) ** 20
    assert it.correct_share == pytest.approx(kept / (kept + missed))
    noted(it, correct=True, values=[1.0] * 500)
    assert it.correct_share == 0.1
    noted(it, correct=True, values=[0.0] * 500)
    noted(it, correct=False, values=[1.0] * 500)
    assert it.correct_share == 0.9


def test_a_policy_that_breaks_what_was_correct_meets_more_correct_originals() -> None:
    breaks, keeps = corrections(), corrections()
    noted(breaks, correct=True, values=[0.0] * 30)
    noted(keeps, correct=True, values=[1.0] * 30)
    assert keeps.correct_share < breaks.correct_share


@given(
    wrong=st.lists(st.sampled_from([0.0, 1.0]), max_size=40), correct=st.lists(st.sampled_from([0.0, 1.0]), max_size=40)
)
def test_a_restored_state_goes_on_with_the_same_ratio_and_numbers(wrong: list[float], correct: list[float]) -> None:
    before = corrections(share=0.9)
    noted(before, correct=False, values=[*wrong])
    noted(before, correct=True, values=[*correct])
    before.offer(group("a", [0.0, 0.0]))
    used = len(drawn(before, 3))
    after = corrections(share=0.9)
    after.restore(before.state())
    assert after.state() == before.state()
    assert after.correct_share == before.correct_share
    after.offer(group("b", [0.0, 0.0]))
    assert [one.number for one in drawn(after, 3)] == [used]


@pytest.mark.parametrize(
    "state",
    [
        {},
        {"next": -1, "wrong_errors": 0.5, "correct_errors": 0.5},
        {"next": 1, "wrong_errors": 1.5, "correct_errors": 0.5},
        {"next": 1, "wrong_errors": 0.5, "correct_errors": float("nan")},
    ],
)
def test_a_state_that_is_none_is_refused(state: dict[str, object]) -> None:
    with pytest.raises(InputError, match=r"the state of corrections needs 'next' and two rates"):
        corrections().restore(state)


# ---------------------------------------------------------------------------------------------------- configuration


@pytest.mark.parametrize(
    ("rollout", "message"),
    [
        ({"cipo": {"share": 0.0}}, r"rollout.cipo.share: must be > 0 and < 1, got 0.0; .* leave \[rollout.cipo\] out"),
        ({"cipo": {"share": 1.5}}, r"rollout.cipo.share: must be > 0 and < 1, got 1.5"),
        ({"cipo": {"share": float("nan")}}, r"rollout.cipo.share: must be > 0 and < 1, got nan"),
        ({"cipo": {"penalty": -0.1}}, r"rollout.cipo.penalty: must be >= 0, got -0.1"),
        ({"cipo": {"penalty": float("inf")}}, r"rollout.cipo.penalty: .*finite.* got inf"),
        ({"cipo": {"correct_max": 1.2}}, r"rollout.cipo.correct_max: must be >= 0 and <= 1, got 1.2"),
        ({"cipo": {"correct_min": 0.6}}, r"rollout.cipo: correct_min \(0.6\) must be <= correct_max \(0.5\)"),
        ({"cipo": {"max_original_tokens": 0}}, r"rollout.cipo.max_original_tokens: must be >= 1, got 0"),
        (
            {"cipo": {"max_original_tokens": 64}, "max_episode_tokens": 64},
            r"cipo.max_original_tokens must be < max_episode_tokens \(64\), .* got 64",
        ),
        ({"cipo": {}, "max_staleness": 0}, r"cipo needs max_staleness >= 1: .* got 0"),
        ({"cipo": {}, "source": "sessions"}, r'cipo plays tasks of the environment again, .* choose "environment"'),
        ({"cipo": {"shares": 0.1}}, r"unknown key 'rollout.cipo.shares'; did you mean 'rollout.cipo.share'"),
    ],
)
def test_bad_settings_are_refused(rollout: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_config(ServiceConfig, {"env": {"id": "maze"}, "rollout": rollout})


def test_it_is_off_by_default() -> None:
    assert parse_config(ServiceConfig, {"env": {"id": "maze"}}).rollout.cipo is None
