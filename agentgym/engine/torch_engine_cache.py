"""The KV cache of the torch engine. Law: position p of slot s lies at [s, :, p] whatever is in the batch around it.

transformers' own static cache has one position for the whole batch; here every row has its own. Attention over it runs
head group by head group (grouped-query attention without repeating the keys), as one batched product a side.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from transformers import AttentionInterface, Cache

GROUPED = "agentgym_grouped"  # the name under which transformers finds `grouped_attention`
_BUCKET = 32  # attention sees a whole number of these columns, so that kernels meet few shapes
_DENSE = 0.6  # from this share of live rows on, computing the idle ones too is cheaper than gathering the live ones
_EXTRAS = ("softcap", "s_aux", "sinks", "position_bias")  # terms of some models' attention that are not computed here
_SDPA_QUERIES = 64  # from this many query tokens on, the fused kernel that never holds all scores is the better one


def grouped_attention(
    module: torch.nn.Module,
    query: torch.Tensor,  # [B, H, T, D]
    key: torch.Tensor,  # [B, K, L, D], H a multiple of K
    value: torch.Tensor,
    attention_mask: torch.Tensor,  # [B, 1, T, L], added to the scores
    dropout: float = 0.0,
    scaling: float | None = None,
    **extras: Any,
) -> tuple[torch.Tensor, None]:
    """softmax(q k^T * scaling + mask) v in transformers' calling convention; [B, T, H, D]."""
    unheeded = [name for name in _EXTRAS if extras.get(name) is not None]
    if unheeded:
        raise NotImplementedError(f"grouped attention does not know {', '.join(unheeded)}")
    batch, heads, num_queries, depth = query.shape
    kv_heads, columns = key.shape[1], key.shape[2]
    scale = depth**-0.5 if scaling is None else scaling
    if num_queries >= _SDPA_QUERIES:
        if heads != kv_heads:
            key = key.repeat_interleave(heads // kv_heads, dim=1)
            value = value.repeat_interleave(heads // kv_heads, dim=1)
        fused = torch.nn.functional.scaled_dot_product_attention(query, key, value, attention_mask, scale=scale)
        return fused.transpose(1, 2).contiguous(), None
    rows, depth_v = heads // kv_heads * num_queries, value.shape[3]
    grouped = (query * scale).reshape(batch * kv_heads, rows, depth)
    keys = key.reshape(batch * kv_heads, columns, depth)
    values = value.reshape(batch * kv_heads, columns, depth_v)
    scores = torch.bmm(grouped, keys.transpose(1, 2)).view(batch, heads, num_queries, columns)
    scores += attention_mask
    weights = torch.softmax(scores, -1).view(batch * kv_heads, rows, columns)
    mixed = torch.bmm(weights, values).view(batch, heads, num_queries, depth_v)
    return mixed.transpose(1, 2).contiguous(), None


AttentionInterface.register(GROUPED, grouped_attention)


class SlotCache(Cache):
    """Keys and values of S slots, allocated when the first forward shows their shapes.

    Before each forward `select` says which rows and positions it is about. Column `max_context` of every row is
    scratch: padding and idle rows write there, and nobody ever attends to it.
    """

    def __init__(self, num_slots: int, max_context: int) -> None:
        super().__init__(layers=[])
        self._num_slots = num_slots
        self._columns = max_context + 1
        self._keys: list[torch.Tensor] = []  # by layer, [S, K, columns, D]
        self._values: list[torch.Tensor] = []
        self._rows: np.ndarray = np.zeros(0, np.int64)
        self._positions: np.ndarray = np.zeros((0, 0), np.int64)
        self._seen = 0
        self._gather: torch.Tensor | None = None
        self._index: dict[int, torch.Tensor] = {}  # by number of heads: where the new keys go

    def select(self, rows: np.ndarray, positions: np.ndarray, seen: int) -> int:
        """The next forward adds `positions` [R, T] to `rows` [R] and attends to the first `seen` positions.

        Returns the number of columns L that attention will see.
        """
        self._rows, self._positions, self._index = rows, positions, {}
        self._seen = min(-(-seen // _BUCKET) * _BUCKET, self._columns - 1)
        contiguous = rows[-1] == len(rows) - 1  # rows are sorted and distinct
        self._gather = None if contiguous else torch.from_numpy(rows)
        return self._seen

    @staticmethod
    def batch_rows(live: np.ndarray) -> np.ndarray:
        """The rows to compute for the sorted `live` ones: themselves, or all up to the last where they are dense."""
        span = int(live[-1]) + 1
        return np.arange(span) if len(live) >= _DENSE * span else live

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Stores [R, K, T, D] and returns what the selected rows attend to, [R, K, L, D]."""
        while len(self._keys) <= layer_idx:
            self._keys.append(self._allocate(key_states))
            self._values.append(self._allocate(value_states))
        keys, values = self._keys[layer_idx], self._values[layer_idx]
        index = self._index_of(key_states.shape[1])
        keys.view(-1, keys.shape[3]).index_copy_(0, index, key_states.reshape(-1, keys.shape[3]))
        values.view(-1, values.shape[3]).index_copy_(0, index, value_states.reshape(-1, values.shape[3]))
        if self._gather is None:
            count = len(self._rows)
            return keys[:count, :, : self._seen], values[:count, :, : self._seen]
        return (
            keys[:, :, : self._seen].index_select(0, self._gather),
            values[:, :, : self._seen].index_select(0, self._gather),
        )

    def _allocate(self, states: torch.Tensor) -> torch.Tensor:
        heads, depth = states.shape[1], states.shape[3]
        return torch.zeros(self._num_slots, heads, self._columns, depth, dtype=states.dtype)

    def _index_of(self, heads: int) -> torch.Tensor:
        if heads not in self._index:
            first = (self._rows[:, None] * heads + np.arange(heads)) * self._columns  # [R, K]
            self._index[heads] = torch.from_numpy((first[:, :, None] + self._positions[:, None, :]).reshape(-1))
        return self._index[heads]

    def copy(self, source: int, target: int, count: int) -> None:
        """Copies the first `count` positions of row `source` to row `target`."""
        for states in (*self._keys, *self._values):
            states[target, :, :count] = states[source, :, :count]

    def wipe(self, row: int) -> None:
        """Removes non-finite values, which even a masked column would pass on (0 * nan)."""
        for states in (*self._keys, *self._values):
            states[row] = 0.0

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Only a model that is not given its positions would ask; each row has its own length."""
        return 0
