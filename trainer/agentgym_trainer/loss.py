"""The decoupled policy objective. Must never know a model, a batch or an anchor: logprobs in, a loss and its terms out.

Law (arXiv 2605.12070): R = r_d * r_s; the discrepancy ratio r_d = pi_prox/mu_old is corrected symmetrically, the
staleness ratio r_s = pi_theta/pi_prox is clipped by the sign of the advantage, and

    l_t = - M_d(r_d) * sg[W(r_d)] * min(r_s A, clip(r_s, 1 - clip_low, 1 + clip_high) A)

summed over loss tokens and divided by their ORIGINAL number in the whole optimizer step over all ranks. Dividing by
what a mask kept would rescale the survivors. With the token mask each active token's gradient coefficient is R * A.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from agentgym.errors import TrainingError
from agentgym_trainer.correction import Correction, apply_correction, log_ratio, stop_gradient


@dataclass(frozen=True, slots=True)
class TokenTerms:
    """What became of every token [.., T] of one call; all without gradient, meaningful where `counted`.

    Example: one token with r_d = 3 under `token_mask` 2: counted, not mask_pass, clip_pass, not active.
    """

    counted: Tensor  # bool: a loss token with a finite behavior logprob
    dropped: Tensor  # bool: a loss token without one; in no numerator and no denominator
    mask_pass: Tensor  # bool: M_d
    clip_high: Tensor  # bool: A > 0 and r_s > 1 + clip_high
    clip_low: Tensor  # bool: A < 0 and r_s < 1 - clip_low
    policy_logprobs: Tensor
    proximal_logprobs: Tensor
    behavior_logprobs: Tensor  # 0.0 where dropped
    objective: Tensor  # l_t, 0.0 where not counted
    entropy: Tensor | None

    @property
    def clip_pass(self) -> Tensor:
        return ~(self.clip_high | self.clip_low)

    @property
    def active(self) -> Tensor:
        """Tokens whose logprob receives a gradient: counted, through the mask and through the clip."""
        return self.counted & self.mask_pass & self.clip_pass


def split_by_finiteness(behavior_logprobs: Tensor, loss_mask: Tensor) -> tuple[Tensor, Tensor]:
    """(counted, dropped), both bool [.., T]: loss tokens with and without a finite behavior logprob."""
    finite = torch.isfinite(behavior_logprobs)
    return loss_mask & finite, loss_mask & ~finite


def decoupled_loss(
    policy_logprobs: Tensor,
    proximal_logprobs: Tensor,
    behavior_logprobs: Tensor,
    advantages: Tensor,
    loss_mask: Tensor,
    *,
    correction: Correction,
    denominator: float,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
    entropy: Tensor | None = None,
    entropy_coefficient: float = 0.0,
) -> tuple[Tensor, TokenTerms]:
    """The loss of one micro-batch (a scalar with a gradient to `policy_logprobs` alone, and to `entropy` if given)
    and the terms from which `metrics.StepMetrics` counts.

    All tensors are [.., T] and index t concerns token t; `advantages` broadcasts. `denominator` is the number of
    counted loss tokens of the whole optimizer step over all ranks (`batch.StepRows.num_loss_tokens`), divided by the
    world size where gradients are averaged over ranks; micro-batches are then simply summed. PPO on the total ratio R
    is `proximal_logprobs = behavior_logprobs` with `Correction("none")`. A micro-batch without a loss token gives a
    zero that can be differentiated.
    """
    if not denominator > 0:
        raise TrainingError(f"the step has no loss token with a finite behavior logprob (denominator {denominator})")
    counted, dropped = split_by_finiteness(behavior_logprobs, loss_mask)
    # Values outside the mask may be anything, nan included: they leave before any arithmetic, not by multiplication.
    policy = torch.where(counted, policy_logprobs, 0.0)
    proximal = stop_gradient(torch.where(counted, proximal_logprobs, 0.0))
    behavior = stop_gradient(torch.where(counted, behavior_logprobs, 0.0))
    advantages = stop_gradient(advantages.expand_as(policy))

    staleness = log_ratio(policy, proximal).exp()
    corrected = apply_correction(correction, log_ratio(proximal, behavior), counted)
    too_high = (advantages > 0) & (staleness > 1.0 + clip_high)
    too_low = (advantages < 0) & (staleness < 1.0 - clip_low)
    bounded = torch.where(too_high | too_low, staleness.detach().clamp(1.0 - clip_low, 1.0 + clip_high), staleness)
    objective = torch.where(counted & corrected.mask_pass, -corrected.weights * bounded * advantages, 0.0)

    loss = objective.sum() / denominator
    if entropy is not None and entropy_coefficient != 0.0:
        loss = loss - entropy_coefficient * torch.where(counted, entropy, 0.0).sum() / denominator
    terms = TokenTerms(
        counted=counted,
        dropped=dropped,
        mask_pass=corrected.mask_pass,
        clip_high=too_high,
        clip_low=too_low,
        policy_logprobs=policy.detach(),
        proximal_logprobs=proximal,
        behavior_logprobs=behavior,
        objective=objective.detach(),
        entropy=None if entropy is None else entropy.detach(),
    )
    return loss, terms
