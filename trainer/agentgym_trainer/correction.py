"""How the discrepancy ratio r_d = pi_prox/mu_old is handled. Must never know where either logprob came from.

Law: a correction is a constant of the gradient. Its weight W(r_d) and its mask M_d multiply a token's objective, and
nothing is ever differentiated through them (old-logits mathematics, arXiv 2605.12070). Logarithms of ratios are fp32
differences of logprobs, clamped to +-20; "row" means one token sequence, over its counted tokens. The kinds and their
formulas stand in `correction_kinds.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from agentgym_trainer.correction_kinds import CORRECTIONS, TRUNCATIONS, Correction, CorrectionKind, check_stack

__all__ = ["CORRECTIONS", "Corrected", "Correction", "CorrectionKind", "TokenRatios", "apply_correction", "log_ratio"]

LOG_RATIO_LIMIT = 20.0  # exp(20) is 5e8: beyond it a ratio says "broken", and fp32 squares of it still fit


def stop_gradient(x: Tensor) -> Tensor:
    """sg[x] of the formulas."""
    return x.detach()


def log_ratio(numerator_logprobs: Tensor, denominator_logprobs: Tensor) -> Tensor:
    """log of a ratio of probabilities in fp32 (float64 stays float64), clamped to +-20 so that its exp is finite."""
    return clamp_log(at_least_fp32(numerator_logprobs) - at_least_fp32(denominator_logprobs))


def clamp_log(x: Tensor) -> Tensor:
    """A logarithm of a ratio whose exp may be taken, and squared."""
    return x.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)


def over_row(values: Tensor, counted: Tensor, *, mean: bool) -> Tensor:
    """[.., 1]: the sum or the mean of a row's counted tokens; 0 for a row without one."""
    total = torch.where(counted, values, 0.0).sum(-1, keepdim=True)
    return total / counted.sum(-1, keepdim=True).clamp(min=1) if mean else total


def at_least_fp32(x: Tensor) -> Tensor:
    """What mathematics is done in, whatever a model computes in."""
    return x if x.dtype == torch.float64 else x.float()


@dataclass(frozen=True, slots=True)
class TokenRatios:
    """What a correction may look at, each [.., T] and without gradient; zeros where not counted.

    Example: one token sampled with probability 0.2 that the anchor gives 0.3, A = 1: log_discrepancy log(1.5).
    """

    log_discrepancy: Tensor  # log r_d, clamped
    proximal_logprobs: Tensor
    behavior_logprobs: Tensor
    advantages: Tensor
    counted: Tensor  # bool: the tokens that a row consists of

    @classmethod
    def of(cls, proximal: Tensor, behavior: Tensor, advantages: Tensor, counted: Tensor) -> TokenRatios:
        proximal, behavior = stop_gradient(at_least_fp32(proximal)), stop_gradient(at_least_fp32(behavior))
        return cls(log_ratio(proximal, behavior), proximal, behavior, stop_gradient(advantages), counted)


@dataclass(frozen=True, slots=True)
class Corrected:
    """What a correction says of every token [.., T]: its weight W(r_d) and whether the mask M_d lets it pass.

    Example: `token_mask` with c = 2 on r_d = (1.5, 3.0): weights (1.5, 3.0), mask_pass (True, False).
    """

    weights: Tensor
    mask_pass: Tensor
    vetoed: Tensor  # bool: in a row that the veto dropped; not mask_pass either
    truncated: Tensor  # bool: the weight stands at its bound


def apply_correction(correction: Correction | Sequence[Correction], ratios: TokenRatios) -> Corrected:
    """Weights and mask of every token. Of several corrections the masks multiply; the weight is a truncation's if
    there is one, else r_d if there is a mask, else 1."""
    stack = (correction,) if isinstance(correction, Correction) else tuple(correction)
    check_stack([part.kind for part in stack])
    log_discrepancy = stop_gradient(ratios.log_discrepancy)
    r_d = log_discrepancy.exp()
    nowhere = torch.zeros_like(ratios.counted, dtype=torch.bool)
    mask_pass, vetoed, truncated = ~nowhere, nowhere, nowhere
    weights = r_d if any(part.kind in _MASKS for part in stack) else torch.ones_like(r_d)
    for part in stack:
        if part.kind in TRUNCATIONS:
            by_row = part.kind == "sequence_truncate"
            ratio = _row_ratio(ratios, mean=False).expand_as(r_d) if by_row else r_d
            weights, truncated = ratio.clamp(max=part.bound), ratio > part.bound
        elif part.kind == "veto":
            broken = ratios.counted & (r_d < part.bound)
            vetoed = broken.any(-1, keepdim=True).expand_as(mask_pass)
            mask_pass = mask_pass & ~vetoed
        elif part.kind != "none":
            mask_pass = mask_pass & _MASKS[part.kind](part, ratios)
    return Corrected(weights, mask_pass, vetoed, truncated)


def _row_ratio(ratios: TokenRatios, *, mean: bool) -> Tensor:
    """[.., 1]: exp of the sum, or of the mean, of the row's log r_d."""
    return clamp_log(over_row(stop_gradient(ratios.log_discrepancy), ratios.counted, mean=mean)).exp()


def _within(ratio: Tensor, low: float, high: float) -> Tensor:
    return (ratio >= low) & (ratio <= high)


def _token_mask(part: Correction, ratios: TokenRatios) -> Tensor:
    return _within(stop_gradient(ratios.log_discrepancy).exp(), 1.0 / part.bound, part.bound)


def _icepop(part: Correction, ratios: TokenRatios) -> Tensor:
    return _within(stop_gradient(ratios.log_discrepancy).exp(), part.low, part.bound)


def _geometric_mask(part: Correction, ratios: TokenRatios) -> Tensor:
    return _within(_row_ratio(ratios, mean=True), part.low, part.bound).expand_as(ratios.counted)


def _sequence_mask(part: Correction, ratios: TokenRatios) -> Tensor:
    return _within(_row_ratio(ratios, mean=False), 1.0 / part.bound, part.bound).expand_as(ratios.counted)


def _bernoulli_kl_mask(part: Correction, ratios: TokenRatios) -> Tensor:
    # The floor stands for "as near to 1 as this dtype can say": 1 - p is then not zero, but below its resolution.
    floor = torch.finfo(ratios.behavior_logprobs.dtype).eps
    other_mu = (-torch.expm1(ratios.behavior_logprobs)).clamp(min=floor)
    other_prox = (-torch.expm1(ratios.proximal_logprobs)).clamp(min=floor)
    divergence = other_mu * (other_mu / other_prox).log() - ratios.behavior_logprobs.exp() * ratios.log_discrepancy
    return divergence <= part.bound


def _probability_difference_mask(part: Correction, ratios: TokenRatios) -> Tensor:
    difference = ratios.proximal_logprobs.exp() - ratios.behavior_logprobs.exp()
    too_high = (ratios.advantages > 0) & (difference > part.bound)
    too_low = (ratios.advantages < 0) & (difference < -part.bound)
    return ~(too_high | too_low)


_MASKS: dict[str, Callable[[Correction, TokenRatios], Tensor]] = {
    "token_mask": _token_mask,
    "icepop": _icepop,
    "geometric_mask": _geometric_mask,
    "sequence_mask": _sequence_mask,
    "bernoulli_kl_mask": _bernoulli_kl_mask,
    "probability_difference_mask": _probability_difference_mask,
}
