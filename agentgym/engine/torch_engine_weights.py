"""From a published safetensors file into a live model. Law: everything is checked before the first weight changes.

Files are mapped and copied in place, so that tied parameters stay tied and nothing is allocated. Narrowing is refused:
the engine must serve exactly the values that were published.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging as transformers_logging

from agentgym.errors import EngineError, InputError, UnavailableError

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def checked_dtype(name: str) -> torch.dtype:
    """The dtype called `name`; UnavailableError for bfloat16 where this CPU would only emulate it."""
    if name not in _DTYPES:
        raise InputError(f"engine dtype must be one of {', '.join(_DTYPES)}, got {name!r}")
    if name == "bfloat16" and not has_native_bfloat16():
        raise UnavailableError(
            "engine dtype 'bfloat16' needs a CPU with AVX512-BF16 or AMX, and this one has neither (it would be about "
            "500 times slower than float32); use dtype 'float32'"
        )
    return _DTYPES[name]


def has_native_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 matrices in hardware."""
    try:
        with open("/proc/cpuinfo", encoding="ascii", errors="replace") as lines:
            flags = next((line.split() for line in lines if line.startswith(("flags", "Features"))), [])
    except OSError:
        return False
    return bool({"avx512_bf16", "amx_bf16", "bf16"} & set(flags))


def read_model(folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    """The causal LM of `folder`, complete, for inference only, in memory of its own (never mapped from the file)."""
    if not (folder / "config.json").is_file():
        raise InputError(f"no model at {folder}: it holds no config.json")
    bar = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, local_files_only=True, output_loading_info=True
        )
    except (OSError, ValueError, KeyError, RuntimeError, json.JSONDecodeError, SafetensorError) as error:
        raise EngineError(f"transformers cannot load the model at {folder}: {error}") from error
    finally:
        if bar:
            transformers_logging.enable_progress_bar()
    model: PreTrainedModel = loaded[0]
    info: dict[str, Any] = loaded[1]
    if info["missing_keys"] or info["mismatched_keys"]:
        lacking = sorted(str(key) for key in {*info["missing_keys"], *info["mismatched_keys"]})
        raise EngineError(f"the model at {folder} lacks weights, or has others than its config: {', '.join(lacking)}")
    model.eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model


def load_weights(model: PreTrainedModel, path: Path) -> None:
    """Copies the tensors of `path` into `model`, or raises EngineError naming the first that does not fit."""
    if not os.path.isfile(path):
        raise EngineError(f"no weights at {path}")
    targets = model.state_dict(keep_vars=True)
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            names = sorted(file.keys())
            _check_names(model, targets, names, path)
            sources = {name: file.get_tensor(name) for name in names}
    except (SafetensorError, OSError) as error:
        raise EngineError(f"{path} is not a readable safetensors file: {error}") from error
    for name, source in sources.items():
        _check_tensor(name, source, targets[name], path)
    _check_ties(targets, sources, path)
    with torch.no_grad():
        for name, source in sources.items():
            targets[name].copy_(source)


def _check_names(model: PreTrainedModel, targets: dict[str, torch.Tensor], names: list[str], path: Path) -> None:
    unknown = [name for name in names if name not in targets]
    if unknown:
        raise EngineError(f"{path} holds {unknown[0]!r}, which the model does not have ({len(unknown)} such)")
    given = {id(targets[name]) for name in names}
    for name, parameter in model.named_parameters():  # a tied parameter is one object, and any of its names will do
        if id(parameter) not in given:
            raise EngineError(f"{path} lacks {name!r}")


def _check_tensor(name: str, source: torch.Tensor, target: torch.Tensor, path: Path) -> None:
    if source.shape != target.shape:
        raise EngineError(f"{name!r} in {path} has shape {list(source.shape)}, the model has {list(target.shape)}")
    if torch.promote_types(source.dtype, target.dtype) != target.dtype:
        raise EngineError(
            f"{name!r} in {path} is {source.dtype}, which the engine's {target.dtype} cannot hold without rounding"
        )


def _check_ties(targets: dict[str, torch.Tensor], sources: dict[str, torch.Tensor], path: Path) -> None:
    first: dict[int, str] = {}
    for name, source in sources.items():
        twin = first.setdefault(id(targets[name]), name)
        if twin != name and not torch.equal(source, sources[twin]):
            raise EngineError(f"{path} holds different values for {twin!r} and {name!r}, which the model ties")
