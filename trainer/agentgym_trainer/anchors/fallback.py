"""What stands in for exact old logprobs where there are none: another anchor, by name, for those tokens alone. Must
never know why they are missing.

Law: a fallback is asked for by name and counted; an exact token beside it stays exact.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from agentgym_trainer.anchors.protocol import Anchor, Resolvable
from agentgym_trainer.batch import MicroBatch


@dataclass(frozen=True, slots=True)
class Patched:
    """Exact proximal logprobs, but for the tokens [B, T] that are `missing`."""

    exact: Resolvable
    missing: Tensor
    fallback: Resolvable

    def resolve(self, policy_logprobs: Tensor) -> Tensor:
        """As Resolvable.resolve."""
        exact = self.exact.resolve(policy_logprobs)
        return torch.where(self.missing, self.fallback.resolve(policy_logprobs).to(exact.dtype), exact)


class WithFallback:
    """An exact anchor's dealings with the one that may stand in: its state is all the state there is, and it follows
    what is published whether it is needed or not."""

    def __init__(self, fallback: Anchor | None) -> None:
        self._fallback = fallback
        self._counts: dict[str, float] = {}  # of the last batch

    def published(self, version: int, *, active_fraction: float, mean_lag: float) -> None:
        if self._fallback is not None:
            self._fallback.published(version, active_fraction=active_fraction, mean_lag=mean_lag)

    def metrics(self) -> dict[str, float]:
        return self._counts | (self._fallback.metrics() if self._fallback is not None else {})

    def state_dict(self) -> dict[str, Any]:
        return self._fallback.state_dict() if self._fallback is not None else {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if self._fallback is not None:
            self._fallback.load_state_dict(state)


def stood_in(proximal: Resolvable) -> Tensor | None:
    """The tokens [B, T] of a micro-batch that a fallback stands in for; None where there are none."""
    return proximal.missing if isinstance(proximal, Patched) else None


def patch(
    exact: Sequence[Resolvable], missing: Sequence[Tensor], micro_batches: Sequence[MicroBatch], fallback: Anchor,
    trainer_version: int, reuse_policy: bool,
) -> list[Resolvable]:  # fmt: skip
    """`exact`, with the fallback's values where `missing`. Micro-batches without such tokens cost nothing."""
    wanted = [number for number, tokens in enumerate(missing) if bool(tokens.any())]
    proximals = fallback.proximal(
        [micro_batches[number] for number in wanted], trainer_version=trainer_version, reuse_policy=reuse_policy
    )
    patched = list(exact)
    for number, proximal in zip(wanted, proximals, strict=True):
        patched[number] = Patched(exact[number], missing[number], proximal)
    return patched


def count_exact(micro_batches: Sequence[MicroBatch], missing: Sequence[Tensor]) -> dict[str, float]:
    """Tokens that a fallback stands in for, and exact ones. A token that attended to an older version's KV entries was
    sampled from no single version's distribution, so its logprob is not called exact."""
    num_fallbacks = num_exact = 0
    for batch, gone in zip(micro_batches, missing, strict=True):
        fresh_kv = batch.kv_versions >= batch.policy_versions
        num_fallbacks += int(gone.sum())
        num_exact += int((batch.loss_mask & ~gone & fresh_kv).sum())
    return {"anchor/num_fallbacks": float(num_fallbacks), "anchor/num_exact": float(num_exact)}
