"""The mismatch lab against a real vLLM server with two real faults: it records raw logprobs, and it takes new weights
without forgetting the keys of the old ones."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import torch
from safetensors.torch import load_file, save_file

from agentgym.server.models import resolve_model
from agentgym_trainer.lab.mismatch import Questions
from agentgym_trainer.lab.mismatch_command import Setup, compare

pytestmark = pytest.mark.vllm
START_S = 400.0


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """Old weights, new weights, and the folder that the server loads from, which holds the old ones."""
    base = tmp_path_factory.mktemp("models")
    generator = torch.Generator().manual_seed(1)
    for name in ("old", "new", "live"):
        shutil.copytree(resolve_model("tiny", "maze", 0), base / name)
    weights = {
        name: torch.randn(tensor.shape, generator=generator) * 0.25 if tensor.dim() > 1 else tensor
        for name, tensor in load_file(base / "old" / "model.safetensors").items()
    }
    for name in ("old", "live"):
        save_file(weights, base / name / "model.safetensors", {"format": "pt"})
    changed = {}
    for name, tensor in weights.items():
        noise = torch.randn(tensor.shape, generator=generator) * tensor.std() if tensor.dim() > 1 else 0.0
        changed[name] = tensor + 0.05 * noise
    save_file(changed, base / "new" / "model.safetensors", {"format": "pt"})
    return base / "old", base / "new", base / "live"


@pytest.fixture(scope="module")
def server(folders: tuple[Path, Path, Path], vllm_python: Path, tmp_path_factory) -> Iterator[str]:
    kept = socket.socket()  # keeps the port from everybody but the server, which reuses addresses as this does
    kept.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    kept.bind(("127.0.0.1", 0))
    port = kept.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    command = [
        str(vllm_python), "-m", "vllm.entrypoints.openai.api_server", "--model", str(folders[2]),
        "--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--max-model-len", "256",
        "--max-num-seqs", "8", "--enforce-eager", "--enable-scale-out", "--logprobs-mode", "raw_logprobs",
        "--generation-config", "vllm", "--block-size", "32",
    ]  # fmt: skip
    environment = os.environ | {
        "VLLM_SERVER_DEV_MODE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1",
    }  # fmt: skip
    log = tmp_path_factory.mktemp("vllm") / "log"
    with log.open("wb") as file:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=file, stderr=file, env=environment, start_new_session=True,
            cwd=log.parent,
        )  # fmt: skip
    try:
        deadline = time.monotonic() + START_S
        while True:
            assert process.poll() is None, log.read_text(errors="replace")[-3000:]
            assert time.monotonic() < deadline, log.read_text(errors="replace")[-3000:]
            try:
                if httpx.get(f"{url}/health", timeout=5.0, trust_env=False).status_code == 200:
                    break
            except httpx.TransportError:
                time.sleep(0.5)
        yield url
    finally:
        kept.close()
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_raw_logprobs_and_then_a_prefix_cache_that_outlived_its_weights(
    server: str, folders: tuple[Path, Path, Path]
) -> None:
    old, new, live = folders
    questions = Questions(temperatures=(1.0, 0.7), num_prompts=8, num_tokens=24, context=200)
    result = compare(Setup(str(old), vllm_url=server), questions)
    at_one, at_less, again = result.phases
    assert at_one.diagnosis.cause is None, str(at_one.diagnosis)  # raw and processed are one at temperature 1
    assert at_one.diagnosis.mismatch.max_abs < 1e-3
    assert at_less.diagnosis.cause == "raw_logprobs", str(at_less.diagnosis)
    assert at_less.diagnosis.findings[0].explained > 0.99
    assert "processed_logprobs" in at_less.diagnosis.mend
    assert again.diagnosis.cause is None

    shutil.copyfile(new / "model.safetensors", live / "model.safetensors")
    httpx.post(f"{server}/collective_rpc", json={"method": "reload_weights"}, timeout=300.0).raise_for_status()
    result = compare(Setup(str(new), vllm_url=server, previous=(old,)), Questions((1.0,), 8, 24, 200))
    seen = result.phases[0].diagnosis
    assert seen.cause == "stale_prefix_cache", str(seen)
    assert "in blocks of 32" in seen.detail
    assert str(old) in seen.detail
