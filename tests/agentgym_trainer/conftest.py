"""The smallest models and ragged rows that the trainer's tests share."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from agentgym.trajectory import NO_VERSION, TokenSequence
from agentgym_trainer.batch import Row

VOCABULARY = 23


@pytest.fixture
def make_model() -> Callable[..., LlamaForCausalLM]:
    """A two-layer Llama of 23 tokens from a seed."""

    def make(seed: int = 0, *, dtype: torch.dtype = torch.float32, tied: bool = False) -> LlamaForCausalLM:
        config = LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, max_position_embeddings=128, tie_word_embeddings=tied, initializer_range=0.4,
        )  # fmt: skip
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return LlamaForCausalLM(config).to(dtype)

    return make


@pytest.fixture
def make_rows() -> Callable[..., list[Row]]:
    """Rows of the given lengths: half of the tokens carry loss, versions rise within a row."""

    def make(lengths: Sequence[int], seed: int = 0, newest_version: int = 4, span: int = 3) -> list[Row]:
        rng = np.random.default_rng(seed)
        return [_row(rng, length, newest_version, span) for length in lengths]

    return make


def _row(rng: np.random.Generator, length: int, newest_version: int, span: int) -> Row:
    mask = rng.random(length) < 0.5
    mask[0], mask[-1] = False, True
    versions = np.sort(rng.integers(newest_version - span, newest_version + 1, length))
    logprobs = np.where(mask, rng.uniform(-4.0, -0.5, length), 0.0)
    versions = np.where(mask, versions, NO_VERSION).tolist()
    sequence = TokenSequence(
        tuple(rng.integers(0, VOCABULARY, length).tolist()), tuple(mask.tolist()), tuple(logprobs.tolist()),
        tuple(versions), tuple(versions),
    )  # fmt: skip
    return Row(sequence, float(rng.normal()))
