"""The weight-transfer back end that runs inside a vLLM worker: published files, mapped where they lie.

Law: nothing of the model changes before every byte that will be loaded has been compared with what was sent. Runs in
vLLM's environment, where this distribution is installed without its dependencies: imports torch, safetensors and vllm
only. vLLM finds `register` through the entry-point group `vllm.general_plugins`.

An update begins with two calls of /update_weights: "stage" begins to map and compare in a thread while the engine
samples, and on the CPU makes the new layers there (vllm_beside.py); "verify" waits for that and raises what is wrong
with the file. /finish_weight_update, the one call in a pause, swaps them in, or loads. "discard" forgets what was
staged. vLLM reloads layer by layer and repacks a layer on the CPU when it is whole, so whoever sends names sends all
names of a layer.
"""

from __future__ import annotations

# pyright: reportMissingImports=false, reportUntypedBaseClass=false
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch
from safetensors import safe_open
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.logger import init_logger
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from agentgym.engine.vllm_beside import Beside

BACKEND = "agentgym_file"
_ROW = 1024  # words; as in vllm_weights.py, which computes the same sums with numpy
_COLUMN_FACTOR = -0x61C8864680B583EB  # 0x9E3779B97F4A7C15 as a signed word
_ROW_FACTOR = -0x40A7B892E31B1A47  # 0xBF58476D1CE4E5B9
_LENGTH_FACTOR = -0x6B2FB644ECCEEE15  # 0x94D049BB133111EB
_log = init_logger("vllm.agentgym")  # vLLM shows what is said below `vllm`


def register() -> None:
    """What vLLM calls in each of its processes, possibly more than once."""
    if BACKEND not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(BACKEND, FileWeightTransferEngine)


@dataclass
class FileInitInfo(WeightTransferInitInfo):
    """What config.json says of the model whose weights will come."""

    config: dict[str, Any] = field(default_factory=dict)


@dataclass
class FileUpdateInfo(WeightTransferUpdateInfo):
    """`tensors` maps the names to load to the checksums of their bytes."""

    step: str
    path: str = ""
    tensors: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Staged:
    """What an update loads: tensors as they came, or layers that are made of them already."""

    tensors: dict[str, torch.Tensor]
    beside: Beside | None


class FileWeightTransferEngine(WeightTransferEngine[FileInitInfo, FileUpdateInfo]):
    """Maps safetensors files that this machine can read."""

    init_info_cls = FileInitInfo
    update_info_cls = FileUpdateInfo
    supports_draft_weight_update = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._stager = ThreadPoolExecutor(1, "agentgym-stage")
        self._staged: Future[_Staged] | None = None

    def init_transfer_engine(self, init_info: FileInitInfo) -> None:
        """As vLLM's; there is no connection. Raises ValueError where this is another model."""
        mine = self.model_config.hf_text_config
        for name, wanted in init_info.config.items():
            if _differs(wanted, value := getattr(mine, name, None)):
                said = f"another model: its {name} is {value}, and not {wanted}"
                raise ValueError(said.replace("'", ""))  # vLLM quotes it; what asks reads to the next quote

    def start_weight_update(self) -> None:
        """As vLLM's; layers are touched at the end only."""
        self._staged = None

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """As vLLM's, which would synchronise an accelerator that may not exist."""
        self.receive_weights(self.parse_update_info(update_info))
        if self.device.type != "cpu":
            torch.accelerator.synchronize()

    def receive_weights(self, update_info: FileUpdateInfo) -> None:
        """One step."""
        if update_info.step == "stage":
            self._staged = self._stager.submit(self._stage, update_info.path, update_info.tensors)
        elif update_info.step == "discard":
            self._staged = None
        elif update_info.step != "verify":
            raise ValueError(f"unknown step {update_info.step!r}")
        elif self._staged is None:
            raise ValueError("step 'verify' before step 'stage'")
        else:
            self._staged.result()

    def _stage(self, path: str, checksums: dict[str, str]) -> _Staged:
        tensors = _map(path, checksums)
        if self.device.type != "cpu" or not self.model_config.enforce_eager:
            return _Staged(tensors, None)
        modules = _modules(self.model, list(tensors))
        return _Staged(tensors, Beside.make(self.model, modules, tensors, self.model_config))

    def _apply(self, staged: _Staged) -> None:
        if staged.beside is None:
            self._reload(staged.tensors)
            _log.info("%d tensors are loaded, layer by layer", len(staged.tensors))
        else:
            staged.beside.swap()
            self._stager.submit(staged.beside.drop_old)
            _log.info("%d tensors are loaded, their layers swapped in", len(staged.tensors))

    def _reload(self, tensors: dict[str, torch.Tensor]) -> None:
        modules = _modules(self.model, list(tensors))
        for module in modules:
            initialize_layerwise_reload(module)
        self.model.load_weights(tensors.items())
        for module in modules:
            finalize_layerwise_reload(module, self.model_config)
        self._repack_ties(modules)

    def _repack_ties(self, loaded: list[torch.nn.Module]) -> None:
        """A module that is tied to a loaded one has its new values, and its own packed copy of the old ones."""
        inside = {id(module) for top in loaded for module in top.modules()}
        fresh = {id(parameter) for top in loaded for parameter in top.parameters()}
        for module in self.model.modules():
            own = module.parameters(recurse=False)
            method = getattr(module, "quant_method", None)
            if id(module) not in inside and method is not None and any(id(parameter) in fresh for parameter in own):
                method.process_weights_after_loading(module)

    def finish_weight_update(self) -> None:
        """As vLLM's: loads what was staged."""
        staged, self._staged = self._staged, None
        if staged is not None:
            self._apply(staged.result())
            if self.device.type != "cpu":
                torch.accelerator.synchronize()

    def shutdown(self) -> None:
        """As vLLM's."""
        self._staged = None
        self._stager.shutdown(wait=False)


def _differs(wanted: Any, value: Any) -> bool:
    """Whether two values contradict each other; one that says nothing contradicts none."""
    if wanted is None or value is None:
        return False
    if isinstance(wanted, dict) and isinstance(value, dict):
        return any(_differs(wanted[key], value[key]) for key in wanted.keys() & value.keys())
    return bool(wanted != value)


def _map(path: str, checksums: dict[str, str]) -> dict[str, torch.Tensor]:
    """The tensors of `path` that `checksums` names, if their bytes are those that were sent."""
    with safe_open(path, framework="pt", device="cpu") as file:
        lacking = sorted(checksums.keys() - set(file.keys()))
        if lacking:
            raise ValueError(f"{path} lacks {lacking[0]!r} ({len(lacking)} such)")
        tensors = {name: file.get_tensor(name) for name in file.keys() if name in checksums}  # noqa: SIM118
    for name, tensor in tensors.items():
        received = checksum(tensor)
        if received != checksums[name]:
            raise ValueError(f"checksum of {name!r} in {path}: sent {checksums[name]}, received {received}")
    return tensors


def _modules(model: torch.nn.Module, names: list[str]) -> list[torch.nn.Module]:
    """The smallest modules that hold `names` with all their siblings: decoder layers, and the owners of the rest.

    The whole model where a name has no module of that path; then `names` must be those of the whole model.
    """
    paths = dict.fromkeys(layer_of(name) for name in names)
    try:
        found = [model.get_submodule(path) for path in paths]
    except AttributeError:
        return [model]
    return list({id(module): module for module in found}.values())


def layer_of(name: str) -> str:
    """`model.layers.3` of `model.layers.3.mlp.up_proj.weight`; `model.norm` of `model.norm.weight`."""
    parts = name.split(".")
    for index, part in enumerate(parts):
        if part.isdigit():
            return ".".join(parts[: index + 1])
    return ".".join(parts[:-1])


def checksum(tensor: torch.Tensor) -> str:
    """Two sums over the tensor's bytes that see where each word stands, at the speed of memory: 128 bits in hex."""
    data = tensor.detach().contiguous().view(-1).view(torch.uint8)
    size = data.numel()
    whole = size // (8 * _ROW) * (8 * _ROW)
    tail = torch.zeros(8 * _ROW, dtype=torch.uint8)
    tail[: size - whole] = data[whole:]
    rows = [_words(tail).view(1, _ROW)]
    if whole:
        rows.insert(0, _words(data[:whole]).view(-1, _ROW))
    by_column = sum((part.sum(0) for part in rows), torch.zeros(_ROW, dtype=torch.int64))
    by_row = torch.cat([part.sum(1) for part in rows])
    first = int((by_column * _factors(_ROW, _COLUMN_FACTOR)).sum())
    second = int((by_row * _factors(len(by_row), _ROW_FACTOR)).sum()) + size * _LENGTH_FACTOR
    return f"{first % 2**64:016x}{second % 2**64:016x}"


def _words(data: torch.Tensor) -> torch.Tensor:
    aligned = data.storage_offset() % 8 == 0 and data.data_ptr() % 8 == 0
    return (data if aligned else data.clone()).view(torch.int64)


def _factors(count: int, factor: int) -> torch.Tensor:
    return (2 * torch.arange(count, dtype=torch.int64) + 1) * factor
