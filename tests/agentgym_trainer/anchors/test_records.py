"""Records of old logprobs against the simplest thing that is right: a dictionary of tokens."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentgym.errors import TrainingError
from agentgym_trainer.anchors.records import (
    ContradictionError,
    OldLogprobs,
    OverlapError,
    RecordStore,
    Run,
    digest,
    runs_of,
)

TOKENS = list(range(100, 118))  # of row 0


def tokens_of(row: int) -> list[int]:
    return [token + 50 * row for token in TOKENS]


def record(start: int, stop: int, version: int = 3, row: int = 0, name: str = "t", shift: float = 0.0) -> OldLogprobs:
    logprobs = -np.arange(start, stop, dtype=np.float32) / 8 - version + np.float32(shift)
    return OldLogprobs(name, row, start, stop, version, logprobs, digest(tokens_of(row)[:stop]))


def test_a_batch_looks_up_what_was_scored() -> None:
    store = RecordStore()
    assert store.add(record(1, 3, version=3))
    assert store.add(record(4, 5, version=4))
    logprobs, known = store.lookup("t", 0, TOKENS[:6], [-1, 3, 3, -1, 4, 4])
    assert known.tolist() == [False, True, True, False, True, False]
    assert logprobs.tolist() == [0.0, -3.125, -3.25, 0.0, -4.5, 0.0]
    assert not store.lookup("other", 0, TOKENS[:2], [-1, 3])[1].any()
    assert store.settle("t", [(TOKENS[:6], [-1, 3, 3, -1, 4, 4])]) == [Run(0, 5, 6, 4)]
    assert store.num_tokens == 3


def test_a_record_holds_behind_the_tokens_that_it_was_scored_behind_and_nowhere_else() -> None:
    store = RecordStore()
    store.add(record(3, 5))
    changed = [TOKENS[0], 99, *TOKENS[2:8]]
    versions = [-1, -1, -1, 3, 3, 3, 3, 3]
    assert not store.lookup("t", 0, changed, versions)[1].any()
    assert store.lookup("t", 1, TOKENS[:8], versions)[1].tolist() == [False] * 3 + [True] * 2 + [False] * 3
    context = [-1] * 6 + [3, 3]  # the same tokens as history of another row: nothing was sampled there
    assert not store.lookup("t", 1, TOKENS[:8], context)[1].any()
    missing = store.settle("t", [(changed, versions), (TOKENS[:8], versions)])
    assert missing == [Run(0, 3, 8, 3), Run(1, 5, 8, 3)]
    assert [(kept.row, kept.start, kept.stop) for kept in store] == [(1, 3, 5)]


def test_the_same_again_is_counted_and_the_first_stays() -> None:
    store = RecordStore()
    assert store.add(record(1, 3))
    assert not store.add(record(1, 3, shift=1e-5))
    assert store.num_duplicates == 1
    assert store.lookup("t", 0, TOKENS[:3], [-1, 3, 3])[0].tolist() == [0.0, -3.125, -3.25]


@pytest.mark.parametrize(
    ("second", "error", "message"),
    [
        (record(2, 5), OverlapError, r"trajectory t row 0 tokens 2\.\.5 overlaps tokens 1\.\.4"),
        (record(0, 2), OverlapError, r"overlaps tokens 1\.\.4"),
        (record(2, 3), OverlapError, r"overlaps tokens 1\.\.4"),
        (record(0, 9), OverlapError, r"overlaps tokens 1\.\.4"),
        (record(1, 4, version=2), ContradictionError, r"scored under version 3, and again under 2"),
        (record(1, 4, shift=0.01), ContradictionError, r"twice under version 3, 0\.01 apart"),
    ],
)
def test_records_that_disagree_are_refused(second: OldLogprobs, error: type[Exception], message: str) -> None:
    store = RecordStore()
    store.add(record(1, 4))
    with pytest.raises(error, match=message):
        store.add(second)
    assert store.num_tokens == 3


@pytest.mark.parametrize("versions", [[-1, 3, 4], [-1, -1, 3], [-1, 2, 2]])
def test_a_record_of_another_version_than_the_tokens_is_refused(versions: list[int]) -> None:
    store = RecordStore()
    store.add(record(1, 3))
    with pytest.raises(ContradictionError, match=r"tokens 1\.\.3 were scored under version 3, but the row"):
        store.lookup("t", 0, TOKENS[:3], versions)


@pytest.mark.parametrize(
    ("start", "stop", "version", "logprobs"),
    [
        (3, 3, 0, np.zeros(0, np.float32)),
        (-1, 1, 0, np.zeros(2, np.float32)),
        (1, 3, -1, np.zeros(2, np.float32)),
        (1, 3, 0, np.zeros(3, np.float32)),
        (1, 3, 0, np.zeros(2, np.int64)),
        (1, 3, 0, np.array([0.0, np.nan], np.float32)),
        (1, 3, 0, np.array([-np.inf, 0.0], np.float32)),
    ],
)
def test_what_is_no_record_is_refused(start: int, stop: int, version: int, logprobs: np.ndarray) -> None:
    with pytest.raises(TrainingError, match="trajectory t row 0 tokens"):
        OldLogprobs("t", 0, start, stop, version, logprobs, b"")


def test_trajectories_that_are_gone_take_no_memory() -> None:
    store = RecordStore()
    for name in "abcd":
        store.extend([record(1, 3, name=name), record(5, 6, name=name, row=1)])
    store.forget(["a", "unknown"])
    assert "a" not in store
    assert store.num_tokens == 9
    assert {r.trajectory_id for r in store.of({"b", "a"})} == {"b"}
    store.keep_only({"c", "a"})
    assert [r.trajectory_id for r in store] == ["c", "c"]
    assert store.add(record(2, 4, name="b"))  # nothing is left of what was forgotten


@given(
    st.lists(st.tuples(st.sampled_from("ab"), st.integers(0, 1), st.integers(0, 12), st.integers(1, 5)), max_size=25),
    st.lists(st.integers(0, 2), min_size=18, max_size=18),
)
def test_the_store_knows_what_a_dictionary_of_tokens_knows(
    ranges: list[tuple[str, int, int, int]], versions: list[int]
) -> None:
    """Rows of 18 tokens whose versions are given; whatever is offered, in whatever order."""
    store = RecordStore()
    tokens: dict[tuple[str, int, int], float] = {}
    kept: set[tuple[str, int, int, int]] = set()
    for name, row, start, length in ranges:
        same = versions[start : start + length]
        offered = record(start, start + length, version=same[0], row=row, name=name)
        places = [(name, row, t) for t in range(start, start + length)]
        if (name, row, start, start + length) in kept:
            assert not store.add(offered)
        elif any(place in tokens for place in places):
            with pytest.raises(OverlapError):
                store.add(offered)
        elif len(set(same)) > 1:
            continue  # no record holds two versions
        else:
            assert store.add(offered)
            kept.add((name, row, start, start + length))
            tokens |= dict(zip(places, offered.logprobs.tolist()))
    assert store.num_tokens == len(tokens)
    for name in "ab":
        for row in (0, 1):  # rows of other tokens, so that each has its own records alone
            logprobs, known = store.lookup(name, row, tokens_of(row), versions)
            assert known.tolist() == [(name, row, t) in tokens for t in range(18)]
            assert logprobs.tolist() == [tokens.get((name, row, t), 0.0) for t in range(18)]
        missing = store.settle(name, [(tokens_of(row), versions) for row in (0, 1)])
        assert {(run.row, t, run.version) for run in missing for t in range(run.start, run.stop)} == {
            (row, t, versions[t]) for row in (0, 1) for t in range(18) if (name, row, t) not in tokens
        }
    assert store.num_tokens == len(tokens)


@given(st.lists(st.integers(-1, 2), max_size=30))
def test_runs_cover_each_sampled_token_once(versions: list[int]) -> None:
    runs = runs_of(versions)
    covered = [(t, version) for start, stop, version in runs for t in range(start, stop)]
    assert covered == [(t, v) for t, v in enumerate(versions) if v != -1]
    assert all(a[1] < b[0] or a[2] != b[2] for a, b in pairwise(runs))  # maximal
