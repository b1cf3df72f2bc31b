"""The edges of the decoupled loss: bounds and their directions, bad values, masks, the entropy bonus."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from agentgym.errors import ConfigError, TrainingError, UnknownNameError
from agentgym_trainer.correction import CORRECTIONS, Correction, TokenRatios, apply_correction, log_ratio
from agentgym_trainer.loss import TokenTerms, decoupled_loss
from agentgym_trainer.objectives import Ppo

NONE = Correction("none")
LOGPROBS = st.floats(-12.0, 0.0)


def token(
    r_d: float, r_s: float, advantage: float, correction: Correction, **bounds: float
) -> tuple[float, TokenTerms]:
    """One token with the given ratios: its gradient coefficient and its terms."""
    behavior = torch.tensor([-3.0], dtype=torch.float64)
    proximal = behavior + math.log(r_d)
    policy = (proximal + math.log(r_s)).requires_grad_()
    mask = torch.tensor([True])
    loss, terms = decoupled_loss(
        policy, proximal, behavior, torch.tensor([advantage]).double(), mask,
        correction=correction, denominator=1.0, objective=Ppo(**bounds),
    )  # fmt: skip
    loss.backward()
    assert policy.grad is not None
    return policy.grad.item(), terms


@pytest.mark.parametrize(
    ("r_s", "advantage", "passes"),
    [
        (1.27, 1.0, True),  # within both
        (1.29, 1.0, False),  # the raise is already made: only 1 + clip_high stops a positive advantage
        (1.29, -1.0, True),  # the pull back is never clipped
        (0.81, -1.0, True),
        (0.79, -1.0, False),  # only 1 - clip_low stops a negative one
        (0.79, 1.0, True),
        (0.73, -1.0, False),
        (0.73, 1.0, True),  # 1 - clip_high is no bound of anything
        (1.21, 1.0, True),  # nor is 1 + clip_low
    ],
)
def test_the_clip_is_signed_by_the_advantage(r_s: float, advantage: float, passes: bool) -> None:
    coefficient, terms = token(1.0, r_s, advantage, NONE, clip_low=0.2, clip_high=0.28)
    assert coefficient == pytest.approx(-r_s * advantage if passes else 0.0, abs=1e-12)
    assert bool(terms.active) is passes
    assert bool(terms.clip_high) is (not passes and advantage > 0)
    assert bool(terms.clip_low) is (not passes and advantage < 0)


@pytest.mark.parametrize(("r_d", "passes"), [(1.49, True), (1.51, False), (0.67, True), (0.66, False), (0.51, False)])
def test_the_mask_is_symmetric_in_the_logarithm(r_d: float, passes: bool) -> None:
    coefficient, terms = token(r_d, 1.1, 1.0, Correction("token_mask", 1.5))
    assert coefficient == pytest.approx(-r_d * 1.1 if passes else 0.0, abs=1e-12)
    assert bool(terms.mask_pass) is passes
    assert bool(terms.clip_pass)


@pytest.mark.parametrize(("r_d", "weight"), [(0.01, 0.01), (1.4, 1.4), (1.6, 1.5), (400.0, 1.5)])
def test_truncation_bounds_from_above_only(r_d: float, weight: float) -> None:
    coefficient, terms = token(r_d, 1.1, -2.0, Correction("token_truncate", 1.5))
    assert coefficient == pytest.approx(weight * 1.1 * 2.0, abs=1e-12)
    assert bool(terms.active)


def test_the_value_of_a_clipped_token_is_the_minimum() -> None:
    for r_s in (0.5, 0.9, 1.0, 1.2, 1.6):
        for advantage in (-1.5, 0.0, 2.0):
            _, terms = token(1.2, r_s, advantage, Correction("token_truncate", 3.0), clip_low=0.1, clip_high=0.3)
            expected = -1.2 * min(r_s * advantage, min(max(r_s, 0.9), 1.3) * advantage)
            assert terms.objective.item() == pytest.approx(expected, abs=1e-12)


@given(
    st.lists(st.tuples(LOGPROBS, LOGPROBS, LOGPROBS, st.floats(-3, 3), st.booleans()), min_size=1, max_size=12),
    st.sampled_from([NONE, Correction("token_mask", 1.7), Correction("token_truncate", 1.7)]),
)
def test_tokens_do_not_know_each_other(
    tokens: list[tuple[float, float, float, float, bool]], correction: Correction
) -> None:
    columns = [torch.tensor(column, dtype=torch.float64) for column in list(zip(*tokens))[:4]]
    mask = torch.tensor([row[4] for row in tokens])

    def total(selected: Tensor) -> Tensor:
        return decoupled_loss(*columns, mask & selected, correction=correction, denominator=3.0)[0]

    everything = torch.ones_like(mask)
    alone = sum(total(torch.arange(len(tokens)) == i) for i in range(len(tokens)))
    torch.testing.assert_close(total(everything), torch.as_tensor(alone, dtype=torch.float64), atol=1e-9, rtol=1e-12)


@given(st.lists(st.sampled_from([math.nan, math.inf, -math.inf, -45.0, -1.0, 0.0]), min_size=4, max_size=4))
def test_what_is_masked_or_broken_never_reaches_the_gradient(values: list[float]) -> None:
    """Anything may stand at a masked position, in any column; a broken behavior logprob masks its own token."""
    bad = torch.tensor(values)
    mask = torch.tensor([True, False, True, False])
    policy = torch.where(mask, torch.tensor(-1.0), bad).requires_grad_()
    proximal = torch.where(mask, torch.tensor(-1.0), bad)
    behavior = bad
    loss, terms = decoupled_loss(
        policy, proximal, behavior, torch.ones(4), mask, correction=Correction("token_truncate"), denominator=2.0
    )
    loss.backward()
    assert policy.grad is not None
    assert loss.isfinite()
    assert policy.grad.isfinite().all()
    assert not policy.grad[~mask | ~behavior.isfinite()].any()
    assert terms.counted.tolist() == (mask & behavior.isfinite()).tolist()
    assert terms.dropped.tolist() == (mask & ~behavior.isfinite()).tolist()


def test_log_ratios_are_clamped_before_exp() -> None:
    near, far = torch.tensor([-1.0, -1.0, 0.0]), torch.tensor([-500.0, -1.0, -30.0])
    assert log_ratio(near, far).tolist() == [20.0, 0.0, 20.0]
    assert log_ratio(far, near).tolist() == [-20.0, 0.0, -20.0]
    assert log_ratio(near.bfloat16(), far.bfloat16()).dtype == torch.float32
    assert log_ratio(near.double(), far.double()).dtype == torch.float64


def test_the_denominator_is_the_steps_and_not_what_was_kept() -> None:
    policy = torch.zeros(4, requires_grad=True)
    proximal, behavior = torch.zeros(4), torch.tensor([0.0, 0.0, -3.0, 0.0])  # the third is masked
    mask = torch.tensor([True, True, True, False])
    loss, terms = decoupled_loss(
        policy, proximal, behavior, torch.ones(4), mask, correction=Correction("token_mask"), denominator=10.0
    )
    loss.backward()
    assert policy.grad is not None
    assert policy.grad.tolist() == pytest.approx([-0.1, -0.1, 0.0, 0.0])
    assert int(terms.counted.sum()) == 3


def test_the_entropy_bonus_lowers_the_loss_over_counted_tokens_only() -> None:
    entropy = torch.tensor([1.0, 2.0, 4.0, math.nan], requires_grad=True)
    behavior = torch.tensor([0.0, -math.inf, 0.0, 0.0])
    mask = torch.tensor([True, True, True, False])
    zeros = torch.zeros(4)
    options = {"correction": NONE, "denominator": 10.0, "entropy": entropy}
    loss, terms = decoupled_loss(zeros, zeros, behavior, zeros, mask, entropy_coefficient=0.5, **options)
    loss.backward()
    assert loss.item() == pytest.approx(-0.5 * 5.0 / 10.0)
    assert entropy.grad is not None
    assert entropy.grad.tolist() == pytest.approx([-0.05, 0.0, -0.05, 0.0])
    assert terms.entropy is not None
    assert not terms.entropy.requires_grad
    assert decoupled_loss(zeros, zeros, behavior, zeros, mask, **options)[0].item() == 0.0


@pytest.mark.parametrize("denominator", [0.0, -1.0, math.nan])
def test_a_step_without_a_loss_token_is_refused(denominator: float) -> None:
    zeros = torch.zeros(1)
    with pytest.raises(TrainingError, match="no loss token"):
        decoupled_loss(zeros, zeros, zeros, zeros, zeros.bool(), correction=NONE, denominator=denominator)


def test_corrections_that_make_no_sense_are_refused() -> None:
    with pytest.raises(UnknownNameError, match="unknown correction 'token_msak'; did you mean 'token_mask'"):
        Correction("token_msak")  # type: ignore[arg-type]
    for bound in (1.0, 0.5, math.inf, math.nan):
        with pytest.raises(ConfigError, match="token_mask must be finite and > 1"):
            Correction("token_mask", bound)
    for bound in (0.0, -1.0, math.inf):
        with pytest.raises(ConfigError, match="token_truncate must be finite and > 0"):
            Correction("token_truncate", bound)


def test_a_correction_has_no_gradient_to_give() -> None:
    proximal = torch.zeros(3, requires_grad=True)
    zeros = torch.zeros(3)
    for kind in CORRECTIONS:
        ratios = TokenRatios(proximal - zeros, proximal, zeros, zeros, torch.ones(3, dtype=torch.bool))
        corrected = apply_correction(Correction(kind), ratios)  # type: ignore[arg-type]
        assert not corrected.weights.requires_grad
        assert not corrected.mask_pass.requires_grad
