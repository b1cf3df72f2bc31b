"""The `ewma` anchor: one exponentially weighted copy of the weights (revised PPO-EWMA, arXiv 2110.00641, 2605.12070).
Must never know the loss.

Law: theta_prox(t) = sum_k beta^(t-k) theta(k) / sum_k beta^(t-k) over published versions k since the last reset, kept
in fp32; the unit of k is the policy version. It is one global approximation: fresh tokens get spurious ratios from it.

A reset (theta_prox <- theta, w = 1) replaces a version's update when fewer than RESET_BELOW of the tokens stayed
active. Resets at every step mean engine mismatch, not staleness.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from agentgym.errors import CheckpointError
from agentgym_trainer.anchors.protocol import Proximal, require_finite
from agentgym_trainer.anchors.scoring import frozen_copy
from agentgym_trainer.batch import MicroBatch
from agentgym_trainer.logprobs import token_logprobs, unwrap
from agentgym_trainer.lora import is_adapted
from agentgym_trainer.publish import published_metadata, published_state

_OF_A_COPY = ("_name_or_path", "transformers_version", "torch_dtype", "dtype", "use_cache", "architectures")
RESET_BELOW = 0.9  # tau: the active fraction below which the anchor lets its history go


def decay_of(mean_lag: float, max_staleness: int) -> float:
    """beta = W/(W + 2) with W = twice the mean lag, at most max_staleness: the mean age of the average is W/2."""
    window = min(2.0 * mean_lag, float(max_staleness))
    return window / (window + 2.0)


@torch.no_grad()
def average_in(average: Tensor, current: Tensor, weight: float, beta: float) -> None:
    """One bias-corrected step in place, w the weight before it: average <- (beta w/w') average + current/w' with
    w' = beta w + 1. Elementwise, hence the same on a shard as on the whole. beta 0 gives `current`, bitwise."""
    if beta == 0.0:
        average.copy_(current)
        return
    new_weight = beta * weight + 1.0
    average.mul_(beta * weight / new_weight).add_(current.to(average.dtype), alpha=1.0 / new_weight)


class EwmaAnchor:
    """Keeps theta_prox in the module that also does its forward: one copy of the weights and no more."""

    name = "ewma"

    def __init__(
        self, model: nn.Module, temperature: float, *, max_staleness: int, reset_below: float = RESET_BELOW
    ) -> None:
        self._model = model
        self._temperature = temperature
        self._max_staleness = max_staleness
        self._reset_below = reset_below
        frozen = frozen_copy(model)
        # fp32: the increments of an average vanish in bf16. Test models in float64 stay as they are, and so does an
        # adapter, which is fp32 already: to convert the base under it would be to convert that of the policy.
        held = is_adapted(frozen) or next(frozen.parameters()).dtype == torch.float64
        self._average = frozen if held else frozen.float()
        self._weight = 1.0  # w
        self._age = 0.0  # mean age of theta_prox in versions
        self._beta = 0.0
        self._num_resets = 0

    def proximal(
        self, micro_batches: Sequence[MicroBatch], *, trainer_version: int, reuse_policy: bool
    ) -> list[Proximal]:
        return [Proximal(self.score(batch), None) for batch in micro_batches]

    @torch.no_grad()
    def score(self, batch: MicroBatch) -> Tensor:
        """Logprobs [B, T] of the loss tokens under theta_prox."""
        logprobs = token_logprobs(self._average, batch, self._temperature).logprobs
        return require_finite(logprobs, self.name, "the averaged weights")

    @torch.no_grad()
    def published(self, version: int, *, active_fraction: float, mean_lag: float) -> None:
        current = unwrap(self._model)
        reset = active_fraction < self._reset_below
        self._beta = 0.0 if reset else decay_of(mean_lag, self._max_staleness)
        self._num_resets += reset
        for average, parameter in zip(self._average.parameters(), current.parameters(), strict=True):
            if average is not parameter:  # it is, where both hold one frozen base under their adapters
                average_in(average, parameter, self._weight, self._beta)
        for copied, buffer in zip(self._average.buffers(), current.buffers(), strict=True):
            copied.copy_(buffer)
        weight = self._beta * self._weight + 1.0
        self._age = self._beta * self._weight / weight * (self._age + 1.0)
        self._weight = weight

    @property
    def weights(self) -> Mapping[str, Tensor]:
        """theta_prox by parameter name."""
        return dict(self._average.named_parameters())

    def metrics(self) -> dict[str, float]:
        return {
            "anchor/ewma_age": self._age,
            "anchor/ewma_beta": self._beta,
            "anchor/ewma_resets": float(self._num_resets),
        }

    def state_dict(self) -> dict[str, Any]:
        return {
            "weight": self._weight,
            "age": self._age,
            "beta": self._beta,
            "num_resets": self._num_resets,
            "model": model_description(self._average),
            "average": {name: tensor.detach().clone() for name, tensor in published_state(self._average).items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raises CheckpointError, changing nothing, for a state that is not of this model."""
        if missing := {"model", "average", "weight", "age", "beta", "num_resets"} - state.keys():
            raise CheckpointError(f"the checkpoint holds no state of an ewma anchor: {min(missing)!r} is missing")
        held, saved = published_state(self._average), state["average"]
        _require_same_model(json.loads(model_description(self._average)), json.loads(state["model"]))
        _require_same_tensors(held, saved)
        with torch.no_grad():
            for name, tensor in held.items():
                tensor.copy_(saved[name])
        self._weight, self._age, self._beta = state["weight"], state["age"], state["beta"]
        self._num_resets = state["num_resets"]


def model_description(model: nn.Module) -> str:
    """What tells models of equal tensors apart (heads, rotations, an adapter's scale), as JSON: a model's configuration
    without what concerns only how it is held. Empty for modules that have none."""
    config = getattr(model, "config", None)
    values = json.loads(config.to_json_string(use_diff=False)) if isinstance(config, PretrainedConfig) else {}
    values = {key: value for key, value in values.items() if key not in _OF_A_COPY}
    return json.dumps({**values, **published_metadata(model)}, sort_keys=True)


def _require_same_model(here: Mapping[str, Any], saved: Mapping[str, Any]) -> None:
    # A key that one of them lacks is another release of the library; what both say must agree.
    for key in sorted(here.keys() & saved.keys()):
        if here[key] != saved[key]:
            raise CheckpointError(
                f"the checkpoint's ewma anchor is of another model: {key} is {saved[key]!r} in it and {here[key]!r} "
                "here; resume with the model it was made of"
            )


def _require_same_tensors(here: Mapping[str, Tensor], saved: Mapping[str, Tensor]) -> None:
    if odd := sorted(here.keys() ^ saved.keys()):
        where = "only here" if odd[0] in here else "only in it"
        raise CheckpointError(f"the checkpoint's ewma anchor is of another model: {odd[0]!r} is {where}")
    for name in here:
        if here[name].shape != saved[name].shape:
            raise CheckpointError(
                f"the checkpoint's ewma anchor is of another model: {name!r} is {list(saved[name].shape)} in it and "
                f"{list(here[name].shape)} here"
            )
