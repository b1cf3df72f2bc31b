"""What a publication costs: SmolLM2-135M on a vLLM server on the CPU, eight requests running, in all modes.

"full" moves every tensor; "sparse" moves two of thirty layers, as a sparse delta or a partly frozen model does, and
only those are loaded; "adapter" is LoRA of rank 16 on all linear layers, on a server that takes adapters. `bytes`: what
the server loaded; `before_ms`: the file read and compared, an adapter loaded, while the server samples (in mode "wait"
with the draining of requests); `pause_ms`: no request went in for so long; for a model that includes the end of the
engine's step under way (about 50 ms here) and, but for "abort", 20 ms that vLLM itself waits in a pause. An adapter's
swap waits for neither: what a server computes at that moment (250 ms with adapters here) is for nobody, and requests
that go in queue behind it. `total_ms`, both: what the trainer waits for. `gb_per_s`: bytes over the pause; beside it a
plain copy of as many bytes. Medians of three. fp32, one thread.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig

from agentgym import weight_file
from agentgym.engine.gate import PublishMode, VersionedPolicy
from agentgym.engine.protocol import WeightUpdate
from agentgym.engine.vllm.engine import VllmEngine
from agentgym.engine.vllm.server import VllmServerOptions
from agentgym.policy import SamplingParams
from benchmarks.machine import ROOT

_MODES: tuple[PublishMode, ...] = ("abort", "wait", "keep")
_RUNNING = 8
_RANK = 16
_ADAPTED = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


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
    columns: dict[str, list[object]] = {
        name: []
        for name in ("mode", "kind", "bytes", "before_ms", "pause_ms", "total_ms", "gb_per_s", "target_pause_ms")
    }
    for kinds, rank in ((("full", "sparse"), None), (("adapter",), _RANK)):
        options = VllmServerOptions(vllm_python(), 512, slots=_RUNNING, max_lora_rank=rank)
        for (mode, kind), rows in (await _measure(folder, scratch, options, kinds, repetitions)).items():
            pause_s, total_s = (statistics.median(row[index] for row in rows) for index in (0, 1))
            size = rows[0][2]
            figures = (
                mode, kind, size, 1e3 * (total_s - pause_s), 1e3 * pause_s, 1e3 * total_s, size / pause_s / 1e9,
                60 + 1e3 * size / 2e9,
            )  # fmt: skip
            for name, value in zip(columns, figures, strict=True):
                columns[name].append(round(value, 3) if isinstance(value, float) else value)
    largest = max(int(str(size)) for size in columns["bytes"])
    return {**columns, "running": _RUNNING, "memcpy_gb_per_s": round(_memcpy(largest), 2)}


async def _measure(
    folder: Path, scratch: Path, options: VllmServerOptions, kinds: tuple[str, ...], repetitions: int
) -> dict[tuple[PublishMode, str], list[tuple[float, float, int]]]:
    """(pause, total, bytes loaded) of every publication, by mode and kind, on a server of their own."""
    tensors = load_file(folder / "model.safetensors")
    engine = await VllmEngine.start(folder, options)
    measured: dict[tuple[PublishMode, str], list[tuple[float, float, int]]] = {}
    try:
        policy = VersionedPolicy(engine)
        await policy.publish(_update(tensors, 1, kinds[0], scratch))  # a server's first load is longer
        version = 1
        for _ in range(repetitions):
            for mode in _MODES:
                for kind in kinds:
                    version += 1
                    update = _update(tensors, version, kind, scratch)
                    measured.setdefault((mode, kind), []).append(await _publish(engine, policy, update, mode))
                    print(f"{mode} {kind}: {measured[mode, kind][-1]}", file=sys.stderr)
                    for old in scratch.glob("*.safetensors"):
                        if old != update.path:
                            old.unlink()
    finally:
        await engine.close()
    return measured


def _update(tensors: dict[str, torch.Tensor], version: int, kind: str, scratch: Path) -> WeightUpdate:
    """Moves all tensors, or those of two layers, by as little as a step of training does; or an adapter to them."""
    path = scratch / f"{version:06d}.safetensors"
    if kind == "adapter":
        weights, metadata = _adapter(tensors, version)
        weight_file.save_file(weights, path, metadata)
        return WeightUpdate(version, path)
    moved = ("",) if kind == "full" else (".layers.0.", ".layers.1.")
    for name, tensor in tensors.items():
        if any(part in name for part in moved):
            tensor.mul_(1 + 1e-6)
    save_file(tensors, path)
    return WeightUpdate(version, path)


def _adapter(tensors: dict[str, torch.Tensor], version: int) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """A small random adapter, and what its file says of it."""
    rng = np.random.default_rng(version)
    weights: dict[str, np.ndarray] = {}
    for name, tensor in tensors.items():
        module = name.removesuffix(".weight")
        if module.endswith(_ADAPTED):
            rows, columns = tensor.shape
            weights[f"base_model.model.{module}.lora_A.weight"] = rng.normal(0, 0.02, (_RANK, columns)).astype("f4")
            weights[f"base_model.model.{module}.lora_B.weight"] = rng.normal(0, 0.02, (rows, _RANK)).astype("f4")
    config = {"peft_type": "LORA", "r": _RANK, "lora_alpha": 2 * _RANK, "target_modules": list(_ADAPTED)}
    return weights, {"format": "lora", "adapter_config": json.dumps(config)}


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
    return report.pause_s, report.total_s, report.loaded_bytes


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
