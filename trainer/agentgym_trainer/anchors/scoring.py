"""A second module whose weights are swapped, or switched in place by what changed. Must never know why.

Law: one structure for all versions; every tensor of it comes from the weights given, or the swap fails. A switch ends
with the bits that a swap would have brought.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from agentgym.errors import VersionError
from agentgym.versions import BFLOAT16, Delta
from agentgym_trainer.anchors.protocol import VersionChain, VersionSource
from agentgym_trainer.batch import MicroBatch
from agentgym_trainer.logprobs import token_logprobs, unwrap
from agentgym_trainer.lora import base_parameters
from agentgym_trainer.publish import published_state

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def frozen_copy(model: nn.Module) -> nn.Module:
    """A copy of the model inside any wrapper, in evaluation mode, without gradients. The base under an adapter is not
    copied: nobody writes it, so one is enough for all."""
    inner = unwrap(model)
    frozen = copy.deepcopy(inner, {id(parameter): parameter for parameter in base_parameters(inner)})
    # Mixed precision puts a forward of its own on the instance. As a method it is copied with it and keeps scoring and
    # policy in one precision; as a closure it would go on calling the original's weights.
    if getattr(frozen.__dict__.get("forward"), "__self__", None) is not frozen:
        frozen.__dict__.pop("forward", None)
    return frozen.requires_grad_(False).eval()


class ScoringModel:
    """A scratch copy of a model, made at its first use; or the model itself, if it is nobody else's (`own`)."""

    def __init__(self, model: nn.Module, temperature: float, *, own: bool = False) -> None:
        self._model = model
        self._own = own
        self._temperature = temperature
        self._scratch: nn.Module | None = None
        self._version: int | None = None  # of the weights in the scratch copy; None while they are of no version
        self._shifts: dict[str, int | None] = {}

    @property
    def module(self) -> nn.Module:
        """The scratch copy, with the weights last loaded."""
        assert self._scratch is not None, "load() comes before module"
        return self._scratch

    @property
    def version(self) -> int | None:
        """Of the weights last loaded; None before, and where a failure left weights of no version."""
        return self._version

    def bring(self, versions: VersionSource, version: int) -> None:
        """Makes `version` the weights that score: along the deltas where they lead there, else by a full copy. Raises
        VersionError if `versions` has it not, or not whole."""
        if self._version == version:
            return
        if isinstance(versions, VersionChain) and self._version is not None and None not in self._shifts.values():
            steps = versions.steps(self._version, version)
            if steps is not None:
                self._version = None  # until the last step: an error on the way leaves what is no version
                for step in steps:
                    self._switch(step)
                self._version = version
                return
        self.load(versions.read(version), version)

    @torch.no_grad()
    def load(self, weights: Mapping[str, np.ndarray], version: int) -> None:
        """Swaps in the weights of `version`. Tied parameters may be given under one of their names. Raises
        VersionError for names or shapes that do not fit the model."""
        if self._scratch is None:
            self._scratch = self._model.requires_grad_(False).eval() if self._own else frozen_copy(self._model)
        self._version = None
        state = published_state(self._scratch)
        missing = {tensor.data_ptr(): name for name, tensor in state.items()}
        for name, array in weights.items():
            if name not in state:
                raise VersionError(f"version {version} holds {name!r}, which the model has not")
            if tuple(array.shape) != tuple(state[name].shape):
                raise VersionError(f"version {version}: {name!r} is {array.shape}, the model's {state[name].shape}")
            published = _as_tensor(array)
            state[name].copy_(published)
            self._shifts[name] = _shift(state[name].dtype, published.dtype)
            missing.pop(state[name].data_ptr(), None)
        if missing:
            raise VersionError(f"version {version} lacks {next(iter(missing.values()))!r}")
        self._version = version

    @torch.no_grad()
    def _switch(self, delta: Delta) -> None:
        assert self._scratch is not None, "load() comes before a switch"
        state = published_state(self._scratch)
        for name, patch in delta.items():
            held = state[name].detach()
            values = held.contiguous()  # itself, but for a tensor that lies in memory in another order
            target = values.view(-1).view(_BITS[held.element_size()])
            bits = torch.from_numpy(patch.bits.astype(f"i{patch.bits.itemsize}")).to(target.device, target.dtype)
            shift = self._shifts[name]
            assert shift is not None, "bring() switches only what can be"
            indices = torch.from_numpy(patch.indices).to(target.device)
            # as `target[indices] ^= bits << shift`, in a third of its time on a CPU
            target.scatter_(0, indices, target.gather(0, indices) ^ (bits << shift))
            if values is not held:
                held.copy_(values)

    @torch.no_grad()
    def score(self, micro_batch: MicroBatch) -> Tensor:
        """Logprobs [B, T] of the loss tokens under the weights last loaded."""
        assert self._scratch is not None, "load() comes before score()"
        return token_logprobs(self._scratch, micro_batch, self._temperature).logprobs


def _shift(held: torch.dtype, published: torch.dtype) -> int | None:
    """Where the bits of a published element lie within those of the one that holds its value: a bfloat16 is the upper
    half of a float32. None where the two formats share no bits."""
    if held == published:
        return 0
    return 16 if (held, published) == (torch.float32, torch.bfloat16) else None


def _as_tensor(array: np.ndarray) -> Tensor:
    writable = array if array.flags.writeable else array.copy()
    if writable.dtype == BFLOAT16:
        return torch.from_numpy(writable.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(writable)
