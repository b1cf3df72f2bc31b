"""The shift by one, the temperature and the selected positions, against the plain way."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, LlamaForCausalLM
from transformers.models.gemma2 import Gemma2Config

from agentgym.errors import InputError
from agentgym_trainer.batch import MicroBatch, Row, build_micro_batches
from agentgym_trainer.logprobs import token_logprobs, unwrap

MakeModel = Callable[..., LlamaForCausalLM]
MakeRows = Callable[..., list[Row]]


@torch.no_grad()
def plain_logprobs(model: nn.Module, row: Row, temperature: float) -> list[float]:
    """One row at a time, all logits, the textbook way."""
    token_ids = torch.tensor([row.sequence.token_ids])
    logprobs = (model(input_ids=token_ids).logits[0].double() / temperature).log_softmax(-1)
    return [
        logprobs[t - 1, token].item() if mask else 0.0
        for t, (token, mask) in enumerate(zip(row.sequence.token_ids, row.sequence.loss_mask))
    ]


def check(model: nn.Module, rows: list[Row], temperature: float) -> None:
    for batch in build_micro_batches(rows, max_tokens=64):
        ours = token_logprobs(model, batch, temperature).logprobs
        assert ours.shape == batch.token_ids.shape
        for b, row_id in enumerate(batch.row_ids.tolist()):
            expected = torch.tensor(plain_logprobs(model, rows[row_id], temperature))
            torch.testing.assert_close(ours[b, : len(expected)].detach(), expected, atol=2e-6, rtol=0.0)
            assert (ours[b, len(expected) :] == 0.0).all()


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_index_t_concerns_token_t(make_model: MakeModel, make_rows: MakeRows, temperature: float) -> None:
    check(make_model(), make_rows([9, 4, 17, 2, 12]), temperature)


@pytest.mark.parametrize(
    "config",
    [
        GPT2Config(vocab_size=23, n_positions=64, n_embd=16, n_layer=2, n_head=2),
        Gemma2Config(
            vocab_size=23, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, head_dim=8, sliding_window=6, final_logit_softcapping=3.0, initializer_range=0.4,
        ),
    ],
    ids=["learned positions", "sliding window and capped logits"],
)  # fmt: skip
def test_other_architectures(make_rows: MakeRows, config: GPT2Config | Gemma2Config) -> None:
    torch.manual_seed(0)
    check(AutoModelForCausalLM.from_config(config).eval(), make_rows([9, 4, 17, 2, 12]), 1.0)


def test_entropy_is_that_of_the_predicting_distribution(make_model: MakeModel, make_rows: MakeRows) -> None:
    model, rows = make_model(), make_rows([9, 6])
    batch = build_micro_batches(rows, max_tokens=64)[0]
    result = token_logprobs(model, batch, 0.7, with_entropy=True)
    assert result.entropy is not None
    with torch.no_grad():
        full = (model(input_ids=batch.token_ids).logits / 0.7).softmax(-1)
    entropy = torch.distributions.Categorical(probs=full).entropy()[:, :-1]
    expected = torch.where(batch.loss_mask[:, 1:], entropy, 0.0)
    torch.testing.assert_close(result.entropy[:, 1:], expected, atol=2e-6, rtol=0.0)
    assert (result.entropy[:, 0] == 0.0).all()
    assert result.entropy.requires_grad


def test_a_float64_model_stays_float64(make_model: MakeModel, make_rows: MakeRows) -> None:
    batch = build_micro_batches(make_rows([5]), max_tokens=64)[0]
    assert token_logprobs(make_model(dtype=torch.float64), batch).logprobs.dtype == torch.float64
    half = token_logprobs(make_model(dtype=torch.bfloat16), batch).logprobs
    assert half.dtype == torch.float32


def test_only_the_needed_logits_are_computed(make_model: MakeModel, make_rows: MakeRows) -> None:
    model = make_model()
    batch = build_micro_batches(make_rows([9, 6]), max_tokens=64)[0]
    shapes: list[torch.Size] = []
    model.lm_head.register_forward_hook(lambda module, inputs, output: shapes.append(output.shape))
    token_logprobs(model, batch)
    assert shapes == [(int(batch.loss_mask.sum()), 23)]
    assert model(input_ids=batch.token_ids).logits.shape == (2, 9, 23)  # nothing of ours stays on the model


class Wrapper(nn.Module):
    """What a data-parallel wrapper looks like: another forward around `module`."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.num_calls = 0

    def forward(self, **inputs: object) -> object:
        self.num_calls += 1
        return self.module(**inputs)


def test_a_wrapped_model_is_called_through_its_wrapper(make_model: MakeModel, make_rows: MakeRows) -> None:
    model = make_model()
    wrapper = Wrapper(model)
    batch = build_micro_batches(make_rows([9, 6]), max_tokens=64)[0]
    torch.testing.assert_close(token_logprobs(wrapper, batch).logprobs, token_logprobs(model, batch).logprobs)
    assert wrapper.num_calls == 1
    assert unwrap(wrapper) is model


def test_a_fully_masked_micro_batch_has_a_zero_gradient(make_model: MakeModel, make_rows: MakeRows) -> None:
    model = make_model()
    batch = build_micro_batches(make_rows([5, 5, 5]), max_tokens=5, rank=0, world_size=2)[-1]
    assert batch.row_ids.tolist() == [-1]
    token_logprobs(model, batch).logprobs.sum().backward()
    gradients = [parameter.grad for parameter in model.parameters()]
    assert all(gradient is not None and not gradient.any() for gradient in gradients)


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan")])
def test_a_temperature_that_gives_no_distribution_is_refused(
    make_model: MakeModel, make_rows: MakeRows, temperature: float
) -> None:
    batch: MicroBatch = build_micro_batches(make_rows([5]), max_tokens=64)[0]
    with pytest.raises(InputError, match="must be > 0"):
        token_logprobs(make_model(), batch, temperature)
