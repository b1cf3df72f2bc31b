"""Laws A and B: on a tabular autoregressive softmax whose trajectories can all be enumerated, autograd equals the
closed form equals central differences, for every anchor and correction; and mutants of the loss do not pass."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from torch import Tensor

from agentgym_trainer import correction as correction_module
from agentgym_trainer import loss as loss_module
from agentgym_trainer import objectives as objectives_module
from agentgym_trainer.anchors.ewma import average_in
from agentgym_trainer.correction import Corrected, Correction, TokenRatios, apply_correction, log_ratio
from agentgym_trainer.loss import decoupled_loss
from agentgym_trainer.objectives import Ppo

V, T = 3, 3
CLIP_LOW, CLIP_HIGH = 0.15, 0.4  # asymmetric, so that a swapped threshold shows
CORRECTIONS = [Correction("none"), Correction("token_mask", 1.25), Correction("token_truncate", 1.1)]
ANCHORS = ["behavior", "resident", "snapshot", "ewma"]
TRAJECTORIES = torch.tensor(list(itertools.product(range(V), repeat=T)))  # [V^T, T]: all of them
NUM_PREFIXES = sum(V**t for t in range(T))


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
    """The policy: theta [prefixes, V] -> logprobs [V^T, T]."""
    return theta.log_softmax(-1)[PREFIXES].gather(-1, TRAJECTORIES[..., None])[..., 0]


@dataclasses.dataclass(frozen=True)
class Instance:
    """A policy, four published versions before it, an engine that is slightly off, and a batch of every trajectory."""

    theta: Tensor
    behavior: Tensor
    proximal: dict[str, Tensor]
    advantages: Tensor  # [V^T, 1]: signed, and scaled by the trajectory's probability under the behavior policy
    mask: Tensor


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
        proximal={
            "behavior": behavior,
            "resident": logprobs(published[-1]),
            "snapshot": old,
            "ewma": logprobs(average),
        },
        advantages=noise(len(TRAJECTORIES), 1, scale=1.0) * probability * len(TRAJECTORIES),
        mask=torch.rand(old.shape, generator=generator) < 0.9,
    )


def loss_of(case: Instance, theta: Tensor, proximal: Tensor, correction: Correction) -> Tensor:
    return decoupled_loss(
        logprobs(theta), proximal, case.behavior, case.advantages, case.mask, correction=correction,
        denominator=float(case.mask.sum()), objective=Ppo(CLIP_LOW, CLIP_HIGH),
    )[0]  # fmt: skip


def closed_form(case: Instance, proximal: Tensor, correction: Correction) -> Tensor:
    """The gradient written out: sum over active tokens of -W r_s A grad log pi, without autograd."""
    policy = logprobs(case.theta)
    r_s, r_d = (policy - proximal).exp(), (proximal - case.behavior).exp()
    if correction.kind == "token_mask":
        weights = torch.where((r_d * correction.bound >= 1) & (r_d <= correction.bound), r_d, 0.0)
    else:
        weights = r_d.clamp(max=correction.bound) if correction.kind == "token_truncate" else torch.ones_like(r_d)
    positive = case.advantages > 0
    active = torch.where(positive, r_s <= 1 + CLIP_HIGH, r_s >= 1 - CLIP_LOW) & case.mask
    coefficient = torch.where(active, -weights * r_s * case.advantages, 0.0) / case.mask.sum()
    gradient = torch.zeros_like(case.theta)
    one_hot = torch.nn.functional.one_hot(TRAJECTORIES, V)
    score = one_hot - case.theta.softmax(-1)[PREFIXES]  # grad of log pi(token) to its logits
    gradient.index_add_(0, PREFIXES.flatten(), (coefficient[..., None] * score).flatten(0, 1))
    return gradient


def central_differences(case: Instance, proximal: Tensor, correction: Correction, h: float = 1e-6) -> Tensor:
    gradient = torch.zeros_like(case.theta)
    for index in itertools.product(*map(range, case.theta.shape)):
        step = torch.zeros_like(case.theta)
        step[index] = h
        above, below = (loss_of(case, case.theta + sign * step, proximal, correction) for sign in (1, -1))
        gradient[index] = (above - below) / (2 * h)
    return gradient


def autograd(case: Instance, proximal: Callable[[Tensor], Tensor], correction: Correction) -> Tensor:
    theta = case.theta.clone().requires_grad_()
    loss_of(case, theta, proximal(theta), correction).backward()
    assert theta.grad is not None
    return theta.grad


def check_law_b(case: Instance, anchor: str, correction: Correction) -> None:
    fixed = case.proximal[anchor]
    ours = autograd(case, lambda _: fixed, correction)
    torch.testing.assert_close(ours, closed_form(case, fixed, correction), atol=1e-10, rtol=0.0)
    torch.testing.assert_close(ours, central_differences(case, fixed, correction), atol=1e-8, rtol=0.0)


def check_constants(case: Instance, correction: Correction) -> None:
    """An anchor that depends on the policy being updated (half way to it, as `loglinear` is) carries no gradient, nor
    does a weight made from it. Half way and not the policy itself, because W r_s = R there whatever the anchor is:
    only a clipped token, or a weight other than r_d, tells a constant from a function."""

    def half_way(theta: Tensor) -> Tensor:
        return (case.behavior + logprobs(theta)) / 2

    ours = autograd(case, half_way, correction)
    expected = closed_form(case, half_way(case.theta), correction)
    torch.testing.assert_close(ours, expected, atol=1e-10, rtol=0.0)


@pytest.mark.parametrize("correction", CORRECTIONS, ids=lambda c: c.kind)
@pytest.mark.parametrize("anchor", ANCHORS)
@pytest.mark.parametrize("seed", [0, 1])
def test_autograd_is_the_closed_form_is_central_differences(seed: int, anchor: str, correction: Correction) -> None:
    check_law_b(instance(seed), anchor, correction)


@pytest.mark.parametrize("correction", CORRECTIONS, ids=lambda c: c.kind)
def test_nothing_but_the_policy_logprobs_carries_a_gradient(correction: Correction) -> None:
    check_constants(instance(0), correction)


def test_the_instance_exercises_every_branch() -> None:
    case = instance(0)
    loss, terms = decoupled_loss(
        logprobs(case.theta), case.proximal["snapshot"], case.behavior, case.advantages, case.mask,
        correction=Correction("token_mask", 1.25), denominator=1.0, objective=Ppo(CLIP_LOW, CLIP_HIGH),
    )  # fmt: skip
    assert loss.isfinite()
    for branch in (
        terms.clip_high,
        terms.clip_low,
        ~terms.mask_pass,
        terms.active,
        ~terms.clip_pass & ~terms.mask_pass,
    ):
        assert (branch & terms.counted).sum() >= 2


# ------------------------------------------------------------------------------- mutants: the checks must refuse them


def _identity(x: Tensor) -> Tensor:
    return x


def _mask_without_lower_bound(correction: Correction, ratios: TokenRatios) -> Corrected:
    plain = apply_correction(correction, ratios)
    return dataclasses.replace(plain, mask_pass=ratios.log_discrepancy.exp() <= correction.bound)


def _truncate_from_below(correction: Correction, ratios: TokenRatios) -> Corrected:
    plain = apply_correction(correction, ratios)
    return dataclasses.replace(plain, weights=ratios.log_discrepancy.exp().clamp(min=correction.bound))


@pytest.mark.parametrize("correction", CORRECTIONS, ids=lambda c: c.kind)
@pytest.mark.parametrize("rooms", [(loss_module,), (loss_module, correction_module)], ids=["anchor", "anchor, weight"])
def test_mutants_without_the_stop_gradient_are_refused(
    monkeypatch: pytest.MonkeyPatch, rooms: tuple[ModuleType, ...], correction: Correction
) -> None:
    for room in rooms:
        monkeypatch.setattr(room, "stop_gradient", _identity)
    with pytest.raises(AssertionError):
        check_constants(instance(0), correction)


@pytest.mark.parametrize(
    ("mutant", "correction"),
    [(_mask_without_lower_bound, Correction("token_mask", 1.25)), (_truncate_from_below, CORRECTIONS[2])],
    ids=["mask without its lower bound", "truncation from the wrong side"],
)
def test_mutant_corrections_are_refused(
    monkeypatch: pytest.MonkeyPatch, mutant: Callable[..., Corrected], correction: Correction
) -> None:
    monkeypatch.setattr(loss_module, "apply_correction", mutant)
    with pytest.raises(AssertionError):
        check_law_b(instance(0), "snapshot", correction)


def test_mutant_with_swapped_ratios_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        objectives_module, "log_ratio", lambda numerator, denominator: log_ratio(denominator, numerator)
    )
    with pytest.raises(AssertionError):
        check_law_b(instance(0), "snapshot", Correction("token_mask", 1.25))


def test_mutant_with_swapped_clip_bounds_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    original = objectives_module._clipped

    def swapped(ratio: Tensor, advantages: Tensor, low: float, high: float, dual: float | None) -> object:
        return original(ratio, advantages, high, low, dual)

    monkeypatch.setattr(objectives_module, "_clipped", swapped)
    with pytest.raises(AssertionError):
        check_law_b(instance(0), "snapshot", Correction("none"))


# ------------------------------------------------------------------------------------------------------------ law A


def check_the_product_of_ratios(case: Instance, ratio_of: Callable[[Tensor, Tensor], Tensor]) -> None:
    """r_d r_s == R, in float64 and in float32."""
    policy = logprobs(case.theta)
    for proximal in case.proximal.values():
        for dtype, rtol in ((torch.float64, 1e-12), (torch.float32, 2e-6)):
            theta, prox, mu = (x.to(dtype) for x in (policy, proximal, case.behavior))
            product = ratio_of(prox, mu).exp() * ratio_of(theta, prox).exp()
            torch.testing.assert_close(product, (theta - mu).exp(), atol=0.0, rtol=rtol)


@pytest.mark.parametrize("seed", range(3))
def test_the_ratios_multiply_to_the_total_ratio(seed: int) -> None:
    check_the_product_of_ratios(instance(seed), log_ratio)


@pytest.mark.parametrize(
    "mutant",
    [
        lambda numerator, denominator: log_ratio(denominator, numerator),
        lambda numerator, denominator: log_ratio(numerator, denominator).clamp(-0.2, 0.2),
        lambda numerator, denominator: log_ratio(numerator, denominator) * 0.99,
    ],
    ids=["swapped", "clamped too early", "scaled"],
)
def test_mutant_ratios_do_not_multiply_to_it(mutant: Callable[[Tensor, Tensor], Tensor]) -> None:
    with pytest.raises(AssertionError):
        check_the_product_of_ratios(instance(0), mutant)


@pytest.mark.parametrize("correction", CORRECTIONS, ids=lambda c: c.kind)
def test_on_policy_the_gradient_is_reinforce(correction: Correction) -> None:
    case = instance(0)
    on_policy = dataclasses.replace(case, behavior=logprobs(case.theta))
    ours = autograd(on_policy, lambda _: on_policy.behavior, correction)
    theta = case.theta.clone().requires_grad_()
    terms = torch.where(case.mask, logprobs(theta) * case.advantages, 0.0)
    (-terms.sum() / case.mask.sum()).backward()
    torch.testing.assert_close(ours, theta.grad, atol=1e-12, rtol=0.0)


@pytest.mark.parametrize("anchor", ANCHORS)
def test_under_the_token_mask_every_active_token_has_coefficient_r_times_a(anchor: str) -> None:
    case = instance(1)
    policy = logprobs(case.theta).requires_grad_()
    loss, terms = decoupled_loss(
        policy, case.proximal[anchor], case.behavior, case.advantages, case.mask,
        correction=Correction("token_mask", 1.25), denominator=1.0, objective=Ppo(CLIP_LOW, CLIP_HIGH),
    )  # fmt: skip
    loss.backward()
    assert policy.grad is not None
    expected = torch.where(terms.active, -(policy.detach() - case.behavior).exp() * case.advantages, 0.0)
    torch.testing.assert_close(policy.grad, expected, atol=1e-10, rtol=0.0)
    assert 0 < terms.active.sum() < case.mask.sum()
