"""Law C: the importance weight of a whole row, made of each token's own version and of the engine's noise, gives the
policy gradient without bias; one version label a trajectory, an engine taken at its word, or no weight at all do not.

By brute force: every trajectory of a tabular policy, weighted by the probability with which it is really sampled, goes
through the loss of training. Token-level objectives are biased by design, and nothing is asked of them here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from tabular import NUM_PREFIXES, PREFIXES, TRAJECTORIES, T, V, logprobs
from torch import Tensor

from agentgym_trainer import correction as correction_module
from agentgym_trainer.correction import Correction, over_row
from agentgym_trainer.loss import decoupled_loss

UNBOUNDED = Correction("sequence_truncate", 1e8)
NUM_VERSIONS = 4


@dataclass(frozen=True)
class World:
    """Published policies, an engine that samples each of them a little wrongly, and the policy in training.

    New weights arrive while a trajectory is under way: which version samples a token depends on what came before it
    (slow tools, say), never on the token.
    """

    theta: Tensor  # [prefixes, V]
    published: Tensor  # [versions, prefixes, V]
    served: Tensor  # [versions, prefixes, V]: what the engine makes of them
    versions: Tensor  # [V^T, T]
    rewards: Tensor  # [V^T, 1]

    def under(self, tables: Tensor, versions: Tensor) -> Tensor:
        """[V^T, T]: each token's logprob under its version of the tables."""
        return torch.stack([logprobs(table) for table in tables]).gather(0, versions[None])[0]

    @property
    def sampled(self) -> Tensor:
        """log mu, as the engine recorded it."""
        return self.under(self.served, self.versions)


def world(seed: int) -> World:
    generator = torch.Generator().manual_seed(seed)

    def noise(scale: float, *shape: int) -> Tensor:
        return scale * torch.randn(*shape, generator=generator, dtype=torch.float64)

    drift = noise(0.35, NUM_VERSIONS, NUM_PREFIXES, V).cumsum(0)
    published = noise(0.6, NUM_PREFIXES, V) + drift
    arrivals = torch.randint(0, 3, (NUM_PREFIXES,), generator=generator)  # publications just before a token
    versions = arrivals[PREFIXES].cumsum(-1).clamp(max=NUM_VERSIONS - 1)
    return World(
        theta=published[-1] + noise(0.2, NUM_PREFIXES, V),
        published=published,
        served=published + noise(0.15, NUM_VERSIONS, NUM_PREFIXES, V),
        versions=versions,
        rewards=noise(1.0, V**T, 1) + (TRAJECTORIES.sum(-1, keepdim=True) == 4),
    )


def true_gradient(here: World) -> Tensor:
    """Of the expected reward under the policy in training, downhill."""
    theta = here.theta.clone().requires_grad_()
    (-(logprobs(theta).sum(-1, keepdim=True).exp() * here.rewards).sum()).backward()
    assert theta.grad is not None
    return theta.grad


def expected_gradient(here: World, behavior: Tensor, correction: Correction) -> Tensor:
    """What training computes on average over what the engine really samples, from the behavior logprobs it is given.
    The anchor is the policy itself, so that r_d is the total ratio and the row's weight the product of all."""
    probability = here.sampled.sum(-1, keepdim=True).exp()
    theta = here.theta.clone().requires_grad_()
    policy = logprobs(theta)
    loss, _ = decoupled_loss(
        policy, policy.detach(), behavior, here.rewards * probability, torch.ones_like(policy, dtype=torch.bool),
        correction=correction, denominator=1.0,
    )  # fmt: skip
    loss.backward()
    assert theta.grad is not None
    return theta.grad


def bias(here: World, behavior: Tensor, correction: Correction = UNBOUNDED) -> float:
    truth = true_gradient(here)
    return ((expected_gradient(here, behavior, correction) - truth).norm() / truth.norm()).item()


def check_unbiased(seed: int) -> None:
    here = world(seed)
    assert bias(here, here.sampled) < 1e-12


def test_the_instance_is_a_distribution_with_mixed_versions() -> None:
    here = world(0)
    assert here.sampled.sum(-1).exp().sum().item() == pytest.approx(1.0, abs=1e-12)
    spans = here.versions.amax(-1) - here.versions.amin(-1)
    assert (spans >= 1).double().mean() > 0.5
    assert (here.versions.diff(dim=-1) >= 0).all()


@pytest.mark.parametrize("seed", range(4))
def test_rows_weighted_by_each_tokens_own_version_are_unbiased(seed: int) -> None:
    check_unbiased(seed)


@pytest.mark.parametrize("seed", range(4))
def test_the_wrong_variants_are_visibly_biased(seed: int) -> None:
    here = world(seed)
    last = here.versions[:, -1:].expand_as(here.versions)
    first = here.versions[:, :1].expand_as(here.versions)
    assert bias(here, here.under(here.served, last)) > 0.1  # one label a trajectory: the version that ended it
    assert bias(here, here.under(here.served, first)) > 0.1  # or began it
    assert bias(here, here.under(here.published, here.versions)) > 0.05  # the engine taken at its word: r_d ignored
    assert bias(here, here.sampled, Correction("none")) > 0.2


def test_exact_old_logprobs_take_the_weight_apart_and_nothing_more() -> None:
    """prod r_d * prod r_s, with old logprobs of each token's own version, is the row's weight; with one label it is not
    made of the same two factors."""
    here = world(0)
    counted = torch.ones_like(here.versions, dtype=torch.bool)
    policy, old = logprobs(here.theta), here.under(here.published, here.versions)
    discrepancy = over_row(old - here.sampled, counted, mean=False)
    staleness = over_row(policy - old, counted, mean=False)
    torch.testing.assert_close(discrepancy + staleness, over_row(policy - here.sampled, counted, mean=False))
    labelled = here.under(here.published, here.versions[:, -1:].expand_as(here.versions))
    assert (labelled - old).abs().max() > 0.1


def _mean_of_logs(values: Tensor, counted: Tensor, *, mean: bool) -> Tensor:
    return over_row(values, counted, mean=True)


def _without_the_last_token(values: Tensor, counted: Tensor, *, mean: bool) -> Tensor:
    return over_row(values[..., :-1], counted[..., :-1], mean=mean)


@pytest.mark.parametrize("mutant", [_mean_of_logs, _without_the_last_token])
def test_mutants_of_the_rows_weight_are_biased(monkeypatch: pytest.MonkeyPatch, mutant: Callable[..., Tensor]) -> None:
    monkeypatch.setattr(correction_module, "over_row", mutant)
    with pytest.raises(AssertionError):
        check_unbiased(0)
