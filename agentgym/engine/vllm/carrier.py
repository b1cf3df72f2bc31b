"""How a whole model's weights reach a vLLM server. Law: what is carried is compared with what was sent, and the server
calls it by the version that it is.

A server on a machine that sees the published files maps them itself: VllmReplica is that carrier. For one that takes
weights from GPU to GPU (vLLM's NCCL or CUDA IPC), `Sender` is the service's end of a process in vLLM's environment
(inside/sender.py) that drives vLLM's own engines; requests to the server are made here.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import logging
import os
import socket
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

from agentgym.engine.owned_folder import OwnedFolder
from agentgym.engine.vllm.facts import understood
from agentgym.engine.vllm.replica import ReplicaLostError, VllmReplica
from agentgym.engine.vllm.server import answer_of
from agentgym.engine.vllm.weights import PublishedTensors
from agentgym.errors import EngineError, InputError, UnavailableError

PREFIX = "agentgym-sender-"
_LONGEST_LINE = 64 * 2**20  # the names, shapes and handles of a model's tensors
_PATIENCE_S = 360.0  # longer than a request to the server may take
_TAIL_BYTES = 3000
_log = logging.getLogger(__name__)
# not with -m: a plug-in that adds a carrier must meet the module that runs
_PROGRAM = "import sys; from agentgym.engine.vllm.inside.sender import main; main(sys.argv[1])"


class Carrier(Protocol):
    """What a seat has its server's weights carried by."""

    async def introduce(self, config: Mapping[str, Any]) -> None:
        """Says which model is meant. Raises InputError where the server has another."""
        ...

    async def stage(self, published: PublishedTensors, names: Mapping[str, str]) -> None:
        """What can be done before sampling is paused. Raises EngineError for a file that is not what was sent."""
        ...

    async def load(self, version: int, names: Mapping[str, str]) -> None:
        """Serves what was staged, as `version`; only while paused. A failure leaves weights that nobody knows."""
        ...


@dataclass(frozen=True, slots=True)
class SenderOptions:
    """How weights go from GPU to GPU: `kind` is vLLM's "nccl" or "ipc"; `devices` are GPUs as CUDA_VISIBLE_DEVICES
    names them, one for all senders or one for each server.

    Example: `SenderOptions(Path("python"), "nccl", ("0",))`.
    """

    python: Path  # of an environment that has vLLM and this distribution
    kind: str
    devices: tuple[str, ...]

    @property
    def backend(self) -> str:
        """The back end of a server that takes from it; inside/plugin.py registers them."""
        return f"agentgym_{self.kind}"

    def device(self, index: int) -> str:
        return self.devices[index if len(self.devices) > 1 else 0] if self.devices else ""


async def check_senders(options: SenderOptions) -> None:
    """Raises UnavailableError where senders could not work. Takes seconds, not a server's start."""
    if options.kind in ("nccl", "ipc"):  # and not a plug-in's own
        await asyncio.gather(*(_check_gpu(options, device) for device in dict.fromkeys(options.devices)))


async def _check_gpu(options: SenderOptions, device: str) -> None:
    probe = "import torch; print(torch.cuda.device_count())"
    if await answer_of(options.python, probe, _environment(device)) == 0:
        raise UnavailableError(
            f"engine.weight_transfer = {options.kind!r} carries weights from the GPU {device!r} of this machine, and "
            f"{options.python} sees none by that name; name another in engine.sender_devices, or use 'file'"
        )


class Sender:
    """A sender process and its server; make one with `Sender.start`. One that failed is closed, never used again."""

    def __init__(
        self, process: asyncio.subprocess.Process, folder: OwnedFolder, replica: VllmReplica, num_workers: int
    ) -> None:
        self._process = process
        self._folder = folder
        self._replica = replica
        self._num_workers = num_workers
        self._orders: dict[int, asyncio.Future[None]] = {}
        self._ids = itertools.count()
        self._calls: set[asyncio.Task[None]] = set()
        self._reading = asyncio.create_task(self._read())

    @classmethod
    async def start(cls, options: SenderOptions, index: int, replica: VllmReplica, num_workers: int) -> Sender:
        """Starts the process for the server `replica`, of `num_workers` GPUs. Raises UnavailableError."""
        folder = OwnedFolder(PREFIX, Path(tempfile.gettempdir()))
        try:
            with open(folder.path / "log", "wb") as log:
                process = await asyncio.create_subprocess_exec(
                    str(options.python), "-c", _PROGRAM, options.kind,
                    stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, limit=_LONGEST_LINE,
                    start_new_session=True, cwd=folder.path, env=_environment(options.device(index)),
                )  # fmt: skip
        except OSError as error:
            folder.remove()
            raise UnavailableError(f"engine.vllm_python {options.python} cannot be run: {error}") from error
        except BaseException:
            folder.remove()
            raise
        return cls(process, folder, replica, num_workers)

    # ---------------------------------------------------------------------------------------------------- carrying

    async def introduce(self, config: Mapping[str, Any]) -> None:
        """As Carrier.introduce: the sender and the server's workers meet."""
        host = host_towards(self._replica.url)
        try:
            await self._order({"do": "join", "host": host, "num_workers": self._num_workers, "config": dict(config)})
        except ReplicaLostError:
            raise
        except EngineError as error:
            raise understood(self._replica.name, error) from error

    async def stage(self, published: PublishedTensors, names: Mapping[str, str]) -> None:
        """As Carrier.stage: the sender maps the file, and compares it with what the service has read."""
        if names:
            await self._order({"do": "stage", "path": str(published.path), "checksums": dict(names)})

    async def load(self, version: int, names: Mapping[str, str]) -> None:
        """As Carrier.load: the tensors are carried."""
        if names:
            await self._order({"do": "send", "label": self._replica.label(version)})
            self._replica.loaded(version)
        else:
            await self._replica.load(version, {})

    # ----------------------------------------------------------------------------------------------- the process

    async def _order(self, order: dict[str, Any]) -> None:
        if self._reading.done():
            raise ReplicaLostError(self._last_words())
        number, ended = next(self._ids), asyncio.get_running_loop().create_future()
        self._orders[number] = ended
        try:
            await self._say(order | {"id": number})
            async with asyncio.timeout(_PATIENCE_S):
                await ended
        except TimeoutError as error:
            raise ReplicaLostError(
                f"the sender of {self._replica.name} did not {order['do']} within {_PATIENCE_S:.0f} s; {self._tail()}"
            ) from error
        finally:
            self._orders.pop(number, None)

    async def _say(self, what: Mapping[str, Any]) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(ConnectionError):  # it has ended, and who reads from it tells all orders
            self._process.stdin.write(json.dumps(what).encode() + b"\n")
            await self._process.stdin.drain()

    async def _read(self) -> None:
        assert self._process.stdout is not None
        try:
            async for line in self._process.stdout:
                self._hear(json.loads(line))
        except ValueError:  # no line of a sender's
            _log.exception("the sender of %s speaks out of turn; killing it", self._replica.name)
            self._process.kill()
        await self._process.wait()
        for order in self._orders.values():
            _settle(order, ReplicaLostError(self._last_words()))

    def _hear(self, said: Mapping[str, Any]) -> None:
        if "call" in said:
            task = asyncio.create_task(self._call(said["call"], said["route"], said["body"]))
            self._calls.add(task)
            task.add_done_callback(self._calls.discard)
        elif said["done"] in self._orders:
            failed = said["error"] and EngineError(f"the sender of {self._replica.name}: {said['error']}")
            _settle(self._orders[said["done"]], failed or None)

    async def _call(self, number: int, route: str, body: Any) -> None:
        """Asks the server what the sender wants of it. What fails there fails the order at once: the sender may stand
        in a collective that the server will never join."""
        error = None
        try:
            await self._replica.control(route, body)
        except EngineError as failure:
            error = str(failure)
            for order in self._orders.values():
                _settle(order, failure)
        await self._say({"answer": number, "error": error})

    def _last_words(self) -> str:
        return f"the sender of {self._replica.name} (process {self._process.pid}) ended; {self._tail()}"

    def _tail(self) -> str:
        with contextlib.suppress(OSError), open(self._folder.path / "log", "rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - _TAIL_BYTES))
            return f"its last words:\n{file.read().decode(errors='replace').strip() or '(none)'}"
        return "it said nothing"

    async def close(self) -> None:
        """Ends the process, whatever it waits for; idempotent."""
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()
        await self._reading
        for task in list(self._calls):
            task.cancel()
        await asyncio.gather(*self._calls, return_exceptions=True)
        self._folder.remove()


def _settle(order: asyncio.Future[None], error: Exception | None) -> None:
    if order.done():
        return
    if error is None:
        order.set_result(None)
    else:
        order.set_exception(error)


def _environment(device: str) -> dict[str, str]:
    chosen = {"CUDA_VISIBLE_DEVICES": device} if device else {}
    return {**os.environ, **chosen, "OMP_NUM_THREADS": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}


def host_towards(url: str | None) -> str:
    """This machine's address as the server at `url` sees it; a server without one is on this machine."""
    host = urlsplit(url).hostname if url else None
    if host is None:
        return "127.0.0.1"
    try:
        family, _, _, _, address = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(address)  # sends nothing
            return str(probe.getsockname()[0])
    except OSError as error:
        raise InputError(f"the address of {url} is not known: {error}") from error
