"""Tokens trained per second (forward, loss, backward) on ragged rows. Must never know a rollout.

Four sides do the same sum over the same rows on one thread, interleaved: ours (rows of similar length, padded on the
right); one sequence at a time, where nothing is padded (the bound); padded micro-batches of a fixed number of rows in
their order of arrival (the plain way); and rows packed into one long row behind a block-diagonal mask. All compute
logits only where a loss token is predicted, so that the ratios speak of layout alone.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from agentgym.trajectory import NO_VERSION, TokenSequence
from agentgym_trainer.batch import MicroBatch, Row, build_micro_batches
from agentgym_trainer.correction import Correction
from agentgym_trainer.logprobs import token_logprobs
from agentgym_trainer.loss import decoupled_loss

MAX_TOKENS = 4096  # padded tokens of one micro-batch, on every side
ROWS_PER_PADDED_BATCH = 8
LOSS_FRACTION = 0.4  # an agent's rows are mostly observations
SEED = 7


def run(quick: bool) -> dict[str, object]:
    torch.set_num_threads(1)
    model = _model(quick)
    rows = _ragged_rows(num_rows=12 if quick else 48, median=24 if quick else 96, longest=128 if quick else 1024)
    sides: dict[str, Callable[[], float]] = {
        "ours": lambda: _train(model, build_micro_batches(rows, max_tokens=MAX_TOKENS)),
        "unpadded_bound": lambda: _train(model, [b for row in rows for b in build_micro_batches([row], max_tokens=1)]),
        "padded": lambda: _train(model, _in_arrival_order(rows)),
        "packed": lambda: _train_packed(model, rows),
    }
    gradients = [_gradient(model, side) for side in sides.values()]  # warms up, too
    wall: dict[str, list[float]] = {name: [] for name in sides}
    cpu: dict[str, list[float]] = {name: [] for name in sides}
    for repetition in range(1 if quick else 3):
        for name, side in sides.items():
            started, cpu_started = time.perf_counter(), time.process_time()
            side()
            wall[name].append(time.perf_counter() - started)
            cpu[name].append(time.process_time() - cpu_started)
            print(f"repetition {repetition}: {name} {wall[name][-1]:.2f} s", file=sys.stderr)
    num_tokens = sum(len(row.sequence) for row in rows)
    seconds = {name: statistics.median(values) for name, values in wall.items()}
    cpu_seconds = {name: statistics.median(values) for name, values in cpu.items()}
    batches = build_micro_batches(rows, max_tokens=MAX_TOKENS)
    return {
        "tokens_per_s": num_tokens / seconds["ours"],
        "unpadded_bound_tokens_per_s": num_tokens / seconds["unpadded_bound"],
        "padded_tokens_per_s": num_tokens / seconds["padded"],
        "packed_tokens_per_s": num_tokens / seconds["packed"],
        "ratio_bound": seconds["unpadded_bound"] / seconds["ours"],
        "ratio_padded": seconds["padded"] / seconds["ours"],
        "ratio_packed": seconds["packed"] / seconds["ours"],
        "cpu_ratio_bound": cpu_seconds["unpadded_bound"] / cpu_seconds["ours"],
        "cpu_ratio_padded": cpu_seconds["padded"] / cpu_seconds["ours"],
        "cpu_s": cpu_seconds["ours"],
        "wall_s": seconds["ours"],
        "num_tokens": num_tokens,
        "num_parameters": sum(parameter.numel() for parameter in model.parameters()),
        "padding_fraction": 1.0 - num_tokens / sum(batch.num_tokens for batch in batches),
        "padding_fraction_padded": 1.0 - num_tokens / sum(batch.num_tokens for batch in _in_arrival_order(rows)),
        "max_gradient_difference": max(float((g - gradients[0]).abs().max()) for g in gradients),  # one sum, four ways
        "max_gradient": float(gradients[0].abs().max()),
    }


def _model(quick: bool) -> LlamaForCausalLM:
    width = 32 if quick else 384
    config = LlamaConfig(
        vocab_size=256 if quick else 8192, hidden_size=width, intermediate_size=width * 8 // 3,
        num_hidden_layers=2 if quick else 6, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=8192, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(SEED)
    return LlamaForCausalLM(config)


def _ragged_rows(num_rows: int, median: int, longest: int) -> list[Row]:
    """Log-normal lengths, as episodes of a few to many turns have."""
    rng = np.random.default_rng(SEED)
    lengths = np.clip(rng.lognormal(np.log(median), 1.0, num_rows), 8, longest).astype(int)
    rows = []
    for length in lengths:
        mask = rng.random(length) < LOSS_FRACTION
        mask[0], mask[-1] = False, True
        versions = tuple(np.where(mask, 0, NO_VERSION).tolist())
        logprobs = tuple(np.where(mask, -5.0, 0.0).tolist())
        token_ids = tuple(rng.integers(0, 256, length).tolist())
        rows.append(Row(TokenSequence(token_ids, tuple(mask.tolist()), logprobs, versions, versions), rng.normal()))
    return rows


def _in_arrival_order(rows: Sequence[Row]) -> list[MicroBatch]:
    # A budget that the rows just fit makes one micro-batch of them, whatever their lengths.
    batches = []
    for start in range(0, len(rows), ROWS_PER_PADDED_BATCH):
        part = rows[start : start + ROWS_PER_PADDED_BATCH]
        widest = max(len(row.sequence) for row in part)
        filled = [Row(_lengthened(row.sequence, widest), row.advantage) for row in part]
        batches += build_micro_batches(filled, max_tokens=widest * len(part))
    return batches


def _lengthened(sequence: TokenSequence, length: int) -> TokenSequence:
    padding = length - len(sequence)
    return TokenSequence(
        sequence.token_ids + (0,) * padding, sequence.loss_mask + (False,) * padding,
        sequence.behavior_logprobs + (0.0,) * padding, sequence.policy_versions + (NO_VERSION,) * padding,
        sequence.kv_versions + (NO_VERSION,) * padding,
    )  # fmt: skip


def _train(model: LlamaForCausalLM, batches: Sequence[MicroBatch]) -> float:
    model.zero_grad()
    total = 0.0
    for batch in batches:
        logprobs = token_logprobs(model, batch).logprobs
        loss = _loss(logprobs, batch.behavior_logprobs, batch.advantages, batch.loss_mask)
        loss.backward()
        total += loss.item()
    return total


def _train_packed(model: LlamaForCausalLM, rows: Sequence[Row]) -> float:
    model.zero_grad()
    total = 0.0
    for part in _packs(rows):
        lengths = torch.tensor([len(row.sequence) for row in part])
        row_of = torch.repeat_interleave(torch.arange(len(part)), lengths)
        positions = torch.cat([torch.arange(int(length)) for length in lengths])
        mask = (row_of[:, None] == row_of) & (positions[:, None] >= positions)
        sequences = [row.sequence for row in part]
        token_ids = torch.tensor([token for s in sequences for token in s.token_ids])
        loss_mask = torch.tensor([value for s in sequences for value in s.loss_mask])
        behavior = torch.tensor([value for s in sequences for value in s.behavior_logprobs])
        advantages = torch.tensor([row.advantage for row in part])[row_of].float()
        hidden = model.model(
            input_ids=token_ids[None], position_ids=positions[None], attention_mask=mask[None, None], use_cache=False
        ).last_hidden_state[0]
        where = loss_mask.nonzero()[:, 0]
        logprobs = -torch.nn.functional.cross_entropy(
            model.lm_head(hidden[where - 1]), token_ids[where], reduction="none"
        )
        loss = _loss(logprobs, behavior[where], advantages[where], torch.ones_like(where, dtype=torch.bool))
        loss.backward()
        total += loss.item()
    return total


def _packs(rows: Sequence[Row]) -> list[list[Row]]:
    """First fit into rows of at most MAX_TOKENS."""
    packs: list[list[Row]] = []
    for row in sorted(rows, key=lambda row: -len(row.sequence)):
        for pack in packs:
            if sum(len(other.sequence) for other in pack) + len(row.sequence) <= MAX_TOKENS:
                pack.append(row)
                break
        else:
            packs.append([row])
    return packs


def _loss(logprobs: Tensor, behavior: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    correction = Correction("token_truncate", 2.0)
    return decoupled_loss(
        logprobs, logprobs.detach(), behavior, advantages, mask, correction=correction, denominator=1000.0
    )[0]


def _gradient(model: LlamaForCausalLM, side: Callable[[], float]) -> Tensor:
    side()
    return torch.cat([p.grad.flatten().clone() for p in model.parameters() if p.grad is not None])
