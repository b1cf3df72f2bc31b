"""A replica's place in the engine: filled with a server, lost, filled again. Law: it serves only once its server has
the engine's version, and a server that nobody can vouch for is never used again as it is.

Own servers are started and restarted; running ones elsewhere are taken over, and waited for when they go away.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from agentgym.engine.protocol import PauseMode, Probe
from agentgym.engine.vllm_replica import VllmReplica
from agentgym.engine.vllm_server import BACKEND, VllmServer, VllmServerOptions, until_answering
from agentgym.engine.vllm_weights import PublishedTensors
from agentgym.errors import AgentGymError, EngineDiedError, EngineError, InputError

SeatState = Literal["starting", "serving", "lost"]

_PROBE_S = 0.25
_LOOK_S = 10.0  # between looks at a replica that serves
_BACKOFF_S = (0.0, 1.0, 5.0, 30.0, 60.0)  # before the 1st, 2nd, ... attempt in a row to fill the seat
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ReplicaStatus:
    """A replica as /v1/policy shows it.

    Example: `ReplicaStatus("vllm 0", "started here", "serving", policy_version=3, running=12, restarts=0, error="")`.
    """

    name: str
    where: str
    state: SeatState
    policy_version: int
    running: int
    restarts: int
    error: str  # why it is not serving


class Served(Protocol):
    """What a seat asks of its engine."""

    run: str
    model_folder: Path
    dtype: str
    max_context: int
    max_lora_rank: int | None
    going: asyncio.Event  # set while the engine is not paused

    def serves(self) -> tuple[int, Path | None]:
        """The version that a replica must have, and the file of its weights; None: those of the model's folder."""
        ...

    def probe(self) -> Probe | None:
        """What a replica must agree with before it serves that version."""
        ...

    def adapter_folder(self, version: int, published: PublishedTensors) -> Path:
        """Where an adapter lies for a server."""
        ...

    def named(self) -> set[int]:
        """The versions that a request names, or will."""
        ...

    def seat_changed(self, seat: Seat) -> None:
        """The seat has come to serve, or is lost."""
        ...


class Seat:
    """`options` start a server here; without them `url` is a server that runs already."""

    def __init__(self, engine: Served, name: str, options: VllmServerOptions | None, url: str | None) -> None:
        self.name = name
        self.state: SeatState = "starting"
        self.error = ""
        self.running = 0  # requests; the engine counts them
        self.replica: VllmReplica | None = None
        self.server: VllmServer | None = None
        self._engine = engine
        self._options = options
        self._url = url
        self._restarts = 0
        self._loaded: Mapping[str, str] | None = None  # checksums of the model it holds; None: not known
        self._adapters: set[int] = set()  # versions that it has loaded
        self._staged: tuple[PublishedTensors, Mapping[str, str]] | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._closing = False

    def status(self) -> ReplicaStatus:
        version = self.replica.version if self.replica is not None else -1
        where = self._url or "started here"
        return ReplicaStatus(self.name, where, self.state, version, self.running, self._restarts, self.error)

    # ---------------------------------------------------------------------------------------------------- filling

    async def fill(self) -> None:
        """Gets a server that has the engine's version, and serves. Raises InputError, EngineError, EngineDiedError."""
        self.state = "starting"
        replica = await self._server()
        facts = await replica.facts()
        engine = self._engine
        facts.check(
            self.name, backend=BACKEND, dtype=engine.dtype, max_context=engine.max_context,
            max_lora_rank=engine.max_lora_rank,
        )  # fmt: skip
        current = -1
        if self._options is not None:  # it has loaded the model's folder itself
            await replica.begin(0)
            self._loaded, current = await asyncio.to_thread(_folder_checksums, engine.model_folder), 0
        while current != engine.serves()[0] or not engine.going.is_set():
            if not engine.going.is_set():
                await engine.going.wait()
                continue
            current, path = engine.serves()
            await self._bring(replica, current, path, facts.model)
            await self._check_probe()
        self.state, self.error, self._staged = "serving", "", None
        _log.info("%s serves version %d", self.name, replica.version)
        engine.seat_changed(self)
        self._spawn(self._watch(replica))

    async def _server(self) -> VllmReplica:
        run = self._engine.run
        if self._options is None:
            replica = self.replica = VllmReplica(self.name, run, url=self._url)
            if not await replica.answers():
                raise EngineDiedError(f"no vLLM server answers at {self._url}")
            return replica
        self.server = await VllmServer.start(self._engine.model_folder, self._options)
        replica = self.replica = VllmReplica(self.name, run, socket=self.server.socket)
        await until_answering(self.server, replica.answers, self._options.start_s, _PROBE_S)
        return replica

    async def _bring(self, replica: VllmReplica, version: int, path: Path | None, model: str) -> None:
        """Loads what the engine serves into a server that serves nobody yet."""
        folder = self._engine.model_folder
        if path is None:
            path = folder / "model.safetensors"
            if not path.is_file():  # in shards, which are not published files: it must have loaded them itself
                if Path(model).resolve() != folder.resolve():
                    raise InputError(f"{self.name} serves {model}, and this run {folder}; start it with that model")
                await replica.begin(version)
                return
        published = await asyncio.to_thread(PublishedTensors.read, path.absolute())
        await self.stage(version, published)
        await replica.pause("abort")
        await self.load(version, published)
        await replica.resume()

    # ---------------------------------------------------------------------------------------------------- serving

    async def stage(self, version: int, published: PublishedTensors) -> None:
        """Has the server compare what it will load, or load an adapter beside the one it serves, while it samples."""
        assert self.replica is not None
        self._staged = None
        if published.adapter_config is None:
            names = published.changed(self._loaded)
            await self.replica.stage(published, names)
        else:
            names = {}
            for named in self._adapters - self._engine.named():
                await self.replica.forget_adapter(named)
                self._adapters.discard(named)
            await self.replica.stage_adapter(version, self._engine.adapter_folder(version, published))
            self._adapters.add(version)
        self._staged = published, names

    async def load(self, version: int, published: PublishedTensors) -> int:
        """Serves `published` as `version`; only while paused. Returns how many bytes the server had to load."""
        assert self.replica is not None
        if self._staged is None or self._staged[0] is not published:  # it came to serve after the others had staged
            await self.stage(version, published)
        assert self._staged is not None
        names, self._staged = self._staged[1], None
        if published.adapter_config is not None:
            await self.replica.load_adapter(version)
            return sum(published.sizes.values())
        self._loaded = None
        await self.replica.load(version, names)
        self._loaded = published.checksums
        return sum(published.sizes[name] for name in names)

    async def off(self, probe: Probe) -> float:
        """The largest difference between the server's logprobs and the trainer's. Not while it is paused."""
        assert self.replica is not None
        scored = await self.replica.score(probe.token_ids)
        return float(np.abs(np.subtract(scored, probe.logprobs)).max())  # nan, where there is one

    async def _check_probe(self) -> None:
        """Raises EngineError where the server has the weights and computes something else."""
        probe = self._engine.probe()
        if probe is not None and not (off := await self.off(probe)) <= probe.tolerance:
            raise EngineError(
                f"its logprobs are off by {off:.2g} with the weights of version {self.status().policy_version}"
            )

    async def pause(self, mode: PauseMode) -> None:
        assert self.replica is not None
        await self.replica.pause(mode)

    async def resume(self) -> None:
        assert self.replica is not None
        await self.replica.resume()

    async def is_alive(self) -> bool:
        """Whether the server still answers, or has ended since a request failed on it."""
        if self.replica is None or (self.server is not None and self.server.ended.done()):
            return False
        return await self.replica.answers()

    async def _watch(self, replica: VllmReplica) -> None:
        silent = 0
        while self.state == "serving" and self.replica is replica:
            if self.server is not None:
                await asyncio.wait((self.server.ended,), timeout=_LOOK_S)
                if self.server is not None and self.server.ended.done():
                    self.lose(self.server.ended.result())
                    return
            else:
                await asyncio.sleep(_LOOK_S)
            if self.state != "serving" or self.replica is not replica:
                return
            silent = 0 if await replica.answers() else silent + 1
            if silent >= 2 and self.replica is replica:
                self.lose(f"{self.name} does not answer")

    # ---------------------------------------------------------------------------------------------------- leaving

    def lose(self, why: str) -> None:
        """Takes the server out, for good; the seat is filled again in the background."""
        if self.state != "serving" or self._closing:
            return
        self.state, self.error, self._loaded, self._staged = "lost", why, None, None
        said = f"; it said last:\n{self.server.tail()}" if self.server is not None and "last words" not in why else ""
        _log.warning("%s is taken out: %s%s", self.name, why, said)
        self._engine.seat_changed(self)
        self._spawn(self._refill())

    async def _refill(self) -> None:
        attempt = 0
        while not self._closing:
            await self._empty()
            await asyncio.sleep(_BACKOFF_S[min(attempt, len(_BACKOFF_S) - 1)])
            attempt += 1
            try:
                await self.fill()
            except AgentGymError as error:
                self.state, self.error = "lost", str(error)
                _log.warning("%s does not come back (attempt %d): %s", self.name, attempt, error)
            else:
                self._restarts += 1
                return

    async def _empty(self) -> None:
        self._adapters.clear()
        replica, self.replica = self.replica, None
        server, self.server = self.server, None
        if replica is not None:
            await replica.close()
        if server is not None:
            await server.close()

    async def close(self) -> None:
        """Ends the server if it was started here; one that ran before goes on, with the weights it has."""
        self._closing = True
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._empty()

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _folder_checksums(folder: Path) -> Mapping[str, str] | None:
    """Of what a server has loaded from the model's folder, where that is one file."""
    try:
        return PublishedTensors.read(folder / "model.safetensors").checksums
    except EngineError:
        return None
