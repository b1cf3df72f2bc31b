"""Law G: padding, micro-batching, accumulation and the number of shares leave the gradient unchanged."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from agentgym_trainer import batch as batch_module
from agentgym_trainer.batch import Row, build_micro_batches
from agentgym_trainer.correction import Correction
from agentgym_trainer.logprobs import token_logprobs
from agentgym_trainer.loss import decoupled_loss

MakeModel = Callable[..., LlamaForCausalLM]
MakeRows = Callable[..., list[Row]]
StepGradient = Callable[..., dict[str, torch.Tensor]]
LENGTHS = (9, 30, 4, 17, 2, 12, 5, 5, 26)


def assert_same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor], tolerance: float) -> None:
    for name, gradient in left.items():
        torch.testing.assert_close(right[name], gradient, atol=tolerance, rtol=0.0, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("entropy_coefficient", [0.0, 0.05])
@pytest.mark.parametrize(("max_tokens", "world_size"), [(1, 1), (40, 1), (40, 2), (40, 4), (1000, 3)])
def test_the_gradient_does_not_depend_on_the_layout(
    make_model: MakeModel, make_rows: MakeRows, step_gradient: StepGradient,
    max_tokens: int, world_size: int, entropy_coefficient: float,
) -> None:  # fmt: skip
    model, rows = make_model(dtype=torch.float64), make_rows(LENGTHS)
    whole = step_gradient(model, rows, max_tokens=10_000, entropy_coefficient=entropy_coefficient)
    parts = step_gradient(
        model, rows, max_tokens=max_tokens, world_size=world_size, entropy_coefficient=entropy_coefficient
    )
    assert max(gradient.abs().max() for gradient in whole.values()) > 1e-3
    assert_same(whole, parts, 1e-13)


def test_in_fp32_to_rounding(make_model: MakeModel, make_rows: MakeRows, step_gradient: StepGradient) -> None:
    model, rows = make_model(), make_rows(LENGTHS)
    exact = step_gradient(make_model(dtype=torch.float64), rows, max_tokens=10_000)
    ours = step_gradient(model, rows, max_tokens=40, world_size=2)
    assert_same({name: gradient.float() for name, gradient in exact.items()}, ours, 2e-6)


def test_the_order_of_arrival_does_not_matter(
    make_model: MakeModel, make_rows: MakeRows, step_gradient: StepGradient
) -> None:
    model, rows = make_model(dtype=torch.float64), make_rows(LENGTHS)
    order = np.random.default_rng(1).permutation(len(rows))
    shuffled = step_gradient(model, [rows[i] for i in order], max_tokens=40)
    assert_same(step_gradient(model, rows, max_tokens=40), shuffled, 1e-13)


def test_a_token_with_a_broken_logprob_is_no_part_of_the_gradient(
    make_model: MakeModel, make_rows: MakeRows, step_gradient: StepGradient
) -> None:
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


def test_a_fully_masked_micro_batch_is_a_zero_that_can_be_differentiated(
    make_model: MakeModel, make_rows: MakeRows
) -> None:
    model = make_model()
    batch = build_micro_batches(make_rows([5]), max_tokens=40, rank=1, world_size=2)[0]
    policy = token_logprobs(model, batch, with_entropy=True)
    loss, terms = decoupled_loss(
        policy.logprobs, policy.logprobs.detach(), batch.behavior_logprobs, batch.advantages, batch.loss_mask,
        correction=Correction(), denominator=7.0, entropy=policy.entropy, entropy_coefficient=0.1,
    )  # fmt: skip
    loss.backward()
    assert loss.item() == 0.0
    assert not terms.counted.any()
    gradients = [parameter.grad for parameter in model.parameters()]
    assert all(gradient is not None and not gradient.any() for gradient in gradients)


def test_mutant_that_divides_by_each_micro_batchs_own_tokens_is_refused(
    make_model: MakeModel, make_rows: MakeRows, step_gradient: StepGradient, monkeypatch: pytest.MonkeyPatch
) -> None:
    def own_denominator(*tensors: torch.Tensor, denominator: float, **options: object) -> object:
        return decoupled_loss(*tensors, denominator=float(tensors[4].sum()), **options)  # type: ignore[arg-type]

    model, rows = make_model(dtype=torch.float64), make_rows(LENGTHS)
    monkeypatch.setitem(step_gradient.__globals__["micro_batch_loss"].__globals__, "decoupled_loss", own_denominator)
    whole = step_gradient(model, rows, max_tokens=10_000)
    with pytest.raises(AssertionError):
        assert_same(whole, step_gradient(model, rows, max_tokens=40), 1e-13)


def test_mutant_that_pads_on_the_left_is_refused(
    make_model: MakeModel, make_rows: MakeRows, step_gradient: StepGradient, monkeypatch: pytest.MonkeyPatch
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
