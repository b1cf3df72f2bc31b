"""The forward pass: a model and a micro-batch in, the logprob of every loss token out. Must never know a loss.

Law: the shift by one lives here and nowhere else. The hidden state at t - 1 predicts token t; outside this file index
t always concerns token t itself.

Only the positions that predict a loss token go through the output layer: for small models with large vocabularies the
logits are most of the work and of the memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from agentgym.errors import InputError
from agentgym_trainer.batch import MicroBatch


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Logprobs [B, T] of the tokens of a micro-batch, 0.0 where the loss mask is False; the same for the entropy of
    the distribution each was drawn from.

    Example: a row of 3 tokens with loss on the last: logprobs [[0.0, 0.0, -1.2]].
    """

    logprobs: Tensor
    entropy: Tensor | None


def token_logprobs(
    model: nn.Module, micro_batch: MicroBatch, temperature: float = 1.0, *, with_entropy: bool = False
) -> TokenLogprobs:
    """Logprobs of the loss tokens under `model` (a transformers causal LM, wrapped for data parallelism or not), at
    `temperature`, in fp32 (float64 for a float64 model). Carries a gradient unless called under `torch.no_grad`."""
    if not temperature > 0:
        raise InputError(f"the trainer's temperature must be > 0, got {temperature}")
    mask = micro_batch.loss_mask
    num_columns = mask.shape[1]
    rows, columns = mask.nonzero(as_tuple=True)
    logits = logits_at(model, micro_batch.token_ids, rows * num_columns + columns - 1)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    if temperature != 1.0:
        logits = logits / temperature
    targets = micro_batch.token_ids[rows, columns]
    # A scatter of nothing still hangs on the graph: a fully masked micro-batch has a gradient, and it is zero.
    blank = torch.zeros(mask.shape, dtype=logits.dtype, device=logits.device)
    logprobs = blank.masked_scatter(mask, -F.cross_entropy(logits, targets, reduction="none"))
    if not with_entropy:
        return TokenLogprobs(logprobs, None)
    log_probabilities = logits.log_softmax(-1)
    entropy = -(log_probabilities.exp() * log_probabilities).sum(-1)
    return TokenLogprobs(logprobs, blank.masked_scatter(mask, entropy))


def logprob_dtype(model: nn.Module) -> torch.dtype:
    """The dtype of `token_logprobs` under this model: fp32, or float64 for a float64 model."""
    return torch.float64 if next(model.parameters()).dtype == torch.float64 else torch.float32


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside data-parallel and compile wrappers."""
    while True:
        inner = getattr(model, "module", None) or getattr(model, "_orig_mod", None)
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def logits_at(model: nn.Module, token_ids: Tensor, positions: Tensor) -> Tensor:
    """Logits [n, V] at flat positions [n] of `token_ids` [B, T]. Rows are padded on the right only, so the causal
    mask is all the attention needs."""
    output_layer = unwrap(model).get_output_embeddings()  # type: ignore[operator]
    if output_layer is None:
        return model(input_ids=token_ids, use_cache=False).logits.flatten(0, 1)[positions]
    with _only_at(output_layer, positions):
        return model(input_ids=token_ids, use_cache=False).logits


@contextmanager
def _only_at(output_layer: nn.Module, positions: Tensor) -> Iterator[None]:
    # The whole model is called, not its trunk: data-parallel wrappers work in their own forward.
    handle = output_layer.register_forward_pre_hook(lambda _, inputs: (inputs[0].flatten(0, 1)[positions],))
    try:
        yield
    finally:
        handle.remove()
