"""The anchors that need no weights but the trainer's own: `behavior` and `resident`. Must never know a version log."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from agentgym_trainer.anchors.protocol import Proximal, require_finite
from agentgym_trainer.batch import MicroBatch
from agentgym_trainer.logprobs import token_logprobs, unwrap


class Stateless:
    """An anchor that follows nothing: publications and checkpoints are nothing to it."""

    def published(self, version: int, *, active_fraction: float, mean_lag: float) -> None:
        pass

    def metrics(self) -> dict[str, float]:
        return {}

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        pass


class BehaviorAnchor(Stateless):
    """pi_prox = mu_old: r_d is 1 and the clip acts on the total ratio R. No forward."""

    name = "behavior"

    def proximal(
        self, micro_batches: Sequence[MicroBatch], *, trainer_version: int, reuse_policy: bool
    ) -> list[Proximal]:
        return [Proximal(batch.behavior_logprobs, None) for batch in micro_batches]


class ResidentAnchor(Stateless):
    """pi_prox = the trainer's weights when the batch arrives. Staleness leaks into r_d: exact at lag 0 only."""

    name = "resident"

    def __init__(self, model: nn.Module, temperature: float) -> None:
        self._model = model
        self._temperature = temperature

    def proximal(
        self, micro_batches: Sequence[MicroBatch], *, trainer_version: int, reuse_policy: bool
    ) -> list[Proximal]:
        if reuse_policy:
            return [Proximal(torch.zeros_like(batch.behavior_logprobs), batch.loss_mask) for batch in micro_batches]
        return [Proximal(self._score(batch), None) for batch in micro_batches]

    @torch.no_grad()
    def _score(self, batch: MicroBatch) -> torch.Tensor:
        # Without the wrapper: its forward may talk to the other ranks, which score other numbers of micro-batches.
        logprobs = token_logprobs(unwrap(self._model), batch, self._temperature).logprobs
        return require_finite(logprobs, self.name, "the trainer's weights")
