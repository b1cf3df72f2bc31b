"""Law B: on a tabular autoregressive softmax whose trajectories can all be enumerated, autograd equals the closed form
equals central differences, for every anchor, correction and objective; and mutants of the loss do not pass."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from types import ModuleType

import pytest
import tabular
import torch
from tabular import (
    ANCHORS,
    CORRECTIONS,
    OBJECTIVES,
    Instance,
    autograd,
    closed_form,
    combinations,
    instance,
    logprobs,
    name_of,
    settled,
    terms_of,
)  # fmt: skip
from torch import Tensor

from agentgym_trainer import correction as correction_module
from agentgym_trainer import loss as loss_module
from agentgym_trainer import objectives as objectives_module
from agentgym_trainer.anchors.interpolation import Interpolated
from agentgym_trainer.correction import Corrected, Correction, TokenRatios, apply_correction, log_ratio, over_row
from agentgym_trainer.objectives import Gspo, M2po, Objective, Ppo

ROOMS = (loss_module, correction_module, objectives_module)
PPO, GSPO = OBJECTIVES[0], OBJECTIVES[2]
CORRECTION_OF = {correction[0].kind: correction for correction in reversed(CORRECTIONS)}


class StopGradients:
    """sg[.] as a constant of the point: keeps what it was given there, and gives that again at every other point."""

    def __init__(self) -> None:
        self._kept: list[Tensor] = []
        self._next: int | None = None  # while they are given again

    def __call__(self, x: Tensor) -> Tensor:
        if self._next is None:
            self._kept.append(x.detach())
            return x.detach()
        self._next += 1
        return self._kept[self._next - 1].expand_as(x)

    def give_again(self) -> None:
        self._next = 0


def central_differences(case: Instance, anchor: str, correction: Sequence[Correction], objective: Objective) -> Tensor:
    """Of the loss, with every stop-gradient held at its value at theta; all directions at once."""
    h = 1e-6
    constants, patch = StopGradients(), pytest.MonkeyPatch()
    steps = h * torch.eye(case.theta.numel(), dtype=torch.float64).view(-1, *case.theta.shape)
    around = torch.cat([case.theta + steps, case.theta - steps])
    with patch.context() as context:
        for room in ROOMS:
            context.setattr(room, "stop_gradient", constants)
        terms_of(case, case.theta, case.proximal(anchor, logprobs(case.theta)), correction, objective)
        constants.give_again()
        _, terms = terms_of(case, around, case.proximal(anchor, logprobs(around)), correction, objective)
    above, below = (terms.objective.sum((-1, -2)) / case.mask.sum()).chunk(2)
    return ((above - below) / (2 * h)).view_as(case.theta)


def check_law_b(case: Instance, anchor: str, correction: Sequence[Correction], objective: Objective) -> None:
    ours = autograd(case, lambda policy: case.proximal(anchor, policy), correction, objective)
    proximal = case.proximal(anchor, logprobs(case.theta))
    torch.testing.assert_close(ours, closed_form(case, proximal, correction, objective), atol=1e-10, rtol=0.0)
    fixed = settled(objective, case)
    torch.testing.assert_close(ours, central_differences(case, anchor, correction, fixed), atol=1e-8, rtol=0.0)


def check_seeds(anchor: str, correction: Sequence[Correction], objective: Objective) -> None:
    for seed in (0, 1, 2):
        check_law_b(instance(seed), anchor, correction, objective)


def check_constants(case: Instance, correction: Sequence[Correction], objective: Objective) -> None:
    """An anchor that depends on the policy being updated and forgets to say that it is a constant carries no gradient,
    nor does a weight made from it. Half way and not the policy itself, because W r_s = R there whatever the anchor is:
    only a clipped token, or a weight other than r_d, tells a constant from a function."""

    def half_way(policy: Tensor) -> Tensor:
        return (case.behavior + policy) / 2

    ours = autograd(case, half_way, correction, objective)
    expected = closed_form(case, half_way(logprobs(case.theta)), correction, objective)
    torch.testing.assert_close(ours, expected, atol=1e-10, rtol=0.0)


@pytest.mark.parametrize(("anchor", "correction", "objective"), combinations(), ids=name_of)
def test_autograd_is_the_closed_form_is_central_differences(
    anchor: str, correction: tuple[Correction, ...], objective: Objective
) -> None:
    check_seeds(anchor, correction, objective)


@pytest.mark.parametrize("correction", CORRECTIONS, ids=name_of)
@pytest.mark.parametrize("objective", OBJECTIVES, ids=name_of)
def test_nothing_but_the_policy_logprobs_carries_a_gradient(
    correction: tuple[Correction, ...], objective: Objective
) -> None:
    check_constants(instance(0), correction, objective)


@pytest.mark.parametrize("kind", ["linear", "loglinear"])
def test_an_interpolation_gives_a_constant(kind: str) -> None:
    case = instance(0)
    policy = logprobs(case.theta).requires_grad_()
    assert not Interpolated(kind, case.behavior, case.behavior_weight).resolve(policy).requires_grad  # type: ignore[arg-type]


def test_gspo_is_the_gradient_of_the_rows_themselves() -> None:
    """The published objective, of ratios of rows and without any stop-gradient, has the gradient of ours."""
    for case in (instance(0), instance(1)):
        old = case.fixed["snapshot"]
        theta = case.theta.clone().requires_grad_()
        log_s = tabular.by_row(logprobs(theta) - old, case.mask, mean=True)[:, 0]
        s, a = log_s.exp(), case.advantages[:, 0]
        rows = torch.minimum(s * a, s.clamp(0.96, 1.09) * a)[case.mask.any(-1)]
        (-rows.mean()).backward()
        ours = autograd(case, lambda _, old=old: old, CORRECTIONS[0], Gspo(0.04, 0.09))
        torch.testing.assert_close(ours, theta.grad, atol=1e-12, rtol=0.0)


@pytest.mark.parametrize("correction", CORRECTIONS[1:], ids=name_of)
def test_the_instance_crosses_every_bound_of_the_corrections(correction: tuple[Correction, ...]) -> None:
    case = instance(0)
    _, terms = terms_of(case, case.theta, case.fixed["snapshot"], correction, PPO)
    if any(part.kind.endswith("truncate") for part in correction):
        assert 2 <= (terms.limited & terms.counted).sum() < terms.counted.sum() - 1
    if any(part.kind.endswith("mask") or part.kind in ("icepop", "veto") for part in correction):
        assert 2 <= (terms.mask_pass & terms.counted).sum() < terms.counted.sum() - 1
    if correction[-1].kind == "veto":
        assert 2 <= (terms.vetoed & terms.counted).sum() < terms.counted.sum() - 1
        assert not (terms.vetoed & terms.mask_pass).any()
    for branch in (terms.active, ~terms.clip_pass & terms.mask_pass):
        assert (branch & terms.counted).any()


@pytest.mark.parametrize("objective", OBJECTIVES, ids=name_of)
def test_the_instance_crosses_every_bound_of_the_objectives(objective: Objective) -> None:
    case = instance(0)
    anchor = case.behavior if objective.on_total_ratio else case.fixed["snapshot"]
    _, terms = terms_of(case, case.theta, anchor, CORRECTIONS[0], objective)
    stopping = isinstance(objective, Ppo | Gspo | M2po)
    for branch in (terms.clip_high, terms.clip_low) if stopping else (terms.limited,):
        assert 2 <= (branch & terms.counted).sum() < terms.counted.sum() - 1
    if not stopping:
        assert terms.active.equal(terms.counted)


# ------------------------------------------------------------------------------- mutants: the checks must refuse them


def _identity(x: Tensor) -> Tensor:
    return x


@pytest.mark.parametrize("correction", CORRECTIONS, ids=name_of)
@pytest.mark.parametrize("rooms", [ROOMS[:1], ROOMS[:2]], ids=["anchor", "anchor, weight"])
def test_mutants_without_the_stop_gradient_of_the_anchor_are_refused(
    monkeypatch: pytest.MonkeyPatch, rooms: tuple[ModuleType, ...], correction: tuple[Correction, ...]
) -> None:
    for room in rooms:
        monkeypatch.setattr(room, "stop_gradient", _identity)
    with pytest.raises(AssertionError):
        check_constants(instance(0), correction, Ppo(0.05, 0.1))  # narrow: some tokens that a mask keeps are clipped


@pytest.mark.parametrize("kind", ["token_truncate", "sequence_truncate", "token_mask", "geometric_mask"])
def test_mutants_that_differentiate_the_weight_alone_are_refused(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    def leaking(correction: Sequence[Correction], ratios: TokenRatios) -> Corrected:
        monkeypatch.setattr(correction_module, "stop_gradient", _identity)
        assert leaks is not None
        return apply_correction(correction, TokenRatios.of(leaks, ratios.behavior_logprobs, ratios.advantages, mask))

    case = instance(0)
    mask, leaks = case.mask, None
    monkeypatch.setattr(loss_module, "apply_correction", leaking)
    theta = case.theta.clone().requires_grad_()
    leaks = torch.where(mask, (case.behavior + logprobs(theta)) / 2, 0.0)
    terms_of(case, theta, leaks.detach(), CORRECTION_OF[kind], PPO)[0].backward()
    expected = closed_form(case, (case.behavior + logprobs(case.theta)) / 2, CORRECTION_OF[kind], PPO)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(theta.grad, expected, atol=1e-10, rtol=0.0)


@pytest.mark.parametrize("objective", [o for o in OBJECTIVES if not isinstance(o, Ppo | M2po)], ids=name_of)
def test_mutants_without_the_stop_gradient_of_the_objective_are_refused(
    monkeypatch: pytest.MonkeyPatch, objective: Objective
) -> None:
    """PPO and M2PO have no weight to forget it on; GSPO's says where in a row a gradient goes, so a mask must tell."""
    monkeypatch.setattr(objectives_module, "stop_gradient", _identity)
    anchor, kind = ("snapshot", "token_mask") if isinstance(objective, Gspo) else ("behavior", "none")
    with pytest.raises(AssertionError):
        check_law_b(instance(0), anchor, CORRECTION_OF[kind], objective)


def _mask_without_lower_bound(correction: Sequence[Correction], ratios: TokenRatios) -> Corrected:
    plain = apply_correction(correction, ratios)
    return dataclasses.replace(plain, mask_pass=ratios.log_discrepancy.exp() <= correction[0].bound)


def _truncate_from_below(correction: Sequence[Correction], ratios: TokenRatios) -> Corrected:
    plain = apply_correction(correction, ratios)
    return dataclasses.replace(plain, weights=ratios.log_discrepancy.exp().clamp(min=correction[0].bound))


def _weight_one(correction: Sequence[Correction], ratios: TokenRatios) -> Corrected:
    plain = apply_correction(correction, ratios)
    return dataclasses.replace(plain, weights=torch.ones_like(plain.weights))


def _blind_to_the_sign(correction: Sequence[Correction], ratios: TokenRatios) -> Corrected:
    return apply_correction(correction, dataclasses.replace(ratios, advantages=ratios.advantages.abs()))


def _the_other_divergence(correction: Sequence[Correction], ratios: TokenRatios) -> Corrected:
    other = dataclasses.replace(
        ratios, proximal_logprobs=ratios.behavior_logprobs, behavior_logprobs=ratios.proximal_logprobs,
        log_discrepancy=-ratios.log_discrepancy,
    )  # fmt: skip
    return dataclasses.replace(
        apply_correction(correction, ratios), mask_pass=apply_correction(correction, other).mask_pass
    )


@pytest.mark.parametrize(
    ("mutant", "kind"),
    [
        (_mask_without_lower_bound, "token_mask"), (_mask_without_lower_bound, "icepop"),
        (_truncate_from_below, "token_truncate"), (_weight_one, "geometric_mask"), (_weight_one, "sequence_mask"),
        (_blind_to_the_sign, "probability_difference_mask"), (_the_other_divergence, "bernoulli_kl_mask"),
    ],
)  # fmt: skip
def test_mutant_corrections_are_refused(
    monkeypatch: pytest.MonkeyPatch, mutant: Callable[..., Corrected], kind: str
) -> None:
    monkeypatch.setattr(loss_module, "apply_correction", mutant)
    with pytest.raises(AssertionError):
        check_seeds("snapshot", CORRECTION_OF[kind], PPO)


def _sum_for_mean(values: Tensor, counted: Tensor, *, mean: bool) -> Tensor:
    return over_row(values, counted, mean=not mean)


def _over_padding(values: Tensor, counted: Tensor, *, mean: bool) -> Tensor:
    return over_row(torch.where(counted, values, 0.0), torch.ones_like(counted), mean=mean)


@pytest.mark.parametrize("mutant", [_sum_for_mean, _over_padding])
@pytest.mark.parametrize(
    ("room", "kind", "objective"),
    [(correction_module, "geometric_mask", PPO), (objectives_module, "none", GSPO)],
    ids=["geometric_mask", "gspo"],
)
def test_mutant_rows_are_refused(
    monkeypatch: pytest.MonkeyPatch, room: ModuleType, kind: str, objective: Objective, mutant: Callable[..., Tensor]
) -> None:
    monkeypatch.setattr(room, "over_row", mutant)
    with pytest.raises(AssertionError):
        check_seeds("snapshot", CORRECTION_OF[kind], objective)


@pytest.mark.parametrize("objective", OBJECTIVES, ids=name_of)
def test_mutant_with_swapped_ratios_is_refused(monkeypatch: pytest.MonkeyPatch, objective: Objective) -> None:
    monkeypatch.setattr(objectives_module, "log_ratio", lambda above, below: log_ratio(below, above))
    with pytest.raises(AssertionError):
        check_law_b(instance(0), "behavior", CORRECTIONS[0], objective)


@pytest.mark.parametrize("objective", OBJECTIVES[:3], ids=name_of)
def test_mutant_with_swapped_clip_bounds_is_refused(monkeypatch: pytest.MonkeyPatch, objective: Objective) -> None:
    original = objectives_module._clipped

    def swapped(ratio: Tensor, advantages: Tensor, low: float, high: float, dual: float | None) -> object:
        return original(ratio, advantages, high, low, dual)

    monkeypatch.setattr(objectives_module, "_clipped", swapped)
    with pytest.raises(AssertionError):
        check_law_b(instance(0), "snapshot", CORRECTIONS[0], objective)


@pytest.mark.parametrize("anchor", ANCHORS)
def test_under_the_token_mask_every_active_token_has_coefficient_r_times_a(anchor: str) -> None:
    case = instance(1)
    policy = logprobs(case.theta).requires_grad_()
    loss, terms = loss_module.decoupled_loss(
        policy, case.proximal(anchor, policy), case.behavior, case.advantages, case.mask,
        correction=Correction("token_mask", 1.25), denominator=1.0, objective=Ppo(0.15, 0.4),
    )  # fmt: skip
    loss.backward()
    assert policy.grad is not None
    expected = torch.where(terms.active, -(policy.detach() - case.behavior).exp() * case.advantages, 0.0)
    torch.testing.assert_close(policy.grad, expected, atol=1e-10, rtol=0.0)
    assert 0 < terms.active.sum() < case.mask.sum()
