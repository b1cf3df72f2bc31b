"""Each correction and objective by hand, on tokens and rows of chosen ratios; bad values; and through the learner."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from gradient_worker import VERSION, Versions, ragged_trajectories, small_model
from hypothesis import given
from hypothesis import strategies as st
from tabular import CORRECTIONS, OBJECTIVES, name_of
from torch import Tensor

from agentgym.config import parse_config
from agentgym.errors import ConfigError, TrainingError
from agentgym_trainer.correction import CORRECTIONS as KINDS
from agentgym_trainer.correction import Corrected, Correction, TokenRatios, apply_correction
from agentgym_trainer.learner import Learner, make_accelerator
from agentgym_trainer.loss import decoupled_loss
from agentgym_trainer.objectives import Cispo, Gspo, M2po, Objective, Ppo, Topr, TruncatedReinforce
from agentgym_trainer.settings import TrainConfig

NONE = Correction("none")


def corrected(correction: Correction, r_d: list[list[float]], mask: list[list[bool]] | None = None) -> Corrected:
    ratios = torch.tensor(r_d, dtype=torch.float64)
    behavior = torch.full_like(ratios, -4.0)
    counted = torch.ones_like(ratios, dtype=torch.bool) if mask is None else torch.tensor(mask)
    return apply_correction(correction, TokenRatios.of(behavior + ratios.log(), behavior, behavior * 0 + 1, counted))


# ------------------------------------------------------------------------------------------------------- corrections


def test_icepop_keeps_between_its_bounds_and_its_bounds_are_two() -> None:
    found = corrected(Correction("icepop"), [[0.49, 0.51, 1.0, 4.9, 5.1]])
    assert found.mask_pass.tolist() == [[False, True, True, True, False]]
    assert found.weights.tolist() == [pytest.approx([0.49, 0.51, 1.0, 4.9, 5.1])]


def test_rows_go_by_their_product_or_their_geometric_mean() -> None:
    rows = [[1.5, 1.5, 1.5], [1.5, 1 / 1.5, 1.0], [0.995, 0.996, 0.997], [0.9, 0.9, 0.9]]
    assert corrected(Correction("sequence_mask"), rows).mask_pass[:, 0].tolist() == [False, True, True, True]
    assert corrected(Correction("geometric_mask"), rows).mask_pass[:, 0].tolist() == [False, True, True, False]
    strict = Correction("geometric_mask", 1.001, low=0.999)
    assert corrected(strict, rows).mask_pass[:, 0].tolist() == [False, True, False, False]
    kept = corrected(Correction("sequence_mask"), rows)
    assert kept.weights.tolist() == [pytest.approx(row) for row in rows]  # what is kept keeps each token's own r_d
    truncated = corrected(Correction("sequence_truncate", 2.0), rows)
    assert truncated.weights[:, 1].tolist() == pytest.approx([2.0, 1.0, 0.995 * 0.996 * 0.997, 0.729])
    assert truncated.truncated[:, 0].tolist() == [True, False, False, False]
    assert truncated.mask_pass.all()


def test_a_row_is_its_counted_tokens() -> None:
    row, mask = [[3.0, 0.9, 0.9]], [[False, True, True]]
    assert corrected(Correction("sequence_truncate"), row, mask).weights[0, 1].item() == pytest.approx(0.81)
    assert not corrected(Correction("veto", 0.5), [[0.1, 1.0, 1.0]], mask).vetoed.any()
    geometric = Correction("geometric_mask", 1.2, low=0.895)
    assert corrected(geometric, row, mask).mask_pass.all()  # 0.9, and not the root of 2.43, nor of 0.81 by three


def test_the_veto_drops_the_row_and_says_so() -> None:
    found = corrected(Correction("veto"), [[1.0, 0.9e-4, 1.0], [1.0, 1.1e-4, 1.0], [1e4, 1.0, 1.0]])
    assert found.vetoed[:, 0].tolist() == [True, False, False]
    assert found.mask_pass.equal(~found.vetoed)
    assert (found.weights == 1.0).all()  # it has no weight of its own


def test_the_binary_divergence_and_the_difference_by_hand() -> None:
    """mu = 0.5: to 0.6 the divergence is 0.0204, to 0.7 0.0872."""
    mu = torch.full((1, 4), 0.5, dtype=torch.float64).log()
    p = torch.tensor([[0.6, 0.4, 0.7, 0.3]], dtype=torch.float64).log()
    counted = torch.ones(1, 4, dtype=torch.bool)
    for advantage, passes in ((1.0, [True, True, False, True]), (-1.0, [True, True, True, False])):
        ratios = TokenRatios.of(p, mu, torch.full((1, 4), advantage), counted)
        difference = apply_correction(Correction("probability_difference_mask", 0.15), ratios)
        assert difference.mask_pass.tolist() == [passes]
        divergence = apply_correction(Correction("bernoulli_kl_mask"), ratios)
        assert divergence.mask_pass.tolist() == [[True, True, False, False]]
        assert divergence.weights.tolist() == [pytest.approx([1.2, 0.8, 1.4, 0.6])]
    tight = 0.5 * math.log(0.5 / 0.6) + 0.5 * math.log(0.5 / 0.4)
    for bound, passes in ((tight * 1.001, True), (tight * 0.999, False)):
        assert bool(apply_correction(Correction("bernoulli_kl_mask", bound), ratios).mask_pass[0, 0]) is passes


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_certain_token_has_a_divergence_that_is_a_number(dtype: torch.dtype) -> None:
    """Logprobs of 0, and of a rounding above it, on either side; and of nothing at all."""
    logprobs = torch.tensor([[0.0, 1e-7, -1e-8, -1e-3, -80.0]], dtype=dtype)
    counted = torch.ones_like(logprobs, dtype=torch.bool)
    for other in (logprobs, torch.zeros_like(logprobs)):
        for pair in ((logprobs, other), (other, logprobs)):
            found = apply_correction(Correction("bernoulli_kl_mask"), TokenRatios.of(*pair, logprobs, counted))
            assert found.mask_pass[:, :4].all()
    assert not found.mask_pass[0, 4]


def test_masks_multiply_and_one_weight_is_given() -> None:
    r_d = [[3.0, 1.2, 0.1], [1.0, 1.0, 1.0]]
    stack = (Correction("token_mask", 2.0), Correction("icepop", 2.5, low=0.05))
    assert corrected(stack, r_d).mask_pass[0].tolist() == [False, True, False]  # type: ignore[arg-type]
    both = (Correction("token_truncate", 1.1), Correction("token_mask", 2.0), Correction("veto", 0.2))
    found = corrected(both, r_d)  # type: ignore[arg-type]
    assert found.weights.tolist() == [pytest.approx([1.1, 1.1, 0.1]), [1.0] * 3]
    assert found.mask_pass.tolist() == [[False] * 3, [True] * 3]
    with pytest.raises(ConfigError, match="name one of them"):
        corrected((Correction("token_truncate"), Correction("sequence_truncate")), r_d)  # type: ignore[arg-type]


def test_what_a_mask_says_of_nobodys_rows_harms_nobody() -> None:
    nobody = [[False, False], [True, True]]
    for kind in KINDS:
        found = corrected(Correction(kind), [[1e-9, 1e9], [1.0, 1.0]], nobody)  # type: ignore[arg-type]
        assert found.weights.isfinite().all()
        assert found.mask_pass[1].all()


# -------------------------------------------------------------------------------------------------------- objectives


def coefficient(objective: Objective, ratio: float, advantage: float) -> tuple[float, Any]:
    """What stands before grad log pi of one token whose r_s and R are `ratio`, and its terms."""
    behavior = torch.tensor([[-3.0]], dtype=torch.float64)
    policy = (behavior + math.log(ratio)).requires_grad_()
    loss, terms = decoupled_loss(
        policy, behavior, behavior, torch.tensor([[advantage]]).double(), torch.tensor([[True]]),
        correction=NONE, denominator=1.0, row_denominator=1.0, objective=objective,
    )  # fmt: skip
    loss.backward()
    assert policy.grad is not None
    return -policy.grad.item(), terms


@pytest.mark.parametrize(
    ("objective", "ratio", "advantage", "expected"),
    [
        (Ppo(dual_clip=3.0), 2.9, -1.0, -2.9), (Ppo(dual_clip=3.0), 3.1, -1.0, 0.0), (Ppo(), 3.1, -1.0, -3.1),
        (Ppo(dual_clip=3.0), 1.2, 1.0, 1.2), (Ppo(dual_clip=3.0), 1.3, 1.0, 0.0), (Ppo(dual_clip=3.0), 0.7, -1.0, 0.0),
        (Gspo(), 1.0003, 1.0, 1.0003), (Gspo(), 1.0005, 1.0, 0.0), (Gspo(), 1.0005, -1.0, -1.0005),
        (Gspo(), 0.9998, -1.0, -0.9998), (Gspo(), 0.9996, -1.0, 0.0), (Gspo(), 0.9996, 1.0, 0.9996),
        (Cispo(), 9.0, 1.0, 5.0), (Cispo(), 9.0, -2.0, -10.0), (Cispo(), 0.01, 1.0, 0.01),
        (Cispo(0.6, 2.0), 0.1, 1.0, 0.6),
        (TruncatedReinforce(), 3.0, 1.0, 2.0), (TruncatedReinforce(), 0.1, -1.0, -0.1),
        (TruncatedReinforce(1.0), 3.0, -1.0, -1.0),
        (Topr(), 0.1, 1.0, 1.0), (Topr(), 9.0, 1.0, 1.0), (Topr(), 0.1, -1.0, -0.1), (Topr(), 9.0, -1.0, -1.0),
        (M2po(), 1.2, -1.0, -1.2), (M2po(), 1.23, 1.0, 0.0), (M2po(), 0.81, 1.0, 0.0), (M2po(1.0), 2.5, 1.0, 2.5),
    ],
)  # fmt: skip
def test_each_objective_by_hand(objective: Objective, ratio: float, advantage: float, expected: float) -> None:
    found, terms = coefficient(objective, ratio, advantage)
    assert found == pytest.approx(expected, abs=1e-12)
    assert bool(terms.active) is (expected != 0.0)
    if expected == 0.0:
        assert bool(terms.clip_high) is (ratio > 1) is not bool(terms.clip_low)


def test_what_is_limited_is_said_and_still_learned_from() -> None:
    for objective, ratio, advantage in ((Cispo(), 9.0, 1.0), (TruncatedReinforce(), 3.0, 1.0), (Topr(), 3.0, -1.0)):
        _, terms = coefficient(objective, ratio, advantage)
        assert bool(terms.limited)
        assert bool(terms.active)
    assert not coefficient(Topr(), 3.0, 1.0)[1].limited


def test_the_dual_clips_value() -> None:
    """max(min(r A, clip(r) A), c A) where A < 0."""
    for ratio in (0.5, 0.9, 1.5, 2.9, 3.5, 9.0):
        _, terms = coefficient(Ppo(dual_clip=3.0), ratio, -2.0)
        expected = max(min(-2.0 * ratio, -2.0 * min(max(ratio, 0.8), 1.28)), -6.0)
        assert -terms.objective.item() == pytest.approx(expected)


@given(st.lists(st.floats(0.0, 3.0), max_size=30), st.floats(0.001, 2.0))
def test_the_cut_is_the_least_that_makes_the_rest_small_enough(logs: list[float], bound: float) -> None:
    squares = torch.tensor(logs, dtype=torch.float64) ** 2
    cut = M2po(bound).cut_of(squares)
    kept = sorted(squares[squares < cut].tolist())
    assert not kept or sum(kept) / len(kept) < bound
    # By the letter: drop the largest until the mean of the rest is below the bound.
    left = sorted(squares.tolist())
    while left and sum(left) / len(left) >= bound:
        left.pop()
    ties = [value for value in left if value >= cut]  # as large as one that was dropped
    assert kept == left[: len(left) - len(ties)]


def test_m2po_drops_of_the_whole_call_and_not_of_a_row() -> None:
    behavior = torch.zeros(2, 2, dtype=torch.float64)
    policy = torch.tensor([[0.1, 0.1], [0.9, -0.2]], dtype=torch.float64).requires_grad_()
    _, terms = decoupled_loss(
        policy, behavior, behavior, torch.ones(2, 2), torch.ones(2, 2, dtype=torch.bool), correction=NONE,
        denominator=4.0, objective=M2po(),
    )  # fmt: skip
    assert terms.active.tolist() == [[True, True], [False, True]]
    assert terms.clip_high.tolist() == [[False, False], [True, False]]


def test_gspo_averages_rows_and_not_tokens() -> None:
    """Two rows on policy, of one token and of three: each row's gradient is as large."""
    policy = torch.full((3, 3), -1.0, dtype=torch.float64).requires_grad_()
    mask = torch.tensor([[True, False, False], [True, True, True], [False, False, False]])
    behavior = policy.detach()
    loss, terms = decoupled_loss(
        policy, behavior, behavior, torch.ones(3, 3), mask, correction=NONE, denominator=4.0, row_denominator=2.0,
        objective=Gspo(),
    )  # fmt: skip
    loss.backward()
    assert policy.grad is not None
    assert policy.grad.sum(-1).tolist() == pytest.approx([-0.5, -0.5, 0.0])
    assert loss.item() == pytest.approx(-1.0)
    assert terms.objective.sum().item() / 4 == pytest.approx(loss.item())  # as a run reports it


@pytest.mark.parametrize("rows", [None, 0.0, math.nan])
def test_gspo_without_the_number_of_rows_is_refused(rows: float | None) -> None:
    zeros = torch.zeros(1, 1)
    with pytest.raises(TrainingError, match="averages rows and needs their number"):
        decoupled_loss(
            zeros, zeros, zeros, zeros, zeros.bool(), correction=NONE, denominator=1.0, row_denominator=rows,
            objective=Gspo(),
        )  # fmt: skip


# --------------------------------------------------------------------------------------- bad values and the reference


@pytest.mark.parametrize("correction", CORRECTIONS, ids=name_of)
@pytest.mark.parametrize("objective", OBJECTIVES, ids=name_of)
def test_what_is_masked_or_broken_reaches_no_row_and_no_gradient(
    objective: Objective, correction: tuple[Correction, ...]
) -> None:
    """A token without a finite behavior logprob, and anything at a masked place, are as if they were not there."""
    generator = torch.Generator().manual_seed(0)
    clean = -torch.rand(3, 4, 6, generator=generator, dtype=torch.float64)
    mask = torch.rand(4, 6, generator=generator) < 0.7
    advantages = torch.randn(4, 1, generator=generator, dtype=torch.float64)

    def run(columns: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        policy = columns[0].clone().requires_grad_()
        loss, _ = decoupled_loss(
            policy, columns[1], columns[2], advantages, mask, correction=correction, objective=objective,
            denominator=9.0, row_denominator=4.0,
        )  # fmt: skip
        loss.backward()
        assert policy.grad is not None
        return loss.detach(), policy.grad

    bad = clean.clone()
    bad[:, ~mask] = torch.tensor([math.nan, math.inf, -math.inf]).double()[:, None]
    bad[2, 1, 2], bad[2, 2, 0] = math.nan, -math.inf
    wanted = mask.clone()
    wanted[1, 2] = wanted[2, 0] = False
    loss, gradient = run(bad, mask)
    expected_loss, expected = run(clean, wanted)
    torch.testing.assert_close((loss, gradient), (expected_loss, expected), atol=0.0, rtol=0.0)


def test_the_reference_by_hand() -> None:
    policy = torch.tensor([[-1.0, -2.0, -3.0]], dtype=torch.float64).requires_grad_()
    reference = torch.tensor([[-1.5, -2.0, math.nan]], dtype=torch.float64).requires_grad_()
    mask = torch.tensor([[True, True, False]])
    zeros = torch.zeros(1, 3)
    loss, terms = decoupled_loss(
        policy, policy.detach(), policy.detach(), zeros, mask, correction=NONE, denominator=4.0,
        reference_logprobs=reference, reference_coefficient=0.2,
    )  # fmt: skip
    loss.backward()
    k3 = math.exp(-0.5) - 1 + 0.5
    assert loss.item() == pytest.approx(0.2 * k3 / 4)
    assert terms.reference_k3 is not None
    assert terms.reference_k3.tolist() == [pytest.approx([k3, 0.0, 0.0])]
    assert policy.grad is not None
    assert policy.grad.tolist() == [pytest.approx([0.2 * (1 - math.exp(-0.5)) / 4, 0.0, 0.0])]
    assert reference.grad is None


# -------------------------------------------------------------------------------------------------------- the learner


LEARNERS: dict[str, dict[str, Any]] = {
    "ppo": {"trainer": {"anchor": "snapshot"}},
    "gspo": {"trainer": {"anchor": "ewma"}, "loss": {"objective": "gspo", "correction": "sequence_truncate"}},
    "cispo": {"trainer": {"anchor": "loglinear"}, "loss": {"objective": "cispo", "veto": 0.4}},
    "ppo_dual_clip": {"trainer": {"anchor": "linear"}, "loss": {"objective": "ppo_dual_clip"}},
    "topr": {"trainer": {"anchor": "behavior"}, "loss": {"objective": "topr"}},
    "m2po": {"trainer": {"anchor": "behavior"}, "loss": {"objective": "m2po", "m2po_max_second_moment": 0.5}},
}


def made(sections: dict[str, Any]) -> Learner:
    trainer = {"learning_rate": 1e-2, "on_discrepancy": "ignore", "micro_batch_tokens": 60} | sections["trainer"]
    config = parse_config(TrainConfig, {"env": {"id": "maze"}, **sections, "trainer": trainer})
    model = small_model()
    return Learner(make_accelerator(config), model, config, Versions(model))


@pytest.mark.parametrize("name", LEARNERS)
def test_a_step_of_training(name: str) -> None:
    learner = made(LEARNERS[name])
    before = {name: value.clone() for name, value in learner.module.state_dict().items()}
    figures = learner.learn(ragged_trajectories(), VERSION)
    assert all(math.isfinite(value) for value in figures.values())
    assert figures["gradient_norm"] > 0
    assert any(not torch.equal(before[name], value) for name, value in learner.module.state_dict().items())
    stopped = 1.0 - figures["policy/active_fraction"]
    overlap = figures["policy/overlap_fraction"]
    masked, clipped = 1.0 - figures["policy/mask_pass_fraction"], 1.0 - figures["policy/clip_pass_fraction"]
    assert stopped == pytest.approx(masked + clipped - overlap)
    if name == "m2po":
        assert figures["policy/clip_high_fraction"] + figures["policy/clip_low_fraction"] == pytest.approx(stopped)
        assert 0.0 < stopped < 1.0
    if name == "cispo":
        assert figures["policy/clip_pass_fraction"] == 1.0
        assert figures["policy/num_vetoed"] > 0


def test_the_reference_is_the_initial_weights_on_a_resumed_run_too() -> None:
    sections = {"trainer": {"anchor": "resident"}, "loss": {"reference_coefficient": 0.1}}
    first = made(sections)
    trajectories = ragged_trajectories()
    assert first.learn(trajectories, VERSION)["policy/reference_k3"] == pytest.approx(0.0, abs=1e-9)
    resumed = made(sections)
    resumed.module.load_state_dict(first.module.state_dict())  # as a checkpoint is: after the learner was made
    divergence = resumed.learn(trajectories, VERSION)["policy/reference_k3"]
    assert divergence == first.learn(trajectories, VERSION)["policy/reference_k3"] > 1e-5
