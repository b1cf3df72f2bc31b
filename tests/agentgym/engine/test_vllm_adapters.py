"""Adapters on a real vLLM server: swapped between two tokens, exact, and beside whole models. One server for all."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from vllm_house import CONTEXT, TOLERANCE, House, begun, hearing, prompts, save_small_model

from agentgym.engine.gate import PublishMode
from agentgym.engine.protocol import WeightUpdate
from agentgym.engine.vllm.adapters import AdapterShelf
from agentgym.engine.vllm.engine import VllmEngine
from agentgym.engine.vllm.server import VllmServerOptions, _lora_arguments
from agentgym.engine.vllm.weights import PublishedTensors
from agentgym.errors import EngineError, InputError
from agentgym.policy import Completion, SamplingParams
from agentgym.weight_file import save_file

RANK = 4
on_a_server = pytest.mark.vllm


@pytest.fixture(scope="module")
def house(vllm_python: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    folder = save_small_model(tmp_path_factory.mktemp("model"))
    options = VllmServerOptions(vllm_python, CONTEXT, slots=32, max_lora_rank=RANK)
    with House.opened(folder, options, tmp_path_factory.mktemp("versions"), replicas=1) as opened:
        opened.run(opened.policy.publish(opened.adapter()))  # the first one takes a server longest
        yield opened


@on_a_server
@pytest.mark.parametrize("mode", ["abort", "keep", "wait"])
def test_an_adapter_is_published_while_requests_run(house: House, mode: PublishMode) -> None:
    """A kept request goes on under the adapter that it began with, which is exact, too."""

    async def main() -> None:
        for _ in range(5):  # on a loaded machine the swap may come when most requests have just ended
            split = await adapter_among_requests(house, mode)
            if mode != "abort":
                assert split == 0
                return
            if split:
                return
        raise AssertionError("no swap of five found a request under way")

    house.run(main())


async def adapter_among_requests(house: House, mode: PublishMode) -> int:
    """Publishes an adapter among requests, and checks every token. Returns how many completions have two versions."""
    before = house.engine.policy_version
    update = house.adapter()
    probe = house.probe(update.version)
    work = prompts(8)
    streams: list[list[int]] = [[] for _ in work]
    published = False

    async def ask_until_published(index: int) -> list[tuple[list[int], Completion]]:
        """One request after the other: one is under way at the swap, however long that takes."""
        ended = []
        while not published:
            stream = streams[index] if not ended else []
            params = SamplingParams(200, seed=index)
            ended.append((stream, await house.policy.complete(work[index], params, hearing(stream))))
        return ended

    running = [asyncio.ensure_future(ask_until_published(index)) for index in range(len(work))]
    await begun(streams, 3)
    report = await house.policy.publish(update, mode, probe)
    published = True
    assert report.probe_off is not None
    assert report.probe_off < TOLERANCE
    late = await house.policy.complete([3, 1, 4], SamplingParams(30, seed=1))
    assert late.policy_versions == late.kv_versions == (update.version,) * 30
    house.assert_exact([3, 1, 4], late)
    assert house.off(before, [3, 1, 4], late).max() > 0.1  # an adapter that does something
    split = 0
    for prompt, ended in zip(work, await asyncio.gather(*running), strict=True):
        for stream, completion in ended:
            assert stream == list(completion.token_ids)
            assert completion.kv_versions == completion.policy_versions
            house.assert_exact(prompt, completion)
            versions = set(completion.policy_versions)
            assert versions <= {before, update.version}
            assert mode == "abort" or len(versions) == 1
            split += len(versions) == 2
        spans = [version for _, completion in ended for version in completion.policy_versions]
        assert spans == sorted(spans), "versions only go up"
        assert spans[0] == before
    return split


@on_a_server
def test_an_interruption_gives_what_no_chunk_has_brought_yet(house: House) -> None:
    """Where nobody listens tokens come sixteen at a time; those of a chunk that is not full are not sampled again."""

    async def main() -> None:
        for _ in range(5):  # by chance all may stand at a full chunk, or between two requests
            before = house.engine.policy_version
            update = house.adapter()
            stream: list[int] = []
            heard = house.policy.complete([1], SamplingParams(200, seed=1), hearing(stream))
            others = [house.policy.complete([2, index], SamplingParams(200, seed=index)) for index in range(8)]
            running = [asyncio.ensure_future(completion) for completion in (heard, *others)]
            await begun([stream], 20)
            await house.policy.publish(update, "abort")
            completions = await asyncio.gather(*running)
            for index, completion in enumerate(completions[1:]):
                house.assert_exact([2, index], completion)
            if any(
                list(done.policy_versions).count(before) % 16 and update.version in done.policy_versions
                for done in completions[1:]
            ):
                return
        raise AssertionError("all interrupted requests had whole chunks, five times")

    house.run(main())


@on_a_server
def test_whole_models_and_adapters_may_follow_each_other(house: House) -> None:
    """An adapter is one to the model's folder, whatever was served meanwhile."""

    async def main() -> None:
        updates = (house.adapter(), house.update(), house.adapter(), house.adapter(), house.update())
        for update, mode in zip(updates, ("keep", "abort", "abort", "keep", "keep"), strict=True):
            probe = house.probe(update.version)
            report = await house.policy.publish(update, mode, probe)
            assert report.probe_off is not None
            assert report.probe_off < TOLERANCE
            assert report.loaded_bytes >= sum(tensor.nbytes for tensor in load_file(update.path).values())
            completion = await house.policy.complete([2, 7], SamplingParams(30, seed=1))
            house.assert_exact([2, 7], completion)
        assert house.engine._shelf._root is not None
        root = house.engine._shelf._root.path
        assert len([folder for folder in root.iterdir() if folder.is_dir()]) <= 2

    house.run(main())


@on_a_server
def test_an_adapter_that_the_server_cannot_take_changes_nothing(house: House) -> None:
    async def main() -> None:
        before = house.engine.policy_version
        update = house.adapter(rank=16)
        del house.models[update.version]
        with pytest.raises(EngineError, match="rank"):
            await house.policy.publish(update)
        again = house.adapter()  # under the number of the one that failed
        assert again.version == update.version
        assert [status.state for status in house.engine.replicas()] == ["serving"]
        house.assert_exact([9], completion := await house.policy.complete([9], SamplingParams(20, seed=1)))
        assert set(completion.policy_versions) == {before}
        await house.policy.publish(again)
        house.assert_exact([9], completion := await house.policy.complete([9], SamplingParams(20, seed=1)))
        assert set(completion.policy_versions) == {again.version}

    house.run(main())


# ---------------------------------------------------------------------------------------------- without a server


def adapter_file(path: Path, value: float) -> PublishedTensors:
    weights = {"base_model.model.a.lora_A.weight": np.full((2, 3), value, np.float32)}
    save_file(weights, path, {"format": "lora", "adapter_config": '{"r": 2}'})
    return PublishedTensors.read(path)


def test_a_folder_is_what_peft_writes_and_versions_that_nobody_names_leave(tmp_path: Path) -> None:
    shelf = AdapterShelf(tmp_path)
    first = shelf.put(1, adapter_file(tmp_path / "1.safetensors", 1.0))
    assert sorted(path.name for path in first.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    assert (first / "adapter_config.json").read_text() == '{"r": 2}'
    assert (first / "adapter_model.safetensors").read_bytes() == (tmp_path / "1.safetensors").read_bytes()
    second = shelf.put(2, adapter_file(tmp_path / "2.safetensors", 2.0))
    other = shelf.put(2, adapter_file(tmp_path / "2b.safetensors", 3.0))  # the first try of this number failed
    assert other != second
    shelf.keep({2})
    assert not first.exists()
    assert other.exists()
    shelf.close()
    assert not other.parent.exists()


def test_a_file_that_calls_itself_an_adapter_and_says_no_more_is_refused(tmp_path: Path) -> None:
    save_file({"a": np.zeros(2, np.float32)}, tmp_path / "a.safetensors", {"format": "lora"})
    with pytest.raises(EngineError, match="has no adapter_config"):
        PublishedTensors.read(tmp_path / "a.safetensors")


def test_ranks_that_vllm_has_no_room_for_are_refused(tmp_path: Path) -> None:
    assert _lora_arguments(3)[2] == "8"
    assert _lora_arguments(None) == ()
    with pytest.raises(InputError, match=r"engine\.max_lora_rank must be <= 512"):
        _lora_arguments(513)


def test_an_adapter_for_servers_that_take_none_is_refused_with_the_mend(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"vocab_size": 9}')
    engine = VllmEngine(tmp_path, 64, "float32")
    adapter_file(tmp_path / "1.safetensors", 1.0)
    with pytest.raises(EngineError, match=r"version 1 is an adapter.*set engine\.max_lora_rank"):
        asyncio.run(engine.prepare(WeightUpdate(1, tmp_path / "1.safetensors")))
