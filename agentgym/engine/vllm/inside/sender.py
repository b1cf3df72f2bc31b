"""The process that carries published weights into a vLLM server, with vLLM's own trainer-side engines. Law: it knows
files and tensors, and reaches the server only through whoever started it.

It runs in vLLM's environment beside the service, since those engines need vLLM and a GPU, and the trainer's process has
the one at other versions and the other for itself. One server has one sender: what a server's death leaves hanging in
a collective ends with it. Imports torch and vllm only.

Lines of JSON. Orders come on stdin, one at a time: first "join" (meet the server), then "stage" (map a file and compare
its checksums) and "send" (carry what was staged). On stdout each ends with {"done": ID, "error": null or TEXT}; what
the engine wants of the server goes out as {"call": ID, "route", "body"} and is answered by {"answer": ID, "error"}. The
end of stdin is the end of the process, whatever it waits for.
"""

from __future__ import annotations

# pyright: reportMissingImports=false, reportUntypedBaseClass=false
import itertools
import json
import os
import queue
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, BinaryIO, TextIO

import torch
from vllm.distributed.weight_transfer.base import ParamMeta, TrainerInitInfo, WeightSource
from vllm.distributed.weight_transfer.clients import HTTPVLLMWeightSyncClient
from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory
from vllm.plugins import load_general_plugins

from agentgym.engine.vllm.inside.plugin import mapped

_BUFFER_BYTES = 256 * 2**20  # of a GPU; NCCL has two


@dataclass(frozen=True, slots=True)
class Meeting:
    """Where a sender and the workers of its server meet: `host` is this machine as the server reaches it."""

    host: str
    num_workers: int


def _nccl(meeting: Meeting) -> TrainerInitInfo:
    from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

    return NCCLTrainerInitInfo(
        rank=0, master_address=meeting.host, master_port=free_port(meeting.host), world_size=1 + meeting.num_workers,
        packed_buffer_size_bytes=_BUFFER_BYTES,
    )  # fmt: skip


def _ipc(meeting: Meeting) -> TrainerInitInfo:
    from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo

    return IPCTrainerInitInfo(rank=0, packed=True, packed_buffer_size_bytes=_BUFFER_BYTES)


# By what a server's back end is called behind "agentgym_"; a plug-in of vLLM's may add its own.
CARRIERS: dict[str, Callable[[Meeting], TrainerInitInfo]] = {"nccl": _nccl, "ipc": _ipc}


def free_port(host: str) -> int:
    """A port of this machine that nobody listens on just now."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


class Link:
    """Both ends of the conversation with the service."""

    def __init__(self, source: BinaryIO, sink: TextIO) -> None:
        self._source = source
        self._sink = sink
        self._writing = threading.Lock()
        self._orders: queue.Queue[dict[str, Any]] = queue.Queue()
        self._calls: dict[int, Future[None]] = {}
        self._ids = itertools.count()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        for line in self._source:
            said = json.loads(line)
            if "answer" not in said:
                self._orders.put(said)
            elif said["error"] is None:
                self._calls.pop(said["answer"]).set_result(None)
            else:
                self._calls.pop(said["answer"]).set_exception(RuntimeError(said["error"]))
        os._exit(0)  # the service is gone, and a collective waits for nobody else

    def orders(self) -> Iterator[dict[str, Any]]:
        while True:
            yield self._orders.get()

    def call(self, route: str, body: Any) -> None:
        """Has the service ask the server. Raises RuntimeError with what it says of a failure."""
        number, answered = next(self._ids), Future[None]()
        self._calls[number] = answered
        self.say({"call": number, "route": route, "body": body})
        answered.result()

    def say(self, what: Mapping[str, Any]) -> None:
        with self._writing:  # an engine calls from threads of its own
            self._sink.write(json.dumps(what) + "\n")
            self._sink.flush()


class LinkedClient(HTTPVLLMWeightSyncClient):
    """vLLM's client of a server, whose requests the service makes; it says which model and bytes are meant, and which
    version they are."""

    def __init__(self, link: Link, config: dict[str, Any]) -> None:
        super().__init__("")
        self._link = link
        self._config = config
        self.checksums: Mapping[str, str] = {}
        self.label = ""

    def _post(self, path: str, json: dict[str, Any] | None = None) -> None:
        self._link.call(f"/{path}", json)

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        super().init_weight_transfer_engine({**init_info, "config": self._config})

    def update_weights(self, update_info: Any) -> None:
        super().update_weights({**update_info, "checksums": self.checksums})

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        super().finish_weight_update(weight_version or self.label)


class StagedFile(WeightSource):
    """The tensors of a published file, mapped; each goes to the device when it is its turn."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.tensors: dict[str, torch.Tensor] = {}

    def metadata(self) -> list[ParamMeta]:
        return [ParamMeta(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in self.tensors.items()]

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in self.tensors.items():
            yield name, tensor.to(self._device)


class Sender:
    """Made by the order "join"; obeys the others."""

    def __init__(self, carrier: str, link: Link, join: Mapping[str, Any]) -> None:
        load_general_plugins()
        self._staged = StagedFile(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        self._client = LinkedClient(link, join["config"])
        init_info = CARRIERS[carrier](Meeting(join["host"], join["num_workers"]))
        self._engine = WeightTransferTrainerFactory.trainer_init(init_info, client=self._client, source=self._staged)

    def obey(self, order: Mapping[str, Any]) -> None:
        if order["do"] == "stage":
            self._staged.tensors = mapped(order["path"], order["checksums"])
            self._client.checksums = order["checksums"]
            if self._engine.init_info_cls.backend == "ipc":  # one tensor is one part; who receives it need not know
                largest = max(tensor.nbytes for tensor in self._staged.tensors.values())
                self._engine.packed_buffer_size_bytes = max(_BUFFER_BYTES, largest)
        else:
            self._client.label = order["label"]
            self._engine.send_weights()


def main(carrier: str) -> None:
    sink = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what vLLM logs is no line of ours
    link = Link(sys.stdin.buffer, sink)
    sender: Sender | None = None
    for order in link.orders():
        error = None
        try:
            if sender is None:
                sender = Sender(carrier, link, order)
            else:
                sender.obey(order)
        except Exception as failure:  # noqa: BLE001  whatever it is, who gave the order must hear of it
            error = f"{type(failure).__name__}: {failure}"
        link.say({"done": order["id"], "error": error})
