"""The engine on real vLLM servers (its CPU build): publication in all modes, deaths, refusals. Two replicas, started
once for all tests here."""

from __future__ import annotations

import asyncio
import os
import re
import signal
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from agentgym.engine.gate import PublishMode, VersionedPolicy
from agentgym.engine.protocol import WeightUpdate
from agentgym.engine.torch_engine import TorchEngine
from agentgym.engine.vllm_engine import VllmEngine
from agentgym.engine.vllm_server import VllmServerOptions
from agentgym.errors import EngineError, InputError, PromptTooLongError, VersionError
from agentgym.policy import Completion, SamplingParams

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]

VOCAB = 61
CONTEXT = 256
TOLERANCE = 1e-4
T = TypeVar("T")


@dataclass
class House:
    """The engine, the loop that it lives in, and the weights of every version that was published."""

    runner: asyncio.Runner
    engine: VllmEngine
    policy: VersionedPolicy
    folder: Path
    models: dict[int, PreTrainedModel]
    tmp: Path

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return self.runner.run(asyncio.wait_for(work, 280))

    def update(self, *, only: str = "") -> WeightUpdate:
        """A new version: another point near the first model, or the last one with the parameters `only` moved."""
        version = max(self.models) + 1
        model = AutoModelForCausalLM.from_config(self.models[0].config).eval()
        model.load_state_dict(self.models[version - 1 if only else 0].state_dict())
        generator = torch.Generator().manual_seed(version)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if only in name:
                    parameter.add_(0.08 * torch.randn(parameter.shape, generator=generator))
        self.models[version] = model
        path = self.tmp / f"{version:06d}.safetensors"
        save_file({name: parameter.detach().contiguous() for name, parameter in model.named_parameters()}, path)
        return WeightUpdate(version, path)

    @torch.no_grad()
    def off(self, version: int, prompt: Sequence[int], completion: Completion, temperature: float = 1.0) -> np.ndarray:
        """How far recorded logprobs are from a clean forward of `version`, by token."""
        logits = self.models[version](torch.tensor([[*prompt, *completion.token_ids]])).logits[0, len(prompt) - 1 : -1]
        chosen = torch.tensor(completion.token_ids)[:, None]
        wanted = (logits.float() / (temperature or 1.0)).log_softmax(-1).gather(1, chosen)[:, 0]
        return (torch.tensor(completion.logprobs) - wanted).abs().numpy()

    def assert_exact(self, prompt: Sequence[int], completion: Completion, temperature: float = 1.0) -> None:
        """Every token is the forward of its own version, where its keys are of that version too."""
        versions, keys = np.array(completion.policy_versions), np.array(completion.kv_versions)
        assert list(versions) == sorted(versions)
        assert (keys <= versions).all()
        for version in np.unique(versions):
            fresh = (versions == version) & (keys == version)
            assert (self.off(int(version), prompt, completion, temperature)[fresh] < TOLERANCE).all()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tied model without a tokenizer: tokens are all that the engine knows."""
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=1, head_dim=32, max_position_embeddings=512, tie_word_embeddings=True, bos_token_id=None,
        eos_token_id=5, pad_token_id=None,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.15, generator=generator)
    path = tmp_path_factory.mktemp("model")
    model.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def house(folder: Path, vllm_python: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    torch.set_num_threads(1)
    with asyncio.Runner() as runner:
        options = VllmServerOptions(vllm_python, CONTEXT, slots=32)
        engine = runner.run(VllmEngine.start(folder, options, replicas=2))
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        try:
            yield House(
                runner, engine, VersionedPolicy(engine), folder, {0: model}, tmp_path_factory.mktemp("versions")
            )
        finally:
            runner.run(engine.close())


def prompts(count: int) -> list[list[int]]:
    rng = np.random.default_rng(count)
    return [rng.integers(0, VOCAB, rng.integers(1, 30)).tolist() for _ in range(count)]


async def sampled(engine: VllmEngine, tokens: int) -> None:
    """Until `tokens` more have come."""
    wanted = (await engine.stats()).sampled_tokens + tokens
    while (await engine.stats()).sampled_tokens < wanted:
        await asyncio.sleep(0.005)


async def begun(streams: Sequence[list[int]], tokens: int) -> None:
    """Until every one of `streams` has heard of so many tokens."""
    while min(map(len, streams)) < tokens:
        await asyncio.sleep(0.002)


def hearing(stream: list[int]) -> Callable[..., None]:
    return lambda ids, *_: stream.extend(ids)


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
        for _ in range(100):
            served = [await _running_on_server(house.engine, index) for index in range(2)]
            if served == [0, 0]:
                break
            await asyncio.sleep(0.05)
        assert served == [0, 0]
        assert (await house.engine.stats()).running == 0

    house.run(main())


async def _running_on_server(engine: VllmEngine, index: int) -> int:
    replica = engine.seats[index].replica
    assert replica is not None
    text = (await replica._http.get("/metrics")).text
    return int(sum(float(value) for value in re.findall(r"^vllm:num_requests_running\{.*\} (\S+)$", text, re.M)))


# ------------------------------------------------------------------------------------------------------ publication


@pytest.mark.parametrize("mode", ["abort", "wait", "keep"])
def test_a_publication_while_requests_run(house: House, mode: PublishMode) -> None:
    async def main() -> None:
        before = house.engine.policy_version
        update = house.update()
        work = prompts(10)
        ended = asyncio.Event()
        first: list[list[int]] = [[] for _ in work]  # what was heard of each episode's first completion

        async def episode(index: int) -> list[tuple[Completion, list[int]]]:
            """Completions one after another, so that there is something to interrupt whenever it comes to it."""
            done: list[tuple[Completion, list[int]]] = []
            while not ended.is_set():
                stream = [] if done else first[index]
                params = SamplingParams(200, seed=index + 100 * len(done), session=str(index))
                done.append((await house.policy.complete(work[index], params, hearing(stream)), stream))
            return done

        running = [asyncio.ensure_future(episode(index)) for index in range(len(work))]
        await begun(first, 12)
        report = await house.policy.publish(update, mode)
        ended.set()
        late = await house.policy.complete(work[0], SamplingParams(20, seed=0))
        assert (report.version, report.mode) == (update.version, mode)
        assert [status.policy_version for status in house.engine.replicas()] == [update.version] * 2
        assert late.kv_versions == late.policy_versions == (update.version,) * 20
        house.assert_exact(work[0], late)
        split = mixed = 0
        for prompt, done in zip(work, await asyncio.gather(*running), strict=True):
            for completion, stream in done:
                assert stream == list(completion.token_ids)
                assert len(stream) == 200
                house.assert_exact(prompt, completion)
                versions, keys = np.array(completion.policy_versions), np.array(completion.kv_versions)
                stale = keys < versions
                assert mode == "keep" or not stale.any()
                split += len(set(completion.policy_versions)) == 2
                assert (house.off(before, prompt, completion)[versions == before] < TOLERANCE).all()
                if stale.any():  # the new version on the old one's keys: the forward of neither
                    assert house.off(before, prompt, completion)[stale].max() > 0.01
                    mixed += int((house.off(update.version, prompt, completion)[stale] > 0.001).sum())
        assert split == 0 if mode == "wait" else split >= 2
        assert mixed > 20 or mode != "keep"

    house.run(main())


def test_only_layers_that_changed_are_sent_and_the_tied_head_follows(house: House) -> None:
    async def main() -> None:
        await house.policy.publish(house.update())
        for only, count in (("layers.1.mlp.up_proj", 9), ("embed_tokens", 1), ("norm.weight", 28), ("nothing", 0)):
            update = house.update(only=only)
            await house.engine.prepare(update)
            staged = house.engine.seats[0]._staged
            assert staged is not None
            assert len(staged[1]) == count
            await house.policy.publish(update)
            completion = await house.policy.complete([3, 1, 4], SamplingParams(30, seed=1))
            assert completion.policy_versions == (update.version,) * 30
            house.assert_exact([3, 1, 4], completion)

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
        wrong = dict(seat._staged[1]) | {next(iter(tensors)): "0" * 32}
        assert seat.replica is not None
        with pytest.raises(EngineError, match=r"checksum of .*sent 0000"):
            await seat.replica.stage(seat._staged[0], wrong)
        assert [status.state for status in house.engine.replicas()] == ["serving"] * 2
        completion = await house.policy.complete([2], SamplingParams(20, seed=3))
        assert completion.policy_versions == (before,) * 20
        house.assert_exact([2], completion)

    house.run(main())


def test_requests_that_come_while_paused_are_sent_back(house: House) -> None:
    async def main() -> None:
        engine = house.engine
        running = asyncio.ensure_future(engine.sample([1], SamplingParams(200, seed=1)))
        await sampled(engine, 0)
        await asyncio.sleep(0.3)
        await engine.pause()
        (segment,) = await asyncio.wait_for(running, 10)
        assert segment.finish_reason == "abort"
        (late,) = await engine.sample([1], SamplingParams(20))
        assert (late.token_ids, late.finish_reason) == ((), "abort")
        await engine.resume()
        assert len((await engine.sample([1], SamplingParams(20)))[0].token_ids) == 20

    house.run(main())


# ----------------------------------------------------------------------------------------------------------- deaths


def _server_processes(engine: VllmEngine, index: int) -> list[psutil.Process]:
    server = engine.seats[index].server
    assert server is not None
    return psutil.Process(server.pid).children(recursive=True)


def test_kill_9_of_one_of_two_replicas_loses_and_repeats_nothing(house: House) -> None:
    """Its requests go on elsewhere behind the tokens they have; it comes back with what was published meanwhile."""

    async def main() -> None:
        engine = house.engine
        work = prompts(12)
        while [status.state for status in engine.replicas()] != ["serving"] * 2:
            await asyncio.sleep(0.2)
        # the first steps of a batch of another size are slow: one server must not be done before the other has begun
        await asyncio.gather(*(house.policy.complete(prompt, SamplingParams(5)) for prompt in work))
        streams: list[list[int]] = [[] for _ in work]
        running = [
            asyncio.ensure_future(house.policy.complete(prompt, SamplingParams(200, seed=index), hearing(stream)))
            for index, (prompt, stream) in enumerate(zip(work, streams, strict=True))
        ]
        await begun(streams, 3)
        assert engine.seats[1].running >= 4, engine.replicas()
        processes = _server_processes(engine, 1)
        assert len(processes) >= 3
        os.kill(processes[0].pid, signal.SIGKILL)
        done = await asyncio.gather(*running)
        for prompt, completion, stream in zip(work, done, streams, strict=True):
            assert stream == list(completion.token_ids)  # heard once each, in order
            assert len(stream) == 200
            assert completion.kv_versions == completion.policy_versions
            house.assert_exact(prompt, completion)
        status = engine.replicas()[1]
        assert status.state in ("lost", "starting")
        assert "SIGKILL" in status.error or "went away" in status.error or "half-way" in status.error
        await house.policy.publish(house.update())
        assert engine.replicas()[0].policy_version == engine.policy_version
        while engine.replicas()[1].state != "serving":
            await asyncio.sleep(0.2)
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


# --------------------------------------------------------------------------------------------- servers of others


@asynccontextmanager
async def relayed(socket: str) -> AsyncIterator[str]:
    """A server's Unix socket as a TCP address."""

    async def pipe(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
        try:
            while data := await source.read(65536):
                target.write(data)
                await target.drain()
        except (ConnectionError, asyncio.CancelledError):
            pass
        finally:
            target.close()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        upstream, downstream = await asyncio.open_unix_connection(socket)
        await asyncio.gather(pipe(reader, downstream), pipe(upstream, writer))

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()


def test_a_running_server_is_taken_over_and_its_former_user_notices(house: House) -> None:
    async def main() -> None:
        seat = house.engine.seats[1]
        assert seat.server is not None
        async with relayed(seat.server.socket) as url:
            with pytest.raises(InputError, match="--max-model-len 4096"):
                await VllmEngine.connect(house.folder, [url], max_context=4096)
            with pytest.raises(InputError, match=r"engine\.dtype is bfloat16"):
                await VllmEngine.connect(house.folder, [url], max_context=CONTEXT, dtype="bfloat16")
            other = await VllmEngine.connect(house.folder, [url], max_context=CONTEXT)
            completion = await VersionedPolicy(other).complete([7, 8], SamplingParams(20, seed=1))
            assert completion.policy_versions == (0,) * 20
            assert house.off(0, [7, 8], completion).max() < TOLERANCE  # it has version 0 again, whatever it had
            update = house.update()
            await VersionedPolicy(other).publish(WeightUpdate(1, update.path))
            completion = await VersionedPolicy(other).complete([7, 8], SamplingParams(20, seed=1))
            assert house.off(update.version, [7, 8], completion).max() < TOLERANCE
            await other.close()
        del house.models[update.version]
        house.engine._dispatch._sessions["mine"] = seat
        with pytest.raises(EngineError, match="somebody else updates this server"):
            await house.engine.sample([1], SamplingParams(4, session="mine"))
        assert house.engine.replicas()[1].state != "serving"
        completion = await house.policy.complete([1], SamplingParams(4, session="mine"))
        house.assert_exact([1], completion)

    house.run(main())


def test_a_server_that_records_raw_logprobs_is_refused(folder: Path, vllm_python: Path) -> None:
    async def main() -> None:
        options = VllmServerOptions(vllm_python, CONTEXT, extra_args=("--logprobs-mode", "raw_logprobs"))
        with pytest.raises(
            InputError, match=r"records raw_logprobs, .* start it with --logprobs-mode processed_logprobs"
        ):
            await VllmEngine.start(folder, options)

    asyncio.run(main())
    children = [child.cmdline() for child in psutil.Process().children(recursive=True)]
    assert not [line for line in children if "raw_logprobs" in line]
