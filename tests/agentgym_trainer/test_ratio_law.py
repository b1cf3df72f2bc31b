"""Law A: r_d r_s == R, on-policy everything is one and the gradient is REINFORCE's, and bounds point the right way; and
what an interpolation between behavior and policy does to the two ratios."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tabular import CORRECTIONS, OBJECTIVES, Instance, autograd, instance, logprobs, name_of, terms_of
from torch import Tensor

from agentgym.errors import ConfigError, UnknownNameError
from agentgym_trainer.anchors import make_anchor
from agentgym_trainer.anchors.interpolation import Interpolated, InterpolationAnchor
from agentgym_trainer.batch import MicroBatch
from agentgym_trainer.correction import Correction, log_ratio
from agentgym_trainer.loss import decoupled_loss
from agentgym_trainer.metrics import RATIOS, StepMetrics
from agentgym_trainer.objectives import Objective, Ppo

LOGPROB = st.floats(-6.0, -1e-3)
WEIGHT = st.floats(0.02, 0.98)


def check_the_product_of_ratios(ratio_of: Callable[[Tensor, Tensor], Tensor]) -> None:
    """In float64 and in float32, for log ratios up to 3 either way."""
    generator = torch.Generator().manual_seed(0)
    policy = -6.0 * torch.rand(4000, generator=generator, dtype=torch.float64)
    proximal, behavior = (policy + 3.0 * (torch.rand(2, 4000, generator=generator, dtype=torch.float64) - 0.5)).clamp(
        max=0
    )
    for dtype, rtol in ((torch.float64, 1e-12), (torch.float32, 2e-6)):
        theta, prox, mu = (x.to(dtype) for x in (policy, proximal, behavior))
        product = ratio_of(prox, mu).exp() * ratio_of(theta, prox).exp()
        torch.testing.assert_close(product.double(), (theta.double() - mu.double()).exp(), atol=0.0, rtol=rtol)


def test_the_ratios_multiply_to_the_total_ratio() -> None:
    check_the_product_of_ratios(log_ratio)


@pytest.mark.parametrize(
    "mutant",
    [
        lambda numerator, denominator: log_ratio(denominator, numerator),
        lambda numerator, denominator: log_ratio(numerator, denominator).clamp(-0.7, 0.7),
        lambda numerator, denominator: log_ratio(numerator, denominator) * 0.99999,
        lambda numerator, denominator: log_ratio(numerator.half(), denominator.half()),
    ],
    ids=["swapped", "clamped too early", "scaled", "in half precision"],
)
def test_mutant_ratios_do_not_multiply_to_it(mutant: Callable[[Tensor, Tensor], Tensor]) -> None:
    with pytest.raises(AssertionError):
        check_the_product_of_ratios(mutant)


def on_policy() -> Instance:
    case = instance(0)
    return dataclasses.replace(case, behavior=logprobs(case.theta))


@pytest.mark.parametrize("correction", CORRECTIONS, ids=name_of)
@pytest.mark.parametrize("objective", OBJECTIVES, ids=name_of)
def test_on_policy_the_gradient_is_reinforce(correction: tuple[Correction, ...], objective: Objective) -> None:
    case = on_policy()
    ours = autograd(case, lambda _: case.behavior, correction, objective)
    theta = case.theta.clone().requires_grad_()
    terms = torch.where(case.mask, logprobs(theta) * case.advantages, 0.0)
    if objective.by_row:
        loss = -(terms.sum(-1) / case.mask.sum(-1).clamp(min=1)).sum() / case.num_rows
    else:
        loss = -terms.sum() / case.mask.sum()
    loss.backward()
    torch.testing.assert_close(ours, theta.grad, atol=1e-12, rtol=0.0)


@pytest.mark.parametrize("correction", CORRECTIONS, ids=name_of)
@pytest.mark.parametrize("objective", OBJECTIVES, ids=name_of)
def test_on_policy_every_token_is_active_and_every_figure_says_so(
    correction: tuple[Correction, ...], objective: Objective
) -> None:
    case = on_policy()
    loss, terms = terms_of(case, case.theta, case.behavior, correction, objective)
    assert terms.active.equal(case.mask)
    assert not (terms.vetoed | terms.clip_high | terms.clip_low).any()
    whole, row = torch.zeros(case.mask.shape, dtype=torch.int64), torch.arange(len(case.mask))
    batch = MicroBatch(whole, row, case.mask, whole.double(), whole, whole, whole.double(), row)
    metrics = StepMetrics()
    metrics.add(terms, batch, trainer_version=0)
    figures = metrics.finalise()
    for ratio in RATIOS:
        assert [figures[f"{ratio}/{name}"] for name in ("k1", "k2", "k3", "chi2")] == pytest.approx(
            [0.0] * 4, abs=1e-12
        )
        assert figures[f"{ratio}/ess_fraction"] == figures[f"{ratio}/ess_row_fraction"] == pytest.approx(1.0)
    assert (figures["policy/active_fraction"], figures["policy/num_vetoed"]) == (1.0, 0.0)
    assert figures["policy/loss"] == pytest.approx(loss.item())


# ---------------------------------------------------------------------------------------------------- interpolations


def between(kind: str, mu: float, theta: float, a: float) -> float:
    behavior, weight, policy = torch.tensor([mu, a, theta], dtype=torch.float64)
    return Interpolated(kind, behavior, weight).resolve(policy).item()  # type: ignore[arg-type]


@given(LOGPROB, LOGPROB, WEIGHT)
def test_loglinear_shares_the_total_ratio_out(mu: float, theta: float, a: float) -> None:
    """r_s = R^a, r_d = R^(1-a)."""
    prox = between("loglinear", mu, theta, a)
    assert theta - prox == pytest.approx(a * (theta - mu), abs=1e-12)
    assert prox - mu == pytest.approx((1 - a) * (theta - mu), abs=1e-12)


@given(LOGPROB, LOGPROB, WEIGHT)
def test_linear_bounds_the_staleness_ratio(mu: float, theta: float, a: float) -> None:
    """r_s = R/(a + (1-a) R) <= 1/(1-a), so the upper clip never fires where a <= eps/(1+eps)."""
    prox = between("linear", mu, theta, a)
    assert math.exp(prox) == pytest.approx(a * math.exp(mu) + (1 - a) * math.exp(theta), rel=1e-12)
    r_s, total = math.exp(theta - prox), math.exp(theta - mu)
    assert r_s == pytest.approx(total / (a + (1 - a) * total), rel=1e-12)
    assert r_s <= 1 / (1 - a) + 1e-12
    epsilon = 0.28
    if a <= epsilon / (1 + epsilon):
        assert r_s <= 1 + epsilon + 1e-12


@pytest.mark.parametrize("kind", ["linear", "loglinear"])
@given(st.lists(st.tuples(LOGPROB, LOGPROB, WEIGHT, st.sampled_from([-1.0, 1.0])), min_size=1, max_size=8))
def test_an_interpolation_only_moves_the_clip_on_the_total_ratio(
    kind: str, tokens: list[tuple[float, float, float, float]]
) -> None:
    """Without a mask of r_d, an active token's coefficient under weight r_d is R A, whatever a is."""
    mu, theta, a, advantages = (torch.tensor(column, dtype=torch.float64) for column in zip(*tokens))
    policy = theta.requires_grad_()
    proximal = Interpolated(kind, mu, a).resolve(policy)  # type: ignore[arg-type]
    wide = Correction("icepop", 1e9, low=1e-9)
    loss, terms = decoupled_loss(
        policy, proximal, mu, advantages, torch.ones(len(tokens), dtype=torch.bool), correction=wide, denominator=1.0
    )
    loss.backward()
    assert policy.grad is not None
    expected = torch.where(terms.active, -(policy.detach() - mu).exp() * advantages, 0.0)
    torch.testing.assert_close(policy.grad, expected, atol=1e-9, rtol=1e-9)
    if kind == "loglinear":  # r_s = R^a: the clip [1 - l, 1 + h] on r_s is [(1-l)^(1/a), (1+h)^(1/a)] on R
        log_total = (policy.detach() - mu) * a
        clipped = torch.where(advantages > 0, log_total > math.log(1.28), log_total < math.log(0.8))
        near = (log_total - math.log(1.28)).abs().minimum((log_total - math.log(0.8)).abs()) < 1e-9
        assert (terms.clip_pass.logical_not().eq(clipped) | near).all()


def batch_of_versions(versions: list[int]) -> MicroBatch:
    row = torch.tensor([versions])
    logprob = -torch.arange(1.0, len(versions) + 1)[None]
    number = torch.tensor([len(versions)])
    return MicroBatch(row, number, row >= 0, logprob, row, row, logprob, number * 0)


@pytest.mark.parametrize("kind", ["linear", "loglinear"])
def test_the_weight_follows_the_lag(kind: str) -> None:
    """a = 1/max(d, 1): lag 0 and 1 are the behavior's own, bitwise; then ever more of the policy."""
    batch = batch_of_versions([9, 8, 7, 5])
    (made,) = InterpolationAnchor(kind).proximal([batch], trainer_version=9, reuse_policy=True)  # type: ignore[arg-type]
    torch.testing.assert_close(made.behavior_weight, torch.tensor([[1.0, 1.0, 0.5, 0.25]]))
    policy = batch.behavior_logprobs - 0.5
    resolved = made.resolve(policy)
    assert torch.equal(resolved[:, :2], batch.behavior_logprobs[:, :2])
    if kind == "loglinear":
        torch.testing.assert_close(policy - resolved, torch.tensor([[-0.5, -0.5, -0.25, -0.125]]))
    fixed = make_anchor(kind, torch.nn.Linear(1, 1), {}, temperature=1.0, max_staleness=4, interpolation_weight=0.3)  # type: ignore[arg-type]
    (at_hand,) = fixed.proximal([batch], trainer_version=9, reuse_policy=False)
    torch.testing.assert_close(at_hand.behavior_weight, torch.full((1, 4), 0.3))  # type: ignore[attr-defined]


def test_mutant_interpolations_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The weight given to the wrong side, or means taken of the wrong quantity."""
    original = Interpolated.resolve

    def turned(self: Interpolated, policy: Tensor) -> Tensor:
        return original(dataclasses.replace(self, behavior_weight=1 - self.behavior_weight), policy)

    def other_kind(self: Interpolated, policy: Tensor) -> Tensor:
        kind = "linear" if self.kind == "loglinear" else "loglinear"
        return original(dataclasses.replace(self, kind=kind), policy)

    for mutant in (turned, other_kind):
        monkeypatch.setattr(Interpolated, "resolve", mutant)
        for law in (test_loglinear_shares_the_total_ratio_out, test_linear_bounds_the_staleness_ratio):
            with pytest.raises(AssertionError):
                law()


def test_an_interpolation_that_makes_no_sense_is_refused() -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'loglinear'"):
        InterpolationAnchor("log-linear")  # type: ignore[arg-type]
    for weight in (0.0, 1.0, -0.5, math.nan):
        with pytest.raises(ConfigError, match="weight must be between 0 and 1"):
            InterpolationAnchor("linear", weight)


def test_an_interpolation_follows_the_policy_at_every_optimizer_step() -> None:
    """Two steps on one batch: the second step's proximal logprobs are of the second step's policy."""
    mu, a = torch.tensor([-1.0]), torch.tensor([0.5])
    made = Interpolated("loglinear", mu, a)
    assert made.resolve(torch.tensor([-2.0])).item() == pytest.approx(-1.5)
    assert made.resolve(torch.tensor([-3.0])).item() == pytest.approx(-2.0)


def test_ppo_on_the_behavior_anchor_is_ppo_on_the_total_ratio() -> None:
    case = instance(0)
    ratio = (logprobs(case.theta) - case.behavior).exp()
    expected = torch.minimum(ratio * case.advantages, ratio.clamp(0.85, 1.4) * case.advantages)
    loss, _ = terms_of(case, case.theta, case.behavior, CORRECTIONS[0], Ppo(0.15, 0.4))
    assert loss.item() == pytest.approx(-expected[case.mask].mean().item(), abs=1e-12)
