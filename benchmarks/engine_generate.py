"""Tokens per second of the torch engine against plain `model.generate`, on the same episodes.

64 episodes of the tiny model at a time, of unequal length in every respect: prompts, number of turns, length of each
reply and of each observation. The engine keeps 64 in flight until all are played. `generate` takes them 64 by 64 and
plays them as a loop over turns does: one left-padded batch a turn, which ends when its longest reply does. Both sample
at temperature 1, record the logprob of each sampled token, and give a reply the same length, so that both produce the
same number of tokens. One thread.
"""

from __future__ import annotations

import asyncio
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, StoppingCriteria, StoppingCriteriaList
from transformers.utils import logging as transformers_logging

from agentgym.engine.torch_engine import TorchEngine
from agentgym.policy import SamplingParams

_VOCAB = 357
_MAX_CONTEXT = 1280
_AT_ONCE = 64
_EPISODES = 192
_REPETITIONS = 3


@dataclass(frozen=True, slots=True)
class Plan:
    """One episode's shape. Example: `Plan((5, 9), reply_lengths=(4, 20), observations=((7,), (8, 8)))`."""

    prompt: tuple[int, ...]
    reply_lengths: tuple[int, ...]
    observations: tuple[tuple[int, ...], ...]


def make_plans(count: int, seed: int = 0) -> list[Plan]:
    """1-7 turns; prompts of 20-100 and observations of 4-64 tokens, short ones more often; replies of the length at
    which a stop token of probability 1/16 falls, 96 tokens at most."""
    rng = np.random.default_rng(seed)

    def ids(length: int) -> tuple[int, ...]:
        return tuple(rng.integers(0, _VOCAB, length).tolist())

    def lengths(low: int, high: int, number: int) -> tuple[int, ...]:  # log-uniform
        return tuple(np.exp(rng.uniform(np.log(low), np.log(high), number)).round().astype(int).tolist())

    plans = []
    for _ in range(count):
        turns = int(rng.integers(1, 8))
        observations = tuple(ids(length) for length in lengths(4, 64, turns))
        replies = tuple(np.minimum(rng.geometric(1 / 16, turns), 96).tolist())
        plans.append(Plan(ids(lengths(20, 100, 1)[0]), replies, observations))
    return plans


async def play_with_engine(engine: TorchEngine, plans: list[Plan], seed: int) -> int:
    """As many episodes at once as the engine has slots, each at its own pace; returns the tokens sampled."""
    left = iter(enumerate(plans))

    async def player() -> int:
        sampled = 0
        for index, plan in left:
            context = list(plan.prompt)
            for turn, (length, observation) in enumerate(zip(plan.reply_lengths, plan.observations, strict=True)):
                params = SamplingParams(max_tokens=length, seed=(seed * len(plans) + index) * 100 + turn)
                (segment,) = await engine.sample(context, params)
                context += [*segment.token_ids, *observation]
                sampled += len(segment.token_ids)
        return sampled

    return sum(await asyncio.gather(*(player() for _ in range(_AT_ONCE))))


class _RowLengths(StoppingCriteria):
    """Ends each row after its own number of new tokens."""

    def __init__(self, width: int, lengths: list[int]) -> None:
        self._ends = torch.tensor([width + length for length in lengths])

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        return self._ends <= input_ids.shape[1]


@torch.inference_mode()
def play_with_generate(model: LlamaForCausalLM, plans: list[Plan]) -> int:
    """Batch by batch and turn by turn, all episodes that are still alive at once; returns the tokens sampled."""
    return sum(_play_batch(model, plans[start : start + _AT_ONCE]) for start in range(0, len(plans), _AT_ONCE))


def _play_batch(model: LlamaForCausalLM, plans: list[Plan]) -> int:
    contexts = [list(plan.prompt) for plan in plans]
    sampled = 0
    for turn in range(max(len(plan.reply_lengths) for plan in plans)):
        alive = [index for index, plan in enumerate(plans) if turn < len(plan.reply_lengths)]
        lengths = [plans[index].reply_lengths[turn] for index in alive]
        width = max(len(contexts[index]) for index in alive)
        input_ids = torch.zeros(len(alive), width, dtype=torch.long)
        attention_mask = torch.zeros_like(input_ids)
        for row, index in enumerate(alive):
            input_ids[row, width - len(contexts[index]) :] = torch.tensor(contexts[index])
            attention_mask[row, width - len(contexts[index]) :] = 1
        config = GenerationConfig(
            do_sample=True,
            top_k=0,
            top_p=1.0,
            max_new_tokens=max(lengths),
            pad_token_id=0,
            eos_token_id=None,
            output_logits=True,
            return_dict_in_generate=True,
        )
        output: Any = model.generate(  # pyright: ignore[reportAttributeAccessIssue]
            input_ids=input_ids,
            attention_mask=attention_mask,
            generation_config=config,
            stopping_criteria=StoppingCriteriaList([_RowLengths(width, lengths)]),
        )
        tokens = output.sequences[:, width:]
        logprobs = torch.stack(output.logits, 1).log_softmax(-1).gather(2, tokens[:, :, None])[:, :, 0]
        for row, index in enumerate(alive):
            reply = tokens[row, : lengths[row]].tolist()
            recorded = logprobs[row, : lengths[row]].tolist()
            contexts[index] += [*reply, *plans[index].observations[turn]]
            sampled += len(recorded)
    return sampled


def make_model(folder: Path) -> LlamaForCausalLM:
    """The tiny model of the quickstart in size and shape, with random weights, saved in `folder`."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=_VOCAB,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=_MAX_CONTEXT,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config).eval()
    model.save_pretrained(folder)
    return model


def run(quick: bool) -> dict[str, object]:
    """Medians over interleaved repetitions; `quick` is a smoke run."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    torch.set_num_threads(1)
    plans = make_plans(8 if quick else _EPISODES)
    wanted = sum(sum(plan.reply_lengths) for plan in plans)
    with tempfile.TemporaryDirectory() as folder:
        model = make_model(Path(folder))
        return asyncio.run(_compare(model, Path(folder), plans, wanted, repetitions=1 if quick else _REPETITIONS))


async def _compare(
    model: LlamaForCausalLM, folder: Path, plans: list[Plan], wanted: int, repetitions: int
) -> dict[str, object]:
    engine = TorchEngine(folder, slots=_AT_ONCE, max_context=_MAX_CONTEXT)
    sides: dict[str, list[tuple[float, float]]] = {"engine": [], "generate": []}  # (wall, CPU) seconds
    for repetition in range(repetitions + 1):  # the first warms up
        for side, taken in sides.items():
            start, cpu = time.perf_counter(), time.process_time()
            if side == "engine":
                sampled = await play_with_engine(engine, plans, seed=repetition)
            else:
                sampled = play_with_generate(model, plans)
            assert sampled == wanted, f"{side} sampled {sampled} tokens, not {wanted}"
            if repetition:
                taken.append((time.perf_counter() - start, time.process_time() - cpu))
                print(f"{side}: {wanted / taken[-1][0]:.0f} tokens/s", file=sys.stderr)
    await engine.close()
    pairs = list(zip(sides["engine"], sides["generate"], strict=True))
    return {
        "tokens_per_s": round(statistics.median(wanted / mine[0] for mine, _ in pairs), 1),
        "generate_tokens_per_s": round(statistics.median(wanted / plain[0] for _, plain in pairs), 1),
        "ratio": round(statistics.median(plain[0] / mine[0] for mine, plain in pairs), 2),
        "tokens_per_cpu_s": round(statistics.median(wanted / mine[1] for mine, _ in pairs), 1),
        "generate_tokens_per_cpu_s": round(statistics.median(wanted / plain[1] for _, plain in pairs), 1),
        "ratio_cpu": round(statistics.median(plain[1] / mine[1] for mine, plain in pairs), 2),
        "episodes": len(plans),
        "tokens": wanted,
    }
