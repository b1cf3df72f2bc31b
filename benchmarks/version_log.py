"""What the version log costs: bytes and time of a version, recorded as a delta of bf16 bits. Must never know a rollout.

SmolLM2-135M takes policy-gradient steps at four learning rates; each step's weights are published as bf16. Beside our
codec stand the same streams without their compressor, a general compressor over the whole XOR, a plain copy, and what
the torch engine takes to load the full copy: what a delta would have to beat if engines applied deltas (they do not).
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from agentgym.deltas import bits_of, changed_fraction, decode, difference, encode, flip
from agentgym.engine.torch_engine_weights import load_weights
from agentgym.server.models import resolve_model
from agentgym.trajectory import NO_VERSION, TokenSequence
from agentgym.weight_file import save_file
from agentgym_trainer.batch import MicroBatch, Row, build_micro_batches
from agentgym_trainer.correction import Correction
from agentgym_trainer.logprobs import token_logprobs
from agentgym_trainer.loss import decoupled_loss
from agentgym_trainer.publish import as_published, published_weights

LEARNING_RATES = (1e-6, 5e-6, 1e-5, 5e-5)
CHAIN = 8  # versions behind the newest
NUM_ROWS, PROMPT, LENGTH = 8, 8, 40
SEED = 7


def run(quick: bool) -> dict[str, object]:
    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    start = _model(quick)
    batches = _sampled_by(start)
    initial = {name: tensor.clone() for name, tensor in start.state_dict().items()}
    figures: dict[str, list[float]] = {}
    for lr in LEARNING_RATES[: 2 if quick else None]:
        start.load_state_dict(initial)
        found = _chain(start, batches, lr)
        print(f"lr {lr:g}: " + ", ".join(f"{name} {value:.4g}" for name, value in found.items()), file=sys.stderr)
        for name, value in found.items():
            figures.setdefault(name, []).append(value)
    return {
        **figures,
        "switch_ms": statistics.median(figures["switch_ms_by_lr"]),
        "memcpy_ms": statistics.median(figures.pop("memcpy_ms_by_lr")),
        "copy_mb": 2 * sum(tensor.numel() for tensor in start.parameters()) / 2**20,
    }


def _chain(model: PreTrainedModel, batches: list[MicroBatch], lr: float) -> dict[str, float]:
    """CHAIN steps at `lr`, each recorded; then back along the chain in place, to the very bits of the first."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.0)
    first = weights = published_weights(model, "bfloat16")
    copy_bytes = sum(array.nbytes for array in weights.values())
    generator = torch.Generator().manual_seed(SEED)
    chain, changed, encode_s, bare_bytes = [], [], [], []
    before = weights
    for _ in range(CHAIN):
        _step(model, optimizer, batches, generator)
        before, weights = weights, published_weights(model, "bfloat16")
        began = time.perf_counter()
        delta = difference(before, weights)
        data = encode(delta)
        encode_s.append(time.perf_counter() - began)
        chain.append(data)
        changed.append(changed_fraction(before, weights))
        bare_bytes.append(sum(3 * len(patch.indices) for patch in delta.values()))  # a gap byte, two of bits
    plain_bytes, plain_s = _plain(before, weights)  # once is enough: it is slow
    current = {name: array.copy() for name, array in weights.items()}
    spare = {name: np.empty_like(array) for name, array in weights.items()}
    switch_s, memcpy_s = [], []
    for data in reversed(chain):
        memcpy_s.append(_timed(lambda: [np.copyto(spare[name], current[name]) for name in current]))
        switch_s.append(_timed(lambda data=data: flip(current, decode(data))))
    if any(not np.array_equal(bits_of(current[name]), bits_of(first[name])) for name in first):
        raise AssertionError("the chain does not lead back to the first version")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "00000001.safetensors"
        save_file(weights, path)
        load_s = [_timed(lambda: load_weights(model, path)) for _ in range(3)]
    sizes = [len(data) / copy_bytes for data in chain]
    return {
        "lr": lr,
        "changed_fraction": statistics.mean(changed),
        "bytes_per_version_fraction": statistics.mean(sizes),
        "chain8_fraction": sum(sizes),
        "uncompressed_chain8_fraction": sum(bare_bytes) / copy_bytes,
        "zlib_of_xor_version_fraction": plain_bytes / copy_bytes,
        "zlib_of_xor_ms": 1000 * plain_s,
        "record_ms": 1000 * statistics.median(encode_s),
        "switch_ms_by_lr": 1000 * statistics.median(switch_s),
        "memcpy_ms_by_lr": 1000 * statistics.median(memcpy_s),
        "engine_load_ms_by_lr": 1000 * statistics.median(load_s),
    }


def _plain(old: Mapping[str, np.ndarray], new: Mapping[str, np.ndarray]) -> tuple[int, float]:
    """Bytes and seconds of a general compressor at its fastest over the whole XOR."""
    began = time.perf_counter()
    size = sum(len(zlib.compress(np.bitwise_xor(bits_of(old[name]), bits_of(new[name])).data, 1)) for name in new)
    return size, time.perf_counter() - began


def _timed(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def _step(
    model: PreTrainedModel, optimizer: torch.optim.Optimizer, batches: list[MicroBatch], generator: torch.Generator
) -> None:
    optimizer.zero_grad()
    with as_published(model, "bfloat16"):
        for batch in batches:
            advantages = torch.randn(len(batch.lengths), 1, generator=generator).expand_as(batch.advantages)
            policy = token_logprobs(model, batch).logprobs
            loss, _ = decoupled_loss(
                policy, policy.detach(), policy.detach(), advantages, batch.loss_mask,
                correction=Correction("token_mask", 2.0), denominator=float(NUM_ROWS * (LENGTH - PROMPT)),
            )  # fmt: skip
            loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()


def _sampled_by(model: PreTrainedModel) -> list[MicroBatch]:
    """Rows that the model itself sampled, as a policy's are."""
    prompts = torch.randint(3, model.config.vocab_size, (NUM_ROWS, PROMPT))
    token_ids = model.generate(  # type: ignore[operator]
        prompts, attention_mask=torch.ones_like(prompts), do_sample=True, top_k=0, top_p=1.0,
        min_new_tokens=LENGTH - PROMPT, max_new_tokens=LENGTH - PROMPT, pad_token_id=0,
    )  # fmt: skip
    mask = (False,) * PROMPT + (True,) * (LENGTH - PROMPT)
    versions = tuple(0 if sampled else NO_VERSION for sampled in mask)
    rows = [
        Row(TokenSequence(tuple(ids), mask, (0.0,) * LENGTH, versions, versions), 0.0) for ids in token_ids.tolist()
    ]
    return build_micro_batches(rows, max_tokens=NUM_ROWS * LENGTH)


def _model(quick: bool) -> PreTrainedModel:
    if not quick:
        folder = resolve_model("smollm2-135m", "maze", SEED, report=lambda text: print(text, file=sys.stderr))
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=256,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            tie_word_embeddings=True,
        )
    )
