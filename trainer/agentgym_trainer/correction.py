"""How the discrepancy ratio r_d = pi_prox/mu_old is handled. Must never know where either logprob came from.

Law: a correction is a constant of the gradient. Its weight W(r_d) and its mask M_d multiply a token's objective, and
nothing is ever differentiated through them (old-logits mathematics, arXiv 2605.12070).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from agentgym.errors import ConfigError, UnknownNameError

LOG_RATIO_LIMIT = 20.0  # exp(20) is 5e8: beyond it a ratio says "broken", and fp32 squares of it still fit

CorrectionKind = Literal["none", "token_mask", "token_truncate"]
CORRECTIONS: tuple[str, ...] = get_args(CorrectionKind)


def stop_gradient(x: Tensor) -> Tensor:
    """sg[x] of the formulas."""
    return x.detach()


def log_ratio(numerator_logprobs: Tensor, denominator_logprobs: Tensor) -> Tensor:
    """log of a ratio of probabilities in fp32 (float64 stays float64), clamped to +-20 so that its exp is finite."""
    return (_at_least_fp32(numerator_logprobs) - _at_least_fp32(denominator_logprobs)).clamp(
        -LOG_RATIO_LIMIT, LOG_RATIO_LIMIT
    )


def _at_least_fp32(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


@dataclass(frozen=True, slots=True)
class Correction:
    """The handling of r_d, by kind; `bound` is c for `token_mask`, C for `token_truncate`, unused for `none`.

    * `none`: M_d = W = 1
    * `token_mask`: M_d = 1[1/c <= r_d <= c], W = r_d
    * `token_truncate` (TIS): M_d = 1, W = min(r_d, C)

    Example: `Correction("token_mask", 2.0)` (the default) or `Correction("token_truncate", 2.0)`.
    """

    kind: CorrectionKind = "token_mask"
    bound: float = 2.0

    def __post_init__(self) -> None:
        if self.kind not in CORRECTIONS:
            raise UnknownNameError.of("correction", self.kind, CORRECTIONS)
        if self.kind == "token_mask" and not 1.0 < self.bound < float("inf"):
            raise ConfigError(f"the bound c of token_mask must be finite and > 1, got {self.bound}")
        if self.kind == "token_truncate" and not 0.0 < self.bound < float("inf"):
            raise ConfigError(f"the bound C of token_truncate must be finite and > 0, got {self.bound}")


@dataclass(frozen=True, slots=True)
class Corrected:
    """What a correction says of every token [.., T]: its weight W(r_d) and whether the mask M_d lets it pass.

    Example: `token_mask` with c = 2 on r_d = (1.5, 3.0): weights (1.5, 3.0), mask_pass (True, False).
    """

    weights: Tensor
    mask_pass: Tensor


def apply_correction(correction: Correction, log_discrepancy: Tensor, loss_mask: Tensor) -> Corrected:
    """From log r_d [.., T] (clamped) to weights and mask. `loss_mask` [.., T] says which tokens a row consists of:
    kinds that speak of a whole row sum over it; the kinds here look at one token at a time."""
    log_discrepancy = stop_gradient(log_discrepancy)
    ratios = log_discrepancy.exp()
    everywhere = torch.ones_like(loss_mask, dtype=torch.bool)
    if correction.kind == "none":
        return Corrected(torch.ones_like(ratios), everywhere)
    if correction.kind == "token_mask":
        inside = (ratios >= 1.0 / correction.bound) & (ratios <= correction.bound)
        return Corrected(ratios, inside)
    if correction.kind == "token_truncate":
        return Corrected(ratios.clamp(max=correction.bound), everywhere)
    raise UnknownNameError.of("correction", correction.kind, CORRECTIONS)
