"""Figures by lag: each bucket against its definition; micro-batches and ranks add up."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from agentgym.errors import TrainingError
from agentgym.trajectory import EpisodeStatus, ScoredSequences, TokenSequence
from agentgym_trainer.advantages import Advantages
from agentgym_trainer.batch import MicroBatch, Row, build_micro_batches, collect_rows
from agentgym_trainer.correction import Correction
from agentgym_trainer.loss import TokenTerms, decoupled_loss
from agentgym_trainer.metrics import LAG_BUCKETS, StepMetrics, trajectory_metrics

MakeRows = Callable[..., list[Row]]
NEWEST = 14
BUCKET_OF = {
    lag: name for name, lags in zip(LAG_BUCKETS, ([0], [1], [2], [3, 4], [5, 6, 7, 8], range(9, 15))) for lag in lags
}


def terms_of(batch: MicroBatch, rows: list[Row], shift: float = 0.0) -> TokenTerms:
    """Policy and proximal logprobs that depend on the row and the position alone, whatever the layout."""
    positions = torch.arange(batch.token_ids.shape[1], dtype=torch.float64)
    phase = batch.row_ids[:, None] * 1.7 + positions + shift
    proximal = batch.behavior_logprobs.double() + 0.5 * torch.sin(3 * phase)
    policy = proximal + 0.4 * torch.sin(5 * phase)
    return decoupled_loss(
        policy, proximal, batch.behavior_logprobs.double(), batch.advantages.double(), batch.loss_mask,
        correction=Correction("token_mask", 1.4), denominator=1.0, entropy=phase.abs(),
    )[1]  # fmt: skip


def figures_by_hand(pairs: list[tuple[float, float]]) -> dict[str, float]:
    """The definitions, over (log ratio) values."""
    log = np.array([value for value, _ in pairs])
    r = np.exp(log)
    return {
        "k1": float(np.mean(-log)),
        "k2": float(np.mean(log**2) / 2),
        "k3": float(np.mean(r - 1 - log)),
        "ess_fraction": float(r.sum() ** 2 / (len(r) * (r**2).sum())),
        "chi2": float(np.mean(r**2) - 1),
        "max_abs_log_ratio": float(np.abs(log).max()),
        "mean_abs_log_ratio": float(np.abs(log).mean()),
        "mean_exp_abs_log_ratio": float(np.exp(np.abs(log)).mean()),
        "perplexity_ratio": float(np.exp(np.mean(-log))),
    }


def collected(rows: list[Row], max_tokens: int, world_size: int = 1) -> StepMetrics:
    ranks = []
    for rank in range(world_size):
        metrics = StepMetrics()
        for batch in build_micro_batches(rows, max_tokens=max_tokens, rank=rank, world_size=world_size):
            metrics.add(terms_of(batch, rows), batch, trainer_version=NEWEST)
        ranks.append(metrics)
    sums = torch.stack([metrics.sums for metrics in ranks]).sum(0)
    return StepMetrics.of(sums, torch.stack([metrics.maxima for metrics in ranks]).amax(0))


def test_every_bucket_is_its_definition(make_rows: MakeRows) -> None:
    rows = make_rows([40, 31, 50, 12], newest_version=NEWEST, span=NEWEST)
    batch = build_micro_batches(rows, max_tokens=10_000)[0]
    terms = terms_of(batch, rows)
    figures = collected(rows, 10_000).finalise()
    pairs = {
        "discrepancy": (terms.proximal_logprobs, terms.behavior_logprobs),
        "staleness": (terms.policy_logprobs, terms.proximal_logprobs),
        "total": (terms.policy_logprobs, terms.behavior_logprobs),
    }
    seen = set()
    for name, (numerator, denominator) in pairs.items():
        by_bucket: dict[str, list[tuple[float, float]]] = {}
        for b, t in batch.loss_mask.nonzero().tolist():
            lag = NEWEST - int(batch.policy_versions[b, t])
            value = (float(numerator[b, t] - denominator[b, t]), 0.0)
            for key in (name, f"{name}/{BUCKET_OF[lag]}"):
                by_bucket.setdefault(key, []).append(value)
        for key, values in by_bucket.items():
            seen.add(key.partition("/")[2])
            for figure, expected in figures_by_hand(values).items():
                assert figures[f"{key}/{figure}"] == pytest.approx(expected, abs=1e-9), (key, figure)
    assert seen == {"", *LAG_BUCKETS}


def test_fractions_and_their_overlap(make_rows: MakeRows) -> None:
    rows = make_rows([40, 31, 50, 12], newest_version=NEWEST, span=2)
    batch = build_micro_batches(rows, max_tokens=10_000)[0]
    terms = terms_of(batch, rows)
    figures = collected(rows, 10_000).finalise()
    n = int(batch.loss_mask.sum())

    def fraction(selected: Tensor) -> float:
        return float((selected & batch.loss_mask).sum()) / n

    stopped_by_both = fraction(~terms.mask_pass & ~terms.clip_pass)
    assert stopped_by_both > 0
    assert figures["policy/active_fraction"] == pytest.approx(fraction(terms.mask_pass & terms.clip_pass))
    assert figures["policy/mask_pass_fraction"] == pytest.approx(fraction(terms.mask_pass))
    assert figures["policy/clip_pass_fraction"] == pytest.approx(fraction(terms.clip_pass))
    assert figures["policy/overlap_fraction"] == pytest.approx(stopped_by_both)
    assert figures["policy/clip_high_fraction"] == pytest.approx(fraction(terms.clip_high))
    assert figures["policy/clip_low_fraction"] == pytest.approx(fraction(terms.clip_low))
    lags = (NEWEST - batch.policy_versions)[batch.loss_mask].double()
    assert figures["policy/mean_lag"] == pytest.approx(float(lags.mean()))
    assert figures["policy/num_tokens"] == n
    assert figures["policy/lag0/num_tokens"] == int((lags == 0).sum())
    assert "policy/lag5_8/num_tokens" not in figures
    assert collected(rows, 10_000).active_fraction == pytest.approx(figures["policy/active_fraction"])
    assert collected(rows, 10_000).mean_lag == pytest.approx(float(lags.mean()))


@pytest.mark.parametrize(("max_tokens", "world_size"), [(1, 1), (60, 1), (60, 2), (1000, 3)])
def test_micro_batches_and_ranks_add_up(make_rows: MakeRows, max_tokens: int, world_size: int) -> None:
    rows = make_rows([40, 31, 50, 12, 9, 9, 22], newest_version=NEWEST, span=NEWEST)
    whole = collected(rows, 10_000).finalise()
    parts = collected(rows, max_tokens, world_size).finalise()
    assert parts.keys() == whole.keys()
    assert parts == pytest.approx(whole, rel=1e-12, abs=1e-12)


def test_merge_is_the_same_as_one_accumulator(make_rows: MakeRows) -> None:
    rows = make_rows([40, 31, 50], newest_version=NEWEST, span=NEWEST)
    merged = StepMetrics()
    for batch in build_micro_batches(rows, max_tokens=1):
        one = StepMetrics()
        one.add(terms_of(batch, rows), batch, trainer_version=NEWEST)
        merged.merge(one)
    assert merged.finalise() == pytest.approx(collected(rows, 1).finalise(), rel=1e-12, abs=1e-12)


def test_rows_count_by_the_product_of_their_ratios(make_rows: MakeRows) -> None:
    rows = make_rows([12, 9, 7], newest_version=NEWEST, span=0)
    batch = build_micro_batches(rows, max_tokens=10_000)[0]
    terms = terms_of(batch, rows)
    log = (terms.policy_logprobs - terms.behavior_logprobs).sum(-1).numpy()
    expected = np.exp(log).sum() ** 2 / (3 * np.exp(2 * log).sum())
    figures = collected(rows, 10_000).finalise()
    assert figures["total/ess_row_fraction"] == pytest.approx(expected)
    assert figures["total/lag0/ess_row_fraction"] == pytest.approx(expected)


def test_on_policy_every_ratio_is_one(make_rows: MakeRows) -> None:
    batch = build_micro_batches(make_rows([12, 9, 7], newest_version=NEWEST, span=0), max_tokens=10_000)[0]
    logprobs = batch.behavior_logprobs
    _, terms = decoupled_loss(
        logprobs, logprobs, logprobs, batch.advantages, batch.loss_mask, correction=Correction(), denominator=1.0
    )
    metrics = StepMetrics()
    metrics.add(terms, batch, trainer_version=NEWEST)
    figures = metrics.finalise()
    for ratio in ("discrepancy", "staleness", "total"):
        assert [figures[f"{ratio}/{k}"] for k in ("k1", "k2", "k3", "chi2", "max_abs_log_ratio")] == [0.0] * 5
        assert figures[f"{ratio}/ess_fraction"] == figures[f"{ratio}/ess_row_fraction"] == 1.0
    assert figures["policy/active_fraction"] == 1.0


def test_broken_logprobs_are_counted_and_extreme_ones_stay_finite(make_rows: MakeRows) -> None:
    batch = build_micro_batches(make_rows([12], newest_version=NEWEST, span=0), max_tokens=100)[0]
    first, second = batch.loss_mask.nonzero()[:2].tolist()
    batch.behavior_logprobs[tuple(first)] = -math.inf
    batch.behavior_logprobs[tuple(second)] = -90.0
    policy = torch.full_like(batch.behavior_logprobs, -1.0)
    _, terms = decoupled_loss(
        policy,
        policy,
        batch.behavior_logprobs,
        batch.advantages,
        batch.loss_mask,
        correction=Correction(),
        denominator=1,
    )
    metrics = StepMetrics()
    metrics.add(terms, batch, trainer_version=NEWEST)
    figures = metrics.finalise()
    assert figures["policy/num_dropped"] == 1
    assert figures["policy/num_tokens"] == int(batch.loss_mask.sum()) - 1
    assert figures["discrepancy/max_abs_log_ratio"] == pytest.approx(89.0)
    assert all(math.isfinite(value) for value in figures.values())


def test_vetoed_rows_and_fallbacks_count_by_lag(make_rows: MakeRows) -> None:
    rows = make_rows([20, 30, 25], newest_version=NEWEST, span=3)
    batch = build_micro_batches(rows, max_tokens=10_000)[0]
    proximal = batch.behavior_logprobs.clone()
    chosen = batch.loss_mask.nonzero()[0].tolist()
    proximal[tuple(chosen)] -= 12.0  # one token of its row: r_d = 6e-6
    _, terms = decoupled_loss(
        proximal, proximal, batch.behavior_logprobs, batch.advantages, batch.loss_mask,
        correction=[Correction("none"), Correction("veto")], denominator=1.0,
    )  # fmt: skip
    stale = batch.loss_mask & (batch.policy_versions == NEWEST - 1)
    metrics = StepMetrics()
    metrics.add(terms, batch, trainer_version=NEWEST, fallbacks=stale)
    figures = metrics.finalise()
    row = chosen[0]
    assert figures["policy/num_vetoed"] == int(batch.loss_mask[row].sum())
    assert figures["policy/num_vetoed_rows"] == 1.0
    oldest = NEWEST - int(batch.policy_versions[row][batch.loss_mask[row]].min())
    by_lag = {lag: figures.get(f"policy/{BUCKET_OF[lag]}/num_vetoed_rows", 0.0) for lag in range(4)}
    assert by_lag == {lag: float(BUCKET_OF[lag] == BUCKET_OF[oldest]) for lag in range(4)}
    assert figures["anchor/lag1/num_fallbacks"] == int(stale.sum()) > 0
    assert figures["anchor/lag0/num_fallbacks"] == figures["anchor/lag2/num_fallbacks"] == 0.0
    fallbacks = metrics_without_fresh(batch, terms)
    assert fallbacks.engine_mismatch(exact=True).num_tokens > 0
    fallbacks.add(terms, batch, trainer_version=NEWEST + 1, fallbacks=stale)
    assert fallbacks.engine_mismatch(exact=True).num_tokens == 0  # not all of them are exact


def metrics_without_fresh(batch: MicroBatch, terms: TokenTerms) -> StepMetrics:
    metrics = StepMetrics()
    metrics.add(terms, batch, trainer_version=NEWEST + 1)
    return metrics


def test_stale_kv_is_reported(make_rows: MakeRows) -> None:
    batch = build_micro_batches(make_rows([20], newest_version=NEWEST, span=0), max_tokens=100)[0]
    first = tuple(batch.loss_mask.nonzero()[0].tolist())
    batch.kv_versions[first] -= 1
    metrics = StepMetrics()
    metrics.add(terms_of(batch, []), batch, trainer_version=NEWEST)
    expected = 1 / int(batch.loss_mask.sum())
    assert metrics.finalise()["policy/stale_kv_fraction"] == pytest.approx(expected)


def test_a_token_from_the_future_is_an_error(make_rows: MakeRows) -> None:
    batch = build_micro_batches(make_rows([20], newest_version=3), max_tokens=100)[0]
    with pytest.raises(TrainingError, match="a token of version 3 reached the trainer while it was at 2"):
        StepMetrics().add(terms_of(batch, []), batch, trainer_version=2)


def test_an_empty_step_has_no_figures_but_does_not_break(make_rows: MakeRows) -> None:
    assert StepMetrics().finalise() == {}
    assert StepMetrics().active_fraction == 1.0
    batch = build_micro_batches(make_rows([5]), max_tokens=100, rank=1, world_size=2)[0]
    metrics = StepMetrics()
    metrics.add(terms_of(batch, []), batch, trainer_version=0)
    assert metrics.finalise() == {}


def test_figures_of_trajectories() -> None:
    def sequence(*versions: int) -> TokenSequence:
        mask = tuple(version >= 0 for version in versions)
        return TokenSequence((1,) * len(versions), mask, (-0.5,) * len(versions), versions, versions)

    def trajectory(name: str, *sequences: TokenSequence) -> ScoredSequences:
        sampled = sum(s.num_loss_tokens for s in sequences)
        return ScoredSequences(name, "g", "e", EpisodeStatus.TERMINATED, 1.0, True, {}, sequences, sampled)

    trajectories = [
        trajectory("t", sequence(-1, 3, 3), sequence(-1, 3, 5)),
        trajectory("u", sequence(-1, 6, 6), sequence(-1, 6, 6, -1, 6)),
    ]
    rows = collect_rows(trajectories, Advantages(np.zeros(2), np.array([True, True]), (), 1), max_seq_len=4)
    figures = trajectory_metrics(trajectories, rows, trainer_version=7)
    assert figures["trajectory/lag3_4/delivered_fraction"] == 1.0
    assert figures["trajectory/lag1/delivered_fraction"] == pytest.approx(2 / 5)
    assert figures["trajectory/lag3_4/partial_span_mean"] == 2.0
    assert figures["trajectory/lag1/partial_span_mean"] == 0.0
    assert figures["trajectory/lag1/versions_mean"] == 1.0
    assert figures["trajectory/lag1/num_trajectories"] == 1.0
    assert "trajectory/lag0/versions_mean" not in figures
    rows = collect_rows(trajectories, Advantages(np.zeros(2), np.array([True, True]), (), 1), max_seq_len=2)
    shorter = trajectory_metrics(trajectories, rows, trainer_version=7)
    assert shorter["trajectory/lag1/delivered_fraction"] == 0.0  # nothing of it came through, which is not excluded
    rows = collect_rows(trajectories, Advantages(np.zeros(2), np.array([True, False]), (), 1), max_seq_len=4)
    assert "trajectory/lag1/delivered_fraction" not in trajectory_metrics(trajectories, rows, trainer_version=7)
    assert figures["trajectory/versions_mean"] == 1.5
    assert figures["trajectory/versions_max"] == 2
    assert figures["trajectory/partial_fraction"] == 0.5
    assert figures["trajectory/partial_span_mean"] == 1.0
    assert figures["trajectory/partial_span_max"] == 2
    assert figures["trajectory/lag_mean"] == 2.5
    assert figures["trajectory/lag_max"] == 4
    assert figures["trajectory/delivered_fraction"] == pytest.approx(6 / 9)
    assert (figures["trajectory/num_too_long"], figures["trajectory/num_undelivered"]) == (1, 3)
