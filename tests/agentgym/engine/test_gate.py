"""Law E on the gate: whatever is published, interrupted, cancelled or late, a token has the version that sampled it."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import random
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from agentgym.engine.gate import VersionedPolicy
from agentgym.engine.noise import uniforms
from agentgym.engine.protocol import WeightUpdate
from agentgym.errors import EngineDiedError, EngineError, PromptTooLongError, VersionError
from agentgym.policy import Completion, SamplingParams, Segment
from agentgym.testing.scripted_engine import ScriptedEngine, forced_logits, hashed_logits, log_distribution

VOCAB = 7
LOGITS = hashed_logits(VOCAB, seed=3)


def update(version: int) -> WeightUpdate:
    return WeightUpdate(version, Path(f"{version:06d}.safetensors"))


def assert_lawful(prompt: list[int], completion: Completion, params: SamplingParams, *, stale: bool = False) -> None:
    """Every token: the logprob of its version's distribution at its prefix; versions monotone; keys never stale, or
    known to be."""
    context = list(prompt)
    for token, logprob, version in zip(
        completion.token_ids, completion.logprobs, completion.policy_versions, strict=True
    ):
        assert logprob == pytest.approx(log_distribution(LOGITS(version, context), params.temperature)[token])
        context.append(token)
    assert list(completion.policy_versions) == sorted(completion.policy_versions)
    if stale:
        assert all(
            kv <= version for kv, version in zip(completion.kv_versions, completion.policy_versions, strict=True)
        )
    else:
        assert completion.kv_versions == completion.policy_versions
    stopped = bool(completion.token_ids) and completion.token_ids[-1] in params.stop_token_ids
    assert completion.finish_reason == ("stop" if stopped else "length")
    assert stopped or len(completion.token_ids) == params.max_tokens
    assert not set(completion.token_ids[:-1]) & set(params.stop_token_ids)


@pytest.mark.parametrize("k", [1, 4, 9])
def test_a_bump_after_token_k_splits_the_versions_there(k: int) -> None:
    async def main() -> None:
        script = {k: lambda: asyncio.ensure_future(policy.publish(update(5)))}
        policy = VersionedPolicy(ScriptedEngine(LOGITS, policy_version=4, script=script))
        params = SamplingParams(max_tokens=10, seed=1)
        completion = await policy.complete([1, 2], params)
        assert list(completion.policy_versions) == [4] * k + [5] * (10 - k)
        assert_lawful([1, 2], completion, params)

    asyncio.run(main())


@pytest.mark.parametrize("mutant", ["one label", "late label", "stale logprobs"])
def test_mutants_of_the_versions_are_refused(mutant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    joined = Completion.from_segments

    def wrong(segments: Sequence[Segment]) -> Completion:
        if mutant == "one label":  # the whole completion gets the version that ended it
            segments = [dataclasses.replace(s, policy_version=5, kv_version=5) for s in segments]
        elif mutant == "late label":  # one token too many under the old version
            first, second = segments
            ids, logprobs = second.token_ids, second.logprobs
            segments = [
                dataclasses.replace(first, token_ids=first.token_ids + ids[:1], logprobs=first.logprobs + logprobs[:1]),
                dataclasses.replace(second, token_ids=ids[1:], logprobs=logprobs[1:]),
            ]
        else:  # keys of before the publication: not the forward of any one version
            segments = [dataclasses.replace(s, kv_version=4) for s in segments]
        return joined(segments)

    async def main() -> None:
        script = {4: lambda: asyncio.ensure_future(policy.publish(update(5)))}
        policy = VersionedPolicy(ScriptedEngine(LOGITS, policy_version=4, script=script))
        params = SamplingParams(max_tokens=10, seed=1)
        completion = await policy.complete([1, 2], params)
        with pytest.raises(AssertionError):
            assert_lawful([1, 2], completion, params)

    monkeypatch.setattr(Completion, "from_segments", wrong)
    asyncio.run(main())


def test_a_bump_on_the_last_token_ends_the_completion_there() -> None:
    async def main() -> None:
        script = {6: lambda: asyncio.ensure_future(policy.publish(update(1)))}
        engine = ScriptedEngine(LOGITS, script=script)
        policy = VersionedPolicy(engine)
        completion = await policy.complete([1], SamplingParams(max_tokens=6, seed=2))
        assert (completion.finish_reason, completion.policy_versions) == ("length", (0,) * 6)
        assert (await engine.stats()).sampled_tokens == 6

    asyncio.run(main())


def test_an_interruption_on_a_stop_token_ends_the_completion() -> None:
    class AbortsOnStop(ScriptedEngine):
        async def sample(self, prompt_ids, params, on_tokens=None):
            segments = await super().sample(prompt_ids, params, on_tokens)
            return tuple(dataclasses.replace(segment, finish_reason="abort") for segment in segments)

    async def main() -> None:
        policy = VersionedPolicy(AbortsOnStop(forced_logits(VOCAB, lambda prefix: len(prefix) % VOCAB)))
        completion = await policy.complete([1], SamplingParams(max_tokens=6, seed=2, stop_token_ids=(3,)))
        assert (completion.token_ids, completion.finish_reason) == ((1, 2, 3), "stop")

    asyncio.run(main())


def test_a_resumed_request_goes_on_in_its_stream_of_numbers() -> None:
    """Weights that do not change in value: the interrupted completion equals the uninterrupted one."""

    async def main() -> None:
        constant = hashed_logits(VOCAB, seed=5)
        params = SamplingParams(max_tokens=40, seed=11)

        def same(version: int, prefix: object) -> object:
            return constant(0, prefix)  # type: ignore[arg-type]

        whole = await VersionedPolicy(ScriptedEngine(same)).complete([1, 2, 3], params)  # type: ignore[arg-type]
        script = {
            7: lambda: asyncio.ensure_future(policy.publish(update(1))),
            23: lambda: asyncio.ensure_future(policy.publish(update(2))),
        }
        policy = VersionedPolicy(ScriptedEngine(same, script=script))  # type: ignore[arg-type]
        broken = await policy.complete([1, 2, 3], params)
        assert broken.policy_versions == (0,) * 7 + (1,) * 16 + (2,) * 17
        assert broken.token_ids == whole.token_ids

    asyncio.run(main())


def test_the_numbers_of_a_request_depend_on_seed_and_position_only() -> None:
    whole = uniforms(9, 0, 64)
    for start in range(12):
        assert (uniforms(9, start, 20) == whole[start : start + 20]).all()
    assert len(set(whole.tolist())) == 64
    assert ((whole >= 0) & (whole < 1)).all()
    assert not set(whole.tolist()) & set(uniforms(10, 0, 64).tolist())


def test_the_numbers_are_uniform_and_independent_along_a_stream_and_between_seeds() -> None:
    table = np.stack([uniforms(seed, 3, 500) for seed in range(400)]).astype(np.float64)
    counts = np.histogram(table, bins=100, range=(0, 1))[0]
    assert ((counts - 2000) ** 2 / 2000).sum() < 160  # chi-square, 99 degrees of freedom: p < 1e-4
    for other in (np.roll(table, 1, axis=1), np.roll(table, 1, axis=0)):
        assert abs(np.corrcoef(table.ravel(), other.ravel())[0, 1]) < 0.01


@pytest.mark.parametrize("seed", range(40))
def test_any_interleaving_keeps_the_law(seed: int) -> None:
    """Publications (some refused), cancellations, pauses by others and latencies, in a random order."""

    async def main() -> None:
        rng = random.Random(seed)
        refused = frozenset(version for version in range(1, 30) if rng.random() < 0.2)
        latency = lambda: rng.choice([0.0, 0.0, 0.0, 0.0005])  # noqa: E731
        engine = ScriptedEngine(LOGITS, latency_s=latency, load_s=0.0005, refused=refused)
        policy = VersionedPolicy(engine)
        served = [0]

        async def episode(index: int) -> tuple[list[int], SamplingParams, Completion]:
            await asyncio.sleep(rng.random() * 0.005)
            prompt = [index % VOCAB] * rng.randint(1, 5)
            stop = (VOCAB - 1,) if rng.random() < 0.5 else ()
            temperature = rng.choice([0.0, 0.7, 1.0])
            params = SamplingParams(rng.randint(1, 30), temperature, stop, seed=index)
            return prompt, params, await policy.complete(prompt, params)

        async def publisher() -> None:
            for version in range(1, 30):
                await asyncio.sleep(rng.random() * 0.002)
                if rng.random() < 0.3:
                    await engine.pause()
                    await engine.resume()
                try:
                    report = await policy.publish(update(version))
                except EngineError:
                    assert version in refused
                    assert engine.policy_version == served[-1]
                else:
                    assert report.version == version == engine.policy_version
                    assert 0 < report.pause_s <= report.total_s
                    served.append(version)

        tasks = [asyncio.ensure_future(episode(index)) for index in range(24)]
        publishing = asyncio.ensure_future(publisher())
        cancelled = set(rng.sample(range(24), 6))
        for index in cancelled:
            await asyncio.sleep(rng.random() * 0.002)
            tasks[index].cancel()
        await asyncio.wait_for(publishing, 60)
        results = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 60)
        for index, result in enumerate(results):
            if isinstance(result, asyncio.CancelledError):
                assert index in cancelled
            else:
                assert not isinstance(result, BaseException), result
                prompt, params, completion = result
                assert_lawful(prompt, completion, params)
                assert set(completion.policy_versions) <= set(served)
        assert (await engine.stats()).running == 0

    asyncio.run(main())


def test_a_failed_load_keeps_the_old_version_served_and_raises() -> None:
    async def main() -> None:
        policy = VersionedPolicy(ScriptedEngine(LOGITS, refused=frozenset({1})))
        running = asyncio.ensure_future(policy.complete([1], SamplingParams(max_tokens=50, seed=1)))
        await asyncio.sleep(0)
        with pytest.raises(EngineError, match="version 1 is refused"):
            await policy.publish(update(1))
        await policy.publish(update(2))
        completion = await running
        assert set(completion.policy_versions) <= {0, 2}
        assert_lawful([1], completion, SamplingParams(max_tokens=50, seed=1))

    asyncio.run(main())


def test_publications_are_serialised_and_versions_only_go_up() -> None:
    async def main() -> None:
        loading: list[int] = []

        class Waits(ScriptedEngine):
            async def load(self, update: WeightUpdate) -> int:
                loading.append(update.version)
                for _ in range(20):  # turns of the loop, in which the others would come to it
                    await asyncio.sleep(0)
                assert loading == [update.version], "one after the other"
                loaded_bytes = await super().load(update)
                loading.clear()
                return loaded_bytes

        policy = VersionedPolicy(Waits(LOGITS))
        reports = await asyncio.gather(*(policy.publish(update(version)) for version in (1, 2, 3)))
        assert [report.version for report in reports] == [1, 2, 3]
        assert (reports[0].loaded_bytes, policy.publications.loaded_bytes) == (8, 24)
        assert reports[2].total_s - reports[2].pause_s >= reports[1].pause_s  # it counts the wait for the one before
        with pytest.raises(VersionError, match="only go up"):
            await policy.publish(update(3))
        assert policy.policy_version == 3
        completion = await policy.complete([1], SamplingParams(max_tokens=2))
        assert completion.policy_versions == (3, 3)

    asyncio.run(main())


def test_a_cancelled_publisher_does_not_leave_the_gate_closed_or_the_version_unknown() -> None:
    async def main() -> None:
        policy = VersionedPolicy(ScriptedEngine(LOGITS, load_s=0.01))
        publishing = asyncio.ensure_future(policy.publish(update(1)))
        await asyncio.sleep(0.002)
        publishing.cancel()
        completion = await asyncio.wait_for(policy.complete([1], SamplingParams(max_tokens=3)), 60)
        assert completion.policy_versions == (1, 1, 1)

    asyncio.run(main())


def test_versions_that_were_never_published_or_go_backwards_are_refused() -> None:
    async def main() -> None:
        engine = ScriptedEngine(LOGITS)
        policy = VersionedPolicy(engine)
        engine.policy_version = 9
        with pytest.raises(VersionError, match="not published here"):
            await policy.complete([1], SamplingParams(max_tokens=2))

        def go_back() -> None:
            engine.policy_version = 0
            tasks.append(asyncio.ensure_future(pause_and_resume()))

        async def pause_and_resume() -> None:
            await engine.pause()
            await engine.resume()

        tasks: list[asyncio.Future[None]] = []
        engine = ScriptedEngine(LOGITS, script={3: go_back})
        policy = VersionedPolicy(engine)
        await policy.publish(update(1))
        with pytest.raises(VersionError, match="went back from version 1 to 0"):
            await policy.complete([1], SamplingParams(max_tokens=8))

    asyncio.run(main())


def test_whoever_waits_at_the_gate_says_what_for(caplog: pytest.LogCaptureFixture) -> None:
    class Loading(ScriptedEngine):
        async def load(self, update: WeightUpdate) -> int:
            while "for version 1 to be loaded" not in caplog.text:
                await asyncio.sleep(0.005)
            return await super().load(update)

    async def main() -> None:
        policy = VersionedPolicy(Loading(LOGITS), report_after_s=0.02)
        publishing = asyncio.ensure_future(policy.publish(update(1)))
        while policy.publishing is None:
            await asyncio.sleep(0)
        with caplog.at_level(logging.WARNING):
            completion = await policy.complete([1], SamplingParams(max_tokens=1))
        assert completion.policy_versions == (1,)
        await publishing

    asyncio.run(asyncio.wait_for(main(), 60))


def test_whoever_gets_nothing_from_an_engine_that_others_paused_says_so(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        engine = ScriptedEngine(LOGITS)
        policy = VersionedPolicy(engine, report_after_s=0.1)
        await engine.pause()  # not through the gate
        with caplog.at_level(logging.WARNING):
            running = asyncio.ensure_future(policy.complete([1], SamplingParams(max_tokens=4, seed=1)))
            while not caplog.text:
                await asyncio.sleep(0.01)
            assert "after 0 tokens" in caplog.text
            assert "not by this gate" in caplog.text
            await engine.resume()
            assert len((await asyncio.wait_for(running, 60)).token_ids) == 4

    asyncio.run(asyncio.wait_for(main(), 60))


def test_a_dead_engine_ends_waiters_and_errors_pass_through() -> None:
    async def main() -> None:
        engine = ScriptedEngine(LOGITS, max_context=16)
        policy = VersionedPolicy(engine)
        with pytest.raises(PromptTooLongError, match="context of 16"):
            await policy.complete([1] * 10, SamplingParams(max_tokens=7))
        running = asyncio.ensure_future(policy.complete([1], SamplingParams(max_tokens=15)))
        await asyncio.sleep(0)
        await engine.close()
        with pytest.raises(EngineDiedError):
            await running
        with pytest.raises(EngineDiedError):
            await policy.publish(update(1))
        with pytest.raises(EngineDiedError):
            await asyncio.wait_for(policy.complete([1], SamplingParams(max_tokens=2)), 60)

    asyncio.run(main())


class Stream:
    """Hears tokens as they come, and compares them with the completion at the end."""

    def __init__(self) -> None:
        self.tokens: list[tuple[int, float, int, int]] = []

    def __call__(self, ids: Sequence[int], logprobs: Sequence[float], version: int, kv_version: int) -> None:
        self.tokens += [(token, logprob, version, kv_version) for token, logprob in zip(ids, logprobs, strict=True)]

    def assert_is(self, completion: Completion) -> None:
        columns = completion.token_ids, completion.logprobs, completion.policy_versions, completion.kv_versions
        assert self.tokens == list(zip(*columns, strict=True))


def test_a_kept_request_goes_on_under_new_weights_and_says_that_its_keys_are_old() -> None:
    async def main() -> None:
        script = {
            3: lambda: asyncio.ensure_future(policy.publish(update(5), "keep")),
            7: lambda: asyncio.ensure_future(policy.publish(update(6), "keep")),
        }
        engine = ScriptedEngine(LOGITS, policy_version=4, script=script)
        policy = VersionedPolicy(engine)
        params, stream = SamplingParams(max_tokens=10, seed=1), Stream()
        completion = await policy.complete([1, 2], params, stream)
        assert completion.policy_versions == (4,) * 3 + (5,) * 4 + (6,) * 3
        assert completion.kv_versions == (4,) * 10
        assert (await engine.stats()).prefilled_tokens == 2  # it was never begun again
        assert_lawful([1, 2], completion, params, stale=True)
        stream.assert_is(completion)
        after = await policy.complete([1, 2], params)
        assert after.kv_versions == after.policy_versions == (6,) * 10

    asyncio.run(main())


def test_waiting_lets_running_requests_end_and_holds_new_ones_back() -> None:
    prepared: list[float] = []
    heard: list[float] = []

    class Preparing(ScriptedEngine):
        async def prepare(self, update: WeightUpdate) -> None:
            prepared.append(time.perf_counter())

    async def main() -> None:
        engine = Preparing(LOGITS, latency_s=lambda: 0.001)
        policy = VersionedPolicy(engine, publish_mode="wait")
        running = asyncio.ensure_future(
            policy.complete([1], SamplingParams(20, seed=1), lambda *_: heard.append(time.perf_counter()))
        )
        while not heard:
            await asyncio.sleep(0)
        publishing = asyncio.ensure_future(policy.publish(update(1)))
        await asyncio.sleep(0)
        late = asyncio.ensure_future(policy.complete([1], SamplingParams(3, seed=1)))
        report = await publishing
        assert running.done()
        assert (await running).policy_versions == (0,) * 20
        assert (await late).policy_versions == (1,) * 3
        assert report.mode == "wait"
        waited_s = heard[-1] - prepared[0]  # for the running one, which was sampled all the time
        assert waited_s > 0
        assert 0 < report.pause_s <= report.total_s - waited_s

    asyncio.run(main())


@pytest.mark.parametrize("seed", range(20))
def test_any_interleaving_of_modes_keeps_the_law_and_streams_what_it_returns(seed: int) -> None:
    async def main() -> None:
        rng = random.Random(seed)
        refused = frozenset(version for version in range(1, 20) if rng.random() < 0.2)
        engine = ScriptedEngine(LOGITS, latency_s=lambda: rng.choice([0.0, 0.0005]), load_s=0.0005, refused=refused)
        policy = VersionedPolicy(engine)

        async def episode(index: int) -> None:
            await asyncio.sleep(rng.random() * 0.01)
            params, stream = SamplingParams(rng.randint(1, 30), 1.0, (VOCAB - 1,), seed=index), Stream()
            completion = await policy.complete([index % VOCAB], params, stream)
            assert_lawful([index % VOCAB], completion, params, stale=True)
            stream.assert_is(completion)

        async def publisher() -> None:
            for version in range(1, 20):
                await asyncio.sleep(rng.random() * 0.002)
                try:
                    await policy.publish(update(version), rng.choice(["abort", "wait", "keep"]))
                except EngineError:
                    assert version in refused

        await asyncio.wait_for(asyncio.gather(publisher(), *(episode(index) for index in range(16))), 60)
        assert (await engine.stats()).running == 0

    asyncio.run(main())
