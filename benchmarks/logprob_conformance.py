"""How far recorded logprobs are from the model's own forward: the torch engine and vLLM on the CPU, SmolLM2-135M, fp32.

Sixteen prompts of unequal length, sampled together at temperatures 1 and 0.7; every sampled token's recorded logprob is
compared with that of one plain transformers forward over the whole sequence. One list entry an engine.
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from agentgym.engine.gate import VersionedPolicy
from agentgym.engine.process import ProcessEngine
from agentgym.engine.protocol import Engine
from agentgym.engine.vllm.engine import VllmEngine
from agentgym.engine.vllm.server import VllmServerOptions
from agentgym.policy import Completion, SamplingParams
from benchmarks.publish import small_model, vllm_python

_PROMPTS = 16
_TOKENS = 64
_CONTEXT = 256
_HEATS = (1.0, 0.7)


def run(quick: bool) -> dict[str, object]:
    """Samples with each engine in turn."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="agentgym-conformance-") as scratch:
        return asyncio.run(_run(_model(quick, Path(scratch))))


def _model(quick: bool, scratch: Path) -> Path:
    if quick:
        return small_model(scratch / "model")
    from agentgym.server.models import resolve_model

    return resolve_model("smollm2-135m", "maze", 0, report=lambda line: print(line, file=sys.stderr))


async def _run(folder: Path) -> dict[str, object]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    vocab = int(model.config.vocab_size)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, vocab, rng.integers(4, 100)).tolist() for _ in range(_PROMPTS)]
    figures: dict[str, list[object]] = {name: [] for name in ("engine", "tokens", "mean_abs", "max_abs")}
    for name in ("torch", "vllm"):
        engine: Engine
        if name == "torch":
            engine = await ProcessEngine.start(folder, slots=_PROMPTS, max_context=_CONTEXT)
        else:
            engine = await VllmEngine.start(folder, VllmServerOptions(vllm_python(), _CONTEXT, slots=_PROMPTS))
        try:
            policy = VersionedPolicy(engine)
            params = [SamplingParams(_TOKENS, _HEATS[index % 2], (), seed=index) for index in range(_PROMPTS)]
            done = await asyncio.gather(*(policy.complete(*each) for each in zip(prompts, params, strict=True)))
        finally:
            await engine.close()
        off = np.concatenate(
            [_off(model, *each) for each in zip(prompts, done, (each.temperature for each in params), strict=True)]
        )
        row = (name, len(off), float(off.mean()), float(off.max()))
        print(row, file=sys.stderr)
        for column, value in zip(figures.values(), row, strict=True):
            column.append(value)
    return dict(figures)


@torch.no_grad()
def _off(model: torch.nn.Module, prompt: Sequence[int], done: Completion, temperature: float) -> np.ndarray:
    logits = model(torch.tensor([[*prompt, *done.token_ids]])).logits[0, len(prompt) - 1 : -1].float() / temperature
    wanted = logits.log_softmax(-1).gather(1, torch.tensor(done.token_ids)[:, None])[:, 0]
    return (torch.tensor(done.logprobs) - wanted).abs().numpy()
