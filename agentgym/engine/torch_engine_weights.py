"""From a published safetensors file into a live model. Law: everything is checked before the first weight changes.

Files are mapped and copied in place, so that tied parameters stay tied and nothing is allocated. Narrowing is refused:
the engine must serve exactly the values that were published. An adapter is merged in fp32 into the weights that the
model folder holds, never into what an earlier adapter left: the same file gives the same bits, whatever was served
before.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging as transformers_logging

from agentgym.errors import EngineError, InputError, UnavailableError

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_LORA = "lora"
_PREFIX = "base_model.model."  # PEFT's, before the name of a module of ours
_FACTORS = (".lora_A.weight", ".lora_B.weight")
# What may stand in PEFT's configuration beside scale * B @ A on whole weights, and would have to be computed.
_UNMERGEABLE = (
    "alora_invocation_tokens", "alpha_pattern", "layer_replication", "lora_bias", "modules_to_save", "rank_pattern",
    "target_parameters", "trainable_token_indices", "use_bdlora", "use_dora", "use_qalora", "use_rslora",
)  # fmt: skip


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


class ServedWeights:
    """The weights of a live model: replaced by those of a published file, or, where the file holds an adapter, by those
    of the model folder with the adapter merged in. Keeps a copy of what adapters change, from the first adapter on."""

    def __init__(self, model: PreTrainedModel, folder: Path) -> None:
        self._model = model
        self._folder = folder
        self._base: dict[str, torch.Tensor] = {}  # weights of the folder that adapters changed, as they were
        self._of_folder = True  # but for those, the model's weights are the folder's

    def load(self, path: Path) -> int:
        """Serves what `path` holds, so many bytes, or raises EngineError naming the first that does not fit."""
        metadata, sources = _read(path)
        if metadata.get("format") == _LORA:
            self._merge(_adapter_of(metadata, sources, self._model, path))
        else:
            _copy(self._model, sources, path)
            self._base, self._of_folder = {}, False
        return sum(source.nbytes for source in sources.values())

    def _merge(self, adapter: _Adapter) -> None:
        if not self._of_folder:
            dtype = next(self._model.parameters()).dtype
            pristine = read_model(self._folder, dtype).state_dict()
            _copy(self._model, pristine, self._folder)
            self._base, self._of_folder = {}, True
        weights = self._model.state_dict(keep_vars=True)
        with torch.no_grad():
            for name in self._base.keys() - adapter.factors.keys():
                weights[name].copy_(self._base[name])
            for name, (down, up) in adapter.factors.items():
                if name not in self._base:
                    self._base[name] = weights[name].detach().clone()
                change = (up.float() @ down.float()) * adapter.scale
                weights[name].copy_(self._base[name].float() + (change.T if adapter.transposed else change))


def load_weights(model: PreTrainedModel, path: Path) -> None:
    """Copies the tensors of `path`, which are the whole model's, into `model`, or raises EngineError naming the first
    that does not fit."""
    metadata, sources = _read(path)
    if metadata.get("format") == _LORA:
        raise EngineError(f"{path} holds an adapter, which only an engine that keeps the base can serve")
    _copy(model, sources, path)


def _read(path: Path) -> tuple[Mapping[str, str], dict[str, torch.Tensor]]:
    """What the file says of itself, and its tensors, mapped."""
    if not os.path.isfile(path):
        raise EngineError(f"no weights at {path}")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return file.metadata() or {}, {name: file.get_tensor(name) for name in sorted(file.keys())}
    except (SafetensorError, OSError) as error:
        raise EngineError(f"{path} is not a readable safetensors file: {error}") from error


def _copy(model: PreTrainedModel, sources: dict[str, torch.Tensor], path: Path) -> None:
    targets = model.state_dict(keep_vars=True)
    _check_names(model, targets, list(sources), path)
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
    if not _holds(target.dtype, source.dtype):
        raise EngineError(
            f"{name!r} in {path} is {source.dtype}, which the engine's {target.dtype} cannot hold without rounding"
        )


def _holds(wide: torch.dtype, narrow: torch.dtype) -> bool:
    """Whether `wide` has every value of `narrow`, as far as torch knows."""
    try:
        return torch.promote_types(narrow, wide) == wide
    except RuntimeError:  # it promotes no float8
        return False


def _check_ties(targets: dict[str, torch.Tensor], sources: dict[str, torch.Tensor], path: Path) -> None:
    first: dict[int, str] = {}
    for name, source in sources.items():
        twin = first.setdefault(id(targets[name]), name)
        if twin != name and not torch.equal(source, sources[twin]):
            raise EngineError(f"{path} holds different values for {twin!r} and {name!r}, which the model ties")


# ------------------------------------------------------------------------------------------------------- adapters


@dataclass(frozen=True, slots=True)
class _Adapter:
    """An adapter that fits the model.

    Example: rank 1, alpha 2, on one weight [3, 4]: `_Adapter(2.0, {"fc.weight": (ones(1, 4), ones(3, 1))}, False)`.
    """

    scale: float
    factors: Mapping[str, tuple[torch.Tensor, torch.Tensor]]  # by the weight's name: A [rank, in], B [out, rank]
    transposed: bool  # the weights are [in, out]


def _adapter_of(
    metadata: Mapping[str, str], sources: Mapping[str, torch.Tensor], model: PreTrainedModel, path: Path
) -> _Adapter:
    try:
        config = json.loads(metadata["adapter_config"])
        rank, scale = config["r"], config["lora_alpha"] / config["r"]
        transposed = bool(config.get("fan_in_fan_out"))
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise EngineError(f"{path} holds an adapter without a readable adapter_config: {error!r}") from error
    odd = [name for name in _UNMERGEABLE if config.get(name)] + ["bias"] * (config.get("bias", "none") != "none")
    if odd:
        raise EngineError(f"{path} holds an adapter with {odd[0]} = {config[odd[0]]!r}, which this engine cannot merge")
    targets = model.state_dict(keep_vars=True)
    factors: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    for name in sources:
        suffix = next((suffix for suffix in _FACTORS if name.endswith(suffix)), None)
        weight = name.removeprefix(_PREFIX).removesuffix(suffix or "") + ".weight"
        if suffix is None or not name.startswith(_PREFIX) or weight not in targets:
            raise EngineError(f"{path} holds an adapter of another model: this one has no module for {name!r}")
        if weight not in factors:
            down, up = (sources.get(_PREFIX + weight.removesuffix(".weight") + part) for part in _FACTORS)
            if down is None or up is None:
                raise EngineError(f"{path} holds one half of an adapter: {name!r} without the other")
            _check_factors(weight, down, up, rank, path)
            _check_target(weight, [up.shape[0], down.shape[1]], targets, transposed, path)
            factors[weight] = down, up
    return _Adapter(scale, factors, transposed)


def _check_factors(weight: str, down: torch.Tensor, up: torch.Tensor, rank: int, path: Path) -> None:
    if down.ndim != 2 or up.ndim != 2 or down.shape[0] != rank or up.shape[1] != rank:
        raise EngineError(
            f"{path} says that its adapter has rank {rank}, and holds {list(down.shape)} and {list(up.shape)} for "
            f"{weight!r}"
        )
    for factor in (down, up):
        if not _holds(torch.float32, factor.dtype):
            raise EngineError(
                f"{path}: the adapter of {weight!r} is {factor.dtype}, and adapters are merged in float32"
            )


def _check_target(
    weight: str, shape: list[int], targets: Mapping[str, torch.Tensor], transposed: bool, path: Path
) -> None:
    target = targets[weight]
    if list(target.shape) != (shape[::-1] if transposed else shape):
        raise EngineError(
            f"{path} holds an adapter of another model: that of {weight!r} fits {shape}, the model has "
            f"{list(target.shape)}"
        )
    twins = [name for name, tensor in targets.items() if tensor is target and name != weight]
    if twins:
        raise EngineError(f"{path} holds an adapter of {weight!r}, which the model ties to {twins[0]!r}")
