"""Servers that somebody else has set up or updates, on real vLLM servers (its CPU build), one for each test."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path

import psutil
import pytest
from vllm_house import CONTEXT, House, relayed, save_small_model

from agentgym.engine.vllm.engine import VllmEngine
from agentgym.engine.vllm.server import VllmServerOptions
from agentgym.errors import EngineError, InputError
from agentgym.policy import SamplingParams

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_small_model(tmp_path_factory.mktemp("model"))


@pytest.mark.slow
def test_weights_that_somebody_else_has_loaded_are_noticed_at_their_first_token(
    folder: Path, vllm_python: Path, tmp_path: Path
) -> None:
    with House.opened(folder, VllmServerOptions(vllm_python, CONTEXT), tmp_path, replicas=1) as house:

        async def main() -> None:
            server = house.engine.seats[0].server
            assert server is not None
            async with relayed(server.socket) as url:
                await (await VllmEngine.connect(house.folder, [url], max_context=CONTEXT)).close()
            with pytest.raises(EngineError, match="somebody else updates this server"):
                await house.engine.sample([1], SamplingParams(4))
            assert house.engine.replicas()[0].state != "serving"
            house.assert_exact([1], await house.policy.complete([1], SamplingParams(4)))

        house.run(main())


@pytest.mark.slow
def test_a_server_that_records_raw_logprobs_is_refused(folder: Path, vllm_python: Path) -> None:
    async def main() -> None:
        options = VllmServerOptions(vllm_python, CONTEXT, extra_args=("--logprobs-mode", "raw_logprobs"))
        with pytest.raises(
            InputError, match=r"records raw_logprobs, .* start it with --logprobs-mode processed_logprobs"
        ):
            await VllmEngine.start(folder, options)

    asyncio.run(main())
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):  # one of another test that ends just now
            assert "raw_logprobs" not in child.cmdline()
