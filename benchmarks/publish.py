"""What a publication costs: SmolLM2-135M on a vLLM server on the CPU, eight requests running, in all modes.

"full" moves every tensor; "sparse" moves two of thirty layers, as a sparse delta or a partly frozen model does, and
only those are loaded. `bytes`: what the server loaded; `pause_ms`: nothing was sampled for so long; `total_ms`: what
the trainer waits for: the file read and compared before the pause, and in mode "wait" the running requests. `gb_per_s`:
bytes over the pause; beside it a plain copy of as many bytes. Medians of three. fp32, one thread.
"""

from __future__ import annotations

import asyncio
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig

from agentgym.engine.gate import PublishMode, VersionedPolicy
from agentgym.engine.protocol import WeightUpdate
from agentgym.engine.vllm_engine import VllmEngine
from agentgym.engine.vllm_server import VllmServerOptions
from agentgym.policy import SamplingParams
from benchmarks.machine import ROOT

_MODES: tuple[PublishMode, ...] = ("abort", "wait", "keep")
_KINDS = ("full", "sparse")
_RUNNING = 8


def vllm_python() -> Path:
    """The interpreter that has vllm: that of `.venv-vllm`, which .ci/run makes, or this one."""
    own = ROOT / ".venv-vllm" / "bin" / "python"
    return own if own.exists() else Path(sys.executable)


def small_model(folder: Path) -> Path:
    """A random model for quick runs, in the shape that vLLM serves on a CPU."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=2,
        num_key_value_heads=1, head_dim=32, max_position_embeddings=512, tie_word_embeddings=True, bos_token_id=None,
        eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def run(quick: bool) -> dict[str, object]:
    """Starts one server and publishes to it."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="agentgym-publish-") as scratch:
        return asyncio.run(_run(_model(quick, Path(scratch)), Path(scratch), 1 if quick else 3))


def _model(quick: bool, scratch: Path) -> Path:
    if quick:
        return small_model(scratch / "model")
    from agentgym.server.models import resolve_model

    return resolve_model("smollm2-135m", "maze", 0, report=lambda line: print(line, file=sys.stderr))


async def _run(folder: Path, scratch: Path, repetitions: int) -> dict[str, object]:
    tensors = load_file(folder / "model.safetensors")
    engine = await VllmEngine.start(folder, VllmServerOptions(vllm_python(), 512, slots=_RUNNING))
    columns: dict[str, list[object]] = {
        name: [] for name in ("mode", "kind", "bytes", "pause_ms", "total_ms", "gb_per_s", "target_pause_ms")
    }
    try:
        policy = VersionedPolicy(engine)
        await policy.publish(_update(tensors, 1, "full", scratch))  # a server's first load is longer
        version = 1
        measured: dict[tuple[PublishMode, str], list[tuple[float, float, int]]] = {}
        for _ in range(repetitions):
            for mode in _MODES:
                for kind in _KINDS:
                    version += 1
                    update = _update(tensors, version, kind, scratch)
                    measured.setdefault((mode, kind), []).append(await _publish(engine, policy, update, mode))
                    (scratch / f"{version:06d}.safetensors").unlink()
                    print(f"{mode} {kind}: {measured[mode, kind][-1]}", file=sys.stderr)
        for (mode, kind), rows in measured.items():
            pause_s, total_s = (statistics.median(row[index] for row in rows) for index in (0, 1))
            size = rows[0][2]
            figures = (mode, kind, size, 1e3 * pause_s, 1e3 * total_s, size / pause_s / 1e9, 60 + 1e3 * size / 2e9)
            for name, value in zip(columns, figures, strict=True):
                columns[name].append(round(value, 3) if isinstance(value, float) else value)
    finally:
        await engine.close()
    largest = max(int(str(size)) for size in columns["bytes"])
    return {**columns, "running": _RUNNING, "memcpy_gb_per_s": round(_memcpy(largest), 2)}


def _update(tensors: dict[str, torch.Tensor], version: int, kind: str, scratch: Path) -> WeightUpdate:
    """Moves all tensors, or those of two layers, by as little as a step of training does."""
    moved = ("",) if kind == "full" else (".layers.0.", ".layers.1.")
    for name, tensor in tensors.items():
        if any(part in name for part in moved):
            tensor.mul_(1 + 1e-6)
    path = scratch / f"{version:06d}.safetensors"
    save_file(tensors, path)
    return WeightUpdate(version, path)


async def _publish(
    engine: VllmEngine, policy: VersionedPolicy, update: WeightUpdate, mode: PublishMode
) -> tuple[float, float, int]:
    """(pause, total, bytes loaded) of one publication while requests run."""
    ended = asyncio.Event()

    async def episode(index: int) -> None:
        while not ended.is_set():
            await policy.complete([index + 1, 2, 3], SamplingParams(64, seed=index))

    running = [asyncio.ensure_future(episode(index)) for index in range(_RUNNING)]
    before = (await engine.stats()).sampled_tokens
    while (await engine.stats()).sampled_tokens == before:
        await asyncio.sleep(0.01)
    report = await policy.publish(update, mode)
    ended.set()
    await asyncio.gather(*running)
    return report.pause_s, report.total_s, engine.loaded_bytes


def _memcpy(size: int) -> float:
    """GB/s of a plain copy, the best of five."""
    source = np.ones(max(size, 1), np.uint8)
    target = np.zeros_like(source)
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        np.copyto(target, source)
        best = min(best, time.perf_counter() - start)
    return size / best / 1e9
