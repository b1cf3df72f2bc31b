"""A new adapter comes into force between two requests: no server stands still for it, and one that does goes on. The
servers speak vLLM's routes and have no model; what they compute then is asked in test_vllm_adapters.py."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import numpy as np
import pytest
from vllm_pretender import house

from agentgym import weight_file
from agentgym.engine.gate import PublishMode, VersionedPolicy
from agentgym.engine.protocol import WeightUpdate
from agentgym.policy import SamplingParams

PATIENCE_S = 150.0


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    weight = {"base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": np.ones((1, 32), np.float32)}
    config = {"format": "lora", "adapter_config": json.dumps({"r": 1})}
    weight_file.save_file(weight, tmp_path / "adapter.safetensors", config)
    return tmp_path / "adapter.safetensors"


async def ask(policy: VersionedPolicy) -> tuple[int, ...]:
    return (await policy.complete([1, 2], SamplingParams(3, seed=1))).policy_versions


@pytest.mark.parametrize("mode", ["abort", "keep", "wait"])
def test_a_server_that_samples_is_not_paused_and_one_that_is_paused_goes_on(
    model_of, adapter: Path, mode: PublishMode
) -> None:
    async def main() -> None:
        async with house(model_of("llama")[0], 1, max_lora_rank=1) as (engine, servers):
            policy = VersionedPolicy(engine)
            await policy.pause(20.0)
            await policy.publish(WeightUpdate(1, adapter), mode)
            assert servers[0].resumed.is_set()
            assert await ask(policy) == (1, 1, 1)
            paused = servers[0].asked["/pause"]
            await policy.publish(WeightUpdate(2, adapter), mode)
            assert await ask(policy) == (2, 2, 2)
            assert servers[0].asked["/pause"] == paused, "it went on all the time"

    asyncio.run(asyncio.wait_for(main(), PATIENCE_S))


def test_a_request_that_is_interrupted_goes_on_under_the_new_adapter(model_of, adapter: Path) -> None:
    async def main() -> None:
        async with house(model_of("llama")[0], 1, max_lora_rank=1) as (engine, servers):
            policy = VersionedPolicy(engine)
            await policy.publish(WeightUpdate(1, adapter))
            servers[0].go.clear()
            asked = asyncio.ensure_future(ask(policy))
            await servers[0].begun.wait()
            before = servers[0].asked["/abort_requests"]
            await policy.publish(WeightUpdate(2, adapter))
            assert servers[0].asked["/abort_requests"] == before + 1
            servers[0].go.set()
            assert await asked == (2, 2, 2), "the server still holds it under the old one, and nobody listens"
            assert [salt.rpartition(":")[2] for salt in servers[0].salts] == ["1", "2"]

    asyncio.run(asyncio.wait_for(main(), PATIENCE_S))


def test_weights_that_come_in_the_place_of_a_staged_adapter_meet_a_server_that_stands_still(
    model_of, perturbed, adapter: Path
) -> None:
    folder, model = model_of("llama")

    async def main() -> None:
        async with house(folder, 1, max_lora_rank=1) as (engine, servers):
            paused = servers[0].asked["/pause"]
            await engine.prepare(WeightUpdate(1, adapter))
            await engine.pause("abort")
            assert servers[0].asked["/pause"] == paused
            await engine.load(WeightUpdate(2, perturbed(model, 2)[0]))
            assert servers[0].asked["/pause"] == paused + 1
            assert not servers[0].resumed.is_set()
            await engine.resume()
            assert servers[0].resumed.is_set()
            assert await ask(VersionedPolicy(engine)) == (2, 2, 2)

    asyncio.run(asyncio.wait_for(main(), PATIENCE_S))
