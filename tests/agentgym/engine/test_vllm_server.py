"""Servers that cannot be started or trusted: typed, with the reason, and nobody left behind. No vLLM is needed."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from vllm_pretender import FACTS

from agentgym.engine.vllm import keeper
from agentgym.engine.vllm.engine import VllmEngine
from agentgym.engine.vllm.facts import ServerFacts
from agentgym.engine.vllm.seat import Seat
from agentgym.engine.vllm.server import BACKEND, VllmServer, VllmServerOptions
from agentgym.errors import EngineDiedError, InputError, UnavailableError


def test_the_plug_in_is_registered_under_the_name_that_the_engine_asks_for() -> None:
    room = Path(keeper.__file__).parent / "inside"
    there = {f"agentgym.engine.vllm.inside.{file.stem}": file.read_text() for file in room.glob("*.py")}
    assert f'BACKEND = "{BACKEND}"' in there["agentgym.engine.vllm.inside.plugin"]
    lines = [line for part in there.values() for line in part.splitlines() if re.match("(import|from) ", line.strip())]
    imported = {line.split()[1] for line in lines}
    ours = {name for name in imported if name.startswith("agentgym")}
    assert ours < there.keys()  # this distribution is installed there without its dependencies
    assert {name.split(".")[0] for name in imported - ours} - set(sys.stdlib_module_names) == {
        "torch", "safetensors", "vllm",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("section", "key", "value", "mend"),
    [
        ("model_config", "logprobs_mode", "raw_logprobs", "--logprobs-mode processed_logprobs"),
        ("model_config", "dtype", "torch.bfloat16", "engine.dtype is float32"),
        ("model_config", "max_model_len", 64, "--max-model-len 128"),
        ("model_config", "quantization", "fp8", "without --quantization"),
        ("cache_config", "cache_dtype", "fp8_e4m3", "--kv-cache-dtype auto"),
        ("scheduler_config", "async_scheduling", True, "--no-async-scheduling"),
        ("scheduler_config", "enable_chunked_prefill", True, "--no-enable-chunked-prefill"),
        ("weight_transfer_config", "backend", "nccl", "--weight-transfer-config"),
    ],
)
def test_a_server_that_lacks_what_correctness_needs_is_refused(
    section: str, key: str, value: object, mend: str
) -> None:
    check(FACTS)
    with pytest.raises(InputError, match=mend):
        check({**FACTS, section: {**FACTS[section], key: value}})


def check(config: dict[str, Any], *, takes_adapters: bool = False, max_lora_rank: int | None = None) -> None:
    facts = ServerFacts.of(config, takes_adapters=takes_adapters)
    facts.check("s", backend=BACKEND, dtype="float32", max_context=128, max_lora_rank=max_lora_rank)


def test_cuda_ipc_needs_servers_of_one_gpu() -> None:
    two = {**FACTS, "weight_transfer_config": {"backend": "agentgym_ipc"}, "parallel_config": {"world_size": 2}}
    with pytest.raises(InputError, match=r"s is spread over 2 GPUs, and CUDA IPC .* use engine.weight_transfer 'nccl'"):
        ServerFacts.of(two, takes_adapters=False).check("s", backend="agentgym_ipc", dtype="float32", max_context=64)
    nccl = {**two, "weight_transfer_config": {"backend": "agentgym_nccl"}}
    facts = ServerFacts.of(
        {**nccl, "parallel_config": {"world_size": 2, "data_parallel_size": 3}}, takes_adapters=False
    )
    facts.check("s", backend="agentgym_nccl", dtype="float32", max_context=64)
    assert facts.num_workers == 6


def test_a_server_on_a_gpu_may_split_prompts() -> None:
    check({**FACTS, "device_config": {"device": "cuda"}, "scheduler_config": {"enable_chunked_prefill": True}})


@pytest.mark.parametrize(
    ("rank", "route", "wanted"), [(None, True, 4), (4, False, 4), (8, True, 16), (8, True, 8), (8, True, None)]
)
def test_a_run_with_adapters_needs_servers_that_take_them(rank: int | None, route: bool, wanted: int | None) -> None:
    config = {**FACTS, "lora_config": {"max_lora_rank": rank} if rank else None}
    if wanted is None or (rank and route and rank >= wanted):
        check(config, takes_adapters=route, max_lora_rank=wanted)
    else:
        with pytest.raises(InputError, match=f"this run publishes rank {wanted}; .*--max-lora-rank >= {wanted}"):
            check(config, takes_adapters=route, max_lora_rank=wanted)


def test_what_cannot_be_started_is_told_at_once(model_of, tmp_path: Path) -> None:
    folder = model_of("llama")[0]

    async def main() -> None:
        options = VllmServerOptions(tmp_path / "python", 64)
        with pytest.raises(UnavailableError, match="cannot be run"):
            await VllmEngine.start(folder, options)
        with pytest.raises(UnavailableError, match="has no vllm"):
            await VllmEngine.start(folder, VllmServerOptions(Path(sys.executable), 64))
        with pytest.raises(InputError, match=r"config\.json"):
            await VllmEngine.connect(tmp_path, ["http://127.0.0.1:9"], max_context=64)
        with pytest.raises(EngineDiedError, match=r"no vLLM server answers at http://127\.0\.0\.1:9"):
            await VllmEngine.connect(folder, ["http://127.0.0.1:9"], max_context=64)
        with pytest.raises(InputError, match="different URLs"):
            await VllmEngine.connect(folder, ["http://127.0.0.1:9"] * 2, max_context=64)

    asyncio.run(main())


def test_a_server_that_ends_while_starting_leaves_its_last_words(tmp_path: Path) -> None:
    async def main() -> None:
        python = tmp_path / "python"
        python.write_text("#!/bin/sh\necho no memory for the cache >&2\nexit 7\n")
        python.chmod(0o755)
        server = await VllmServer.start(tmp_path, VllmServerOptions(python, 64))
        assert "ended with code 7" in await server.ended
        assert "no memory for the cache" in await server.ended
        await server.close()

    asyncio.run(main())


CHANGING = """#!{python}
import sys
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from socketserver import UnixStreamServer

class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()

    def log_message(self, *said):
        pass

options = dict(zip(sys.argv[1:], sys.argv[2:]))
(Path(options["--model"]) / "model.safetensors").write_bytes(b"others")
UnixStreamServer(options["--uds"], Handler).serve_forever()
"""


def test_a_server_is_not_used_that_read_another_model_than_the_engine_began_with(model_of, tmp_path: Path) -> None:
    folder = shutil.copytree(model_of("llama")[0], tmp_path / "model")
    python = tmp_path / "python"
    python.write_text(CHANGING.format(python=sys.executable))
    python.chmod(0o755)

    async def refused(options: VllmServerOptions) -> None:
        seat = Seat(engine, "vllm 0", options, None)
        with pytest.raises(InputError, match=r"^model\.safetensors in the model's folder .*/model changed since"):
            await seat.fill()
        await seat.close()

    async def main() -> None:
        await refused(VllmServerOptions(python, 64))  # it changes while the server starts
        await refused(VllmServerOptions(tmp_path / "none", 64))  # it has changed: none is started

    engine = VllmEngine(folder, 64, "float32")
    asyncio.run(main())


TREE = """
import os, subprocess, sys, time
from multiprocessing.resource_tracker import _resource_tracker
from multiprocessing.shared_memory import SharedMemory
children = [subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]) for _ in range(2)]
memory = SharedMemory(create=True, size=4096)
print(memory.name, os.getpid(), *(child.pid for child in children), _resource_tracker._pid, flush=True)
time.sleep(600)
"""
OWNER = """
import os, subprocess, sys, time
keeper, tree = sys.argv[1:]
kept = subprocess.Popen([sys.executable, keeper, str(os.getpid()), sys.executable, "-c", tree],
                        stdin=subprocess.PIPE, start_new_session=True)
time.sleep(600)
"""


def _wait_for(condition: Callable[[], bool], seconds: float = 60.0) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def _gone(pid: int) -> bool:
    try:
        return "\nState:\tZ" in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return True


@pytest.mark.parametrize("victim", ["owner", "server"])
def test_kill_9_of_the_owner_or_of_the_server_leaves_nobody_and_no_memory(victim: str) -> None:
    owner = subprocess.Popen([sys.executable, "-c", OWNER, keeper.__file__, TREE], stdout=subprocess.PIPE)
    assert owner.stdout is not None
    memory, *numbers = owner.stdout.readline().decode().split()
    pids = [int(number) for number in numbers]
    assert len(pids) == 4
    assert Path("/dev/shm", memory).exists()
    assert not any(_gone(pid) for pid in pids)
    os.kill(owner.pid if victim == "owner" else pids[0], signal.SIGKILL)
    assert _wait_for(lambda: all(_gone(pid) for pid in pids))
    assert not Path("/dev/shm", memory).exists()
    owner.kill()
    owner.wait()
    owner.stdout.close()
