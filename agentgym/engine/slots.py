"""Which request sits in which row of the KV cache. Law: a row's first `filled` keys and values were computed from its
first `filled` tokens, under the weights now served; only a running row may be stale, and nobody copies from that one.

Rows keep their content when their request ends, so that the next turn of the episode, which extends it, prefills only
what is new; a prompt that begins like another row's content takes a copy of that beginning. Must never know torch.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

_MIN_COPY = 16  # a shared beginning shorter than this is cheaper to compute than to copy


@dataclass(frozen=True, slots=True)
class Placement:
    """Where a prompt goes: its first `reused` positions come from row `source` (`slot` itself: they lie there).

    Example: `Placement(slot=3, source=0, reused=40)`: copy 40 positions of row 0 to row 3, then prefill the rest.
    """

    slot: int
    source: int
    reused: int


class SlotTable:
    """The rows of the cache: S slots of `max_context` tokens."""

    def __init__(self, num_slots: int, max_context: int) -> None:
        self.tokens = np.zeros((num_slots, max_context), np.int64)  # [S, max_context]
        self.draws = np.zeros((num_slots, max_context), np.float32)  # the uniform number of each position
        self.length = np.zeros(num_slots, np.int64)  # tokens known
        self.filled = np.zeros(num_slots, np.int64)  # tokens whose keys and values are in the cache
        self.running = np.zeros(num_slots, bool)
        self.stale = np.zeros(num_slots, bool)  # running on keys of which some are of older weights
        self.temperature = np.ones(num_slots, np.float32)
        self.since = np.zeros(num_slots, np.int64)  # when its request came or went, in requests
        self._clock = 0

    def place(self, prompt: np.ndarray) -> Placement | None:
        """The best free row for `prompt` [P], or None: no row is free, or one that computes the same beginning now
        will be worth copying from in a moment."""
        if self.running.all():
            return None
        usable = len(prompt) - 1  # the last token is always computed: its logits are what is sampled from
        slot = self._continued(prompt, usable)
        if slot is not None:
            return Placement(slot, slot, int(self.filled[slot]))
        same = self.tokens[:, :usable] == prompt[:usable]
        common = np.where(same.all(1), usable, same.argmin(1) if usable else 0)
        common = np.where(self.stale, 0, np.minimum(common, self.length))
        shared = np.minimum(common, self.filled)
        source = int(shared.argmax())
        best = int(shared[source])
        if (common[self.running] >= best + _MIN_COPY).any():
            return None
        free = np.flatnonzero(~self.running)
        oldest = int(free[self.since[free].argmin()])
        if best < _MIN_COPY:
            return Placement(oldest, oldest, int(shared[oldest]))
        if not self.running[source] and (len(free) == 1 or best == self.filled[source]):
            return Placement(source, source, best)
        if oldest == source:
            others = free[free != source]
            oldest = int(others[self.since[others].argmin()]) if len(others) else source
        return Placement(oldest, source, best)

    def _continued(self, prompt: np.ndarray, usable: int) -> int | None:
        """The free row whose whole content the prompt extends, if that is at least half of the prompt."""
        last = np.minimum(self.filled, usable) - 1
        likely = ~self.running & (self.filled <= usable) & (2 * self.filled >= usable) & (self.filled > 0)
        likely &= self.tokens[np.arange(len(last)), last] == prompt[last]
        rows = np.flatnonzero(likely)
        for row in rows[np.argsort(-self.filled[rows], kind="stable")]:
            filled = self.filled[row]
            if np.array_equal(self.tokens[row, :filled], prompt[:filled]):
                return int(row)
        return None

    def occupy(self, placement: Placement, prompt: np.ndarray, draws: np.ndarray, temperature: float) -> None:
        """Puts a request into its row; `draws` are the numbers of the positions behind the prompt."""
        slot, end = placement.slot, len(prompt)
        self.tokens[slot, :end] = prompt
        self.draws[slot, end : end + len(draws)] = draws
        self.length[slot] = end
        self.filled[slot] = placement.reused
        self.temperature[slot] = temperature
        self.running[slot] = True
        self._touch(slot)

    def release(self, slot: int) -> None:
        """Ends the row's request; its content stays for whoever extends it."""
        self.running[slot] = False
        if self.stale[slot]:
            self.forget(slot)
        self._touch(slot)

    def forget(self, slot: int | None = None) -> None:
        """Declares the keys and values of one row worthless, or of all (new weights) but the running ones, which go on
        with them."""
        if slot is None:
            self.filled[~self.running] = 0
            self.stale |= self.filled > 0
        else:
            self.filled[slot] = 0
            self.stale[slot] = False

    def _touch(self, slot: int) -> None:
        self._clock += 1
        self.since[slot] = self._clock
