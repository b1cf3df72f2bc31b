"""A published file is loaded whole or not at all, and what does not fit is named."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from agentgym.engine import torch_engine_weights
from agentgym.engine.gate import VersionedPolicy
from agentgym.engine.protocol import WeightUpdate
from agentgym.engine.torch_engine import TorchEngine
from agentgym.engine.torch_engine_weights import checked_dtype, load_weights, read_model
from agentgym.errors import EngineDiedError, EngineError, UnavailableError, VersionError
from agentgym.policy import SamplingParams

Tensors = dict[str, torch.Tensor]
NAME = "model.layers.0.self_attn.q_proj.weight"


def drop(tensors: Tensors) -> None:
    del tensors[NAME]


def add(tensors: Tensors) -> None:
    tensors["model.layers.7.extra"] = torch.zeros(1)


def reshape(tensors: Tensors) -> None:
    tensors[NAME] = tensors[NAME][:-1].contiguous()


def widen(tensors: Tensors) -> None:
    tensors[NAME] = tensors[NAME].double()


def narrow(tensors: Tensors) -> None:
    tensors[NAME] = tensors[NAME].to(torch.float8_e4m3fn)  # which torch promotes to nothing


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (drop, f"lacks '{NAME}'"),
        (add, "holds 'model.layers.7.extra', which the model does not have"),
        (reshape, rf"'{NAME}' .* has shape \[31, 32\], the model has \[32, 32\]"),
        (widen, f"'{NAME}' .* is torch.float64, which the engine's torch.float32 cannot hold"),
        (narrow, f"'{NAME}' .* is torch.float8_e4m3fn, which the engine's torch.float32 cannot hold"),
    ],
)
def test_a_file_that_does_not_fit_is_named_and_changes_nothing(
    model_of, perturbed, tmp_path: Path, spoil: Callable[[Tensors], None], message: str
) -> None:
    folder, model = model_of("llama")
    tensors = load_file(perturbed(model, 1)[0])
    spoil(tensors)
    save_file(tensors, tmp_path / "spoilt.safetensors")
    mine = read_model(folder, torch.float32)
    with pytest.raises(EngineError, match=message):
        load_weights(mine, tmp_path / "spoilt.safetensors")
    for name, parameter in model.named_parameters():
        assert torch.equal(mine.get_parameter(name), parameter)


def test_missing_truncated_and_foreign_files_are_refused(model_of, perturbed, tmp_path: Path) -> None:
    folder, model = model_of("llama")
    good = perturbed(model, 1)[0].read_bytes()
    (tmp_path / "half.safetensors").write_bytes(good[: len(good) // 2])
    (tmp_path / "text.safetensors").write_text("no tensors here")
    mine = read_model(folder, torch.float32)
    with pytest.raises(EngineError, match="no weights at"):
        load_weights(mine, tmp_path / "none.safetensors")
    for name in ("half", "text"):
        with pytest.raises(EngineError, match="not a readable safetensors file"):
            load_weights(mine, tmp_path / f"{name}.safetensors")


def test_tied_weights_may_be_given_once_or_twice_but_not_differently(model_of, perturbed, tmp_path: Path) -> None:
    folder, model = model_of("qwen2")
    path, twin = perturbed(model, 1)
    tensors = load_file(path)
    assert "lm_head.weight" not in tensors
    for version, extra in enumerate([{}, {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}]):
        mine = read_model(folder, torch.float32)
        save_file(tensors | extra, tmp_path / f"{version}.safetensors")
        load_weights(mine, tmp_path / f"{version}.safetensors")
        assert mine.lm_head.weight is mine.model.embed_tokens.weight
        for name, parameter in twin.named_parameters():
            assert torch.equal(mine.get_parameter(name), parameter)
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"] + 1}, tmp_path / "two.safetensors")
    with pytest.raises(EngineError, match=r"different values for .* which the model ties"):
        load_weights(read_model(folder, torch.float32), tmp_path / "two.safetensors")


def test_published_bfloat16_is_held_exactly_in_float32(model_of, tmp_path: Path) -> None:
    folder, model = model_of("llama")
    rounded = {name: parameter.detach().bfloat16() for name, parameter in model.named_parameters()}
    save_file(rounded, tmp_path / "rounded.safetensors")
    mine = read_model(folder, torch.float32)
    load_weights(mine, tmp_path / "rounded.safetensors")
    for name, parameter in mine.named_parameters():
        assert torch.equal(parameter, rounded[name].float())


def test_loading_never_writes_into_the_model_folder(model_of, perturbed) -> None:
    folder, model = model_of("llama")
    before = (folder / "model.safetensors").read_bytes()
    load_weights(read_model(folder, torch.float32), perturbed(model, 1)[0])
    assert (folder / "model.safetensors").read_bytes() == before


def test_the_engine_loads_only_newer_versions_and_only_while_paused(model_of, perturbed, tmp_path: Path) -> None:
    folder, model = model_of("llama")
    path, _ = perturbed(model, 1)

    async def main() -> None:
        engine = TorchEngine(folder, slots=2, max_context=64)
        with pytest.raises(EngineError, match="only while the engine is paused"):
            await engine.load(WeightUpdate(1, path))
        await engine.pause()
        with pytest.raises(EngineError, match="no weights at"):
            await engine.load(WeightUpdate(1, tmp_path / "none"))
        assert engine.policy_version == 0
        await engine.load(WeightUpdate(5, path))
        for version in (5, 4):
            with pytest.raises(VersionError, match="versions only go up"):
                await engine.load(WeightUpdate(version, path))
        assert engine.policy_version == 5
        await engine.close()

    asyncio.run(main())


def test_bfloat16_needs_hardware(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_engine_weights, "has_native_bfloat16", lambda: False)
    with pytest.raises(UnavailableError, match=r"AVX512-BF16 or AMX.*use dtype 'float32'"):
        checked_dtype("bfloat16")
    monkeypatch.setattr(torch_engine_weights, "has_native_bfloat16", lambda: True)
    assert checked_dtype("bfloat16") is torch.bfloat16


def test_a_load_that_ends_the_engine_fails_typed_and_does_not_wait_for_ever(model_of, tmp_path: Path) -> None:
    """Whatever a load raises that is no error of ours, its caller must hear of: the gate is closed until then."""
    folder, _ = model_of("llama")
    deep = {"format": "lora", "adapter_config": "[" * 100_000}  # which ends a JSON reader with a RecursionError
    save_file({"x": torch.zeros(1)}, tmp_path / "deep.safetensors", deep)

    async def main() -> None:
        engine = TorchEngine(folder, slots=2, max_context=32)
        policy = VersionedPolicy(engine)
        try:
            for _ in range(2):
                with pytest.raises(EngineDiedError, match="the torch engine failed: RecursionError"):
                    await asyncio.wait_for(policy.publish(WeightUpdate(1, tmp_path / "deep.safetensors")), 60)
            with pytest.raises(EngineDiedError, match="RecursionError"):
                await asyncio.wait_for(policy.complete([1, 2], SamplingParams(3)), 60)
        finally:
            await engine.close()

    asyncio.run(main())
