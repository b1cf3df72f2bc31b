"""A tabular autoregressive softmax whose trajectories can all be enumerated, and every gradient of the loss on it
written out by hand. Must never call what it checks: weights, masks and coefficients are computed here anew."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from agentgym_trainer.anchors.ewma import average_in
from agentgym_trainer.anchors.interpolation import Interpolated
from agentgym_trainer.correction import Correction
from agentgym_trainer.loss import TokenTerms, decoupled_loss
from agentgym_trainer.objectives import Cispo, Gspo, M2po, Objective, Ppo, Topr, TruncatedReinforce

V, T = 3, 3
TRAJECTORIES = torch.tensor(list(itertools.product(range(V), repeat=T)))  # [V^T, T]: all of them
NUM_PREFIXES = sum(V**t for t in range(T))

# Bounds that this instance's ratios cross on both sides; asymmetric wherever they can be, so that a swap shows.
OBJECTIVES: list[Objective] = [
    Ppo(0.15, 0.4), Ppo(0.15, 0.4, dual_clip=1.25), Gspo(0.04, 0.09), Cispo(0.85, 1.2), TruncatedReinforce(1.1), Topr(),
    M2po(0.04),
]  # fmt: skip
CORRECTIONS: list[tuple[Correction, ...]] = [
    (Correction("none"),),
    (Correction("token_mask", 1.25),),
    (Correction("token_truncate", 1.1),),
    (Correction("sequence_truncate", 1.15),),
    (Correction("icepop", 1.4, low=0.85),),
    (Correction("geometric_mask", 1.2, low=0.95),),
    (Correction("sequence_mask", 1.3),),
    (Correction("bernoulli_kl_mask", 0.004),),
    (Correction("probability_difference_mask", 0.03),),
    (Correction("none"), Correction("veto", 0.8)),
    (Correction("token_mask", 1.25), Correction("veto", 0.75)),
    (Correction("token_truncate", 1.1), Correction("geometric_mask", 1.2, low=0.95), Correction("veto", 0.75)),
]
ANCHORS = ["behavior", "resident", "snapshot", "ewma", "linear", "loglinear"]  # the other exact ones give snapshot's


def name_of(value: object) -> str | None:
    """Ids of parametrised tests."""
    if isinstance(value, tuple):
        return "+".join(part.kind for part in value)
    if isinstance(value, Ppo) and value.dual_clip:
        return "dual_clip"
    return getattr(value, "kind", None)


def combinations() -> list[tuple[str, tuple[Correction, ...], Objective]]:
    """Anchor x correction x objective, without those that the configuration refuses."""
    nothing = CORRECTIONS[0]
    return [
        (anchor, correction, objective)
        for anchor, correction, objective in itertools.product(ANCHORS, CORRECTIONS, OBJECTIVES)
        if (correction is nothing if anchor == "behavior" else not objective.on_total_ratio)
    ]


def prefixes() -> Tensor:
    """[V^T, T]: for each token of each trajectory, the row of the table that its prefix selects."""
    offsets = [sum(V**s for s in range(t)) for t in range(T)]
    index = torch.zeros_like(TRAJECTORIES)
    for t in range(T):
        code = torch.zeros(len(TRAJECTORIES), dtype=torch.int64)
        for s in range(t):
            code = code * V + TRAJECTORIES[:, s]
        index[:, t] = offsets[t] + code
    return index


PREFIXES = prefixes()


def logprobs(theta: Tensor) -> Tensor:
    """The policy: theta [.., prefixes, V] -> logprobs [.., V^T, T]."""
    rows = theta.log_softmax(-1)[..., PREFIXES, :]
    return rows.gather(-1, TRAJECTORIES[..., None].expand(*rows.shape[:-1], 1))[..., 0]


@dataclasses.dataclass(frozen=True)
class Instance:
    """A policy, four published versions before it, an engine that is slightly off, and a batch of every trajectory."""

    theta: Tensor
    behavior: Tensor
    fixed: dict[str, Tensor]  # proximal logprobs of the anchors that have some of their own
    advantages: Tensor  # [V^T, 1]: signed, and scaled by the trajectory's probability under the behavior policy
    mask: Tensor
    behavior_weight: Tensor

    def proximal(self, anchor: str, policy: Tensor) -> Tensor:
        if anchor in self.fixed:
            return self.fixed[anchor]
        return Interpolated(anchor, self.behavior, self.behavior_weight).resolve(policy)  # type: ignore[arg-type]

    @property
    def num_rows(self) -> int:
        return int(self.mask.any(-1).sum())


def instance(seed: int) -> Instance:
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int, scale: float) -> Tensor:
        return scale * torch.randn(*shape, generator=generator, dtype=torch.float64)

    published = [noise(NUM_PREFIXES, V, scale=0.7)]
    for _ in range(3):
        published.append(published[-1] + noise(NUM_PREFIXES, V, scale=0.25))
    versions = torch.randint(0, 4, (len(TRAJECTORIES), T), generator=generator).sort(-1).values
    old = torch.stack([logprobs(theta) for theta in published]).gather(0, versions[None])[0]
    behavior = old + noise(*old.shape, scale=0.12)
    average, weight = published[0].clone(), 1.0
    for theta in published[1:]:
        average_in(average, theta, weight, 0.6)
        weight = 0.6 * weight + 1.0
    probability = behavior.sum(-1, keepdim=True).exp()
    return Instance(
        theta=published[-1] + noise(NUM_PREFIXES, V, scale=0.25),
        behavior=behavior,
        fixed={
            "behavior": behavior,
            "resident": logprobs(published[-1]),
            "snapshot": old,
            "ewma": logprobs(average),
        },
        advantages=noise(len(TRAJECTORIES), 1, scale=1.0) * probability * len(TRAJECTORIES),
        mask=torch.rand(old.shape, generator=generator) < 0.9,
        behavior_weight=1.0 / (4 - versions).clamp(min=2).double(),  # of a trainer at version 4; no lag of one
    )


def settled(objective: Objective, case: Instance) -> Objective:
    """With what a whole step gives it, as the learner does."""
    if not isinstance(objective, M2po):
        return objective
    squares = M2po.squares(logprobs(case.theta), case.behavior)[case.mask]
    return dataclasses.replace(objective, cut=objective.cut_of(squares))


def terms_of(
    case: Instance, theta: Tensor, proximal: Tensor, correction: Sequence[Correction], objective: Objective
) -> tuple[Tensor, TokenTerms]:
    """The loss on a theta [prefixes, V], or on a stack of them at once: then each one's loss is in its terms."""
    policy = logprobs(theta)
    return decoupled_loss(
        policy, proximal.expand_as(policy), case.behavior.expand_as(policy), case.advantages,
        case.mask.expand_as(policy), correction=correction, objective=objective,
        denominator=float(case.mask.sum()), row_denominator=float(case.num_rows),
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------------- closed form


def by_row(values: Tensor, mask: Tensor, *, mean: bool) -> Tensor:
    total = (values * mask).sum(-1, keepdim=True)
    return (total / mask.sum(-1, keepdim=True).clamp(min=1) if mean else total).expand_as(values)


def weights_of(case: Instance, proximal: Tensor, correction: Sequence[Correction]) -> Tensor:
    """M_d W of every token."""
    r_d, log_r_d = (proximal - case.behavior).exp(), proximal - case.behavior
    mu, p = case.behavior.exp(), proximal.exp()
    total = by_row(log_r_d, case.mask, mean=False).exp()
    geometric = by_row(log_r_d, case.mask, mean=True).exp()
    weight, truncation, passes = torch.ones_like(r_d), None, torch.ones_like(case.mask)
    for part in correction:
        b = part.bound
        if part.kind == "token_truncate":
            truncation = r_d.clamp(max=b)
        elif part.kind == "sequence_truncate":
            truncation = total.clamp(max=b)
        elif part.kind == "veto":
            passes = passes & ~(case.mask & (r_d < b)).any(-1, keepdim=True)
        elif part.kind != "none":
            weight = r_d
            divergence = mu * (mu / p).log() + (1 - mu) * ((1 - mu) / (1 - p)).log()
            difference = (p - mu) * case.advantages.sign()
            passes = (
                passes
                & {
                    "token_mask": (r_d * b >= 1) & (r_d <= b),
                    "icepop": (r_d >= part.low) & (r_d <= b),
                    "geometric_mask": (geometric >= part.low) & (geometric <= b),
                    "sequence_mask": (total * b >= 1) & (total <= b),
                    "bernoulli_kl_mask": divergence <= b,
                    "probability_difference_mask": difference <= b,
                }[part.kind]
            )
    return (weight if truncation is None else truncation) * passes


def coefficients_of(case: Instance, policy: Tensor, proximal: Tensor, objective: Objective) -> Tensor:
    """What stands before grad log pi_theta, of the surrogate: r_s A for an unclipped token of PPO."""
    advantages = case.advantages.expand_as(policy)
    up = advantages > 0
    r_s, total = (policy - proximal).exp(), (policy - case.behavior).exp()
    if isinstance(objective, Ppo):
        inside = torch.where(up, r_s <= 1 + objective.clip_high, r_s >= 1 - objective.clip_low)
        return r_s * advantages * (inside & (up | (r_s <= (objective.dual_clip or math.inf))))
    if isinstance(objective, Gspo):
        s = by_row(policy - proximal, case.mask, mean=True).exp()
        inside = torch.where(up, s <= 1 + objective.clip_high, s >= 1 - objective.clip_low)
        lengths = case.mask.sum(-1, keepdim=True).clamp(min=1)
        return s * advantages * inside / lengths * case.mask.sum() / case.num_rows
    if isinstance(objective, Cispo):
        return r_s.clamp(objective.low, objective.high) * advantages
    if isinstance(objective, TruncatedReinforce):
        return total.clamp(max=objective.bound) * advantages
    if isinstance(objective, Topr):
        return torch.where(up, 1.0, total.clamp(0.0, 1.0)) * advantages
    assert isinstance(objective, M2po)
    left = sorted((policy - case.behavior)[case.mask].square().tolist())
    while left and sum(left) / len(left) >= objective.max_second_moment:
        left.pop()  # the largest
    return total * advantages * ((policy - case.behavior).square() <= left[-1])


def closed_form(case: Instance, proximal: Tensor, correction: Sequence[Correction], objective: Objective) -> Tensor:
    """The gradient to theta written out: sum over tokens of -M W c grad log pi, without autograd."""
    policy = logprobs(case.theta)
    coefficient = -weights_of(case, proximal, correction) * coefficients_of(case, policy, proximal, objective)
    coefficient = coefficient * case.mask / case.mask.sum()
    one_hot = torch.nn.functional.one_hot(TRAJECTORIES, V)
    score = one_hot - case.theta.softmax(-1)[PREFIXES]  # grad of log pi(token) to its logits
    gradient = torch.zeros_like(case.theta)
    return gradient.index_add_(0, PREFIXES.flatten(), (coefficient[..., None] * score).flatten(0, 1))


def autograd(
    case: Instance, proximal: Callable[[Tensor], Tensor], correction: Sequence[Correction], objective: Objective
) -> Tensor:
    """`proximal` from the policy's logprobs."""
    theta = case.theta.clone().requires_grad_()
    terms_of(case, theta, proximal(logprobs(theta)), correction, settled(objective, case))[0].backward()
    assert theta.grad is not None
    return theta.grad
