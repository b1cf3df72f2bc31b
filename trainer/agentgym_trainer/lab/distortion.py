"""An engine mismatch that is injected on purpose and can be turned up. Law: what the engine samples from is what it
records, so that behavior logprobs are true and only the trainer's forward differs; the trainer's side is never touched.

    none           the engine computes as the trainer does, but for its own kernels
    bf16           the engine's weights are the published ones rounded to bfloat16
    logits:0.05    each logit has normal noise of that standard deviation
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedModel

from agentgym.errors import ConfigError
from agentgym.versions import BFLOAT16, VersionReader

KINDS = ("none", "bf16", "logits:SCALE")


@dataclass(frozen=True, slots=True)
class Distortion:
    """What is wrong with the engine.

    Example: `Distortion.parse("logits:0.05")` is `Distortion("logits", 0.05)`.
    """

    kind: str
    scale: float = 0.0

    @classmethod
    def parse(cls, text: str) -> Distortion:
        """Raises ConfigError for what is not one of KINDS."""
        kind, _, scale = text.partition(":")
        if kind in ("none", "bf16") and not scale:
            return cls(kind)
        try:
            size = float(scale)
        except ValueError:
            size = float("nan")
        if kind != "logits" or not 0.0 < size < float("inf"):
            raise ConfigError(f"an injected mismatch is one of {', '.join(KINDS)} with SCALE > 0, got {text!r}")
        return cls(kind, size)

    def __str__(self) -> str:
        return f"{self.kind}:{self.scale:g}" if self.kind == "logits" else self.kind

    def weights(self, versions: VersionReader) -> Callable[[int], Mapping[str, np.ndarray]]:
        """What the engine is given as the weights of a version."""
        if self.kind != "bf16":
            return versions.read
        return lambda version: {name: _rounded(array) for name, array in versions.read(version).items()}

    @contextmanager
    def on(self, engine_model: PreTrainedModel, seed: int) -> Iterator[None]:
        """While it lasts, the engine's logits have their noise; equal seeds, equal noise."""
        if self.kind != "logits":
            yield
            return
        generator = torch.Generator().manual_seed(seed)

        def add_noise(_module: torch.nn.Module, _inputs: object, logits: torch.Tensor) -> torch.Tensor:
            return logits + self.scale * torch.randn(logits.shape, generator=generator, dtype=logits.dtype)

        output_layer = engine_model.get_output_embeddings()
        assert output_layer is not None, "a causal language model has an output layer"
        handle = output_layer.register_forward_hook(add_noise)
        try:
            yield
        finally:
            handle.remove()


def _rounded(array: np.ndarray) -> np.ndarray:
    """Values rounded to bfloat16, held in fp32. Integers and what is bfloat16 already stay."""
    if array.dtype == BFLOAT16 or not np.issubdtype(array.dtype, np.floating):
        return array
    return torch.from_numpy(array).to(torch.bfloat16).float().numpy()
