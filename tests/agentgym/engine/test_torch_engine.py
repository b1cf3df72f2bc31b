"""Law E on real models: what is recorded is the forward of the version that sampled it, whatever happened around."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch_law import TOLERANCE, Pace, assert_recorded, engine_of, forward, segment_of
from transformers import AutoModelForCausalLM, LlamaConfig, MambaConfig

from agentgym.engine.gate import VersionedPolicy
from agentgym.engine.protocol import WeightUpdate
from agentgym.engine.torch_engine import TorchEngine
from agentgym.engine.torch_engine_batch import draw
from agentgym.errors import EngineDiedError, EngineError, InputError, PromptTooLongError
from agentgym.policy import SamplingParams

VOCAB = 61
ARCHITECTURES = ["llama", "qwen2", "qwen3", "gpt_neox", "gpt2"]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_recorded_logprobs_are_the_forward_of_each_version(model_of, perturbed, architecture: str) -> None:
    """Twelve requests on six slots, three real publications while they run."""
    folder, model = model_of(architecture)
    files = {version: perturbed(model, version) for version in (1, 2, 3)}
    models = {0: model, **{version: twin for version, (_, twin) in files.items()}}

    async def main() -> None:
        async with engine_of(folder) as engine:
            policy, pace = VersionedPolicy(engine), Pace(engine)
            rng = np.random.default_rng(0)
            prompts = [rng.integers(0, VOCAB, rng.integers(1, 30)).tolist() for _ in range(12)]
            heat = [(1.0, 0.6, 0.0)[index % 3] for index in range(12)]
            running = [
                asyncio.ensure_future(policy.complete(prompt, SamplingParams(60, heat[index], (), seed=index)))
                for index, prompt in enumerate(prompts)
            ]
            for version, (path, _) in files.items():
                await pace.sampled(40)
                await policy.publish(WeightUpdate(version, path))
            pace.release()
            seen: set[int] = set()
            for index, (prompt, task) in enumerate(zip(prompts, running, strict=True)):
                completion = await task
                assert len(completion.token_ids) == 60
                assert completion.kv_versions == completion.policy_versions
                assert list(completion.policy_versions) == sorted(completion.policy_versions)
                seen |= set(completion.policy_versions)
                versions = np.array(completion.policy_versions)
                for version in np.unique(versions):
                    wanted = forward(models[int(version)], prompt, completion.token_ids, heat[index])
                    error = (torch.tensor(completion.logprobs) - wanted).abs()[versions == version]
                    assert error.max() < TOLERANCE
            assert seen == {0, 1, 2, 3}

    asyncio.run(main())


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_the_batch_around_a_request_does_not_change_it(model_of, architecture: str) -> None:
    folder, _ = model_of(architecture)
    params = SamplingParams(max_tokens=30, seed=99)
    prompt = [3, 1, 4, 1, 5]

    async def main() -> None:
        async with engine_of(folder) as engine:
            alone = await segment_of(engine, prompt, params)
        async with engine_of(folder) as engine:
            rng = np.random.default_rng(1)
            others = [
                asyncio.ensure_future(
                    segment_of(engine, rng.integers(0, VOCAB, n).tolist(), SamplingParams(int(n) + 5, seed=int(n)))
                )
                for n in rng.integers(2, 40, 16)
            ]
            await asyncio.sleep(0.01)
            among = await segment_of(engine, prompt, params)
            await asyncio.gather(*others)
        assert among.token_ids == alone.token_ids
        assert np.abs(np.array(among.logprobs) - np.array(alone.logprobs)).max() < TOLERANCE

    asyncio.run(main())


def test_stop_tokens_end_a_segment_with_themselves(model_of) -> None:
    folder, _model = model_of("llama")

    async def main() -> None:
        async with engine_of(folder) as engine:
            free = await segment_of(engine, [1, 2], SamplingParams(max_tokens=20, seed=4))
            stop = free.token_ids[7]
            first = free.token_ids.index(stop)
            unseen = next(token for token in range(VOCAB) if token not in free.token_ids)
            stopped = await segment_of(engine, [1, 2], SamplingParams(20, 1.0, (unseen, stop), seed=4))
            assert stopped.token_ids == free.token_ids[: first + 1]
            assert (free.finish_reason, stopped.finish_reason) == ("length", "stop")

    asyncio.run(main())


def test_greedy_takes_the_likeliest_and_records_temperature_one(model_of) -> None:
    folder, model = model_of("qwen2")

    async def main() -> None:
        async with engine_of(folder) as engine:
            segment = await segment_of(engine, [5, 6], SamplingParams(max_tokens=12, temperature=0.0))
            with torch.no_grad():
                logits = model(torch.tensor([[5, 6, *segment.token_ids]])).logits[0, 1:-1]
            assert segment.token_ids == tuple(logits.argmax(-1).tolist())
            assert_recorded(model, [5, 6], segment, temperature=1.0)

    asyncio.run(main())


def test_draw_samples_the_distribution_it_records() -> None:
    logits = torch.tensor([[0.0, 1.0, -1.0, 2.0, -float("inf")]]).expand(20_000, 5)
    uniform = ((np.arange(20_000) + 0.5) / 20_000).astype(np.float32)
    for temperature in (0.5, 1.0, 2.0):
        chosen, logprobs = draw(logits, np.full(20_000, temperature, np.float32), uniform)
        wanted = (logits[0] / temperature).softmax(-1)
        shares = torch.bincount(chosen, minlength=5) / 20_000
        assert (shares - wanted).abs().max() < 1e-4
        assert (logprobs - wanted.log()[chosen]).abs().max() < 1e-6
    highest, _ = draw(logits[:1], np.ones(1, np.float32), np.array([1 - 2**-23], np.float32))
    assert highest.item() == 3  # never the impossible last token


def test_more_requests_than_slots_all_end(model_of) -> None:
    folder, model = model_of("llama")

    async def main() -> None:
        async with engine_of(folder, slots=3) as engine:
            prompts = [[index % VOCAB, (3 * index) % VOCAB] for index in range(40)]
            segments = await asyncio.gather(
                *(
                    segment_of(engine, prompt, SamplingParams(1 + index % 9, seed=index))
                    for index, prompt in enumerate(prompts)
                )
            )
            for index, (prompt, segment) in enumerate(zip(prompts, segments, strict=True)):
                assert len(segment.token_ids) == 1 + index % 9
                assert_recorded(model, prompt, segment)
            stats = await engine.stats()
            assert (stats.running, stats.waiting) == (0, 0)

    asyncio.run(main())


def test_pause_interrupts_between_tokens_and_a_paused_engine_takes_nothing(model_of) -> None:
    folder, model = model_of("llama")

    async def main() -> None:
        async with engine_of(folder, slots=2) as engine:
            pace = Pace(engine)
            running = [
                asyncio.ensure_future(segment_of(engine, [index, 7], SamplingParams(90, seed=index)))
                for index in range(4)
            ]
            await pace.sampled(20)
            await engine.pause()
            pace.release()
            sampled = (await engine.stats()).sampled_tokens
            segments = await asyncio.gather(*running)
            assert [segment.finish_reason for segment in segments] == ["abort"] * 4
            assert sum(len(segment.token_ids) for segment in segments) == sampled
            assert not segments[3].token_ids
            assert_recorded(model, [0, 7], segments[0])
            late = await segment_of(engine, [1], SamplingParams(5))
            assert (late.token_ids, late.finish_reason) == ((), "abort")
            await engine.pause()
            assert (await engine.stats()).sampled_tokens == sampled
            await engine.resume()
            assert len((await segment_of(engine, [1], SamplingParams(5))).token_ids) == 5

    asyncio.run(main())


def test_a_cancelled_request_frees_its_slot(model_of) -> None:
    folder, _ = model_of("llama")

    async def main() -> None:
        async with engine_of(folder, slots=1) as engine:
            pace = Pace(engine)
            running = asyncio.ensure_future(segment_of(engine, [1], SamplingParams(90, seed=1)))
            waiting = asyncio.ensure_future(segment_of(engine, [2], SamplingParams(90, seed=1)))
            await pace.sampled(3)
            running.cancel()
            waiting.cancel()
            await asyncio.gather(running, waiting, return_exceptions=True)
            pace.release()
            assert len((await segment_of(engine, [3], SamplingParams(2))).token_ids) == 2
            stats = await engine.stats()
            assert (stats.running, stats.waiting) == (0, 0)
            assert stats.sampled_tokens <= 3 + 1 + 2

    asyncio.run(main())


def test_requests_that_cannot_be_served_are_refused_with_their_figures(model_of) -> None:
    folder, _ = model_of("llama")

    async def main() -> None:
        async with engine_of(folder, max_context=32) as engine:
            assert len((await segment_of(engine, [1] * 24, SamplingParams(8))).token_ids) == 8
            with pytest.raises(PromptTooLongError, match=r"prompt of 25 tokens and max_tokens 8 .* context of 32"):
                await segment_of(engine, [1] * 25, SamplingParams(8))
            with pytest.raises(InputError, match="at least one token"):
                await segment_of(engine, [], SamplingParams(8))
            with pytest.raises(InputError, match=r"prompt ids must be in \[0, 61\), got 3..61"):
                await segment_of(engine, [3, VOCAB], SamplingParams(8))

    asyncio.run(main())


def test_closing_ends_whoever_waits(model_of) -> None:
    folder, _ = model_of("llama")

    async def main() -> None:
        engine = TorchEngine(folder, slots=1, max_context=96)
        pace = Pace(engine)
        running = [asyncio.ensure_future(segment_of(engine, [1], SamplingParams(90))) for _ in range(3)]
        await pace.sampled(3)
        await engine.close()
        results = await asyncio.gather(*running, return_exceptions=True)
        assert all(isinstance(result, EngineDiedError) for result in results)
        with pytest.raises(EngineDiedError, match="closed"):
            await segment_of(engine, [1], SamplingParams(1))
        with pytest.raises(EngineDiedError, match="closed"):
            await engine.pause()
        await engine.close()

    asyncio.run(main())


def test_options_that_cannot_work_are_refused(model_of, tmp_path: Path) -> None:
    folder, _ = model_of("llama")
    with pytest.raises(InputError, match=r"no config\.json"):
        TorchEngine(tmp_path / "nowhere", slots=1, max_context=8)
    with pytest.raises(InputError, match="slots must be >= 1, got 0"):
        TorchEngine(folder, slots=0, max_context=8)
    with pytest.raises(InputError, match=r"<= 128 .*max_position_embeddings.* got 129"):
        TorchEngine(folder, slots=1, max_context=129)
    with pytest.raises(InputError, match="float32, bfloat16, got 'float8'"):
        TorchEngine(folder, slots=1, max_context=8, dtype="float8")


def test_models_that_the_cache_cannot_carry_are_refused(tmp_path: Path) -> None:
    config = MambaConfig(vocab_size=VOCAB, hidden_size=16, num_hidden_layers=1, state_size=4)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(EngineError, match="MambaForCausalLM does not compute the same through the slot cache"):
        TorchEngine(tmp_path, slots=2, max_context=32)


def test_weights_that_are_not_finite_fail_the_request_and_not_the_engine(model_of, perturbed, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder, model = model_of("llama")
    good, twin = perturbed(model, 2)
    tensors = load_file(good)
    tensors["model.layers.0.mlp.up_proj.weight"] = torch.full_like(tensors["model.layers.0.mlp.up_proj.weight"], np.nan)
    save_file(tensors, tmp_path / "bad.safetensors")

    async def main() -> None:
        async with engine_of(folder) as engine:
            policy = VersionedPolicy(engine)
            await policy.publish(WeightUpdate(1, tmp_path / "bad.safetensors"))
            for result in await asyncio.gather(
                *(segment_of(engine, [1, 2, index], SamplingParams(5)) for index in range(6)), return_exceptions=True
            ):
                assert isinstance(result, EngineError)
                assert "not finite (policy version 1)" in str(result)
            await policy.publish(WeightUpdate(2, good))
            for index in range(6):
                assert_recorded(twin, [1, index], await segment_of(engine, [1, index], SamplingParams(5, seed=index)))

    asyncio.run(main())


def test_a_folder_without_all_weights_is_refused(tmp_path: Path, model_of) -> None:
    from safetensors.torch import save_file

    _, model = model_of("llama")
    LlamaConfig.from_dict(model.config.to_dict()).save_pretrained(tmp_path)
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items() if "layers.1.mlp" not in name}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(EngineError, match=r"lacks weights.*model\.layers\.1\.mlp"):
        TorchEngine(tmp_path, slots=1, max_context=8)


def test_tokens_are_heard_as_they_come_and_are_those_of_the_segment(model_of) -> None:
    async def main() -> None:
        async with engine_of(model_of("llama")[0]) as engine:
            heard: list[tuple[int, float]] = []
            chunks: list[int] = []

            def hear(ids: Sequence[int], logprobs: Sequence[float], version: int, kv_version: int) -> None:
                assert (version, kv_version) == (0, 0)
                heard.extend(zip(ids, logprobs, strict=True))
                chunks.append(len(ids))

            def fail(*_: object) -> None:
                raise RuntimeError("a listener that fails is its caller's trouble, and nobody else's")

            asyncio.get_running_loop().set_exception_handler(lambda *_: None)
            broken = asyncio.ensure_future(engine.sample([3], SamplingParams(40, seed=2), fail))
            (segment,) = await engine.sample([1, 2], SamplingParams(40, seed=1), hear)
            assert heard == list(zip(segment.token_ids, segment.logprobs, strict=True))
            assert len(chunks) > 20
            assert len((await broken)[0].token_ids) == 40

    asyncio.run(main())
