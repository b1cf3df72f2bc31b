"""A real engine, token by token with a cache, that can be given the faults of real ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from agentgym.trajectory import NO_VERSION, TokenSequence

Weights = Callable[[int], tuple[nn.Module, int]]
"""(index of the token that goes through the weights) -> the model, and the version that it is said to be."""


@dataclass
class FaultyEngine:
    """`weights(t)` is what token t of a row goes through when its turn comes to be computed; `records_at` is the
    temperature of what is recorded, `samples_at` that of what is drawn from."""

    weights: Weights
    samples_at: float = 1.0
    records_at: float = 1.0
    generator: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(0))

    @torch.no_grad()
    def play(
        self, prompt: Sequence[int], num_tokens: int, keys_of: Callable[[int], nn.Module] | None = None
    ) -> TokenSequence:
        """One row. `keys_of(t)` computes the keys of prompt token t, where that is not the present weights."""
        ids, cache = list(prompt), None
        logprobs, labels, kv = [], [], []
        start = 0
        if keys_of is not None:
            while start < len(prompt) - 1 and (keeper := keys_of(start)) is not self.weights(len(prompt) - 1)[0]:
                stop = start + 1
                while stop < len(prompt) - 1 and keys_of(stop) is keeper:
                    stop += 1
                cache = keeper(torch.tensor([ids[start:stop]]), past_key_values=cache, use_cache=True).past_key_values
                start = stop
        oldest = None
        for _ in range(num_tokens):
            model, label = self.weights(len(ids) - 1)
            done = model(torch.tensor([ids[start:]]), past_key_values=cache, use_cache=True)
            cache, start = done.past_key_values, len(ids)
            logits = done.logits[0, -1].float()
            token = int(torch.multinomial((logits / self.samples_at).softmax(-1), 1, generator=self.generator))
            logprobs.append(float((logits / self.records_at).log_softmax(-1)[token]))
            oldest = label if oldest is None else min(oldest, label)
            labels.append(label)
            kv.append(oldest)
            ids.append(token)
        blank = len(prompt)
        return TokenSequence(
            tuple(ids), (False,) * blank + (True,) * num_tokens, (0.0,) * blank + tuple(logprobs),
            (NO_VERSION,) * blank + tuple(labels), (NO_VERSION,) * blank + tuple(kv),
        )  # fmt: skip
