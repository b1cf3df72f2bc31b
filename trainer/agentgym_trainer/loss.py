"""The policy loss. Must never know a model, a batch or an anchor: logprobs in, a loss and its terms out.

Law (arXiv 2605.12070): R = r_d * r_s; the discrepancy ratio r_d = pi_prox/mu_old is corrected symmetrically, the
staleness ratio r_s = pi_theta/pi_prox is the objective's, and with the default one

    l_t = - M_d(r_d) * sg[W(r_d)] * min(r_s A, clip(r_s, 1 - clip_low, 1 + clip_high) A)

summed over loss tokens and divided by their ORIGINAL number in the whole optimizer step over all ranks. Dividing by
what a mask kept would rescale the survivors. With the token mask each active token's gradient coefficient is R * A.
Objectives on a row's ratio average each row's tokens, and divide by the step's original number of non-empty rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from agentgym.errors import TrainingError
from agentgym_trainer.correction import (
    Correction,
    TokenRatios,
    apply_correction,
    at_least_fp32,
    log_ratio,
    stop_gradient,
)
from agentgym_trainer.objectives import Objective, PolicyTokens, Ppo


@dataclass(frozen=True, slots=True)
class TokenTerms:
    """What became of every token [.., T] of one call; all without gradient, meaningful where `counted`.

    Example: one token with r_d = 3 under `token_mask` 2: counted, not mask_pass, clip_pass, not active.
    """

    counted: Tensor  # bool: a loss token with a finite behavior logprob
    dropped: Tensor  # bool: a loss token without one; in no numerator and no denominator
    mask_pass: Tensor  # bool: M_d
    vetoed: Tensor  # bool: in a row that the veto dropped; not mask_pass either
    clip_high: Tensor  # bool: no gradient, the objective found its ratio too high; PPO: A > 0 and r_s > 1 + clip_high
    clip_low: Tensor  # bool: no gradient, its ratio is too low; PPO: A < 0 and r_s < 1 - clip_low
    limited: Tensor  # bool: a gradient, but W or the objective's weight stands at its bound
    policy_logprobs: Tensor
    proximal_logprobs: Tensor
    behavior_logprobs: Tensor  # 0.0 where dropped
    objective: Tensor  # what it adds to the loss, times the step's number of tokens; 0.0 where not counted
    entropy: Tensor | None
    reference_k3: Tensor | None  # its estimate of the divergence from the reference model; None without one

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
    correction: Correction | Sequence[Correction],
    denominator: float,
    row_denominator: float | None = None,
    objective: Objective = Ppo(),  # noqa: B008  (frozen)
    entropy: Tensor | None = None,
    entropy_coefficient: float = 0.0,
    reference_logprobs: Tensor | None = None,
    reference_coefficient: float = 0.0,
) -> tuple[Tensor, TokenTerms]:
    """The loss of one micro-batch (a scalar with a gradient to `policy_logprobs` alone, and to the entropy if given)
    and the terms from which `metrics.StepMetrics` counts.

    All tensors are [.., T] and index t concerns token t; the last axis is a row; `advantages` broadcasts.
    `denominator` is the number of counted loss tokens of the whole optimizer step over all ranks
    (`batch.StepRows.num_loss_tokens`), divided by the world size where gradients are averaged over ranks;
    micro-batches are then simply summed. `row_denominator` is the same of non-empty rows (`StepRows.num_loss_rows`),
    which objectives by row need. PPO on the total ratio R is `proximal_logprobs = behavior_logprobs` with
    `Correction("none")`. A micro-batch without a loss token gives a zero that can be differentiated.

    Added, each a sum over counted tokens divided by `denominator`: - entropy_coefficient * entropy, and
    reference_coefficient * (exp(x) - 1 - x) with x = log(pi_ref/pi_theta), the k3 estimate of the divergence from a
    frozen reference model, differentiated through pi_theta (GRPO, arXiv 2402.03300).
    """
    if not denominator > 0:
        raise TrainingError(f"the step has no loss token with a finite behavior logprob (denominator {denominator})")
    if objective.by_row and not (row_denominator is not None and row_denominator > 0):
        raise TrainingError(f"objective {objective.kind} averages rows and needs their number, got {row_denominator}")
    counted, dropped = split_by_finiteness(behavior_logprobs, loss_mask)
    # Values outside the mask may be anything, nan included: they leave before any arithmetic, not by multiplication.
    policy = at_least_fp32(torch.where(counted, policy_logprobs, 0.0))
    proximal = stop_gradient(torch.where(counted, proximal_logprobs, 0.0))
    behavior = stop_gradient(torch.where(counted, behavior_logprobs, 0.0))
    advantages = stop_gradient(advantages.expand_as(policy))

    corrected = apply_correction(correction, TokenRatios.of(proximal, behavior, advantages, counted))
    surrogate = objective.surrogate(PolicyTokens(policy, proximal, behavior, advantages, counted))
    value = torch.where(counted & corrected.mask_pass, -corrected.weights * surrogate.value, 0.0)
    if objective.by_row and row_denominator is not None:
        # In units of 1/denominator like every other objective, so that what is reported adds up to the loss.
        value = value / counted.sum(-1, keepdim=True).clamp(min=1) * (denominator / row_denominator)

    loss = value.sum() / denominator
    if entropy is not None and entropy_coefficient != 0.0:
        loss = loss - entropy_coefficient * torch.where(counted, entropy, 0.0).sum() / denominator
    reference_k3 = None
    if reference_logprobs is not None:
        x = log_ratio(stop_gradient(torch.where(counted, reference_logprobs, 0.0)), policy)
        reference_k3 = torch.where(counted, x.exp() - 1.0 - x, 0.0)
        loss = loss + reference_coefficient * reference_k3.sum() / denominator
    terms = TokenTerms(
        counted=counted,
        dropped=dropped,
        mask_pass=corrected.mask_pass,
        vetoed=corrected.vetoed,
        clip_high=surrogate.clip_high,
        clip_low=surrogate.clip_low,
        limited=surrogate.limited | corrected.truncated,
        policy_logprobs=policy.detach(),
        proximal_logprobs=proximal,
        behavior_logprobs=behavior,
        objective=value.detach(),
        entropy=None if entropy is None else entropy.detach(),
        reference_k3=None if reference_k3 is None else reference_k3.detach(),
    )
    return loss, terms
