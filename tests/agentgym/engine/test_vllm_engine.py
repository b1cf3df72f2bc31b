"""The engine on real vLLM servers (its CPU build): publication in all modes, deaths, refusals, replicas that are wrong.
Two replicas, started once for all tests here; the last test leaves them useless."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file
from vllm_house import (
    CONTEXT,
    TOLERANCE,
    VOCAB,
    House,
    another_model,
    begun,
    hearing,
    prompts,
    published_among_requests,
    refused_as_others,
    relayed,
    save_small_model,
)

from agentgym.engine.gate import PublishMode, VersionedPolicy
from agentgym.engine.protocol import WeightUpdate
from agentgym.engine.torch_engine import TorchEngine
from agentgym.engine.vllm.engine import VllmEngine
from agentgym.engine.vllm.server import VllmServerOptions
from agentgym.engine.vllm.weights import PublishedTensors
from agentgym.errors import EngineError, InputError, PromptTooLongError, VersionError
from agentgym.policy import Completion, SamplingParams

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_small_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def house(folder: Path, vllm_python: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    options = VllmServerOptions(vllm_python, CONTEXT, slots=32)
    with House.opened(folder, options, tmp_path_factory.mktemp("versions"), replicas=2) as opened:
        yield opened


# ------------------------------------------------------------------------------------------------------ conformance


def test_torch_and_vllm_record_the_same_distribution(house: House) -> None:
    """Sampled by either, recorded within 1e-4 of the model's own forward; greedy gives the same tokens."""
    heats = (1.0, 0.6, 0.0)

    async def main() -> None:
        torch_engine = TorchEngine(house.folder, slots=8, max_context=CONTEXT)
        twin = VersionedPolicy(torch_engine)
        work = [(prompt, SamplingParams(40, heats[i % 3], (), seed=i)) for i, prompt in enumerate(prompts(12))]
        ours = await asyncio.gather(*(house.policy.complete(*each) for each in work))
        theirs = await asyncio.gather(*(twin.complete(*each) for each in work))
        await torch_engine.close()
        for (prompt, params), one, two in zip(work, ours, theirs, strict=True):
            assert len(one.token_ids) == 40  # also over the model's eos, which is no stop token of this request
            assert one.kv_versions == one.policy_versions == (0,) * 40
            assert house.off(0, prompt, one, params.temperature).max() < TOLERANCE
            assert house.off(0, prompt, two, params.temperature).max() < TOLERANCE
            if params.temperature == 0:
                assert one.token_ids == two.token_ids
                assert np.abs(np.array(one.logprobs) - np.array(two.logprobs)).max() < TOLERANCE
        assert len({one.token_ids for one in ours}) == 12

    house.run(main())


def test_seeds_stops_and_streams(house: House) -> None:
    async def main() -> None:
        params = SamplingParams(30, seed=7)
        free = await house.policy.complete([1, 2], params)
        others = [
            house.policy.complete(prompt, SamplingParams(20, seed=index)) for index, prompt in enumerate(prompts(8))
        ]
        among, *_ = await asyncio.gather(house.policy.complete([1, 2], params), *others)
        assert among.token_ids == free.token_ids
        stop = free.token_ids[9]
        first = free.token_ids.index(stop)
        heard: list[tuple[int, float, int, int]] = []

        def hear(ids: Sequence[int], logprobs: Sequence[float], version: int, kv_version: int) -> None:
            heard.extend((token, value, version, kv_version) for token, value in zip(ids, logprobs, strict=True))

        stopped = await house.policy.complete([1, 2], SamplingParams(30, 1.0, (stop,), seed=7), hear)
        assert (stopped.token_ids, stopped.finish_reason) == (free.token_ids[: first + 1], "stop")
        columns = stopped.token_ids, stopped.logprobs, stopped.policy_versions, stopped.kv_versions
        assert heard == list(zip(*columns, strict=True))

    house.run(main())


def test_requests_that_cannot_be_served_are_refused_before_they_cost_anything(house: House) -> None:
    async def main() -> None:
        engine = house.engine
        with pytest.raises(PromptTooLongError, match=rf"prompt of 250 tokens and max_tokens 7 .* context of {CONTEXT}"):
            await engine.sample([1] * 250, SamplingParams(7))
        with pytest.raises(InputError, match="at least one token"):
            await engine.sample([], SamplingParams(7))
        with pytest.raises(InputError, match=rf"in \[0, {VOCAB}\), got 3..{VOCAB}"):
            await engine.sample([3, VOCAB], SamplingParams(7))
        whole = await house.policy.complete([1] * (CONTEXT - 8), SamplingParams(8, seed=1))
        assert len(whole.token_ids) == 8

    house.run(main())


def test_a_cancelled_request_frees_its_place_on_the_server(house: House) -> None:
    async def main() -> None:
        streams: list[list[int]] = [[] for _ in range(6)]
        running = [
            asyncio.ensure_future(house.policy.complete([index], SamplingParams(240), hearing(stream)))
            for index, stream in enumerate(streams)
        ]
        await begun(streams, 3)
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        served = [-1, -1]
        for _ in range(1000):
            served = [await house.running_on_server(index) for index in range(2)]
            if served == [0, 0]:
                break
            await asyncio.sleep(0.05)
        assert served == [0, 0]
        assert (await house.engine.stats()).running == 0

    house.run(main())


# ------------------------------------------------------------------------------------------------------ publication


@pytest.mark.parametrize("mode", ["abort", "wait", "keep"])
def test_a_publication_while_requests_run(house: House, mode: PublishMode) -> None:
    async def main() -> None:
        for _ in range(5):  # on a loaded machine a pause may come when most requests have just ended
            split, mixed = await published_among_requests(house, mode)
            if mode == "wait":
                assert split == 0
                return
            if split and (mixed or mode == "abort"):
                return
        raise AssertionError("no publication of five found a request under way")

    house.run(main())


def test_a_prefix_that_is_cached_is_met_again_but_never_under_other_weights(house: House) -> None:
    """`keep` clears no cache: what tells keys apart is the salt."""

    async def main() -> None:
        prompt = np.random.default_rng(7).integers(0, VOCAB, 200).tolist()

        async def asked() -> tuple[Completion, int]:
            before = await house.cached_tokens()
            completion = await house.policy.complete(prompt, SamplingParams(20, seed=1, session="cached"))
            return completion, await house.cached_tokens() - before

        first, _ = await asked()
        again, cached = await asked()
        assert cached >= 64
        assert again.token_ids == first.token_ids
        for mode in ("keep", "abort"):  # neither empties the cache; keys are found by their version
            update = house.update()
            await house.policy.publish(update, mode)
            fresh, cached = await asked()
            assert cached == 0
            assert fresh.policy_versions == (update.version,) * 20
            assert house.off(update.version - 1, prompt, fresh).max() > 0.01
            house.assert_exact(prompt, fresh)

    house.run(main())


def test_a_server_of_ours_need_not_stand_still_to_be_interrupted(house: House) -> None:
    async def main() -> None:
        streams: list[list[int]] = [[] for _ in range(6)]
        running = [
            asyncio.ensure_future(house.engine.sample([index], SamplingParams(200), hearing(stream)))
            for index, stream in enumerate(streams)
        ]
        await begun(streams, 3)
        update = house.update()
        await house.engine.prepare(update)
        await house.engine.pause("abort")
        cut = [segments[-1] for segments in await asyncio.gather(*running)]
        for seat in house.engine.seats:
            assert seat.replica is not None
            assert (await seat.replica._get("/is_paused"))["is_paused"] is False
        await house.engine.load(update)
        await house.engine.resume()
        assert {segment.policy_version for segment in cut} == {update.version - 1}
        assert {segment.finish_reason for segment in cut} == {"abort"}
        for index, (stream, segment) in enumerate(zip(streams, cut, strict=True)):
            assert stream == list(segment.token_ids)
            off = house.off(update.version - 1, [index], Completion.from_segments([segment]))
            assert off.max() < TOLERANCE
        house.policy = VersionedPolicy(house.engine)  # the gate before was not told
        fresh = await house.policy.complete([3, 1, 4], SamplingParams(30, seed=1))
        assert fresh.policy_versions == fresh.kv_versions == (update.version,) * 30
        house.assert_exact([3, 1, 4], fresh)

    house.run(main())


def test_only_layers_that_changed_are_sent_and_the_tied_head_follows(house: House) -> None:
    async def main() -> None:
        await house.policy.publish(house.update())
        for only, count in (("layers.1.mlp.up_proj", 9), ("embed_tokens", 1), ("norm.weight", 28), ("nothing", 0)):
            update = house.update(only=only)
            await house.engine.prepare(update)
            staged = house.engine.seats[0]._staged
            assert staged is not None
            assert len(staged.names) == count
            still = await house.policy.complete([3, 1, 4], SamplingParams(30, seed=2))
            assert still.policy_versions == (update.version - 1,) * 30
            house.assert_exact([3, 1, 4], still)  # the new layers are made, and nobody computes with them yet
            report = await house.policy.publish(update)
            tensors = load_file(update.path)
            assert report.loaded_bytes == sum(tensors[name].nbytes for name in staged.names)
            completion = await house.policy.complete([3, 1, 4], SamplingParams(30, seed=1))
            assert completion.policy_versions == (update.version,) * 30
            house.assert_exact([3, 1, 4], completion)
        server = house.engine.seats[0].server
        assert server is not None
        assert "28 tensors are loaded, their layers swapped in" in server._log_path.read_text()

    house.run(main())


def test_a_file_that_cannot_be_loaded_changes_nothing(house: House) -> None:
    async def main() -> None:
        before = house.engine.policy_version
        update = house.update()
        version = update.version
        del house.models[version]
        tensors = load_file(update.path)
        whole = update.path.read_bytes()
        update.path.write_bytes(whole[:-100])
        with pytest.raises(EngineError, match="cut off"):
            await house.policy.publish(update)
        with pytest.raises(EngineError, match="not a readable safetensors file"):
            await house.policy.publish(WeightUpdate(version, house.tmp / "none.safetensors"))
        with pytest.raises(VersionError, match="only go up"):
            await house.policy.publish(WeightUpdate(before, update.path))
        update.path.write_bytes(whole)
        await house.engine.prepare(update)  # what the servers have compared is not what they shall load
        seat = house.engine.seats[0]
        assert seat._staged is not None
        wrong = dict(seat._staged.names) | {next(iter(tensors)): "0" * 32}
        assert seat.replica is not None
        with pytest.raises(EngineError, match=r"checksum of .*sent 0000"):
            await seat.replica.stage(seat._staged.published, wrong)
        assert [status.state for status in house.engine.replicas()] == ["serving"] * 2
        completion = await house.policy.complete([2], SamplingParams(20, seed=3))
        assert completion.policy_versions == (before,) * 20
        house.assert_exact([2], completion)

    house.run(main())


def test_requests_that_come_while_paused_are_sent_back(house: House) -> None:
    async def main() -> None:
        engine = house.engine
        finish_reason = ""
        while finish_reason != "abort":  # on so small a model it may have come to its end before the pause does
            heard: list[int] = []
            running = asyncio.ensure_future(engine.sample([1], SamplingParams(200, seed=1), hearing(heard)))
            await begun([heard], 3)
            await engine.pause()
            try:
                (segment,) = await asyncio.wait_for(running, 60)
                assert list(segment.token_ids) == heard
                finish_reason = segment.finish_reason
                assert finish_reason == ("length" if len(heard) == 200 else "abort")
                (late,) = await engine.sample([1], SamplingParams(20))
                assert (late.token_ids, late.finish_reason) == ((), "abort")
            finally:
                await engine.resume()
        assert len((await engine.sample([1], SamplingParams(20)))[0].token_ids) == 20

    house.run(main())


# ----------------------------------------------------------------------------------------------------------- deaths


def test_kill_9_of_one_of_two_replicas_loses_and_repeats_nothing(house: House) -> None:
    """Its requests go on elsewhere behind the tokens they have; it comes back with what was published meanwhile."""

    async def main() -> None:
        engine = house.engine
        work = prompts(12)
        await house.all_serve()
        # the first steps of a batch of another size are slow: one server must not be done before the other has begun
        await asyncio.gather(*(house.policy.complete(prompt, SamplingParams(5)) for prompt in work))
        running: list[asyncio.Future[Completion]] = []
        streams: list[list[int]] = []
        while not engine.seats[1].running:  # where this process was late, they have come to their end: once more
            await asyncio.gather(*running)
            streams = [[] for _ in work]
            running = [
                asyncio.ensure_future(
                    house.policy.complete(prompt, SamplingParams(200, seed=index, session=f"k{index}"), hearing(stream))
                )
                for index, (prompt, stream) in enumerate(zip(work, streams, strict=True))
            ]
            while not all(f"k{index}" in engine._dispatch._sessions for index in range(len(work))):
                await asyncio.sleep(0.002)
            placed = [engine._dispatch._sessions[f"k{index}"] for index in range(len(work))]
            await begun([stream for stream, seat in zip(streams, placed, strict=True) if seat is engine.seats[1]], 3)
        processes = house.server_processes(1)
        assert len(processes) >= 3
        os.kill(processes[0].pid, signal.SIGKILL)
        done = await asyncio.gather(*running)
        for prompt, completion, stream in zip(work, done, streams, strict=True):
            assert stream == list(completion.token_ids)  # heard once each, in order
            assert len(stream) == 200
            assert completion.kv_versions == completion.policy_versions
            house.assert_exact(prompt, completion)
        while (status := engine.replicas()[1]).state == "serving" and not status.restarts:
            await asyncio.sleep(0.01)  # nothing was on it, and it is looked at in a moment
        if not status.restarts:  # it is not back already
            assert status.state in ("lost", "starting")
            assert "SIGKILL" in status.error or "went away" in status.error or "half-way" in status.error
        await house.policy.publish(house.update())
        assert engine.replicas()[0].policy_version == engine.policy_version
        await house.all_serve()
        assert engine.replicas()[1].policy_version == engine.policy_version
        assert engine.replicas()[1].restarts == 1
        assert not any(process.is_running() for process in processes)
        both = await asyncio.gather(
            *(house.policy.complete([5, index], SamplingParams(20, seed=index)) for index in range(6))
        )
        for index, completion in enumerate(both):
            assert completion.policy_versions == (engine.policy_version,) * 20
            house.assert_exact([5, index], completion)

    house.run(main())


# ---------------------------------------------------------------------------------------- replicas that are wrong


def test_the_probe_is_compared_on_every_replica_and_a_right_one_stays(house: House) -> None:
    async def main() -> None:
        await house.all_serve()
        update = house.update()
        report = await house.policy.publish(update, probe=house.probe(update.version))
        assert report.probe_off is not None
        assert 0 < report.probe_off < TOLERANCE
        assert [status.state for status in house.engine.replicas()] == ["serving"] * 2

    house.run(main())


def test_a_replica_with_other_weights_is_taken_out_and_all_wrong_is_an_error(house: House) -> None:
    """One is given other weights behind the engine's back, under the right label; then the other belongs to someone
    else for a while, and is started again at the end, which nobody waits for."""

    async def main() -> None:
        engine = house.engine
        await house.all_serve()
        first, second = engine.seats
        update, other = house.update(), house.update()
        await house.policy.publish(update)
        assert second.replica is not None
        published = PublishedTensors.read(other.path)
        await second.replica.stage(published, published.checksums)
        await second.replica.pause("abort")
        await second.replica.load(update.version, published.checksums)
        await second.replica.resume()
        probe = house.probe(update.version)
        wrong = house.off(other.version, [1], await _complete_on(house, 1, [1]))
        assert wrong.max() < TOLERANCE  # it really serves them, and says that they are the version's
        largest = await engine.verify(probe)
        assert largest is not None
        assert largest > 0.01  # that of the one that is taken out now
        assert [status.state == "serving" for status in engine.replicas()] == [True, False]
        assert "its logprobs after version" in engine.replicas()[1].error
        await second.close()  # else it would serve again before this has come to its end, if that takes long
        for index in range(4):  # even those whose session it had
            house.assert_exact([1], await house.policy.complete([1], SamplingParams(8, seed=index, session="on 1")))

        assert first.server is not None
        async with relayed(first.server.socket) as url:
            await refused_as_others(house, url)
            house.assert_exact([1], await _complete_on(house, 0, [1]))  # none of them has touched what it serves

            with pytest.raises(InputError, match="--max-model-len 4096"):
                await VllmEngine.connect(house.folder, [url], max_context=4096)
            with pytest.raises(InputError, match=r"engine\.dtype is bfloat16"):
                await VllmEngine.connect(house.folder, [url], max_context=CONTEXT, dtype="bfloat16")
            with pytest.raises(InputError, match=r"this run publishes rank 4; .*--enable-lora"):
                await VllmEngine.connect(house.folder, [url], max_context=CONTEXT, max_lora_rank=4)
            same = another_model(house.folder, house.tmp / "same")
            stranger = await VllmEngine.connect(same, [url], max_context=CONTEXT)
            completion = await VersionedPolicy(stranger).complete([7, 8], SamplingParams(20, seed=1))
            assert completion.policy_versions == (0,) * 20
            assert house.off(0, [7, 8], completion).max() < TOLERANCE  # it has version 0 again, whatever it had
            await VersionedPolicy(stranger).publish(WeightUpdate(1, other.path))
            completion = await VersionedPolicy(stranger).complete([7, 8], SamplingParams(20, seed=1))
            assert house.off(other.version, [7, 8], completion).max() < TOLERANCE
            (same / "config.json").touch()
            stranger.seats[0].lose("it went away")
            while "changed since" not in stranger.replicas()[0].error:
                await asyncio.sleep(0.05)
            assert stranger.replicas()[0].state == "lost"  # and stays so: it would come back as another model
            await stranger.close()
        with pytest.raises(EngineError, match=rf"after version {update.version} no replica has the trainer's logprobs"):
            await engine.verify(probe)
        assert [status.state == "serving" for status in engine.replicas()] == [False, False]

    house.run(main())


async def _complete_on(house: House, index: int, prompt: Sequence[int]) -> Completion:
    house.engine._dispatch._sessions[f"on {index}"] = house.engine.seats[index]
    return await house.policy.complete(prompt, SamplingParams(20, seed=0, session=f"on {index}"))
