"""Weights that a sender carries into real vLLM servers, with vLLM's own trainer-side engine: over gloo here, over NCCL
and CUDA IPC where there are GPUs."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import torch
from vllm_house import (
    CONTEXT,
    OTHERS,
    House,
    another_model,
    prompts,
    published_among_requests,
    relayed,
    save_small_model,
)

from agentgym.engine.vllm.carrier import PREFIX, SenderOptions, check_senders, host_towards
from agentgym.engine.vllm.engine import VllmEngine
from agentgym.engine.vllm.server import VllmServerOptions
from agentgym.errors import EngineError, InputError, UnavailableError
from agentgym.policy import SamplingParams

GLOO = Path(__file__).parent / "gloo_carrier"
on_vllm = pytest.mark.vllm
pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_small_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def gloo() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(GLOO))
        yield


@pytest.fixture(scope="module")
def house(folder: Path, vllm_python: Path, gloo: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    with opened(folder, vllm_python, tmp_path_factory.mktemp("versions"), replicas=1) as house:
        yield house


@contextmanager
def opened(folder: Path, python: Path, tmp: Path, *, replicas: int) -> Iterator[House]:
    options, senders = VllmServerOptions(python, CONTEXT, slots=32), SenderOptions(python, "gloo", ())
    with House.opened(folder, options, tmp, replicas=replicas, senders=senders) as house:
        yield house


async def sampled_exactly(house: House, version: int) -> None:
    """Every server samples under `version`, and what it records is that version's forward."""
    await house.all_serve()
    assert {status.policy_version for status in house.engine.replicas()} == {version}
    for prompt in prompts(4):
        completion = await house.policy.complete(prompt, SamplingParams(12, seed=1))
        assert set(completion.policy_versions) == {version}
        house.assert_exact(prompt, completion)


@on_vllm
def test_weights_arrive_while_requests_run_and_every_token_has_its_version(house: House) -> None:
    async def main() -> None:
        size = sum(p.numel() * p.element_size() for p in house.models[0].parameters())
        for _ in range(5):  # on a loaded machine a pause may come when most requests have just ended
            split, _ = await published_among_requests(house, "abort")
            assert (await house.policy.publish(house.update())).loaded_bytes == size
            await sampled_exactly(house, version := house.engine.policy_version)
            await house.engine.verify(house.probe(version))
            if split:
                return
        raise AssertionError("no publication of five found a request under way")

    house.run(main())


@on_vllm
def test_what_did_not_change_is_not_carried(house: House) -> None:
    async def main() -> None:
        same = house.update(only="no parameter")
        assert (await house.policy.publish(same)).loaded_bytes == 0
        await sampled_exactly(house, same.version)
        part = await house.policy.publish(house.update(only="layers.1.mlp.up_proj"))  # a layer comes whole
        layer = house.models[0].get_submodule("model.layers.1")
        assert part.loaded_bytes == sum(p.numel() * p.element_size() for p in layer.parameters())
        await sampled_exactly(house, house.engine.policy_version)

    house.run(main())


def senders_of() -> list[psutil.Process]:
    """Oldest first."""
    return [
        one for one in psutil.Process().children() if "agentgym.engine.vllm.inside.sender" in " ".join(one.cmdline())
    ]


@on_vllm
@pytest.mark.slow
def test_a_sender_that_is_killed_takes_its_server_out_and_both_come_back(
    folder: Path, vllm_python: Path, gloo: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed between two publications, and amid one, in a collective that the server waits in."""

    async def main() -> None:
        victim, other = senders_of()[-2:]
        os.kill(victim.pid, signal.SIGKILL)
        victim.wait(60)
        monkeypatch.setenv("GLOO_CARRIER_DIES_AT", "model.layers.1.mlp.up_proj.weight")  # the next one does
        update = house.update()
        await house.policy.publish(update)
        (lost,) = [status for status in house.engine.replicas() if status.state != "serving"]
        assert "the sender of vllm" in lost.error
        while "died at" not in " ".join(status.error for status in house.engine.replicas()):
            await asyncio.sleep(0.05)
        monkeypatch.delenv("GLOO_CARRIER_DIES_AT")
        await sampled_exactly(house, update.version)
        assert other.pid in {one.pid for one in senders_of()}
        await house.policy.publish(house.update())
        await sampled_exactly(house, house.engine.policy_version)

    with opened(folder, vllm_python, tmp_path, replicas=2) as house:
        house.run(main())


@on_vllm
@pytest.mark.slow
def test_what_falls_over_on_the_way_is_noticed_before_it_is_served(
    folder: Path, vllm_python: Path, gloo: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        with pytest.raises(EngineError, match=r"no replica could load version 1: .*checksum of 'model\.norm\.weight'"):
            await house.policy.publish(house.update())
        monkeypatch.delenv("GLOO_CARRIER_SPOILS")
        await sampled_exactly(house, 0)

    monkeypatch.setenv("GLOO_CARRIER_SPOILS", "model.norm.weight")
    with opened(folder, vllm_python, tmp_path, replicas=1) as house:
        house.run(main())
        sender = senders_of()[-1]
        its_folder = Path(sender.cwd())
        assert its_folder.name.startswith(PREFIX)
    assert not sender.is_running()
    assert not its_folder.exists()


@on_vllm
def test_a_server_that_runs_already_is_taken_over_and_one_of_another_model_refused(
    house: House, vllm_python: Path
) -> None:
    """The last test of the module: the server then has another owner's weights."""
    senders = SenderOptions(vllm_python, "gloo", ())

    async def main() -> None:
        server = house.engine.seats[0].server
        assert server is not None
        async with relayed(server.socket) as url:
            for name, value in OTHERS.items():
                other = another_model(house.folder, house.tmp / f"other-{name}", **{name: value})
                with pytest.raises(InputError, match=f"{url} serves another model: its {name} is .*; start"):
                    await VllmEngine.connect(other, [url], max_context=CONTEXT, senders=senders)
            with pytest.raises(InputError, match=r"back end 'agentgym_gloo', and .* asks for 'agentgym_file'"):
                await VllmEngine.connect(house.folder, [url], max_context=CONTEXT)
            taken = await VllmEngine.connect(house.folder, [url], max_context=CONTEXT, senders=senders)
            try:
                await taken.verify(house.probe(0))
                (segment,) = await taken.sample([1, 2], SamplingParams(8, seed=3))
                assert len(segment.token_ids) == 8
            finally:
                await taken.close()

    house.run(main())


# ------------------------------------------------------------------------------------------------------- without GPUs


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
@pytest.mark.parametrize("kind", ["nccl", "ipc"])
def test_a_machine_without_a_gpu_is_told_so_before_anything_starts(kind: str, folder: Path) -> None:
    async def main() -> None:
        senders = SenderOptions(Path(sys.executable), kind, ("0",))
        message = rf"weight_transfer = '{kind}' carries weights from the GPU '0' .* sees none by that name; .* 'file'"
        with pytest.raises(UnavailableError, match=message):
            await VllmEngine.connect(folder, ["http://127.0.0.1:9"], max_context=64, senders=senders)
        with pytest.raises(UnavailableError, match=r"no-python cannot be run"):
            await check_senders(SenderOptions(Path("no-python"), kind, ("0",)))

    asyncio.run(main())


def test_the_address_that_a_server_reaches_this_machine_by() -> None:
    assert host_towards(None) == host_towards("http://127.0.0.1:8000") == "127.0.0.1"
    with pytest.raises(InputError, match=r"the address of http://no\.such\.host\.invalid:1 is not known"):
        host_towards("http://no.such.host.invalid:1")


@on_vllm
@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["ipc", "nccl"])
def test_weights_go_from_gpu_to_gpu(kind: str, folder: Path, vllm_python: Path, tmp_path: Path) -> None:
    if kind == "nccl" and torch.cuda.device_count() < 2:
        pytest.skip("NCCL carries weights between two GPUs, and this machine has one")
    options = VllmServerOptions(vllm_python, CONTEXT, slots=8, extra_args=("--gpu-memory-utilization", "0.3"))
    senders = SenderOptions(vllm_python, kind, ("0",) if kind == "ipc" else ("1",))
    with House.opened(folder, options, tmp_path, replicas=1, senders=senders, devices=("0",)) as house:

        async def main() -> None:
            for _ in range(2):
                await house.policy.publish(house.update())
                version = house.engine.policy_version
                assert (await house.engine.verify(house.probe(version)) or 0.0) < 1e-3
            completion = await house.policy.complete([1, 2], SamplingParams(8, seed=1))
            assert set(completion.policy_versions) == {version}

        house.run(main())
