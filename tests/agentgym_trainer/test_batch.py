"""Rows into micro-batches: nothing lost, nothing doubled, the same plan on every rank."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentgym.errors import InputError
from agentgym.trajectory import EpisodeStatus, ScoredSequences, TokenSequence
from agentgym_trainer.advantages import Advantages
from agentgym_trainer.batch import (
    OVERHEAD_TOKENS,
    PADDING_ROW,
    Row,
    build_micro_batches,
    collect_rows,
    count_loss_tokens,
    plan_cuts,
)

MakeRows = Callable[..., list[Row]]
LENGTHS = st.lists(st.integers(2, 60), min_size=0, max_size=30)


def plain_rows(lengths: list[int]) -> list[Row]:
    """Row i holds token i everywhere and loss on all but its first token."""
    return [
        Row(
            TokenSequence(
                (i,) * n, (False,) + (True,) * (n - 1), (0.0,) + (-float(i + 1),) * (n - 1),
                (-1,) + (i,) * (n - 1), (-1,) + (i,) * (n - 1),
            ),
            float(i) / 8,
        )
        for i, n in enumerate(lengths)
    ]  # fmt: skip


@given(LENGTHS, st.integers(1, 200), st.integers(1, 4))
def test_every_row_comes_once_and_whole(lengths: list[int], max_tokens: int, world_size: int) -> None:
    rows = plain_rows(lengths)
    shares = [
        build_micro_batches(rows, max_tokens=max_tokens, rank=r, world_size=world_size) for r in range(world_size)
    ]
    assert len({len(share) for share in shares}) == 1  # collectives agree
    seen = []
    for batch in (batch for share in shares for batch in share):
        assert batch.num_tokens <= max_tokens or len(batch.row_ids) == 1
        for b, row_id in enumerate(batch.row_ids.tolist()):
            if row_id == PADDING_ROW:
                assert not batch.loss_mask.any()
                continue
            seen.append(row_id)
            sequence, length = rows[row_id].sequence, int(batch.lengths[b])
            assert batch.token_ids[b, :length].tolist() == list(sequence.token_ids)
            assert batch.loss_mask[b].tolist() == list(sequence.loss_mask) + [False] * (
                batch.loss_mask.shape[1] - length
            )
            assert batch.behavior_logprobs[b, :length].tolist() == list(sequence.behavior_logprobs)
            assert batch.policy_versions[b, :length].tolist() == list(sequence.policy_versions)
            assert batch.kv_versions[b, :length].tolist() == list(sequence.kv_versions)
            assert (batch.policy_versions[b, length:] == -1).all()
            assert (batch.advantages[b] == rows[row_id].advantage).all()
    assert sorted(seen) == list(range(len(rows)))


@given(st.lists(st.integers(2, 60), min_size=1, max_size=40), st.integers(2, 4))
def test_shares_are_balanced(lengths: list[int], world_size: int) -> None:
    rows = plain_rows(lengths)
    shares = [build_micro_batches(rows, max_tokens=200, rank=r, world_size=world_size) for r in range(world_size)]
    tokens = [sum(int(b.lengths[b.row_ids >= 0].sum()) for b in share) for share in shares]
    assert max(tokens) - min(tokens) <= max(lengths)


def test_rows_are_dealt_back_and_forth() -> None:
    rows = plain_rows([40, 30, 20, 10])
    shares = [build_micro_batches(rows, max_tokens=1, rank=rank, world_size=2) for rank in range(2)]
    assert [[int(batch.lengths[0]) for batch in share] for share in shares] == [[40, 10], [30, 20]]


@given(st.lists(st.integers(1, 30), min_size=1, max_size=9), st.integers(1, 150))
def test_the_cuts_are_the_cheapest(lengths: list[int], max_tokens: int) -> None:
    lengths = sorted(lengths, reverse=True)

    def cost(cuts: list[int]) -> float:
        total = 0
        for start, stop in pairwise(cuts):
            area = (stop - start) * lengths[start]
            if area > max_tokens and stop - start > 1:
                return math.inf
            total += area + OVERHEAD_TOKENS
        return total

    def every(n: int) -> list[list[int]]:
        inner = range(1, n)
        return [[0, *(i for i in inner if bits >> (i - 1) & 1), n] for bits in range(2 ** (n - 1))]

    cuts = plan_cuts(lengths, max_tokens)
    assert cuts[0] == 0
    assert cuts[-1] == len(lengths)
    assert cost(cuts) == min(cost(other) for other in every(len(lengths)))


def test_no_rows_no_micro_batches() -> None:
    assert build_micro_batches([], max_tokens=10) == []
    assert plan_cuts([], 10) == [0]


@pytest.mark.parametrize(("rank", "world_size", "max_tokens"), [(2, 2, 10), (-1, 1, 10), (0, 1, 0)])
def test_impossible_shares_are_refused(rank: int, world_size: int, max_tokens: int) -> None:
    with pytest.raises(InputError, match="must be"):
        build_micro_batches(plain_rows([3]), max_tokens=max_tokens, rank=rank, world_size=world_size)


# ------------------------------------------------------------------------------------- from trajectories to rows


def trajectory(name: str, *sequences: TokenSequence, sampled: int | None = None) -> ScoredSequences:
    num_sampled = sum(s.num_loss_tokens for s in sequences) if sampled is None else sampled
    return ScoredSequences(name, "g", "env", EpisodeStatus.TERMINATED, 1.0, True, {}, sequences, num_sampled)


def sequence(length: int, *, first_masked: bool = False, logprob: float = -0.5, version: int = 2) -> TokenSequence:
    mask = (first_masked,) + (True,) * (length - 1)
    versions = (version if first_masked else -1,) + (version,) * (length - 1)
    return TokenSequence((1,) * length, mask, (logprob,) * length, versions, versions)


def advantages(*values: float, included: tuple[bool, ...] | None = None) -> Advantages:
    return Advantages(np.array(values), np.array(included or (True,) * len(values)), (), 0)


def test_rows_are_counted_before_anything_is_masked() -> None:
    first = trajectory("a", sequence(5), sequence(4, logprob=math.nan))
    second = trajectory("b", sequence(3, logprob=-math.inf))
    rows = collect_rows([first, second], advantages(0.5, -0.5))
    assert [row.advantage for row in rows.rows] == [0.5, 0.5, -0.5]
    assert (rows.num_loss_tokens, rows.num_dropped, rows.num_sampled_tokens) == (4, 5, 9)
    assert (rows.num_undelivered, rows.delivered_fraction) == (0, 1.0)
    assert count_loss_tokens(row.sequence for row in rows.rows) == 4


def test_rows_that_are_too_long_are_counted_as_undelivered() -> None:
    rows = collect_rows([trajectory("a", sequence(9), sequence(4))], advantages(1.0), max_seq_len=8)
    assert [len(row.sequence) for row in rows.rows] == [4]
    assert (rows.num_too_long, rows.num_undelivered, rows.num_sampled_tokens) == (1, 8, 11)
    assert rows.delivered_fraction == pytest.approx(3 / 11)


def test_a_row_of_exactly_the_limit_is_delivered() -> None:
    rows = collect_rows([trajectory("a", sequence(8))], advantages(1.0), max_seq_len=8)
    assert (len(rows.rows), rows.num_too_long) == (1, 0)


def test_sampled_tokens_that_no_row_holds_are_undelivered() -> None:
    rows = collect_rows([trajectory("a", sequence(4), sampled=12)], advantages(1.0))
    assert (rows.num_undelivered, rows.delivered_fraction) == (9, 0.25)


def test_excluded_trajectories_give_no_rows() -> None:
    rows = collect_rows(
        [trajectory("a", sequence(4)), trajectory("b", sequence(7))], advantages(0.0, 0.0, included=(False, True))
    )
    assert [len(row.sequence) for row in rows.rows] == [7]
    assert (rows.num_excluded, rows.num_sampled_tokens, rows.num_loss_tokens) == (1, 6, 6)


def test_a_first_token_with_loss_is_refused() -> None:
    with pytest.raises(InputError, match="trajectory a: the first token"):
        collect_rows([trajectory("a", sequence(4, first_masked=True))], advantages(1.0))


def test_a_sampled_token_without_a_version_is_refused() -> None:
    with pytest.raises(InputError, match="has no policy version"):
        collect_rows([trajectory("a", sequence(4, version=-1))], advantages(1.0))


def test_as_many_advantages_as_trajectories() -> None:
    with pytest.raises(InputError, match="1 trajectories and 2 advantages"):
        collect_rows([trajectory("a", sequence(4))], advantages(1.0, 2.0))


def test_every_row_says_which_trajectory_it_is_of() -> None:
    short, long = TokenSequence((1, 5), (False, True), (0.0, -1.0), (-1, 0), (-1, 0)), plain_rows([4])[0].sequence
    silent = TokenSequence((1, 5), (False, False), (0.0, 0.0), (-1, -1), (-1, -1))
    trajectories = [
        ScoredSequences(name, "g", "e", EpisodeStatus.TERMINATED, 0.0, True, {}, sequences, 9)
        for name, sequences in (("a", (long,)), ("b", (short, silent, long)))
    ]
    rows = collect_rows(trajectories, Advantages(np.zeros(2), np.array([True, True]), (), 0)).rows
    assert [(row.key.trajectory_id, row.key.row) for row in rows if row.key] == [("a", 0), ("b", 0), ("b", 2)]
    shares = [build_micro_batches(rows, max_tokens=100, rank=rank, world_size=2) for rank in range(2)]
    for batch in (batch for share in shares for batch in share):
        assert batch.to("cpu").keys == batch.keys
        expected = [None if row_id == PADDING_ROW else rows[row_id].key for row_id in batch.row_ids.tolist()]
        assert list(batch.keys) == expected
