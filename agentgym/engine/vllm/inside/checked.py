"""vLLM's own back ends that carry weights from GPU to GPU, NCCL and CUDA IPC, with what correctness asks on top: they
take the weights of their own model only, and every tensor is compared with what was sent before a layer gets it.

Runs inside a vLLM worker, in vLLM's environment: imports vllm only. vLLM imports
it by name once a server is started with one of them (plugin.py registers both).
"""

from __future__ import annotations

# pyright: reportMissingImports=false, reportUntypedBaseClass=false
from dataclasses import dataclass, field
from typing import Any

from vllm.distributed.weight_transfer.ipc_engine import (
    IPCWeightTransferEngine,
    IPCWeightTransferInitInfo,
    IPCWeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.nccl_engine import (
    NCCLWeightTransferEngine,
    NCCLWeightTransferInitInfo,
    NCCLWeightTransferUpdateInfo,
)

from agentgym.engine.vllm.inside.received import ComparedModel, check_model
from agentgym.engine.vllm.inside.reload import Reload


@dataclass(kw_only=True)
class NcclInitInfo(NCCLWeightTransferInitInfo):
    """vLLM's, and what config.json says of the model whose weights will come."""

    config: dict[str, Any] = field(default_factory=dict)


@dataclass
class IpcInitInfo(IPCWeightTransferInitInfo):
    """vLLM's, and what config.json says of the model whose weights will come."""

    config: dict[str, Any] = field(default_factory=dict)


@dataclass
class NcclUpdateInfo(NCCLWeightTransferUpdateInfo):
    """vLLM's, and the checksums of all tensors of the update."""

    checksums: dict[str, str] = field(default_factory=dict)


@dataclass
class IpcUpdateInfo(IPCWeightTransferUpdateInfo):
    """vLLM's, and the checksums of all tensors of the update."""

    checksums: dict[str, str] = field(default_factory=dict)


class Checked:
    """Mixed into one of vLLM's back ends, before it. An update's tensors may come in parts; layers that get none stay
    as they are."""

    supports_draft_weight_update = False
    model: Any
    model_config: Any
    _arriving: ComparedModel | None = None

    def init_transfer_engine(self, init_info: Any) -> None:
        """As vLLM's. Raises ValueError where this is another model."""
        check_model(self.model_config.hf_text_config, init_info.config)
        super().init_transfer_engine(init_info)  # type: ignore[misc]

    def start_weight_update(self) -> None:
        """In the place of vLLM's, which reloads every layer, and leaves one that is tied to another behind."""
        self._arriving = None

    def receive_weights(self, update_info: Any) -> None:
        """As vLLM's. Raises ValueError for a tensor that is not what was sent."""
        model = self.model
        if self._arriving is None:
            reload = Reload(model, update_info.checksums, self.model_config)
            self._arriving = ComparedModel(model, update_info.checksums, reload.finish)
        self.model = self._arriving
        try:
            super().receive_weights(update_info)  # type: ignore[misc]
        finally:
            self.model = model

    def finish_weight_update(self) -> None:
        """In the place of vLLM's. Raises ValueError where a tensor did not come."""
        arriving, self._arriving = self._arriving, None
        if arriving is not None:
            arriving.finish()


class CheckedNccl(Checked, NCCLWeightTransferEngine):
    """Broadcasts into the worker's GPU."""

    init_info_cls = NcclInitInfo
    update_info_cls = NcclUpdateInfo


class CheckedIpc(Checked, IPCWeightTransferEngine):
    """Tensors of a process on the worker's own GPU."""

    init_info_cls = IpcInitInfo
    update_info_cls = IpcUpdateInfo

    def finish_weight_update(self) -> None:
        """As Checked's; the sender's buffer is given back."""
        super().finish_weight_update()
        self._packed_importer.close()
