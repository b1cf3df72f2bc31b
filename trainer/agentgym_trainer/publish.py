"""From the model in training to published weights. Law: what is published is exactly what the version log keeps.

Names are the model's own, so that an engine which loads the same architecture finds every tensor by name.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import torch
from transformers import PreTrainedModel

from agentgym.errors import CheckpointError
from agentgym.versions import BFLOAT16, WHOLE_MODEL
from agentgym_trainer.lora import adapter_metadata, adapter_state, is_adapted, merged


@dataclass(frozen=True, slots=True)
class Publication:
    """One version as it goes to the log and to engines.

    Example: a model of one weight: `Publication({"w": np.zeros(2, np.float32)}, {"format": "pt"})`.
    """

    weights: Mapping[str, np.ndarray]
    metadata: Mapping[str, str]


def published_state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The tensors that a version of `model` consists of, by the names that engines find them under, sharing the
    model's memory: all parameters and persistent buffers, or the adapter's. A tied tensor stands under each name."""
    return adapter_state(model) if is_adapted(model) else model.state_dict(keep_vars=True)


def published_metadata(model: torch.nn.Module) -> Mapping[str, str]:
    """What the file of a version says of its tensors."""
    return adapter_metadata(model) if is_adapted(model) else WHOLE_MODEL


def published_weights(model: torch.nn.Module, dtype: str = "float32") -> dict[str, np.ndarray]:
    """`published_state` as host arrays, tied tensors once; copies, not views. Those of floating point are in `dtype`,
    rounded to nearest."""
    weights: dict[str, np.ndarray] = {}
    seen: set[int] = set()
    for name, tensor in published_state(model).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            kept = getattr(torch, dtype) if tensor.is_floating_point() else tensor.dtype
            layout = torch.contiguous_format  # the log compares bits in order, however they lay in the model
            weights[name] = _as_array(tensor.detach().to("cpu", kept, copy=True, memory_format=layout))
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
    state = {id(tensor): tensor for tensor in published_state(model).values()}  # tied tensors once
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


def save_model(model: torch.nn.Module, source: Path, target: Path) -> None:
    """Writes the trained model to `target` as transformers and engines load it, with the tokenizer and chat template of
    the folder it came from; whole or not at all. An adapter is merged into it, and left as PEFT loads it in the folder
    `adapter` beside it. Raises CheckpointError."""
    try:
        if is_adapted(model):
            base, weights = merged(model)
            with _whole(target.with_name("adapter")) as folder:
                cast(PreTrainedModel, model).save_pretrained(folder)
        else:
            base, weights = cast(PreTrainedModel, model), None
        with _whole(target) as folder:
            shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors*", "*.bin*", "*.msgpack"))
            base.save_pretrained(folder, state_dict=weights)
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"the trained model cannot be written to {target}: {error}") from error


@contextlib.contextmanager
def _whole(target: Path) -> Iterator[Path]:
    """A path for a folder that takes the place of `target` at the end, unless something went wrong."""
    partial = target.with_name(target.name + ".partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        yield partial
        shutil.rmtree(target, ignore_errors=True)
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
