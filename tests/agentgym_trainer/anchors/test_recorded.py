"""Anchors that look old logprobs up: what is there is exact, what is not is an error or a counted fallback."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from transformers import LlamaForCausalLM

from agentgym.errors import InputError, UnknownNameError
from agentgym.server.wire import FeedPage, Piece
from agentgym.trajectory import NO_VERSION, TokenSequence
from agentgym_trainer.anchors import make_anchor
from agentgym_trainer.anchors.followed import Followed, Passage
from agentgym_trainer.anchors.passages import score_passages, to_micro_batch
from agentgym_trainer.anchors.protocol import VersionSource
from agentgym_trainer.anchors.recorded import RecordedAnchor
from agentgym_trainer.anchors.records import MissingLogprobsError, RecordStore
from agentgym_trainer.batch import MicroBatch, Row, RowKey, build_micro_batches
from agentgym_trainer.logprobs import token_logprobs

MakeModel = Callable[..., LlamaForCausalLM]
MakeRows = Callable[..., list[Row]]
NEWEST = 4


class Nowhere(VersionSource):
    def read(self, version: int) -> dict:
        raise AssertionError("a recorded anchor reads no version")


def anchor_of(model: LlamaForCausalLM, fallback: str | None = None) -> RecordedAnchor:
    anchor = make_anchor("interrupt", model, Nowhere(), temperature=0.8, max_staleness=4, fallback=fallback)
    assert isinstance(anchor, RecordedAnchor)
    return anchor


def named(rows: list[Row]) -> list[Row]:
    return [Row(row.sequence, row.advantage, RowKey(f"t{n}", 0)) for n, row in enumerate(rows)]


def passages_of(rows: list[Row], version: int) -> list[Passage]:
    """What of the rows is of one version."""
    passages = []
    for row in rows:
        s: TokenSequence = row.sequence
        ranges = tuple((t, t + 1) for t in range(len(s)) if s.loss_mask[t] and s.policy_versions[t] == version)
        if ranges and row.key:
            ids = s.token_ids[: ranges[-1][1]]
            passages.append(Passage(row.key.trajectory_id, 0, row.key.row, version, ids, ranges))
    return passages


def record(anchor: RecordedAnchor, models: dict[int, LlamaForCausalLM], rows: list[Row], versions: set[int]) -> int:
    """Scores the tokens of `versions`, each by its own model; returns the size of the forwards."""
    size = 0
    with torch.no_grad():
        for version in versions:
            records, forwarded = score_passages(
                passages_of(rows, version),
                lambda batch, version=version: token_logprobs(models[version], batch, 0.8).logprobs,
                max_tokens=64, device="cpu", anchor="test",
            )  # fmt: skip
            anchor.records.extend(records)
            size += forwarded
    return size


def exact(models: dict[int, LlamaForCausalLM], batch: MicroBatch) -> torch.Tensor:
    with torch.no_grad():
        every = torch.stack([token_logprobs(model, batch, 0.8).logprobs for model in models.values()])
    return every.gather(0, batch.policy_versions.clamp(min=0)[None])[0]


@pytest.fixture
def models(make_model: MakeModel) -> dict[int, LlamaForCausalLM]:
    return {version: make_model(version) for version in range(NEWEST + 1)}


@pytest.mark.parametrize("reuse", [True, False])
def test_what_was_recorded_is_looked_up(models: dict[int, LlamaForCausalLM], make_rows: MakeRows, reuse: bool) -> None:
    rows = named(make_rows([9, 30, 4, 17, 2, 12]))
    anchor = anchor_of(models[NEWEST])
    record(anchor, models, rows, {1, 2, 3} if reuse else {1, 2, 3, 4})
    batches = build_micro_batches(rows, max_tokens=40, rank=1, world_size=2)  # with a row that only fills, too
    proximals = anchor.proximal(batches, trainer_version=NEWEST, reuse_policy=reuse)
    for batch, proximal in zip(batches, proximals, strict=True):
        policy = token_logprobs(models[NEWEST], batch, 0.8).logprobs
        resolved = proximal.resolve(policy)
        assert not resolved.requires_grad
        torch.testing.assert_close(resolved, exact(models, batch), atol=1e-5, rtol=0.0)
    figures = anchor.metrics()
    assert figures == {
        "anchor/num_fallbacks": 0.0,
        "anchor/num_exact": float(sum(int(batch.loss_mask.sum()) for batch in batches)),
    }


def test_a_token_that_was_never_scored_is_named(models: dict[int, LlamaForCausalLM], make_rows: MakeRows) -> None:
    rows = named(make_rows([30, 17]))
    anchor = anchor_of(models[NEWEST])
    record(anchor, models, rows, {1, 3})
    batches = build_micro_batches(rows, max_tokens=100)
    with pytest.raises(MissingLogprobsError, match=r"trajectory t\d row 0 tokens \d+\.\.\d+ of version 2.*fallback"):
        anchor.proximal(batches, trainer_version=NEWEST, reuse_policy=True)


@pytest.mark.parametrize("fallback", ["resident", "behavior", "ewma", "loglinear"])
def test_a_fallback_by_name_stands_in_for_those_tokens_alone(
    models: dict[int, LlamaForCausalLM], make_rows: MakeRows, fallback: str
) -> None:
    rows = named(make_rows([30, 17, 8]))
    anchor = anchor_of(models[NEWEST], fallback)
    record(anchor, models, rows, {1, 3})
    batches = build_micro_batches(rows, max_tokens=40)
    alone = make_anchor(fallback, models[NEWEST], Nowhere(), temperature=0.8, max_staleness=4)
    instead = alone.proximal(batches, trainer_version=NEWEST, reuse_policy=True)
    proximals = anchor.proximal(batches, trainer_version=NEWEST, reuse_policy=True)
    missing = 0
    for batch, proximal, other in zip(batches, proximals, instead, strict=True):
        policy = token_logprobs(models[NEWEST], batch, 0.8).logprobs.detach()
        gone = batch.loss_mask & (batch.policy_versions == 2)
        missing += int(gone.sum())
        expected = torch.where(gone, other.resolve(policy), exact(models, batch))
        torch.testing.assert_close(proximal.resolve(policy), expected, atol=1e-5, rtol=0.0)
    assert anchor.metrics()["anchor/num_fallbacks"] == missing > 0


def test_rows_of_no_trajectory_are_refused(models: dict[int, LlamaForCausalLM], make_rows: MakeRows) -> None:
    with pytest.raises(InputError, match="needs rows that say which trajectory"):
        anchor_of(models[NEWEST]).proximal(
            build_micro_batches(make_rows([9]), max_tokens=40), trainer_version=NEWEST, reuse_policy=True
        )


def test_a_fallback_that_is_none_is_refused(models: dict[int, LlamaForCausalLM]) -> None:
    with pytest.raises(UnknownNameError, match="unknown fallback 'snapshot'"):
        anchor_of(models[NEWEST], "snapshot")


def test_the_next_batch_keeps_nothing_of_the_one_before(
    models: dict[int, LlamaForCausalLM], make_rows: MakeRows
) -> None:
    rows = named(make_rows([30, 17]))
    source, anchor = anchor_of(models[NEWEST]), anchor_of(models[NEWEST])
    record(source, models, rows, {1, 2, 3})
    anchor.begin_batch(source.records.of(["t0"]))
    anchor.begin_batch(source.records.of(["t1"]))
    assert {kept.trajectory_id for kept in anchor.records} == {"t1"}


# ------------------------------------------------------------------------------------------------- what is followed


def piece(ids: list[int], versions: list[int], start: int = 0, row: int = 0, generation: int = 0) -> Piece:
    return Piece("t", generation, row, start, tuple(ids), tuple(versions), False)


END = Piece("t", 0, 0, 0, (), (), True)


def page(*pieces: Piece, live: tuple[str, ...] | None = ("t",)) -> FeedPage:
    return FeedPage(1, pieces, live, 3, None)


def test_a_token_is_given_out_once_and_only_when_no_more_of_its_version_can_follow() -> None:
    followed = Followed(RecordStore())
    followed.apply(page(piece([1, 7, 5, 6], [-1, -1, 2, 3])))
    assert followed.take(below=3) == [Passage("t", 0, 0, 2, (1, 7, 5), ((2, 3),))]
    assert followed.take(below=3) == []
    followed.apply(page(piece([9, 8], [-1, 3], start=4)))
    assert followed.take(ended_only=True) == []
    followed.apply(page(END))
    assert followed.take(below=3) == [Passage("t", 0, 0, 3, (1, 7, 5, 6, 9, 8), ((3, 4), (5, 6)))]


def test_the_resident_versions_tokens_are_taken_from_rows_under_way() -> None:
    followed = Followed(RecordStore())
    followed.apply(page(piece([1, 7, 5, 6], [-1, -1, 2, 3])))
    assert [passage.version for passage in followed.take(version=3)] == [3]
    assert [passage.version for passage in followed.take()] == [2]


def test_what_was_scored_before_a_trajectory_began_anew_is_not_scored_again(
    models: dict[int, LlamaForCausalLM],
) -> None:
    """A session's turns change their order at its end: the tokens behind the same tokens keep their records."""
    records = RecordStore()
    followed = Followed(records)
    followed.apply(page(piece([1, 5, 6], [-1, 2, 2]), piece([1, 9], [-1, 2], row=1)))
    taken = followed.take()
    score = lambda batch: token_logprobs(models[2], batch, 0.8).logprobs.detach()  # noqa: E731
    scored, _ = score_passages(taken, score, max_tokens=64, device="cpu", anchor="test")
    records.extend(scored)
    before = {kept.row: kept.logprobs for kept in records}
    followed.apply(page(piece([1, 9, 4], [-1, 2, 2], generation=1)))
    (kept,) = records
    assert (kept.row, kept.start, kept.stop) == (0, 1, 2)
    assert kept.logprobs.tolist() == before[1].tolist()
    assert followed.take() == [Passage("t", 1, 0, 2, (1, 9, 4), ((2, 3),))]
    followed.apply(page(live=()))
    assert followed.live == frozenset()


def test_passages_become_rows_with_loss_on_what_is_wanted() -> None:
    batch = to_micro_batch(
        [Passage("a", 0, 1, 3, (1, 7, 5, 6), ((1, 2), (3, 4))), Passage("b", 0, 0, 3, (4, 2), ((1, 2),))]
    )
    assert batch.token_ids.tolist() == [[1, 7, 5, 6], [4, 2, 0, 0]]
    assert batch.loss_mask.tolist() == [[False, True, False, True], [False, True, False, False]]
    assert batch.policy_versions.tolist() == [
        [NO_VERSION, 3, NO_VERSION, 3], [NO_VERSION, 3, NO_VERSION, NO_VERSION]
    ]  # fmt: skip
    assert batch.keys == (RowKey("a", 1), RowKey("b", 0))
