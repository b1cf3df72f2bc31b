"""The anchors `linear` and `loglinear` (A-3PO, arXiv 2512.06547): proximal logprobs between the behavior's and the
policy's. No forward, no copy. Must never know a version log.

Law: with a the weight of the behavior policy,

    loglinear   log prox = a log mu + (1 - a) sg(log pi_theta)          r_s = R^a,   r_d = R^(1-a)
    linear          prox = a     mu + (1 - a) sg(    pi_theta)          r_s = R/(a + (1-a) R) <= 1/(1-a)

so both only re-parameterise the clip on the total ratio R, and under `linear` the upper clip never fires where
a <= eps/(1 + eps). A-3PO takes a = 1/max(d, 1) for a token of lag d: with d <= 1 this is PPO on R.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from agentgym.errors import ConfigError, UnknownNameError
from agentgym_trainer.anchors.direct import Stateless
from agentgym_trainer.batch import MicroBatch

InterpolationKind = Literal["linear", "loglinear"]


@dataclass(frozen=True, slots=True)
class Interpolated:
    """Proximal logprobs [B, T] of one micro-batch that are made when the policy's are there.

    Example: behavior_logprobs log(0.2), behavior_weight 0.5 and a policy at 0.4: `linear` gives log(0.3), `loglinear`
    log(sqrt(0.08)).
    """

    kind: InterpolationKind
    behavior_logprobs: Tensor
    behavior_weight: Tensor  # a, in (0, 1]

    def resolve(self, policy_logprobs: Tensor) -> Tensor:
        """As `Proximal.resolve`, and of the policy's present logprobs at every optimizer step on the batch."""
        policy = policy_logprobs.detach()
        behavior, a = self.behavior_logprobs.to(policy.dtype), self.behavior_weight.to(policy.dtype)
        if self.kind == "loglinear":
            between = a * behavior + (1.0 - a) * policy
        else:
            between = torch.logaddexp(a.log() + behavior, torch.log1p(-a) + policy)
        return torch.where(a == 1.0, behavior, between)  # exactly: nothing of the policy is left in it


class InterpolationAnchor(Stateless):
    """`behavior_weight` None is A-3PO's a = 1/max(lag, 1); a number is the weight of every token."""

    def __init__(self, kind: InterpolationKind, behavior_weight: float | None = None) -> None:
        if kind not in ("linear", "loglinear"):
            raise UnknownNameError.of("interpolation", kind, ("linear", "loglinear"))
        if behavior_weight is not None and not 0.0 < behavior_weight < 1.0:
            raise ConfigError(f"the behavior policy's weight must be between 0 and 1, got {behavior_weight}")
        self.name = kind
        self._kind: InterpolationKind = kind
        self._weight = behavior_weight

    def proximal(
        self, micro_batches: Sequence[MicroBatch], *, trainer_version: int, reuse_policy: bool
    ) -> list[Interpolated]:
        weights = [self._behavior_weight(batch, trainer_version) for batch in micro_batches]
        return [
            Interpolated(self._kind, batch.behavior_logprobs, weight) for batch, weight in zip(micro_batches, weights)
        ]

    def _behavior_weight(self, batch: MicroBatch, trainer_version: int) -> Tensor:
        if self._weight is not None:
            return torch.full_like(batch.behavior_logprobs, self._weight)
        lags = (trainer_version - batch.policy_versions).to(batch.behavior_logprobs.dtype)
        return 1.0 / lags.clamp(min=1.0)
