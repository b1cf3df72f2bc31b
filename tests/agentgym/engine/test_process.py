"""The engine in a child process: the same samples, typed errors, and nobody left behind."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np
import psutil
import pytest
from safetensors.numpy import load_file
from torch_law import TOLERANCE

from agentgym.engine.gate import VersionedPolicy
from agentgym.engine.process import ProcessEngine
from agentgym.engine.protocol import Engine, WeightUpdate
from agentgym.engine.torch_engine import TorchEngine
from agentgym.errors import EngineDiedError, EngineError, InputError, PromptTooLongError, VersionError
from agentgym.policy import SamplingParams, Segment

VOCAB = 61


async def segment_of(engine: Engine, prompt_ids: Sequence[int], params: SamplingParams) -> Segment:
    """What the engine samples while nothing is loaded: one segment."""
    (segment,) = await engine.sample(prompt_ids, params)
    return segment


@asynccontextmanager
async def started(folder: Path, slots: int = 4, max_context: int = 96) -> AsyncIterator[ProcessEngine]:
    engine = await ProcessEngine.start(folder, slots=slots, max_context=max_context)
    try:
        yield engine
    finally:
        await engine.close()


def gone(pid: int) -> bool:
    """Whether no process `pid` runs any more (a zombie that nobody reaped does not run)."""
    try:
        return "\nState:\tZ" in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return True


def wait_for(condition: Callable[[], bool], seconds: float = 60.0) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


async def held(engine: ProcessEngine) -> tuple[asyncio.Future[tuple[Segment, ...]], int]:
    """A request of 94 tokens whose engine process stands still (SIGSTOP), having sampled some of it and not all; and
    how many such requests came to their end before, because this process was late."""
    for seed in range(100):
        begun = asyncio.Event()
        asked = engine.sample([1, 2], SamplingParams(94, seed=seed), lambda *_, begun=begun: begun.set())
        running = asyncio.ensure_future(asked)
        await begun.wait()
        os.kill(engine.pid, signal.SIGSTOP)
        while "\nState:\tT" not in Path(f"/proc/{engine.pid}/status").read_text():
            await asyncio.sleep(0.001)
        await asyncio.wait((running,), timeout=0.05)  # what it has said by now has arrived
        if not running.done():
            return running, seed
        os.kill(engine.pid, signal.SIGCONT)
    raise AssertionError("the child is always faster")


def test_it_samples_what_the_engine_in_process_samples_over_publications(model_of, perturbed, tmp_path: Path) -> None:
    folder, model = model_of("llama")
    path, _ = perturbed(model, 1)
    prompts = [[(index * step) % VOCAB for step in range(1, 6 + index)] for index in range(9)]

    async def run(engine: TorchEngine | ProcessEngine) -> list[object]:
        policy = VersionedPolicy(engine)
        before = [
            policy.complete(prompt, SamplingParams(12, 0.8, (5,), seed=index)) for index, prompt in enumerate(prompts)
        ]
        first = await asyncio.gather(*before)
        report = await policy.publish(WeightUpdate(1, path))
        assert report.version == engine.policy_version == 1
        assert report.loaded_bytes == sum(tensor.nbytes for tensor in load_file(path).values())
        with pytest.raises(PromptTooLongError, match="context of 96"):
            await segment_of(engine, [1] * 90, SamplingParams(7))
        with pytest.raises(InputError, match="at least one token"):
            await segment_of(engine, [], SamplingParams(7))
        await engine.pause()
        assert (await segment_of(engine, [1], SamplingParams(3))).finish_reason == "abort"
        with pytest.raises(VersionError, match="only go up"):
            await engine.load(WeightUpdate(1, path))
        with pytest.raises(EngineError, match="no weights at"):
            await engine.load(WeightUpdate(2, tmp_path / "none"))
        await engine.resume()
        after = [policy.complete(prompt, SamplingParams(12, seed=index)) for index, prompt in enumerate(prompts)]
        stats = await engine.stats()
        assert stats.policy_version == 1
        assert stats.sampled_tokens >= sum(len(completion.token_ids) for completion in first)
        return [*first, *await asyncio.gather(*after)]

    async def main() -> None:
        async with started(folder) as engine:
            assert engine.max_context == 96
            ours = await run(engine)
        inside = TorchEngine(folder, slots=4, max_context=96)
        for mine, theirs in zip(ours, await run(inside), strict=True):
            assert mine.token_ids == theirs.token_ids
            assert mine.policy_versions == theirs.policy_versions
            assert np.abs(np.array(mine.logprobs) - np.array(theirs.logprobs)).max() < TOLERANCE
        await inside.close()

    asyncio.run(main())


def test_a_child_killed_by_kill_9_fails_every_call_with_its_name(model_of) -> None:
    async def main() -> None:
        async with started(model_of("llama")[0], slots=1) as engine:
            first, _ = await held(engine)
            waiting = (segment_of(engine, [1, 2], SamplingParams(94, seed=index)) for index in range(50))
            running = [first, *map(asyncio.ensure_future, waiting)]
            await asyncio.sleep(0.03)
            os.kill(engine.pid, signal.SIGKILL)
            died = await asyncio.wait_for(asyncio.gather(*running, return_exceptions=True), 60)
            assert all(isinstance(result, EngineDiedError) for result in died)
            assert "was killed by SIGKILL" in str(died[0])
            assert str(engine.pid) in str(died[0])
            with pytest.raises(EngineDiedError, match="SIGKILL"):
                await engine.pause()
            with pytest.raises(EngineDiedError, match="SIGKILL"):
                await VersionedPolicy(engine).complete([1], SamplingParams(2))

    asyncio.run(main())


def test_a_child_that_dies_leaves_its_last_words(model_of) -> None:
    async def main() -> None:
        async with started(model_of("llama")[0]) as engine:
            os.kill(engine.pid, signal.SIGABRT)
            with pytest.raises(EngineDiedError, match="SIGABRT"):
                await segment_of(engine, [1], SamplingParams(2))

    asyncio.run(main())


def test_errors_of_the_start_are_typed_and_leave_no_child(model_of, tmp_path: Path) -> None:
    folder, _ = model_of("llama")
    before = set(psutil.Process().children())

    async def main() -> None:
        nowhere, dtype = await asyncio.gather(
            ProcessEngine.start(tmp_path / "nowhere", slots=1, max_context=8),
            ProcessEngine.start(folder, slots=1, max_context=8, dtype="float8"),
            return_exceptions=True,
        )
        assert isinstance(nowhere, InputError)
        assert "holds no config.json" in str(nowhere)
        assert isinstance(dtype, InputError)
        assert "float32, bfloat16, got 'float8'" in str(dtype)

    asyncio.run(main())
    for child in set(psutil.Process().children()) - before:
        with contextlib.suppress(psutil.NoSuchProcess):
            assert "agentgym.engine.process" not in child.cmdline()


def test_closing_ends_the_child_and_whoever_waits(model_of) -> None:
    async def main() -> None:
        async with started(model_of("llama")[0], slots=1) as engine:
            running = asyncio.ensure_future(segment_of(engine, [1], SamplingParams(90)))
            waiting = asyncio.ensure_future(segment_of(engine, [1], SamplingParams(90)))
            await asyncio.sleep(0)
            await engine.close()
            for result in await asyncio.gather(running, waiting, return_exceptions=True):
                assert isinstance(result, EngineDiedError)
            with pytest.raises(EngineDiedError, match="closed"):
                await engine.stats()
            assert gone(engine.pid)

    asyncio.run(main())


def test_a_cancelled_call_frees_the_slot_in_the_child(model_of) -> None:
    async def main() -> None:
        async with started(model_of("llama")[0], slots=1) as engine:
            first, ended = await held(engine)
            running = [first, *(asyncio.ensure_future(segment_of(engine, [1], SamplingParams(90))) for _ in range(20))]
            await asyncio.sleep(0.01)
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)
            await asyncio.sleep(0)  # what is said in a turn of the loop goes out at its end
            os.kill(engine.pid, signal.SIGCONT)
            await segment_of(engine, [2], SamplingParams(1))
            stats = await engine.stats()
            assert (stats.running, stats.waiting) == (0, 0)
            assert stats.sampled_tokens <= 94 * (ended + 1) + 1, "none of those that waited was sampled"

    asyncio.run(main())


PARENT = """
import asyncio, sys, threading
from pathlib import Path
from agentgym.engine.process import ProcessEngine
from agentgym.policy import SamplingParams

async def main():
    engine = await ProcessEngine.start(Path(sys.argv[1]), slots=2, max_context=96)
    print(engine.pid, "torch" in sys.modules, flush=True)
    while True:
        await engine.sample([1], SamplingParams(90))

asyncio.run(main())
"""


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGINT])
def test_the_child_leaves_when_its_parent_dies(model_of, end: signal.Signals) -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(model_of("llama")[0])], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    assert parent.stdout is not None
    with parent.stdout:
        try:
            pid, torch_in_parent = parent.stdout.readline().split()
            assert torch_in_parent == b"False"
            assert not gone(int(pid))
            parent.send_signal(end)
            parent.wait(60)
        finally:
            parent.kill()
    assert wait_for(lambda: gone(int(pid)))


def test_thousands_of_short_requests_a_second_are_carried(model_of) -> None:
    """Not a figure, a floor: 2,000 one-token requests over the socket; 40 ms for each, one by one, would be 80 s."""

    async def main() -> None:
        async with started(model_of("llama")[0], slots=64, max_context=16) as engine:
            start = time.perf_counter()
            segments = await asyncio.gather(
                *(segment_of(engine, [index % VOCAB], SamplingParams(1, seed=index)) for index in range(2000))
            )
            assert time.perf_counter() - start < 60
            assert all(len(segment.token_ids) == 1 for segment in segments)

    asyncio.run(main())


def test_tokens_and_kept_spans_come_over_the_socket(model_of, perturbed) -> None:
    folder, model = model_of("llama")
    path, _ = perturbed(model, 1)

    async def main() -> None:
        async with started(folder) as engine:
            policy = VersionedPolicy(engine)

            async def published_meanwhile(version: int) -> bool:
                heard: list[tuple[int, float, int, int]] = []
                begun = asyncio.Event()

                def hear(ids: Sequence[int], logprobs: Sequence[float], version: int, kv_version: int) -> None:
                    heard.extend(
                        (token, value, version, kv_version) for token, value in zip(ids, logprobs, strict=True)
                    )
                    begun.set()

                running = asyncio.ensure_future(policy.complete([1, 2], SamplingParams(90, seed=1), hear))
                await begun.wait()
                await policy.publish(WeightUpdate(version, path), "keep")
                completion = await running
                columns = completion.token_ids, completion.logprobs, completion.policy_versions, completion.kv_versions
                assert heard == list(zip(*columns, strict=True))
                assert set(completion.kv_versions) == {version - 1}
                assert set(completion.policy_versions) <= {version - 1, version}
                return len(set(completion.policy_versions)) == 2

            for version in range(1, 51):  # where this process was late, the child had come to the end: once more
                if await published_meanwhile(version):
                    return
            raise AssertionError("no publication of fifty found a request under way")

    asyncio.run(main())
