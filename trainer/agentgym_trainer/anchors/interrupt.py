"""The `interrupt` route: just before the optimizer step, sampling is paused and every token of the present weights that
was not scored yet is scored by them, in-flight ones included. Must never know the loss.

Laws: when the weights change, every sampled token of a trajectory that may still be trained on has been scored under
its own version; no weights are stored for that. Sampling goes on when the next version is published, or by itself if
the trainer crashes; a pause that ended too early is noticed.

The ranks share the work: rank 0 reads the feed and deals out the passages, each rank scores its share, and all keep all
records, since a row may be dealt to any of them later.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from accelerate.utils import gather_object
from torch import nn

from agentgym.server.wire import FeedPage, PauseReport
from agentgym_trainer.anchors.followed import Followed, Passage
from agentgym_trainer.anchors.passages import score_passages
from agentgym_trainer.anchors.records import OldLogprobs, RecordStore
from agentgym_trainer.exchange import BatchExchange
from agentgym_trainer.logprobs import token_logprobs, unwrap


class Sampling(Protocol):
    """What is asked of the rollout service: `agentgym.server.client.ServiceClient`."""

    def feed(self, cursor: int = 0, max_tokens: int = 65_536) -> FeedPage: ...

    def pause(self, limit_s: float) -> PauseReport: ...


@dataclass(frozen=True, slots=True)
class _Work:
    """What rank 0 deals out. `live` is None while more follows; else the trajectories whose records are kept."""

    passages: tuple[Passage, ...]
    live: frozenset[str] | None


class Interruption:
    """Scores what the weights about to change have sampled; one on every rank, `sampling` on rank 0 alone."""

    def __init__(
        self, model: nn.Module, records: RecordStore, exchange: BatchExchange, sampling: Sampling | None, *,
        temperature: float, max_tokens: int, limit_s: float,
    ) -> None:  # fmt: skip
        self._model = unwrap(model)
        self._records = records
        self._exchange = exchange
        self._sampling = sampling
        self._temperature = temperature
        self._max_tokens = max_tokens
        self._limit_s = limit_s
        self._followed = Followed(records)
        self._pause_id: int | None = None
        self._paused_at = 0.0
        self._num_broken = 0
        self._figures: dict[str, float] = {}

    @torch.no_grad()
    def before_update(self, version: int) -> None:
        """Every rank calls it when gradients of the step are there and the weights are still those of `version`, as
        published. When it returns sampling is paused, until `version + 1` is published."""
        began = self._paused_at = time.perf_counter()
        num_records = num_forwarded = 0
        for number in range(2**31):
            work = self._exchange.share(f"interrupt/{version}/{number}", self._next_work(version, number))
            if work.live is not None:
                self._records.keep_only(work.live)
                break
            scored, forwarded = self._score(work.passages)
            self._records.extend(scored)
            num_records += sum(record.stop - record.start for record in scored)
            num_forwarded += forwarded
        now = time.perf_counter()
        self._figures = {
            "anchor/recorded_tokens": float(num_records),
            "anchor/scored_tokens": float(num_forwarded),
            "anchor/kept_tokens": float(self._records.num_tokens),
            "anchor/interrupt_s": now - began,
            "anchor/stall_s": now - self._paused_at,
        }

    def published(self, ended_pause: int | None) -> None:
        """The next version is served; `ended_pause` is the pause that this ended. Rank 0 calls it."""
        self._num_broken += ended_pause != self._pause_id

    def metrics(self) -> dict[str, float]:
        """Of the last interruption, on rank 0. `anchor/broken_pauses`: sampling went on before the publication, so
        that tokens may be without old logprobs; a longer `trainer.interrupt_limit_s` mends it."""
        return self._figures | {"anchor/broken_pauses": float(self._num_broken)}

    def _next_work(self, version: int, number: int) -> _Work | None:
        """Round 0 scores trajectories that have ended, while sampling goes on; then, paused, whatever is left, until a
        pause that was not interrupted has nothing more."""
        sampling = self._sampling
        if sampling is None:
            return None
        if number == 0:
            self._read(sampling)
            return _Work(tuple(self._followed.take(version=version, ended_only=True)), None)
        pause_id = sampling.pause(self._limit_s).pause_id
        if number == 1:
            self._paused_at = time.perf_counter()  # not from the request on: sampling may go on while it travels
        unbroken = number > 1 and pause_id == self._pause_id
        self._pause_id = pause_id
        if unbroken:
            return _Work((), self._followed.live)
        self._read(sampling)
        return _Work(tuple(self._followed.take(version=version)), None)

    def _read(self, sampling: Sampling) -> None:
        while True:
            page = sampling.feed(self._followed.cursor)
            self._followed.apply(page)
            if page.live is not None:
                return

    def _score(self, passages: Sequence[Passage]) -> tuple[list[OldLogprobs], int]:
        exchange = self._exchange
        longest_first = sorted(passages, key=lambda passage: -passage.num_tokens)
        own, num_tokens = score_passages(
            longest_first[exchange.rank :: exchange.num_ranks],
            lambda batch: token_logprobs(self._model, batch, self._temperature).logprobs,
            max_tokens=self._max_tokens, device=next(self._model.parameters()).device, anchor="interrupt",
        )  # fmt: skip
        if exchange.num_ranks == 1:
            return own, num_tokens
        gathered: list[tuple[list[OldLogprobs], int]] = gather_object([(own, num_tokens)])
        return [record for records, _ in gathered for record in records], sum(count for _, count in gathered)
