"""Continuous batching over slots, one step at a time. Law: what a row samples depends on its own context, its own
numbers and the weights, never on what else is in the batch.

A step is at most one prefill (queries padded on the left, so that every row's last token is in the last column) and one
decode of all rows that are ready. Plain synchronous code: threads, futures and versions live in torch_engine.py.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import cast

import numpy as np
import torch
from transformers import PreTrainedModel

from agentgym.engine.noise import uniforms
from agentgym.engine.slots import Placement, SlotTable
from agentgym.engine.torch_engine_cache import GROUPED, SlotCache
from agentgym.errors import EngineError, InputError
from agentgym.policy import FinishReason, SamplingParams

_PREFILL_FLOP = 3e10  # a prefill forward of more work than this would keep a pause waiting for too long
_PREFILL_TOKENS = (128, 4096)  # least and most of one forward, whatever the model
_PREFILL_SHARE = 0.25  # of the rows that are ready to decode: fewer rows wait for others to prefill with
_PREFILL_PATIENCE = 4  # steps, at most
_PREFILL_SPREAD = 2  # rows of one prefill differ in length by at most twice this factor, or padding outweighs them
_PROOF_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.25}  # of logprobs


Span = tuple[int, int, int]  # (tokens sampled so far, policy version, kv version), at a span's end


@dataclass(slots=True, eq=False)
class Work:
    """One request on its way through the batch: what was asked, and what has been sampled so far."""

    prompt: np.ndarray  # int64 [P]
    params: SamplingParams
    seed: int
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    cancelled: bool = False  # nobody waits for it any more
    kv_version: int = 0  # the oldest version among its keys
    spans: list[Span] = field(default_factory=list)  # of versions before the one now served


Outcome = tuple[Work, FinishReason | EngineError]


class SlotBatch:
    """A model, its slots, and the requests that wait for one or sit in one."""

    def __init__(self, model: PreTrainedModel, num_slots: int, max_context: int) -> None:
        _check_context(model, max_context)
        self.model = model
        self.max_context = max_context
        self.vocab_size = cast(torch.nn.Embedding, model.get_input_embeddings()).num_embeddings
        self.waiting: deque[Work] = deque()
        self.running: dict[int, Work] = {}  # by slot
        self.policy_version = 0
        self.sampled_tokens = 0
        self.prefilled_tokens = 0
        parameters = sum(parameter.numel() for parameter in model.parameters())
        self._prefill_tokens = int(np.clip(_PREFILL_FLOP / (2 * parameters), *_PREFILL_TOKENS))
        self._held = 0  # steps for which rows that need a prefill have been waiting for more of them
        self._table = SlotTable(num_slots, max_context)
        self._cache = SlotCache(num_slots, max_context)
        self._columns = torch.arange(max_context)
        self._shut = torch.tensor(torch.finfo(model.dtype).min, dtype=model.dtype)
        self._open = torch.tensor(0.0, dtype=model.dtype)

    @property
    def idle(self) -> bool:
        """Whether a step would have nothing to do."""
        return not self.waiting and not self.running

    def interrupt(self) -> list[Outcome]:
        """Takes every request out, with what it has; rows keep their keys and values."""
        outcomes: list[Outcome] = [(work, "abort") for work in (*self.running.values(), *self.waiting)]
        for slot in self.running:
            self._table.release(slot)
        self.running.clear()
        self.waiting.clear()
        return outcomes

    def renew(self, version: int) -> None:
        """The model has new weights: no key or value in the cache is worth anything, except to the requests that are
        running on them, which go on and remember that."""
        for slot, work in self.running.items():
            end = work.spans[-1][0] if work.spans else 0
            if len(work.token_ids) > end:
                work.spans.append((len(work.token_ids), self.policy_version, work.kv_version))
            if not self._table.filled[slot]:
                work.kv_version = version
        self._table.forget()
        self.policy_version = version

    def step(self) -> list[Outcome]:
        """Admits what fits, prefills once, decodes once; returns the requests that ended."""
        outcomes = self._drop_cancelled()
        self._admit()
        pending = np.where(self._table.running, self._table.length - self._table.filled, 0)
        if self._prefill_pays(pending):
            rows, counts = self._prefill_rows(pending)
            self.prefilled_tokens += int(counts.sum())
            logits = self._forward(rows, counts)
            done = self._table.filled[rows] == self._table.length[rows]
            if done.any():
                self._sample(rows[done], logits[torch.from_numpy(done)], outcomes)
        ready = np.flatnonzero(self._table.running & (self._table.length - self._table.filled == 1))
        if len(ready):
            self._sample(ready, self._forward(ready, np.ones_like(ready)), outcomes)
        return outcomes

    # ------------------------------------------------------------------------------------------------- scheduling

    def _drop_cancelled(self) -> list[Outcome]:
        dropped = [self._end(slot) for slot, work in list(self.running.items()) if work.cancelled]
        if any(work.cancelled for work in self.waiting):
            dropped += [work for work in self.waiting if work.cancelled]
            self.waiting = deque(work for work in self.waiting if not work.cancelled)
        return [(work, "abort") for work in dropped]

    def _admit(self) -> None:
        """Places waiting requests in their order; one that is better placed in a moment lets the next ones pass."""
        deferred: list[Work] = []
        while self.waiting and not self._table.running.all():
            work = self.waiting.popleft()
            placement = self._table.place(work.prompt)
            if placement is None:
                deferred.append(work)
            else:
                self._occupy(work, placement)
        self.waiting.extendleft(reversed(deferred))

    def _occupy(self, work: Work, placement: Placement) -> None:
        if placement.source != placement.slot:
            self._cache.copy(placement.source, placement.slot, placement.reused)
        draws = uniforms(work.seed, len(work.prompt), work.params.max_tokens)
        self._table.occupy(placement, work.prompt, draws, work.params.temperature)
        work.kv_version = self.policy_version
        self.running[placement.slot] = work

    def _prefill_pays(self, pending: np.ndarray) -> bool:
        """Whether to prefill now: a forward of few tokens costs about what one of many does, so few wait for others."""
        waiting = pending > 1
        few = waiting.sum() < _PREFILL_SHARE * (pending == 1).sum()
        small = pending[waiting].sum() < _PREFILL_SHARE * self._prefill_tokens
        self._held = self._held + 1 if waiting.any() and few and small else 0
        if self._held > _PREFILL_PATIENCE:
            self._held = 0
        return bool(waiting.any()) and self._held == 0

    def _prefill_rows(self, pending: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The rows of the next prefill and how many tokens of each: the row that has waited longest and those of
        about its length, as many as the budget holds."""
        rows = np.flatnonzero(pending > 1)
        seed = pending[rows[self._table.since[rows].argmin()]]
        rows = rows[(pending[rows] * _PREFILL_SPREAD >= seed) & (pending[rows] <= seed * _PREFILL_SPREAD)]
        width = min(int(pending[rows].max()), self._prefill_tokens)
        rows = rows[np.argsort(self._table.since[rows])][: max(1, self._prefill_tokens // width)]
        return np.sort(rows), np.minimum(pending[np.sort(rows)], width)

    def _end(self, slot: int) -> Work:
        self._table.release(slot)
        return self.running.pop(slot)

    # -------------------------------------------------------------------------------------------------- computing

    def _forward(self, live: np.ndarray, counts: np.ndarray) -> torch.Tensor:
        """Computes the next `counts` [R] tokens of the sorted rows `live` [R]; logits behind the last, [R, V]."""
        table, width = self._table, int(counts.max())
        rows = SlotCache.batch_rows(live) if width == 1 else live
        dense = len(rows) != len(live)
        columns = np.arange(1 - width, 1) + (table.filled[live] + counts)[:, None] - 1
        real = columns >= table.filled[live][:, None]  # [R, T], False where padded
        positions, writes = np.where(real, columns, 0), np.where(real, columns, self.max_context)
        token_ids = table.tokens[live[:, None], positions]
        if dense:
            positions, token_ids = _spread(positions, live, len(rows), 0), _spread(token_ids, live, len(rows), 0)
            writes = _spread(writes, live, len(rows), self.max_context)
        table.filled[live] += counts
        seen = self._cache.select(rows, writes, int(table.filled[live].max()))
        at = torch.from_numpy(positions)
        mask = torch.where(self._columns[:seen] > at[:, :, None], self._shut, self._open)  # [R, T, L]
        logits = self.model(
            input_ids=torch.from_numpy(token_ids),
            attention_mask=mask[:, None],
            position_ids=at,
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]
        return logits[torch.from_numpy(live)] if dense else logits

    def _sample(self, rows: np.ndarray, logits: torch.Tensor, outcomes: list[Outcome]) -> None:
        """Gives each row its next token and ends those that are complete."""
        table = self._table
        at = table.length[rows]
        chosen, logprobs = draw(logits, table.temperature[rows], table.draws[rows, at])
        table.tokens[rows, at] = chosen
        table.length[rows] += 1
        self.sampled_tokens += len(rows)
        for slot, token, logprob in zip(rows.tolist(), chosen.tolist(), logprobs.tolist(), strict=True):
            work = self.running[slot]
            if logprob != logprob:
                self._cache.wipe(slot)
                table.forget(slot)
                outcomes.append((self._end(slot), EngineError("the model's logits are not finite")))
                continue
            work.token_ids.append(token)
            work.logprobs.append(logprob)
            if token in work.params.stop_token_ids:
                outcomes.append((self._end(slot), "stop"))
            elif len(work.token_ids) == work.params.max_tokens:
                outcomes.append((self._end(slot), "length"))

    # ------------------------------------------------------------------------------------------------------ proof

    def prove(self) -> None:
        """Shows that this model, through this cache, gives what its plain forward gives; else EngineError.

        Takes the grouped attention where it passes, and the model's own where not (soft-capped scores, sinks, ...).
        """
        own = self.model.config._attn_implementation or "eager"
        rng = np.random.default_rng(0)
        rows = np.unique([0, min(2, len(self._table.running) - 1)])
        contexts = rng.integers(0, self.vocab_size, (len(rows), min(14, self.max_context)))
        plain = self.model(input_ids=torch.from_numpy(contexts), use_cache=False).logits.float().log_softmax(-1)
        causes = []
        for implementation in (GROUPED, own):
            self.model.set_attn_implementation(implementation)
            try:
                error = self._proof_error(rows, contexts, plain)
            except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as failure:
                causes.append(f"{implementation}: {type(failure).__name__}: {failure}")
            else:
                if error <= _PROOF_TOLERANCE[self.model.dtype]:
                    return
                causes.append(f"{implementation}: logprobs are off by {error:.2g}")
        raise EngineError(
            f"{type(self.model).__name__} does not compute the same through the slot cache as without "
            f"({'; '.join(causes)}); only models with plain causal attention in every layer can be served"
        )

    def _proof_error(self, rows: np.ndarray, contexts: np.ndarray, plain: torch.Tensor) -> float:
        """Prefills unequal lengths, then decodes; the largest difference of logprobs from `plain` [R, T, V]."""
        table, total = self._table, contexts.shape[1]
        table.tokens[rows, :total] = contexts
        table.filled[rows] = 0
        counts = np.maximum(1, total - 4 - 3 * np.arange(len(rows)))
        error = 0.0
        while True:
            logprobs = self._forward(rows, counts).float().log_softmax(-1)
            wanted = plain[torch.arange(len(rows)), torch.from_numpy(table.filled[rows] - 1)]
            error = max(error, (logprobs - wanted).abs().nan_to_num(np.inf, np.inf).max().item())
            if (table.filled[rows] == total).any():
                table.forget()
                return error
            counts = np.ones_like(rows)


def draw(logits: torch.Tensor, temperature: np.ndarray, draws: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """Inverse-CDF samples [R] of softmax(logits [R, V] / temperature [R]) at `draws` [R] in [0, 1), and their logprobs.

    Temperature 0 takes the likeliest token, with its logprob at temperature 1.
    """
    scaled = logits.float()
    if (temperature != 1.0).any():
        heat = torch.from_numpy(np.where(temperature == 0, 1, temperature).astype(np.float32))
        scaled = (scaled - scaled.amax(-1, keepdim=True)) / heat[:, None]
    probabilities = scaled.softmax(-1)
    cumulated = probabilities.cumsum(-1)
    targets = torch.from_numpy(draws)[:, None] * cumulated[:, -1:]
    chosen = torch.searchsorted(cumulated, targets, right=True).clamp_(max=logits.shape[1] - 1)
    if (temperature == 0).any():
        greedy = torch.from_numpy(temperature == 0)
        chosen = torch.where(greedy[:, None], probabilities.argmax(-1, keepdim=True), chosen)
    return chosen[:, 0], probabilities.gather(1, chosen)[:, 0].log()


def _spread(values: np.ndarray, live: np.ndarray, count: int, idle: int) -> np.ndarray:
    """`values` [R, T] of the live rows among `count` rows, the others `idle`."""
    wide = np.full((count, values.shape[1]), idle)
    wide[live] = values
    return wide


def _check_context(model: PreTrainedModel, max_context: int) -> None:
    config = model.config.get_text_config()
    longest = getattr(config, "max_position_embeddings", None)
    if longest is not None and max_context > longest:
        raise InputError(
            f"engine max_context must be <= {longest} (the model's max_position_embeddings), got {max_context}"
        )
    window = getattr(config, "sliding_window", None)
    if window is not None and getattr(config, "use_sliding_window", True) and window < max_context:
        raise InputError(f"engine max_context must be <= {window} (the model's sliding_window), got {max_context}")
