"""A second module whose weights are swapped. Must never know which version is asked for, or why.

Law: one structure for all versions; every tensor of it comes from the weights given, or the swap fails.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from agentgym.errors import VersionError
from agentgym_trainer.batch import MicroBatch
from agentgym_trainer.logprobs import token_logprobs, unwrap


def frozen_copy(model: nn.Module) -> nn.Module:
    """A copy of the model inside any wrapper, in evaluation mode, without gradients."""
    frozen = copy.deepcopy(unwrap(model))
    # Mixed precision puts a forward of its own on the instance. As a method it is copied with it and keeps scoring and
    # policy in one precision; as a closure it would go on calling the original's weights.
    if getattr(frozen.__dict__.get("forward"), "__self__", None) is not frozen:
        frozen.__dict__.pop("forward", None)
    return frozen.requires_grad_(False).eval()


class ScoringModel:
    """A scratch copy of a model, made at its first use."""

    def __init__(self, model: nn.Module, temperature: float) -> None:
        self._model = model
        self._temperature = temperature
        self._scratch: nn.Module | None = None

    @torch.no_grad()
    def load(self, weights: Mapping[str, np.ndarray], version: int) -> None:
        """Swaps in the weights of `version`. Tied parameters may be given under one of their names. Raises
        VersionError for names or shapes that do not fit the model."""
        if self._scratch is None:
            self._scratch = frozen_copy(self._model)
        state = self._scratch.state_dict(keep_vars=True)
        missing = {tensor.data_ptr(): name for name, tensor in state.items()}
        for name, array in weights.items():
            if name not in state:
                raise VersionError(f"version {version} holds {name!r}, which the model has not")
            if tuple(array.shape) != tuple(state[name].shape):
                raise VersionError(f"version {version}: {name!r} is {array.shape}, the model's {state[name].shape}")
            state[name].copy_(_as_tensor(array))
            missing.pop(state[name].data_ptr(), None)
        if missing:
            raise VersionError(f"version {version} lacks {next(iter(missing.values()))!r}")

    @torch.no_grad()
    def score(self, micro_batch: MicroBatch) -> Tensor:
        """Logprobs [B, T] of the loss tokens under the weights last loaded."""
        assert self._scratch is not None, "load() comes before score()"
        return token_logprobs(self._scratch, micro_batch, self._temperature).logprobs


def _as_tensor(array: np.ndarray) -> Tensor:
    return torch.from_numpy(array if array.flags.writeable else array.copy())
