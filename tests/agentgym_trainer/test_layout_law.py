"""Law G: padding, micro-batching, accumulation and the number of shares leave the gradient unchanged."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import steps
import torch
from steps import micro_batch_loss, step_gradient
from transformers import LlamaForCausalLM

from agentgym_trainer import batch as batch_module
from agentgym_trainer.batch import Row, build_micro_batches
from agentgym_trainer.correction import Correction
from agentgym_trainer.loss import decoupled_loss
from agentgym_trainer.objectives import Cispo, Gspo, M2po, Ppo, Topr, TruncatedReinforce

MakeModel = Callable[..., LlamaForCausalLM]
MakeRows = Callable[..., list[Row]]
LENGTHS = (9, 30, 4, 17, 2, 12, 5, 5, 26)


def assert_same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor], tolerance: float) -> None:
    for name, gradient in left.items():
        torch.testing.assert_close(right[name], gradient, atol=tolerance, rtol=0.0, msg=lambda m, n=name: f"{n}: {m}")


# Of each objective one that clips, weighs or drops some of these rows; of the corrections those that speak of rows.
CASES: dict[str, dict[str, Any]] = {
    "ppo": {"objective": Ppo()},
    "entropy": {"entropy_coefficient": 0.05},
    "dual_clip": {"objective": Ppo(0.2, 0.28, 1.3)},
    "gspo": {"objective": Gspo(0.2, 0.3)},
    "gspo, masked tokens": {"objective": Gspo(0.2, 0.3), "correction": Correction("token_mask", 1.6)},
    "cispo": {"objective": Cispo(0.5, 1.5)},
    "reinforce_truncated": {"objective": TruncatedReinforce()},
    "topr": {"objective": Topr()},
    "m2po": {"objective": M2po(0.8)},
    "sequence_truncate": {"correction": Correction("sequence_truncate")},
    "geometric_mask, veto": {"correction": (Correction("geometric_mask", 1.5, low=0.7), Correction("veto", 0.2))},
    "sequence_mask": {"correction": Correction("sequence_mask", 4.0)},
}
LAYOUTS = [(1, 1), (40, 1), (40, 2), (40, 4), (1000, 3)]


@pytest.mark.parametrize("case", CASES)
def test_the_gradient_does_not_depend_on_the_layout(make_model: MakeModel, make_rows: MakeRows, case: str) -> None:
    model, rows = make_model(dtype=torch.float64), make_rows(LENGTHS)
    whole = step_gradient(model, rows, max_tokens=10_000, **CASES[case])
    assert max(gradient.abs().max() for gradient in whole.values()) > 1e-3
    for max_tokens, world_size in LAYOUTS:
        parts = step_gradient(model, rows, max_tokens=max_tokens, world_size=world_size, **CASES[case])
        assert_same(whole, parts, 1e-12)


def test_the_divergence_from_a_reference_does_not_depend_on_the_layout(
    make_model: MakeModel, make_rows: MakeRows
) -> None:
    model, rows = make_model(dtype=torch.float64), make_rows(LENGTHS)
    options = {"reference": make_model(1, dtype=torch.float64), "reference_coefficient": 0.3, "objective": Gspo()}
    whole = step_gradient(model, rows, max_tokens=10_000, **options)
    assert_same(whole, step_gradient(model, rows, max_tokens=40, world_size=2, **options), 1e-12)
    without = step_gradient(model, rows, max_tokens=10_000, objective=Gspo())
    with pytest.raises(AssertionError):
        assert_same(whole, without, 1e-3)


def test_in_fp32_to_rounding(make_model: MakeModel, make_rows: MakeRows) -> None:
    model, rows = make_model(), make_rows(LENGTHS)
    exact = step_gradient(make_model(dtype=torch.float64), rows, max_tokens=10_000)
    ours = step_gradient(model, rows, max_tokens=40, world_size=2)
    assert_same({name: gradient.float() for name, gradient in exact.items()}, ours, 2e-6)


def test_the_order_of_arrival_does_not_matter(make_model: MakeModel, make_rows: MakeRows) -> None:
    model, rows = make_model(dtype=torch.float64), make_rows(LENGTHS)
    order = np.random.default_rng(1).permutation(len(rows))
    shuffled = step_gradient(model, [rows[i] for i in order], max_tokens=40)
    assert_same(step_gradient(model, rows, max_tokens=40), shuffled, 1e-13)


def test_a_token_with_a_broken_logprob_is_no_part_of_the_gradient(make_model: MakeModel, make_rows: MakeRows) -> None:
    model, (row, other) = make_model(dtype=torch.float64), make_rows([9, 6])
    sequence = row.sequence
    at = max(t for t, mask in enumerate(sequence.loss_mask) if mask)
    broken = list(sequence.behavior_logprobs)
    broken[at] = float("-inf")
    masked = list(sequence.loss_mask)
    masked[at] = False

    def replace(**columns: tuple[object, ...]) -> Row:
        values = {name: getattr(sequence, name) for name in sequence.__dataclass_fields__} | columns
        return Row(type(sequence)(**values), row.advantage)

    with_broken = step_gradient(model, [replace(behavior_logprobs=tuple(broken)), other], max_tokens=40)
    without = step_gradient(model, [replace(loss_mask=tuple(masked)), other], max_tokens=40)
    assert_same(without, with_broken, 1e-13)


@pytest.mark.parametrize("case", CASES)
def test_a_fully_masked_micro_batch_is_a_zero_that_can_be_differentiated(
    make_model: MakeModel, make_rows: MakeRows, case: str
) -> None:
    model = make_model()
    batch = build_micro_batches(make_rows([5]), max_tokens=40, rank=1, world_size=2)[0]
    assert not batch.loss_mask.any()
    options = {"entropy_coefficient": 0.1, "reference": make_model(1), "reference_coefficient": 0.1} | CASES[case]
    loss = micro_batch_loss(model, batch, denominator=7.0, row_denominator=2.0, **options)
    loss.backward()
    assert loss.item() == 0.0
    gradients = [parameter.grad for parameter in model.parameters()]
    assert all(gradient is not None and not gradient.any() for gradient in gradients)


def test_a_row_whose_every_token_is_masked_counts_in_gspos_denominator(
    make_model: MakeModel, make_rows: MakeRows
) -> None:
    """Counted before any mask: what is left of one row of two is half of what it is alone, whatever was masked."""
    model, rows = make_model(dtype=torch.float64), make_rows([9, 6])
    far = rows[1].sequence
    broken = tuple(-19.0 if loss else 0.0 for loss in far.loss_mask)  # r_d is far beyond its bound
    masked = Row(dataclasses.replace(far, behavior_logprobs=broken), rows[1].advantage)
    options = {"objective": Gspo(0.9, 9.0), "correction": Correction("token_mask", 50.0)}
    alone = step_gradient(model, rows[:1], max_tokens=100, **options)
    both = step_gradient(model, [rows[0], masked], max_tokens=100, **options)
    assert_same({name: gradient / 2 for name, gradient in alone.items()}, both, 1e-13)


@pytest.mark.parametrize(
    ("case", "mutant"),
    [
        ("ppo", lambda tensors, options: options | {"denominator": float(tensors[4].sum())}),
        ("gspo", lambda tensors, options: options | {"row_denominator": float(tensors[4].any(-1).sum())}),
        ("m2po", lambda tensors, options: options | {"objective": M2po(0.8)}),  # each micro-batch drops its own
    ],
)
def test_mutants_that_take_a_micro_batch_for_the_step_are_refused(
    make_model: MakeModel, make_rows: MakeRows, monkeypatch: pytest.MonkeyPatch, case: str,
    mutant: Callable[..., dict[str, Any]],
) -> None:  # fmt: skip
    def narrow(*tensors: torch.Tensor, **options: Any) -> object:
        return decoupled_loss(*tensors, **mutant(tensors, options))

    model, rows = make_model(dtype=torch.float64), make_rows(LENGTHS)
    monkeypatch.setattr(steps, "decoupled_loss", narrow)
    whole = step_gradient(model, rows, max_tokens=10_000, **CASES[case])
    with pytest.raises(AssertionError):
        assert_same(whole, step_gradient(model, rows, max_tokens=40, **CASES[case]), 1e-12)


def test_mutant_that_pads_on_the_left_is_refused(
    make_model: MakeModel, make_rows: MakeRows, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, rows = make_model(dtype=torch.float64), make_rows(LENGTHS)
    alone = step_gradient(model, rows, max_tokens=1)
    assemble = batch_module._assemble

    def on_the_left(rows: list[Row], indices: list[int]) -> batch_module.MicroBatch:
        batch = assemble(rows, indices)
        shift = (batch.token_ids.shape[1] - batch.lengths).tolist()
        moved = {
            name: torch.stack([row.roll(n) for row, n in zip(getattr(batch, name), shift)])
            for name in ("token_ids", "loss_mask", "behavior_logprobs", "policy_versions", "kv_versions")
        }
        return batch_module.MicroBatch(
            **moved, lengths=batch.lengths, advantages=batch.advantages, row_ids=batch.row_ids
        )

    monkeypatch.setattr(batch_module, "_assemble", on_the_left)
    with pytest.raises(AssertionError):
        assert_same(alone, step_gradient(model, rows, max_tokens=10_000), 1e-13)
