"""Weights from process to process without a GPU: vLLM's NCCL engines, ours around them, over gloo. A plug-in of vLLM's,
found by its servers and senders on PYTHONPATH.

What is its own is what needs CUDA there: how a group is opened, and a broadcast. The handshake, the request that runs
beside the broadcast, the reload and the checks are those of NCCL.
"""

from __future__ import annotations

# pyright: reportMissingImports=false, reportUntypedBaseClass=false
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, ClassVar

import torch
from torch.distributed import BroadcastOptions, ProcessGroup
from vllm.distributed.utils import stateless_init_torch_distributed_process_group
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory, WeightTransferTrainerFactory
from vllm.distributed.weight_transfer.nccl_common import worker_init_payload
from vllm.distributed.weight_transfer.nccl_engine import (
    NCCLTrainerInitInfo,
    NCCLTrainerWeightTransferEngine,
    NCCLWeightTransferEngine,
    NCCLWeightTransferInitInfo,
)

from agentgym.engine.vllm.inside import sender
from agentgym.engine.vllm.inside.checked import Checked, NcclInitInfo, NcclUpdateInfo


@dataclass
class GlooTrainerInitInfo(NCCLTrainerInitInfo):
    backend: ClassVar[str] = "gloo"


def _group(info: Any, rank: int) -> ProcessGroup:
    return stateless_init_torch_distributed_process_group(
        info.master_address, info.master_port, rank, info.world_size, "gloo", timeout=timedelta(seconds=60)
    )


def _broadcast(group: ProcessGroup, tensor: torch.Tensor) -> torch.Tensor:
    options = BroadcastOptions()
    options.rootRank, options.rootTensor = 0, 0
    group.broadcast([tensor], options).wait()
    return tensor


class GlooEngine(NCCLWeightTransferEngine):
    def init_transfer_engine(self, init_info: Any) -> None:
        self.group = _group(init_info, init_info.rank_offset)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self.receive_weights(self.parse_update_info(update_info))

    def receive_weights(self, update_info: Any) -> None:
        for name, dtype, shape in zip(update_info.names, update_info.dtype_names, update_info.shapes, strict=True):
            self.model.load_weights([(name, _broadcast(self.group, torch.empty(shape, dtype=getattr(torch, dtype))))])


class GlooReceiver(Checked, GlooEngine):
    init_info_cls = NcclInitInfo
    update_info_cls = NcclUpdateInfo


class GlooSender(NCCLTrainerWeightTransferEngine):
    @classmethod
    def trainer_init(cls, init_info: Any, *, client: Any, source: Any = None) -> GlooSender:
        engine = cls(client=client, source=source)
        theirs = NCCLWeightTransferInitInfo(
            master_address=init_info.master_address, master_port=init_info.master_port, rank_offset=1,
            world_size=init_info.world_size,
        )  # fmt: skip
        with ThreadPoolExecutor(1) as beside:
            answered = beside.submit(client.init_weight_transfer_engine, worker_init_payload(theirs))
            engine.model_update_group = _group(init_info, 0)
            answered.result()
        return engine

    def _broadcast(self, source: Any, meta: Any) -> None:
        for name, tensor in self._checked_iter(source, meta):
            sent = tensor.clone()
            if name == os.environ.get("GLOO_CARRIER_SPOILS"):  # a bit that falls over on the way
                sent.view(-1)[0] += 1.0
            if name == os.environ.get("GLOO_CARRIER_DIES_AT"):
                print(f"died at {name}", file=sys.stderr, flush=True)
                os.abort()
            _broadcast(self.model_update_group, sent)

    @staticmethod
    def _post_send_sync() -> None:
        pass


def _meeting(meeting: sender.Meeting) -> GlooTrainerInitInfo:
    return GlooTrainerInitInfo(
        rank=0, master_address=meeting.host, master_port=sender.free_port(meeting.host),
        world_size=1 + meeting.num_workers,
    )  # fmt: skip


def register() -> None:
    if "gloo" not in sender.CARRIERS:
        sender.CARRIERS["gloo"] = _meeting
        WeightTransferTrainerFactory.register_engine("gloo", GlooSender)
        WeightTransferEngineFactory.register_engine("agentgym_gloo", GlooReceiver)
