"""From the model in training to published weights. Law: what is published is exactly what the version log keeps.

Names are the model's own, so that an engine which loads the same architecture finds every tensor by name.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel

from agentgym.errors import CheckpointError


def published_weights(model: torch.nn.Module) -> dict[str, np.ndarray]:
    """The model's parameters and persistent buffers as float32 host arrays, tied tensors once; copies, not views."""
    weights: dict[str, np.ndarray] = {}
    seen: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            weights[name] = tensor.detach().to("cpu", torch.float32, copy=True).numpy()
    return weights


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
