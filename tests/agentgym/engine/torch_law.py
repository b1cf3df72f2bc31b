"""What tests of the torch engine share: an engine for a block, and what a recorded logprob must be."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import torch
from transformers import PreTrainedModel

from agentgym.engine.protocol import Engine
from agentgym.engine.torch_engine import TorchEngine
from agentgym.policy import Completion, SamplingParams, Segment

TOLERANCE = 1e-5


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
