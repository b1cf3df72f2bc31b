"""The weight-transfer back end that runs inside a vLLM worker: published files, mapped where they lie.

Law: nothing of the model changes before every byte that will be loaded has been compared with what was sent. Runs in
vLLM's environment, where this distribution is installed without its dependencies: imports torch, safetensors and vllm
only. vLLM finds `register` through the entry-point group `vllm.general_plugins`.

An update begins with two calls of /update_weights: "stage" begins to map and compare in a thread while the engine
samples, and on the CPU makes the new layers there (beside.py); "verify" waits for that and raises what is wrong
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

from agentgym.engine.vllm.inside.beside import Beside
from agentgym.engine.vllm.inside.received import check_model, compare
from agentgym.engine.vllm.inside.reload import Reload, modules_of

BACKEND = "agentgym_file"
_CHECKED = {"agentgym_nccl": "CheckedNccl", "agentgym_ipc": "CheckedIpc"}
_log = init_logger("vllm.agentgym")  # vLLM shows what is said below `vllm`


def register() -> None:
    """What vLLM calls in each of its processes, possibly more than once."""
    if BACKEND not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(BACKEND, FileWeightTransferEngine)
        for name, checked in _CHECKED.items():  # imported only by a server that has one
            WeightTransferEngineFactory.register_engine(name, "agentgym.engine.vllm.inside.checked", checked)


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
        check_model(self.model_config.hf_text_config, init_info.config)

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
        tensors = mapped(path, checksums)
        if self.device.type != "cpu" or not self.model_config.enforce_eager:
            return _Staged(tensors, None)
        modules = modules_of(self.model, tensors)
        return _Staged(tensors, Beside.make(self.model, modules, tensors, self.model_config))

    def _apply(self, staged: _Staged) -> None:
        if staged.beside is None:
            reload = Reload(self.model, staged.tensors, self.model_config)
            self.model.load_weights(staged.tensors.items())
            reload.finish()
            _log.info("%d tensors are loaded, layer by layer", len(staged.tensors))
        else:
            staged.beside.swap()
            self._stager.submit(staged.beside.drop_old)
            _log.info("%d tensors are loaded, their layers swapped in", len(staged.tensors))

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


def mapped(path: str, checksums: dict[str, str]) -> dict[str, torch.Tensor]:
    """The tensors of `path` that `checksums` names, if their bytes are those that were sent."""
    with safe_open(path, framework="pt", device="cpu") as file:
        lacking = sorted(checksums.keys() - set(file.keys()))
        if lacking:
            raise ValueError(f"{path} lacks {lacking[0]!r} ({len(lacking)} such)")
        tensors = {name: file.get_tensor(name) for name in file.keys() if name in checksums}  # noqa: SIM118
    for name, tensor in tensors.items():
        compare(name, tensor, checksums, f" in {path}")
    return tensors
