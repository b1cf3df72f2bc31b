"""What tests of the torch engine share: an engine for a block, and what a recorded logprob must be."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import torch
from transformers import PreTrainedModel

from agentgym.engine.protocol import Engine
from agentgym.engine.torch_engine import TorchEngine
from agentgym.engine.torch_engine_batch import Outcome
from agentgym.policy import Completion, SamplingParams, Segment

TOLERANCE = 5e-5  # float32 on any batch: of 12,000 tokens the worst was off by 8e-6; another version's by 1e-2 and more


async def segment_of(engine: Engine, prompt_ids: Sequence[int], params: SamplingParams) -> Segment:
    """What the engine samples while nothing is loaded: one segment."""
    (segment,) = await engine.sample(prompt_ids, params)
    return segment


@asynccontextmanager
async def engine_of(folder: Path, slots: int = 6, max_context: int = 96) -> AsyncIterator[TorchEngine]:
    engine = TorchEngine(folder, slots=slots, max_context=max_context)
    try:
        yield engine
    finally:
        await engine.close()


class Pace:
    """Holds an engine behind a number of sampled tokens, with its requests under way, until more are allowed: the
    event loop of a test may be late, and the engine's thread would be done with everything by then."""

    def __init__(self, engine: TorchEngine) -> None:
        self._batch = engine._batch
        self._step = engine._batch.step
        self._most = 0.0
        engine._batch.step = self._held  # type: ignore[method-assign]

    def _held(self) -> list[Outcome]:
        if self._batch.sampled_tokens >= self._most:
            time.sleep(0.001)
            return []
        return self._step()

    def release(self) -> None:
        """Samples on to the end."""
        self._most = float("inf")

    async def sampled(self, tokens: int) -> None:
        """Lets so many more be sampled (and up to a step's more), and waits for them."""
        await asyncio.sleep(0)  # tasks that were made before have asked: none is left with the first one's tokens alone
        self._most = self._batch.sampled_tokens + tokens
        while self._batch.sampled_tokens < self._most:
            await asyncio.sleep(0.001)


@torch.no_grad()
def forward(model: PreTrainedModel, prompt: Sequence[int], tokens: Sequence[int], temperature: float) -> torch.Tensor:
    """A clean forward's logprobs of `tokens` behind `prompt`."""
    logits = model(torch.tensor([[*prompt, *tokens]])).logits[0, len(prompt) - 1 : -1].float()
    return (logits / (temperature or 1.0)).log_softmax(-1).gather(1, torch.tensor(tokens)[:, None])[:, 0]


def assert_recorded(
    model: PreTrainedModel, prompt: Sequence[int], sampled: Segment | Completion, temperature: float = 1.0
) -> None:
    assert sampled.token_ids
    wanted = forward(model, prompt, sampled.token_ids, temperature)
    assert (torch.tensor(sampled.logprobs) - wanted).abs().max() < TOLERANCE
