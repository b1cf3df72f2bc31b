"""The decoupled objective against vectors that were computed elsewhere, in float64 to 1e-9."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from agentgym.trajectory import TokenSequence
from agentgym_trainer.anchors.ewma import EwmaAnchor
from agentgym_trainer.anchors.interpolation import Interpolated
from agentgym_trainer.batch import MicroBatch, count_loss_tokens
from agentgym_trainer.correction import Correction
from agentgym_trainer.loss import TokenTerms, decoupled_loss
from agentgym_trainer.metrics import StepMetrics
from agentgym_trainer.objectives import Cispo, Gspo, Objective, Ppo, TruncatedReinforce

_NAME = "vectors/decoupled_objective.json"
_TESTS = Path(__file__).parents[1]
# The repository's own copy, and the original where the checkout stands beside it.
_PATHS = [path for path in (_TESTS / _NAME, _TESTS.parents[1] / "shared" / _NAME) if path.exists()]
TOLERANCE = {"abs": 1e-9, "rel": 0.0}


@pytest.fixture(params=_PATHS, ids=["own", "shared"][: len(_PATHS)])
def vectors(request: pytest.FixtureRequest) -> dict[str, Any]:
    return json.loads(request.param.read_text())


def table(rows: list[list[float | str]]) -> Tensor:
    return torch.tensor([[float(value) for value in row] for row in rows], dtype=torch.float64)


def evaluate(
    vectors: dict[str, Any],
    correction: Correction,
    *,
    behavior: Tensor | None = None,
    proximal: Callable[[Tensor], Tensor] | None = None,
    objective: Objective | None = None,
) -> tuple[Tensor, Tensor, TokenTerms]:
    """`proximal` makes the anchor's logprobs of the policy's; default: those of the vectors."""
    inputs, constants = vectors["inputs"], vectors["constants"]
    policy = table(inputs["policy_logprobs"]).requires_grad_()
    behavior = table(inputs["behavior_logprobs"]) if behavior is None else behavior
    mask = torch.tensor(inputs["loss_mask"])
    counted = mask & behavior.isfinite()
    loss, terms = decoupled_loss(
        policy,
        proximal(policy) if proximal else table(inputs["proximal_logprobs"]),
        behavior,
        table(inputs["advantages"]),
        mask,
        correction=correction,
        denominator=float(counted.sum()),
        row_denominator=float(counted.any(-1).sum()),
        objective=objective or Ppo(constants["clip_low"], constants["clip_high"]),
    )
    loss.backward()
    assert policy.grad is not None
    return loss, policy.grad, terms


def case_of(vectors: dict[str, Any], name: str) -> dict[str, Any]:
    """What reproduces the row of that name."""
    constants = vectors["constants"]
    behavior = table(vectors["inputs"]["behavior_logprobs"])
    none = Correction("none")
    cases: dict[str, dict[str, Any]] = {
        "none": {"correction": none},
        "token_mask": {"correction": Correction("token_mask", constants["token_mask_c"])},
        "token_truncate": {"correction": Correction("token_truncate", constants["truncate_C"])},
        "icepop": {"correction": Correction("icepop", constants["icepop"][1], constants["icepop"][0])},
        "sequence_truncate": {"correction": Correction("sequence_truncate", constants["truncate_C"])},
        "geometric_mask": {"correction": Correction("geometric_mask", *reversed(constants["geometric_bounds"]))},
        "ppo_on_total_ratio": {"correction": none, "proximal": lambda _: behavior},
        "gspo": {"correction": none, "objective": Gspo(constants["clip_low"], constants["clip_high"])},
        "cispo": {"correction": none, "objective": Cispo(*constants["cispo_bounds"])},
        "reinforce_truncated": {"correction": none, "objective": TruncatedReinforce(constants["truncate_C"])},
    }
    kind = name.partition("_")[0]
    if kind in ("linear", "loglinear"):
        weight = torch.full_like(behavior, vectors["expected"][name]["behavior_weight_in_anchor"])
        return {"correction": none, "proximal": Interpolated(kind, behavior, weight).resolve}  # type: ignore[arg-type]
    return cases[name]


def every_name() -> list[str]:
    return sorted({name for path in _PATHS for name in json.loads(path.read_text())["expected"]})


@pytest.mark.parametrize("name", every_name())
def test_objectives(vectors: dict[str, Any], name: str) -> None:
    expected = vectors["expected"].get(name)
    if expected is None:
        pytest.skip(f"{name} is a row of another file")
    loss, gradient, terms = evaluate(vectors, **case_of(vectors, name))
    assert loss.item() == pytest.approx(expected["loss"], **TOLERANCE)
    torch.testing.assert_close(gradient, table(expected["grad_policy_logprobs"]), atol=1e-9, rtol=0.0)
    assert int(terms.counted.sum()) == vectors["constants"]["num_loss_tokens"]
    total = terms.objective.sum().item() / vectors["constants"]["num_loss_tokens"]
    assert total == pytest.approx(expected["loss"], **TOLERANCE)  # what a run reports
    if "active_fraction" in expected:
        active_fraction = terms.active.sum().item() / vectors["constants"]["num_loss_tokens"]
        assert active_fraction == pytest.approx(expected["active_fraction"], **TOLERANCE)
    if "proximal_logprobs" in expected:
        ours = torch.where(terms.counted, table(expected["proximal_logprobs"]), 0.0)
        torch.testing.assert_close(terms.proximal_logprobs, ours, atol=1e-9, rtol=0.0)


@pytest.mark.parametrize("name", ["token_mask", "token_truncate"])
def test_bad_values(vectors: dict[str, Any], name: str) -> None:
    bad = vectors["bad_values"]
    loss, gradient, terms = evaluate(vectors, **case_of(vectors, name), behavior=table(bad["behavior_logprobs"]))
    expected = bad["expected"][name]
    assert int(terms.counted.sum()) == bad["num_loss_tokens"]
    assert int(terms.dropped.sum()) == bad["num_dropped"]
    assert loss.item() == pytest.approx(expected["loss"], **TOLERANCE)
    torch.testing.assert_close(gradient, table(expected["grad_policy_logprobs"]), atol=1e-9, rtol=0.0)


def test_bad_values_are_counted_before_the_loss(vectors: dict[str, Any]) -> None:
    bad = vectors["bad_values"]
    rows = table(bad["behavior_logprobs"]).tolist()
    sequences = [
        TokenSequence((0,) * len(row), tuple(mask), tuple(row), (0,) * len(row), (0,) * len(row))
        for row, mask in zip(rows, vectors["inputs"]["loss_mask"])
    ]
    assert count_loss_tokens(sequences) == bad["num_loss_tokens"]


@pytest.mark.parametrize("name", ["discrepancy", "staleness", "total"])
def test_metrics(vectors: dict[str, Any], name: str) -> None:
    _, _, terms = evaluate(vectors, Correction("none"))
    mask = torch.tensor(vectors["inputs"]["loss_mask"])
    metrics = StepMetrics()
    zeros = torch.zeros(mask.shape, dtype=torch.int64)
    lengths = torch.full((len(mask),), mask.shape[1])
    batch = MicroBatch(zeros, lengths, mask, zeros.double(), zeros, zeros, zeros.double(), lengths)
    metrics.add(terms, batch, trainer_version=0)
    figures = metrics.finalise()
    for figure, expected in vectors["metrics"][name].items():
        assert figures[f"{name}/{figure}"] == pytest.approx(expected, **TOLERANCE), figure
        assert figures[f"{name}/lag0/{figure}"] == pytest.approx(expected, **TOLERANCE), figure


def test_ewma(vectors: dict[str, Any]) -> None:
    ewma = vectors["ewma"]
    model = nn.Linear(4, 1, bias=False).double()
    theta = [torch.tensor([values], dtype=torch.float64) for values in ewma["theta"]]
    with torch.no_grad():
        model.weight.copy_(theta[0])
    anchor = EwmaAnchor(model, 1.0, max_staleness=ewma["W"])
    for version, expected in enumerate(ewma["theta_prox"]):
        if version > 0:
            with torch.no_grad():
                model.weight.copy_(theta[version])
            reset = version == ewma["reset_at"]
            anchor.published(version, active_fraction=0.89 if reset else 0.9, mean_lag=ewma["W"] / 2)
            assert anchor.metrics()["anchor/ewma_beta"] == (0.0 if reset else ewma["beta"])
        np.testing.assert_allclose(anchor.weights["weight"].numpy()[0], expected, atol=1e-9, rtol=0.0)
