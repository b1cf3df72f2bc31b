"""From the model in training to published weights. Law: what is published is exactly what the version log keeps.

Names are the model's own, so that an engine which loads the same architecture finds every tensor by name.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel

from agentgym.errors import CheckpointError
from agentgym.versions import BFLOAT16


def published_weights(model: torch.nn.Module, dtype: str = "float32") -> dict[str, np.ndarray]:
    """The model's parameters and persistent buffers as host arrays, tied tensors once; copies, not views. Those of
    floating point are in `dtype`, rounded to nearest."""
    weights: dict[str, np.ndarray] = {}
    seen: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            kept = getattr(torch, dtype) if tensor.is_floating_point() else tensor.dtype
            weights[name] = _as_array(tensor.detach().to("cpu", kept, copy=True))
    return weights


@contextlib.contextmanager
def as_published(model: torch.nn.Module, dtype: str) -> Iterator[None]:
    """The model computes with the values that `published_weights` gives, held as they are trained; afterwards it has
    its own back. Without this the policy logprobs of the newest version would not be its old logprobs, and r_s not 1
    at lag 0."""
    if dtype == "float32":  # nothing is rounded
        yield
        return
    rounding = getattr(torch, dtype)
    state = {id(tensor): tensor for tensor in model.state_dict(keep_vars=True).values()}  # tied tensors once
    masters = [tensor.detach() for tensor in state.values() if tensor.is_floating_point() and tensor.dtype != rounding]
    kept = [tensor.clone() for tensor in masters]
    with torch.no_grad():
        for tensor in masters:
            tensor.copy_(tensor.to(rounding))
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, value in zip(masters, kept):
                tensor.copy_(value)


def _as_array(tensor: torch.Tensor) -> np.ndarray:
    if tensor.dtype == torch.bfloat16:  # numpy has none
        return tensor.contiguous().view(torch.int16).numpy().view(BFLOAT16)
    return tensor.numpy()


def save_model(model: PreTrainedModel, source: Path, target: Path) -> None:
    """Writes the trained model to `target` as transformers loads it, with the tokenizer and chat template of the
    folder it came from; whole or not at all. Raises CheckpointError."""
    partial = target.with_name(target.name + ".partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(source, partial, ignore=shutil.ignore_patterns("*.safetensors*", "*.bin*", "*.msgpack"))
        model.save_pretrained(partial)
        shutil.rmtree(target, ignore_errors=True)
        partial.rename(target)
    except (OSError, RuntimeError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise CheckpointError(f"the trained model cannot be written to {target}: {error}") from error
