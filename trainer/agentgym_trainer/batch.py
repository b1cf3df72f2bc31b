"""From scored trajectories to the micro-batches of one optimizer step. Must never know a model or a loss.

Law: every sampled token of an included trajectory is delivered once or counted as undelivered; every rank gets the
same number of micro-batches, of the same shapes but for the last of a bucket, computed without a word between ranks.

Layout: rows of similar length, padded on the right. A causal model never looks right, so no attention mask is needed
and the fast causal kernels run; packing with a block-diagonal mask was measured slower (benchmarks/trainer_throughput).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from agentgym.errors import InputError
from agentgym.trajectory import NO_VERSION, ScoredSequences, TokenSequence
from agentgym_trainer.advantages import Advantages

# What one more micro-batch costs, in tokens: dispatch, small kernels, one more pass over the gradients. With it the
# planner trades padding against the number of micro-batches. On one CPU core 64 suits 13M parameters, 256 suits 0.1M.
OVERHEAD_TOKENS = 128
PADDING_ROW = -1  # row id of a row that only fills a rank's share


@dataclass(frozen=True, slots=True)
class RowKey:
    """Where a row comes from: what its old logprobs are looked up by. Example: `RowKey("g-000004.2", 0)`."""

    trajectory_id: str
    row: int  # its place among the trajectory's token sequences


@dataclass(frozen=True, slots=True)
class Row:
    """One token sequence of a step and the advantage of its trajectory.

    Example: `Row(TokenSequence((1, 7, 5), (False, False, True), (0., 0., -.1), (-1, -1, 3), (-1, -1, 3)), 0.5)`.
    """

    sequence: TokenSequence
    advantage: float
    key: RowKey | None = None  # None: of no trajectory, made by hand


@dataclass(frozen=True, slots=True)
class StepRows:
    """The rows of one optimizer step over all ranks, and what was counted before anything was masked.

    Example: two rows of 3 loss tokens each, one of them with a nan logprob: num_loss_tokens 5, num_loss_rows 2,
    num_dropped 1.
    """

    rows: tuple[Row, ...]
    num_loss_tokens: int  # with a finite behavior logprob: the loss's denominator
    num_loss_rows: int  # with such a token: the denominator of objectives by row
    num_dropped: int  # loss tokens without one
    num_sampled_tokens: int  # of the included trajectories
    num_undelivered: int  # loss tokens of rows longer than max_seq_len, and sampled tokens that no row holds
    num_too_long: int  # rows longer than max_seq_len
    num_excluded: int  # trajectories that no baseline includes
    included: frozenset[str] = frozenset()  # ids of the others, whether or not a row of theirs was short enough

    @classmethod
    def joined(cls, parts: Sequence[StepRows]) -> StepRows:
        """Of the optimizer steps that one batch was cut into."""
        counts = [field.name for field in fields(cls) if field.name.startswith("num_")]
        return cls(
            rows=tuple(row for part in parts for row in part.rows),
            included=frozenset[str]().union(*(part.included for part in parts)),
            **{name: sum(getattr(part, name) for part in parts) for name in counts},
        )

    @property
    def delivered_fraction(self) -> float:
        return 1.0 - self.num_undelivered / self.num_sampled_tokens if self.num_sampled_tokens else 1.0


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """B rows of at most T tokens, padded on the right; one forward and backward. Index t concerns token t itself.

    Example: rows (1, 7, 5) and (1, 2): token_ids [[1, 7, 5], [1, 2, 0]], lengths [3, 2], row_ids [0, 1].
    """

    token_ids: Tensor  # [B, T] int64
    lengths: Tensor  # [B] int64
    loss_mask: Tensor  # [B, T] bool; False on padding
    behavior_logprobs: Tensor  # [B, T] float32; 0.0 where nothing was sampled
    policy_versions: Tensor  # [B, T] int64; -1 where nothing was sampled
    kv_versions: Tensor  # [B, T] int64
    advantages: Tensor  # [B, T] float32, a row's advantage on each of its tokens
    row_ids: Tensor  # [B] int64: index into StepRows.rows; PADDING_ROW for a row that only fills
    keys: tuple[RowKey | None, ...] = ()  # [B] of the rows; None for one that only fills

    @property
    def num_tokens(self) -> int:
        """Tokens of the padded rectangle."""
        return self.token_ids.numel()

    def to(self, device: torch.device | str) -> MicroBatch:
        columns = {field.name: getattr(self, field.name) for field in fields(self)}
        moved = {name: value.to(device) for name, value in columns.items() if isinstance(value, Tensor)}
        return replace(self, **moved)


def collect_rows(
    trajectories: Sequence[ScoredSequences], advantages: Advantages, *, max_seq_len: int | None = None
) -> StepRows:
    """The rows of every included trajectory, in order. Rows longer than `max_seq_len` are left out and counted."""
    if len(trajectories) != len(advantages.values):
        raise InputError(f"{len(trajectories)} trajectories and {len(advantages.values)} advantages")
    rows: list[Row] = []
    num_sampled = num_delivered = num_too_long = 0
    for trajectory, value, included in zip(trajectories, advantages.values, advantages.included):
        if not included:
            continue
        num_sampled += trajectory.num_sampled_tokens
        for number, sequence in enumerate(trajectory.sequences):
            if max_seq_len is not None and len(sequence) > max_seq_len:
                num_too_long += 1
            elif sequence.num_loss_tokens:
                _check(sequence, trajectory.trajectory_id)
                rows.append(Row(sequence, float(value), RowKey(trajectory.trajectory_id, number)))
                num_delivered += sequence.num_loss_tokens
    num_finite = count_loss_tokens(row.sequence for row in rows)
    return StepRows(
        tuple(rows),
        num_loss_tokens=num_finite,
        num_loss_rows=count_loss_rows(row.sequence for row in rows),
        num_dropped=num_delivered - num_finite,
        num_sampled_tokens=num_sampled,
        num_undelivered=num_sampled - num_delivered,
        num_too_long=num_too_long,
        num_excluded=len(trajectories) - int(advantages.included.sum()),
        included=frozenset(t.trajectory_id for t, included in zip(trajectories, advantages.included) if included),
    )


def count_loss_rows(sequences: Iterable[TokenSequence]) -> int:
    """Rows with at least one loss token of a finite behavior logprob: what objectives by row are divided by."""
    return sum(count_loss_tokens([sequence]) > 0 for sequence in sequences)


def count_loss_tokens(sequences: Iterable[TokenSequence]) -> int:
    """Loss tokens with a finite behavior logprob: the denominator of a step over these token sequences."""
    return sum(
        sum(
            1
            for mask, logprob in zip(sequence.loss_mask, sequence.behavior_logprobs)
            if mask and math.isfinite(logprob)
        )
        for sequence in sequences
    )


def build_micro_batches(
    rows: Sequence[Row], *, max_tokens: int, rank: int = 0, world_size: int = 1
) -> list[MicroBatch]:
    """This rank's micro-batches of the step, longest rows first; at most `max_tokens` padded tokens each, except that
    a single longer row goes alone. Deterministic: each rank computes the whole plan from the same rows.

    Rows sorted by length are dealt to the ranks in turn, back and forth, and cut at the same places on every rank, so
    all ranks have the same number of micro-batches. Where the rows do not come out even, a rank's missing row is a
    fully masked one.
    """
    if max_tokens < 1:
        raise InputError(f"max_tokens must be >= 1, got {max_tokens}")
    if not 0 <= rank < world_size:
        raise InputError(f"rank must be in 0..{world_size - 1}, got {rank}")
    order = sorted(range(len(rows)), key=lambda index: (-len(rows[index].sequence), index))
    deals = [order[start : start + world_size] for start in range(0, len(order), world_size)]
    longest = [len(rows[deal[0]].sequence) for deal in deals]
    mine = [_share(deal, turn, rank, world_size) for turn, deal in enumerate(deals)]
    cuts = plan_cuts(longest, max_tokens)
    return [
        _assemble(rows, [index for index in mine[start:stop] if index is not None]) for start, stop in pairwise(cuts)
    ]


def plan_cuts(lengths: Sequence[int], max_tokens: int) -> list[int]:
    """Where to cut a list of lengths, longest first, into micro-batches: minimises padded tokens plus OVERHEAD_TOKENS
    for each micro-batch. Returns the borders, `[0, ..., len(lengths)]`. Exact, by dynamic programming."""
    n = len(lengths)
    width = np.asarray(lengths, dtype=np.int64)
    cost = np.zeros(n + 1, dtype=np.int64)  # cost[i] = the cheapest way to place the first i
    first = np.zeros(n + 1, dtype=np.int64)  # where its last micro-batch begins
    for i in range(1, n + 1):
        starts = np.arange(i)
        area = (i - starts) * width[:i]
        allowed = (area <= max_tokens) | (starts == i - 1)
        total = np.where(allowed, cost[:i] + area + OVERHEAD_TOKENS, np.iinfo(np.int64).max)
        first[i] = int(np.argmin(total))
        cost[i] = total[first[i]]
    cuts = [n]
    while cuts[-1] > 0:
        cuts.append(int(first[cuts[-1]]))
    return cuts[::-1]


def _share(deal: Sequence[int], turn: int, rank: int, world_size: int) -> int | None:
    place = rank if turn % 2 == 0 else world_size - 1 - rank
    return deal[place] if place < len(deal) else None


def _assemble(rows: Sequence[Row], indices: Sequence[int]) -> MicroBatch:
    chosen = [rows[index].sequence for index in indices]
    if not chosen:  # a share that only keeps this rank in step with the others
        chosen, indices = [TokenSequence((0, 0), (False,) * 2, (0.0,) * 2, (NO_VERSION,) * 2, (NO_VERSION,) * 2)], ()
    width = max(len(sequence) for sequence in chosen)

    def column(values: Sequence[Sequence[float]], fill: float, dtype: torch.dtype) -> Tensor:
        table = torch.full((len(values), width), fill, dtype=dtype)
        for i, value in enumerate(values):
            table[i, : len(value)] = torch.tensor(value, dtype=dtype)
        return table

    advantages = torch.tensor([rows[index].advantage for index in indices] or [0.0], dtype=torch.float32)
    return MicroBatch(
        token_ids=column([s.token_ids for s in chosen], 0, torch.int64),
        lengths=torch.tensor([len(s) for s in chosen]),
        loss_mask=column([s.loss_mask for s in chosen], False, torch.bool),
        behavior_logprobs=column([s.behavior_logprobs for s in chosen], 0.0, torch.float32),
        policy_versions=column([s.policy_versions for s in chosen], NO_VERSION, torch.int64),
        kv_versions=column([s.kv_versions for s in chosen], NO_VERSION, torch.int64),
        advantages=advantages[:, None].expand(-1, width).contiguous(),
        row_ids=torch.tensor(list(indices) or [PADDING_ROW]),
        keys=tuple(rows[index].key for index in indices) or (None,),
    )


def _check(sequence: TokenSequence, trajectory_id: str) -> None:
    if sequence.loss_mask[0]:
        raise InputError(f"trajectory {trajectory_id}: the first token of a row cannot carry loss, nothing predicts it")
    if any(mask and version < 0 for mask, version in zip(sequence.loss_mask, sequence.policy_versions)):
        raise InputError(f"trajectory {trajectory_id}: a sampled token has no policy version")
