"""The smallest language model that learns: its shape, and its warm start on deliberately imperfect demonstrations.

Owns the supervised steps before any reinforcement. Must never know an environment: it reads token sequences. Law: the
loss is on the demonstrators' own tokens only, and equal demonstrations and seeds give equal weights.
"""

from __future__ import annotations

import json
import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

from agentgym.errors import TrainingError
from agentgym.trajectory import TokenSequence

Report = Callable[[str], None]
_IGNORED = -100


@dataclass(frozen=True, slots=True)
class Recipe:
    """A tiny model and its warm start. Changed by whoever changes the model; a run's configuration does not.

    Example: `Recipe()` has 104,000 parameters with the maze's 29 tokens and takes about half a minute on one core.
    """

    width: int = 64
    layers: int = 2
    heads: int = 2
    kv_heads: int = 1
    feed_forward: int = 200
    init_std: float = 0.125  # 1/sqrt(width); with 0.02 the warm start is far from done after as many steps
    max_context: int = 4096
    episodes: int = 10_000  # demonstrations
    oracle: float = 0.30  # shares of their moves; the rest is random
    habit: float = 0.54
    steps: int = 1000
    warmup_steps: int = 20
    batch: int = 16  # episodes a step; 32 and half the steps learn less
    learning_rate: float = 4e-3
    max_row: int = 1024  # longer demonstrations are cut


@dataclass(frozen=True, slots=True)
class WarmStart:
    """How a warm start went.

    Example: `WarmStart(first_loss=1.6, last_loss=0.2, steps=1000, seconds=24.0, cpu_seconds=23.1, parameters=103552)`.
    """

    first_loss: float  # per action token, means of ten steps
    last_loss: float
    steps: int
    seconds: float
    cpu_seconds: float
    parameters: int


def build_model(recipe: Recipe, vocabulary: int, pad_token_id: int, end_token_id: int, seed: int) -> LlamaForCausalLM:
    """A fresh model whose weights `seed` determines, whatever the state of torch's global generator."""
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=recipe.width,
        intermediate_size=recipe.feed_forward,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.kv_heads,
        max_position_embeddings=recipe.max_context,
        tie_word_embeddings=True,
        initializer_range=recipe.init_std,
        pad_token_id=pad_token_id,
        bos_token_id=None,
        eos_token_id=end_token_id,
        dtype=torch.float32,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def read_demonstrations(folder: Path) -> tuple[list[TokenSequence], dict[str, Any]]:
    """The sequences of `folder` and its summary (vocabulary, pad_token_id, end_token_id, mean_reward, ...)."""
    sequences = msgspec.msgpack.decode((folder / "demonstrations.msgpack").read_bytes(), type=list[TokenSequence])
    return sequences, json.loads((folder / "demonstrations.json").read_text(encoding="utf-8"))


def warm_start(
    model: LlamaForCausalLM, sequences: Sequence[TokenSequence], recipe: Recipe, seed: int, report: Report
) -> WarmStart:
    """Trains `model` in place to imitate `sequences`, in one thread where that is fastest (its matrices are small).

    Raises TrainingError if the loss is not finite or there is nothing to learn from.
    """
    rows = [_row(sequence, recipe.max_row) for sequence in sequences]
    rows = [row for row in rows if row[1].ne(_IGNORED).any()]
    if not rows:
        raise TrainingError("the demonstrations hold no token of an assistant to learn from")
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate, weight_decay=0.0, foreach=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _learning_rate(step, recipe))
    began, cpu_began = time.monotonic(), time.process_time()
    losses: list[float] = []
    model.train()
    for step, (ids, labels) in enumerate(_batches(rows, recipe, model.config.pad_token_id or 0, seed)):
        # Rows are padded on the right, so that a causal model needs no mask; padding has no label.
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
        wanted = labels[:, 1:]
        places = wanted.ne(_IGNORED)
        loss = functional.cross_entropy(model.lm_head(hidden[places]), wanted[places])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            raise TrainingError(f"the warm start's loss is {losses[-1]} at step {step}")
        if (step + 1) % 200 == 0 or step + 1 == recipe.steps:
            recent = sum(losses[-10:]) / len(losses[-10:])
            report(f"warm start: step {step + 1} of {recipe.steps}, loss {recent:.3f} per action token")
    model.eval()
    first, last = losses[:10], losses[-10:]
    return WarmStart(
        sum(first) / len(first), sum(last) / len(last), len(losses), time.monotonic() - began,
        time.process_time() - cpu_began, sum(parameter.numel() for parameter in model.parameters()),
    )  # fmt: skip


def _learning_rate(step: int, recipe: Recipe) -> float:
    """Linear warm-up, then a cosine to zero; as a factor."""
    if step < recipe.warmup_steps:
        return (step + 1) / recipe.warmup_steps
    done = (step - recipe.warmup_steps) / max(1, recipe.steps - recipe.warmup_steps)
    return 0.5 * (1.0 + math.cos(math.pi * min(1.0, done)))


def _row(sequence: TokenSequence, longest: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids [T] and labels [T]; index t of both concerns token t."""
    ids = torch.tensor(sequence.token_ids[:longest])
    mask = torch.tensor(sequence.loss_mask[:longest])
    return ids, torch.where(mask, ids, _IGNORED)


def _batches(
    rows: Sequence[tuple[torch.Tensor, torch.Tensor]], recipe: Recipe, pad: int, seed: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """`recipe.steps` batches [B, T]; each epoch in its own order, rows of like length together."""
    chooser = random.Random(seed)
    waiting: list[list[int]] = []
    for _ in range(recipe.steps):
        if not waiting:
            waiting = _epoch(rows, recipe.batch, chooser)
        chosen = waiting.pop()
        longest = max(len(rows[i][0]) for i in chosen)
        ids = torch.full((len(chosen), longest), pad)
        labels = torch.full((len(chosen), longest), _IGNORED)
        for k, i in enumerate(chosen):
            length = len(rows[i][0])
            ids[k, :length], labels[k, :length] = rows[i]
        yield ids, labels


def _epoch(rows: Sequence[tuple[torch.Tensor, torch.Tensor]], size: int, chooser: random.Random) -> list[list[int]]:
    """Batches of row numbers. Lengths are sorted within pools of eight batches only, so that batches stay mixed."""
    order = list(range(len(rows)))
    chooser.shuffle(order)
    batches: list[list[int]] = []
    for start in range(0, len(order), 8 * size):
        pool = sorted(order[start : start + 8 * size], key=lambda i: len(rows[i][0]))
        batches += [pool[at : at + size] for at in range(0, len(pool), size)]
    chooser.shuffle(batches)
    return batches
