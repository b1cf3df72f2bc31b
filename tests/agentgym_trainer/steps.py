"""One optimizer step over rows of a model, through the real batching, forward and loss, as the tests share it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from agentgym_trainer.anchors.interpolation import Interpolated
from agentgym_trainer.batch import MicroBatch, Row, build_micro_batches, count_loss_rows, count_loss_tokens
from agentgym_trainer.correction import Correction
from agentgym_trainer.logprobs import token_logprobs
from agentgym_trainer.loss import decoupled_loss, split_by_finiteness
from agentgym_trainer.objectives import M2po, Objective, Ppo


def step_gradient(
    model: nn.Module, rows: Sequence[Row], *, max_tokens: int, world_size: int = 1, **options: Any
) -> dict[str, torch.Tensor]:
    """The gradient of one optimizer step over `rows`, through the real batching, forward and loss. The proximal
    logprobs lie between behavior and policy, so that both ratios are others than one."""
    model.zero_grad()
    batches = [
        batch
        for rank in range(world_size)
        for batch in build_micro_batches(rows, max_tokens=max_tokens, rank=rank, world_size=world_size)
    ]
    options |= {
        "denominator": float(count_loss_tokens(row.sequence for row in rows)),
        "row_denominator": float(count_loss_rows(row.sequence for row in rows)),
        "objective": settled(options.get("objective", Ppo()), model, batches),
    }
    for batch in batches:
        micro_batch_loss(model, batch, **options).backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@torch.no_grad()
def settled(objective: Objective, model: nn.Module, batches: Sequence[MicroBatch]) -> Objective:
    """With what a whole step gives it, as the learner does."""
    if not isinstance(objective, M2po):
        return objective
    squares = [
        M2po.squares(token_logprobs(model, batch).logprobs, batch.behavior_logprobs)[
            split_by_finiteness(batch.behavior_logprobs, batch.loss_mask)[0]
        ]
        for batch in batches
    ]
    return dataclasses.replace(objective, cut=objective.cut_of(torch.cat(squares)))


def micro_batch_loss(
    model: nn.Module,
    batch: MicroBatch,
    *,
    correction: Correction | Sequence[Correction] = Correction("token_mask", 4.0),  # noqa: B008  (frozen)
    reference: nn.Module | None = None,
    **options: Any,
) -> torch.Tensor:
    policy = token_logprobs(model, batch, with_entropy=options.get("entropy_coefficient", 0.0) > 0)
    proximal = Interpolated("loglinear", batch.behavior_logprobs, torch.full_like(batch.behavior_logprobs, 0.6))
    with torch.no_grad():
        reference_logprobs = None if reference is None else token_logprobs(reference, batch).logprobs
    loss, _ = decoupled_loss(
        policy.logprobs, proximal.resolve(policy.logprobs), batch.behavior_logprobs, batch.advantages, batch.loss_mask,
        correction=correction, entropy=policy.entropy, reference_logprobs=reference_logprobs, **options,
    )  # fmt: skip
    return loss
