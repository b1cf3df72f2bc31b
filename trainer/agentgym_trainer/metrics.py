"""The figures of one optimizer step, split by lag. Must never know a model, an anchor or a rank's transport.

Law: everything is a sum or a maximum until the very end, so that micro-batches add and ranks reduce, and only
`finalise` divides. Bucket lag0 is the engine-mismatch floor: what r_d shows there is not staleness.

k1 = mean(-log r), k2 = mean(log^2 r)/2, k3 = mean(r - 1 - log r), ESS = (sum r)^2/(n sum r^2), chi2 = mean(r^2) - 1,
over counted loss tokens; a row's ratio is exp of the sum of its tokens' log ratios. Log ratios are clamped to +-20 as
in the loss, except in `max_abs_log_ratio`, which shows what really came.
"""

from __future__ import annotations

import bisect
import math
from collections import Counter
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from agentgym.errors import TrainingError
from agentgym.trajectory import ScoredSequences, TokenSequence
from agentgym_trainer.batch import MicroBatch, StepRows
from agentgym_trainer.correction import LOG_RATIO_LIMIT
from agentgym_trainer.diagnosis import Mismatch
from agentgym_trainer.loss import TokenTerms

RATIOS = ("discrepancy", "staleness", "total")  # r_d, r_s, R
_LAG_BOUNDS = (0, 1, 2, 4, 8)  # the last lag of each bucket but the open one
LAG_BUCKETS = ("lag0", "lag1", "lag2", "lag3_4", "lag5_8", "lag9_up")
_RATIO_SUMS = ("tokens", "log", "log2", "r", "r2", "abs", "exp_abs", "rows", "row_w", "row_w2")
_TOKEN_COLUMNS = _RATIO_SUMS.index("rows")  # those before it are sums over tokens
_TOKEN_SUMS = (
    "counted", "dropped", "mask_pass", "clip_pass", "active", "clip_high", "clip_low", "stale_kv", "lag", "objective",
    "entropy", "vetoed", "limited", "reference_k3", "fallback", "vetoed_rows",
)  # fmt: skip


class StepMetrics:
    """Accumulates one optimizer step's token figures over micro-batches.

    Over ranks: add up every rank's `sums`, take the elementwise maximum of every rank's `maxima` (fixed shapes), and
    put both into `StepMetrics.of(sums, maxima)`.

    Example: `m = StepMetrics(); m.add(terms, micro_batch, trainer_version=5); m.finalise()["staleness/lag2/k3"]`.
    """

    def __init__(self) -> None:
        self._ratio = torch.zeros(len(RATIOS), len(LAG_BUCKETS), len(_RATIO_SUMS), dtype=torch.float64)
        self._token = torch.zeros(len(LAG_BUCKETS), len(_TOKEN_SUMS), dtype=torch.float64)
        self._max = torch.zeros(len(RATIOS), len(LAG_BUCKETS), dtype=torch.float64)

    @property
    def sums(self) -> Tensor:
        """One flat float64 CPU tensor of everything that adds."""
        return torch.cat([self._ratio.flatten(), self._token.flatten()])

    @property
    def maxima(self) -> Tensor:
        return self._max.flatten()

    @classmethod
    def of(cls, sums: Tensor, maxima: Tensor) -> StepMetrics:
        """From the reduced tensors of all ranks."""
        metrics = cls()
        split = metrics._ratio.numel()
        metrics._ratio = sums[:split].double().cpu().view_as(metrics._ratio).clone()
        metrics._token = sums[split:].double().cpu().view_as(metrics._token).clone()
        metrics._max = maxima.double().cpu().view_as(metrics._max).clone()
        return metrics

    def merge(self, other: StepMetrics) -> None:
        """Adds what another accumulator of the same step has seen."""
        self._ratio += other._ratio
        self._token += other._token
        self._max = torch.maximum(self._max, other._max)

    @torch.no_grad()
    def add(
        self, terms: TokenTerms, micro_batch: MicroBatch, *, trainer_version: int, fallbacks: Tensor | None = None
    ) -> None:
        """Adds one micro-batch. `fallbacks` [B, T]: the tokens whose proximal logprobs are the fallback's, None where
        none is. Raises TrainingError for a token of a version that has not been published yet."""
        lags = trainer_version - micro_batch.policy_versions
        seen = terms.counted | terms.dropped
        if bool((lags[seen] < 0).any()):
            newest = int(micro_batch.policy_versions[seen].max())
            raise TrainingError(f"a token of version {newest} reached the trainer while it was at {trainer_version}")
        bounds = torch.tensor(_LAG_BOUNDS, device=lags.device)
        buckets = torch.bucketize(lags, bounds)
        self._add_tokens(terms, micro_batch, lags, buckets, seen, fallbacks)
        oldest = torch.where(terms.counted, lags, -1).amax(-1)
        vetoed = (terms.counted & terms.vetoed).any(-1)
        where = torch.bucketize(oldest[vetoed], bounds).cpu()
        self._token[:, _TOKEN_SUMS.index("vetoed_rows")] += torch.bincount(where, minlength=len(LAG_BUCKETS))
        pairs = (
            (terms.proximal_logprobs, terms.behavior_logprobs),
            (terms.policy_logprobs, terms.proximal_logprobs),
            (terms.policy_logprobs, terms.behavior_logprobs),
        )
        for index, (numerator, denominator) in enumerate(pairs):
            raw = torch.where(terms.counted, numerator.double() - denominator.double(), 0.0)
            self._add_ratio(index, raw, terms.counted, buckets, oldest, bounds)

    def _add_tokens(
        self, terms: TokenTerms, micro_batch: MicroBatch, lags: Tensor, buckets: Tensor, seen: Tensor,
        fallbacks: Tensor | None,
    ) -> None:  # fmt: skip
        counted = terms.counted
        zero = torch.zeros_like(lags, dtype=torch.float64)
        columns = (
            counted,
            terms.dropped,
            counted & terms.mask_pass,
            counted & terms.clip_pass,
            terms.active,
            counted & terms.clip_high,
            counted & terms.clip_low,
            counted & (micro_batch.kv_versions < micro_batch.policy_versions),
            torch.where(counted, lags, 0),
            terms.objective,
            zero if terms.entropy is None else torch.where(counted, terms.entropy, 0.0),
            counted & terms.vetoed,
            counted & terms.limited,
            zero if terms.reference_k3 is None else terms.reference_k3,
            zero if fallbacks is None else fallbacks,
            zero,  # of rows: `add` puts them in
        )
        features = torch.stack([column.double()[seen] for column in columns], dim=-1)  # [n, S]
        self._token.index_add_(0, buckets[seen].cpu(), features.cpu())

    def _add_ratio(
        self, index: int, raw: Tensor, counted: Tensor, buckets: Tensor, oldest: Tensor, bounds: Tensor
    ) -> None:
        rows = counted.any(-1)
        row_log = raw.sum(-1).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)[rows]
        row_features = torch.zeros(len(row_log), len(_RATIO_SUMS), dtype=torch.float64, device=raw.device)
        row_features[:, _TOKEN_COLUMNS:] = torch.stack(
            [torch.ones_like(row_log), row_log.exp(), (2 * row_log).exp()], dim=-1
        )
        self._ratio[index].index_add_(0, torch.bucketize(oldest[rows], bounds).cpu(), row_features.cpu())

        log = raw[counted].clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
        where = buckets[counted].cpu()
        features = torch.zeros(len(log), len(_RATIO_SUMS), dtype=torch.float64, device=raw.device)
        token_sums = [torch.ones_like(log), log, log**2, log.exp(), (2 * log).exp(), log.abs(), log.abs().exp()]
        features[:, :_TOKEN_COLUMNS] = torch.stack(token_sums, dim=-1)
        self._ratio[index].index_add_(0, where, features.cpu())
        self._max[index].scatter_reduce_(0, where, raw[counted].abs().cpu(), "amax")

    @property
    def active_fraction(self) -> float:
        """Tokens active after both the mask and the clip, of the counted; 1.0 of none. What `ewma` resets on."""
        counted, active = self._token_total("counted"), self._token_total("active")
        return active / counted if counted else 1.0

    @property
    def mean_lag(self) -> float:
        """Mean lag of the counted tokens in policy versions; 0.0 of none."""
        counted = self._token_total("counted")
        return self._token_total("lag") / counted if counted else 0.0

    def engine_mismatch(self, exact: bool) -> Mismatch:
        """Of engine and trainer about the same weights, before the optimizer step: tokens of no lag, whatever the
        anchor; where there are none and the anchor is `exact`, without a fallback, all tokens by their old logprobs."""
        total, discrepancy = RATIOS.index("total"), RATIOS.index("discrepancy")
        sums, largest = self._ratio[total, 0], self._max[total, 0]
        if not sums[0] and exact and not self._token_total("fallback"):
            sums, largest = self._ratio[discrepancy].sum(0), self._max[discrepancy].max()
        s = dict(zip(_RATIO_SUMS, sums.tolist()))
        n = s["tokens"]
        if not n:
            return Mismatch(0, 0.0, 0.0, 0.0)
        return Mismatch(int(n), s["abs"] / n, float(largest), s["exp_abs"] / n - 1.0)

    def _token_total(self, name: str) -> float:
        return float(self._token[:, _TOKEN_SUMS.index(name)].sum())

    def finalise(self) -> dict[str, float]:
        """Flat names: `discrepancy/k3`, `staleness/lag2/k3`, `total/ess_fraction`, `policy/active_fraction`,
        `policy/lag1/clip_high_fraction`, `anchor/lag2/num_fallbacks` (of all lags, the anchor's own figure). A bucket
        without a token has no figures, rather than zeros."""
        figures: dict[str, float] = {}
        for index, name in enumerate(RATIOS):
            figures |= _ratio_figures(name, self._ratio[index].sum(0), float(self._max[index].max()))
            for bucket, label in enumerate(LAG_BUCKETS):
                sums, maximum = self._ratio[index, bucket], float(self._max[index, bucket])
                figures |= _ratio_figures(f"{name}/{label}", sums, maximum)
        figures |= _token_figures("policy", self._token.sum(0))
        for bucket, label in enumerate(LAG_BUCKETS):
            figures |= (found := _token_figures(f"policy/{label}", self._token[bucket]))
            if found:
                figures[f"anchor/{label}/num_fallbacks"] = float(self._token[bucket, _TOKEN_SUMS.index("fallback")])
        return figures


def _ratio_figures(prefix: str, sums: Tensor, maximum: float) -> dict[str, float]:
    s = dict(zip(_RATIO_SUMS, sums.tolist()))
    n = s["tokens"]
    figures: dict[str, float] = {}
    if n:
        k1 = -s["log"] / n
        figures = {
            "k1": k1,
            "k2": s["log2"] / n / 2,
            "k3": s["r"] / n - 1.0 + k1,
            "ess_fraction": s["r"] ** 2 / (n * s["r2"]),
            "chi2": s["r2"] / n - 1.0,
            "max_abs_log_ratio": maximum,
            "mean_abs_log_ratio": s["abs"] / n,
            "mean_exp_abs_log_ratio": s["exp_abs"] / n,
            "perplexity_ratio": math.exp(k1),
        }
    if s["rows"]:
        figures["ess_row_fraction"] = s["row_w"] ** 2 / (s["rows"] * s["row_w2"])
    return {f"{prefix}/{name}": value for name, value in figures.items()}


def _token_figures(prefix: str, sums: Tensor) -> dict[str, float]:
    s = dict(zip(_TOKEN_SUMS, sums.tolist()))
    n = s["counted"]
    figures = {"num_tokens": n, "num_dropped": s["dropped"]}
    if n:
        figures |= {
            "active_fraction": s["active"] / n,
            "mask_pass_fraction": s["mask_pass"] / n,
            "clip_pass_fraction": s["clip_pass"] / n,
            # stopped by both: without it the two factors do not say how they make the active fraction
            "overlap_fraction": (n - s["mask_pass"] - s["clip_pass"] + s["active"]) / n,
            "clip_high_fraction": s["clip_high"] / n,
            "clip_low_fraction": s["clip_low"] / n,
            "stale_kv_fraction": s["stale_kv"] / n,
            "mean_lag": s["lag"] / n,
            "loss": s["objective"] / n,
            "entropy": s["entropy"] / n,
            "num_vetoed": s["vetoed"],
            "num_vetoed_rows": s["vetoed_rows"],
            "limited_fraction": s["limited"] / n,
            "reference_k3": s["reference_k3"] / n,
        }
    elif not s["dropped"]:
        return {}
    return {f"{prefix}/{name}": value for name, value in figures.items()}


def trajectory_metrics(
    trajectories: Sequence[ScoredSequences], rows: StepRows, *, trainer_version: int
) -> Mapping[str, float]:
    """Figures of whole trajectories: versions per trajectory, partial span (newest minus oldest version), the lag of
    the oldest token, what was delivered; by that lag, too, such as `trajectory/lag2/delivered_fraction`. Computed where
    the batch is, once, before any rank sees it."""
    figures = {
        "trajectory/delivered_fraction": rows.delivered_fraction,
        "trajectory/num_undelivered": float(rows.num_undelivered),
        "trajectory/num_too_long": float(rows.num_too_long),
        "trajectory/num_excluded": float(rows.num_excluded),
        "trajectory/num_rows": float(len(rows.rows)),
    }
    delivered: Counter[str] = Counter()
    for row in rows.rows:
        if row.key is not None:
            delivered[row.key.trajectory_id] += row.sequence.num_loss_tokens
    found = [(t, versions) for t in trajectories if (versions := _versions(t.sequences))]
    by_bucket: dict[str, list[tuple[ScoredSequences, set[int]]]] = {}
    for trajectory, versions in found:
        bucket = LAG_BUCKETS[bisect.bisect_left(_LAG_BOUNDS, trainer_version - min(versions))]
        by_bucket.setdefault(bucket, []).append((trajectory, versions))
    for bucket, members in by_bucket.items():
        sampled = [t for t, _ in members if t.trajectory_id in rows.included]
        if total := sum(t.num_sampled_tokens for t in sampled):
            figures[f"trajectory/{bucket}/delivered_fraction"] = (
                sum(delivered[t.trajectory_id] for t in sampled) / total
            )
        figures |= _span_figures(f"trajectory/{bucket}", [versions for _, versions in members], trainer_version)
    return figures | _span_figures("trajectory", [versions for _, versions in found], trainer_version)


def _span_figures(prefix: str, versions: Sequence[set[int]], trainer_version: int) -> dict[str, float]:
    if not versions:
        return {}
    spans = [max(found) - min(found) for found in versions]
    lags = [trainer_version - min(found) for found in versions]
    return {
        f"{prefix}/num_trajectories": float(len(versions)),
        f"{prefix}/versions_mean": sum(map(len, versions)) / len(versions),
        f"{prefix}/versions_max": float(max(map(len, versions))),
        f"{prefix}/partial_fraction": sum(span > 0 for span in spans) / len(spans),
        f"{prefix}/partial_span_mean": sum(spans) / len(spans),
        f"{prefix}/partial_span_max": float(max(spans)),
        f"{prefix}/lag_mean": sum(lags) / len(lags),
        f"{prefix}/lag_max": float(max(lags)),
    }


def _versions(sequences: Sequence[TokenSequence]) -> set[int]:
    return {
        version for sequence in sequences for mask, version in zip(sequence.loss_mask, sequence.policy_versions) if mask
    }
