"""Keys and values that the torch engine keeps: shared, continued and forgotten, and nothing recorded differs."""

from __future__ import annotations

import asyncio

import numpy as np
import torch
from torch_law import TOLERANCE, Pace, assert_recorded, engine_of, forward, segment_of

from agentgym.engine.gate import VersionedPolicy
from agentgym.engine.protocol import WeightUpdate
from agentgym.policy import SamplingParams

VOCAB = 61


def test_the_next_turn_of_an_episode_prefills_only_what_is_new(model_of) -> None:
    folder, model = model_of("llama")

    async def main() -> None:
        async with engine_of(folder, slots=4) as engine:
            rng = np.random.default_rng(2)
            contexts = [rng.integers(0, VOCAB, 20 + index).tolist() for index in range(4)]
            for turn in range(4):
                before = (await engine.stats()).prefilled_tokens
                params = SamplingParams(max_tokens=5, seed=turn)
                segments = await asyncio.gather(*(segment_of(engine, context, params) for context in contexts))
                prefilled = (await engine.stats()).prefilled_tokens - before
                assert prefilled == (sum(map(len, contexts)) if turn == 0 else 4 * 7)  # the last sample and 6 new
                for context, segment in zip(contexts, segments, strict=True):
                    assert_recorded(model, context, segment)
                    context += [*segment.token_ids, *rng.integers(0, VOCAB, 6).tolist()]

    asyncio.run(main())


def test_an_episode_that_waits_for_its_tool_is_not_disturbed(model_of) -> None:
    """Rows that idle between busy ones are computed along with them; what they hold must stay good."""
    folder, model = model_of("llama")

    async def main() -> None:
        async with engine_of(folder, slots=8) as engine:
            rng = np.random.default_rng(3)
            contexts = [rng.integers(0, VOCAB, 12).tolist() for _ in range(8)]
            short = [await segment_of(engine, contexts[index], SamplingParams(3, seed=index)) for index in (0, 1)]
            busy = [
                asyncio.ensure_future(segment_of(engine, context, SamplingParams(40, seed=9)))
                for context in contexts[2:]
            ]
            await asyncio.gather(*busy)
            before = (await engine.stats()).prefilled_tokens
            for context, segment in zip(contexts, short, strict=False):
                longer = [*context, *segment.token_ids, 5, 6]
                assert_recorded(model, longer, await segment_of(engine, longer, SamplingParams(4, seed=1)))
            assert (await engine.stats()).prefilled_tokens - before == 2 * 3

    asyncio.run(main())


def test_siblings_with_one_prompt_share_its_prefill(model_of) -> None:
    folder, model = model_of("llama")
    prompt = [(7 * index) % VOCAB for index in range(40)]

    async def main() -> None:
        async with engine_of(folder, slots=8) as engine:
            segments = await asyncio.gather(
                *(segment_of(engine, prompt, SamplingParams(max_tokens=6, seed=seed)) for seed in range(8))
            )
            assert (await engine.stats()).prefilled_tokens <= 40 + 8
            assert len({segment.token_ids for segment in segments}) == 8
            for segment in segments:
                assert_recorded(model, prompt, segment)

    asyncio.run(main())


def test_a_rewritten_history_shares_only_its_common_beginning(model_of) -> None:
    folder, model = model_of("llama")
    beginning = [(5 * index) % VOCAB for index in range(30)]

    async def main() -> None:
        async with engine_of(folder, slots=2) as engine:
            await segment_of(engine, [*beginning, 1, 2, 3], SamplingParams(max_tokens=8, seed=0))
            before = (await engine.stats()).prefilled_tokens
            rewritten = [*beginning, 9, 2, 3]
            assert_recorded(model, rewritten, await segment_of(engine, rewritten, SamplingParams(max_tokens=8, seed=0)))
            assert (await engine.stats()).prefilled_tokens - before == 3

    asyncio.run(main())


def test_new_weights_forget_the_old_keys(model_of, perturbed) -> None:
    folder, model = model_of("llama")
    path, twin = perturbed(model, 1)
    prompt = [(3 * index) % VOCAB for index in range(25)]

    async def main() -> None:
        async with engine_of(folder) as engine:
            first = await segment_of(engine, prompt, SamplingParams(max_tokens=5, seed=0))
            await engine.pause()
            await engine.load(WeightUpdate(1, path))
            await engine.resume()
            before = (await engine.stats()).prefilled_tokens
            longer = [*prompt, *first.token_ids, 4]
            second = await segment_of(engine, longer, SamplingParams(max_tokens=5, seed=0))
            assert (await engine.stats()).prefilled_tokens - before == len(longer)
            assert (second.policy_version, second.kv_version) == (1, 1)
            assert_recorded(twin, longer, second)

    asyncio.run(main())


def test_kept_requests_run_on_with_old_keys_that_nobody_else_gets(model_of, perturbed) -> None:
    """What is sampled before the switch is version 0's forward; behind it neither's, which kv_versions say; and new
    requests that begin alike share nothing with stale rows."""
    folder, model = model_of("llama")
    path, twin = perturbed(model, 1)
    prompt = [(5 * index) % VOCAB for index in range(24)]

    async def main() -> None:
        async with engine_of(folder, slots=4) as engine:
            policy, pace = VersionedPolicy(engine), Pace(engine)
            running = [
                asyncio.ensure_future(policy.complete(prompt, SamplingParams(60, seed=seed))) for seed in range(5)
            ]
            await pace.sampled(40)
            await policy.publish(WeightUpdate(1, path), "keep")
            pace.release()
            late = asyncio.ensure_future(policy.complete(prompt, SamplingParams(30, seed=9)))
            stale = 0
            for completion in await asyncio.gather(*running):
                recorded = torch.tensor(completion.logprobs)
                off = [
                    (recorded - forward(each, prompt, completion.token_ids, 1.0)).abs().numpy()
                    for each in (model, twin)
                ]
                versions, keys = np.array(completion.policy_versions), np.array(completion.kv_versions)
                mixed = keys < versions
                assert (off[0][versions == 0] < TOLERANCE).all()
                assert (off[1][keys == 1] < TOLERANCE).all()
                if mixed.any():
                    assert off[1][mixed].max() > 0.01
                    stale += int(mixed.sum())
            assert stale > 20
            assert_recorded(twin, prompt, await late)
            again = await policy.complete(prompt, SamplingParams(5, seed=1))
            assert again.kv_versions == (1,) * 5
            assert_recorded(twin, prompt, again)

    asyncio.run(main())


def test_an_interrupted_request_goes_on_as_if_it_had_not_been(model_of) -> None:
    folder, _ = model_of("llama")
    params = SamplingParams(max_tokens=60, seed=5)

    async def main() -> None:
        async with engine_of(folder) as engine:
            whole = await VersionedPolicy(engine).complete([1, 2, 3], params)
        async with engine_of(folder) as engine:
            pace = Pace(engine)
            running = asyncio.ensure_future(VersionedPolicy(engine).complete([1, 2, 3], params))
            for sampled in (7, 13, 13):
                await pace.sampled(sampled)
                await engine.pause()
                await engine.resume()
            pace.release()
            broken = await running
            assert (await engine.stats()).prefilled_tokens == 3  # the same weights: nothing is computed twice
        assert broken.token_ids == whole.token_ids

    asyncio.run(main())
