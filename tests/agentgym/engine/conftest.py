"""Tiny random models of several architectures, as folders that transformers loads."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

VOCAB = 61
_COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}


def _config(architecture: str) -> PreTrainedConfig:
    if architecture == "llama":
        return LlamaConfig(**_COMMON, num_key_value_heads=2, tie_word_embeddings=False)
    if architecture == "qwen2":  # tied embeddings and biases
        return Qwen2Config(**_COMMON, num_key_value_heads=1, tie_word_embeddings=True)
    if architecture == "qwen3":  # normalised queries and keys
        return Qwen3Config(**_COMMON, num_key_value_heads=2, head_dim=16)
    if architecture == "gpt_neox":  # partial rotary, parallel residual
        return GPTNeoXConfig(**_COMMON)
    if architecture == "gpt2":  # learned positions
        return GPT2Config(
            vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=128, bos_token_id=None, eos_token_id=None
        )
    raise KeyError(architecture)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def model_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, PreTrainedModel]]:
    """(folder, model) of an architecture: weights large enough that distributions are far from uniform."""
    made: dict[str, tuple[Path, PreTrainedModel]] = {}

    def make(architecture: str) -> tuple[Path, PreTrainedModel]:
        if architecture not in made:
            generator = torch.Generator().manual_seed(0)
            model = AutoModelForCausalLM.from_config(_config(architecture)).eval()
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.ndim > 1:
                        parameter.normal_(0, 0.18, generator=generator)
            folder = tmp_path_factory.mktemp(architecture)
            model.save_pretrained(folder)
            made[architecture] = folder, model
        return made[architecture]

    return make


@pytest.fixture(scope="session")
def perturbed(
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[PreTrainedModel, int], tuple[Path, PreTrainedModel]]:
    """(safetensors file, model): the published weights of a version, a small step away from `model`."""

    def make(model: PreTrainedModel, version: int) -> tuple[Path, PreTrainedModel]:
        twin = AutoModelForCausalLM.from_config(model.config).eval()
        twin.load_state_dict(model.state_dict())
        generator = torch.Generator().manual_seed(version)
        with torch.no_grad():
            for parameter in twin.parameters():
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
        path = tmp_path_factory.mktemp("versions") / f"{version:06d}.safetensors"
        tensors = {name: parameter.detach().contiguous() for name, parameter in twin.named_parameters()}
        save_file(tensors, path)
        return path, twin

    return make
