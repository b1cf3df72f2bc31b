"""A replica's place in the engine: filled with a server, lost, filled again. Law: it serves only once its server has
the engine's version, and a server that nobody can vouch for is never used again as it is.

Own servers are started and restarted; running ones elsewhere are taken over, and waited for when they go away.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine, Mapping
from contextvars import Context
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from agentgym.engine.protocol import PauseMode, Probe
from agentgym.engine.vllm.carrier import Carrier, Sender, SenderOptions
from agentgym.engine.vllm.replica import VllmReplica
from agentgym.engine.vllm.server import BACKEND, VllmServer, VllmServerOptions, until_answering
from agentgym.engine.vllm.weights import PublishedTensors
from agentgym.errors import AgentGymError, EngineDiedError, EngineError, InputError

SeatState = Literal["starting", "serving", "lost"]

_PROBE_S = 0.25
_SCORED_ONE_BY_ONE = 16  # positions of a probe
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
    shape: Mapping[str, Any]  # of the model: what its config.json says
    senders: SenderOptions | None  # None: servers map published files themselves
    going: asyncio.Event  # set while the engine is not paused

    def check_folder(self) -> None:
        """Raises InputError where the model's folder holds something else than when the engine began."""
        ...

    def serves(self) -> tuple[int, Path | None]:
        """The version that a replica must have, and the file of its weights; None: those of the model's folder."""
        ...

    def probe(self) -> Probe | None:
        """What a replica must agree with before it serves that version."""
        ...

    async def base(self) -> PublishedTensors | None:
        """The weights in the model's folder; None where they are no single file."""
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


@dataclass(frozen=True, slots=True)
class _Staged:
    """What a server can load at once: `names` of `model`, and `published` itself where it is an adapter."""

    published: PublishedTensors
    model: PublishedTensors | None
    names: Mapping[str, str]

    @property
    def is_named(self) -> bool:
        """Whether requests that name it are all that changes: an adapter beside those in use, to the weights in use."""
        return self.published.adapter_config is not None and not self.names


class Seat:
    """`options` start a server here; without them `url` is a server that runs already."""

    def __init__(
        self, engine: Served, name: str, options: VllmServerOptions | None, url: str | None, index: int = 0
    ) -> None:
        self.name = name
        self._index = index
        self.state: SeatState = "starting"
        self.error = ""
        self.running = 0  # requests; the engine counts them
        self.replica: VllmReplica | None = None
        self.server: VllmServer | None = None
        self._sender: Sender | None = None
        self._engine = engine
        self._options = options
        self._url = url
        self._restarts = 0
        self._loaded: Mapping[str, str] | None = None  # checksums of the model it holds; None: not known
        self._has_lora = False  # what its server is started with
        self._adapters: dict[int, Path] = {}  # by version: those that it has loaded
        self._staged: _Staged | None = None
        self._halted = False  # the server stands still, too, in the pause under way
        self._interrupted = False  # it does not, and has no request of ours any more
        self._telling: asyncio.Task[None] | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._closing = False

    def status(self) -> ReplicaStatus:
        version = self.replica.version if self.replica is not None else -1
        where = self._url or "started here"
        return ReplicaStatus(self.name, where, self.state, version, self.running, self._restarts, self.error)

    # ---------------------------------------------------------------------------------------------------- filling

    async def fill(self) -> None:
        """Gets a server that has the engine's version, and serves. Raises InputError, EngineError, EngineDiedError."""
        self.state, self._halted, self._interrupted = "starting", False, False
        engine = self._engine
        engine.check_folder()
        replica = await self._server()
        engine.check_folder()  # a server that was started here has read it meanwhile
        facts = await replica.facts()
        senders = engine.senders
        facts.check(
            self.name, backend=senders.backend if senders else BACKEND, dtype=engine.dtype,
            max_context=engine.max_context, max_lora_rank=engine.max_lora_rank,
        )  # fmt: skip
        if senders is not None:
            self._sender = await Sender.start(senders, self._index, replica, facts.num_workers)
        await self._carrier(replica).introduce(engine.shape)
        self._has_lora = facts.has_lora
        current = -1
        if self._options is not None:  # it has loaded the model's folder itself
            await replica.begin(0)
            base = await engine.base()
            self._loaded, current = base.checksums if base is not None else None, 0
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

    def _carrier(self, replica: VllmReplica) -> Carrier:
        return self._sender or replica

    async def _bring(self, replica: VllmReplica, version: int, path: Path | None, model: str) -> None:
        """Loads what the engine serves into a server that serves nobody yet."""
        folder, base = self._engine.model_folder, await self._engine.base()
        if base is None and self._options is None and Path(model).resolve() != folder.resolve():
            raise InputError(f"{self.name} serves {model}, and this run {folder}; start it with that model")
        if path is None and base is None:  # in several files, which are not published ones: it has loaded them itself
            await replica.begin(version)
            return
        published = base if path is None else await asyncio.to_thread(PublishedTensors.read, path.absolute())
        assert published is not None
        await self.stage(version, published)
        await self.pause("abort")
        await self.load(version, published)
        await self.resume()

    # ---------------------------------------------------------------------------------------------------- serving

    async def stage(self, version: int, published: PublishedTensors) -> None:
        """Has the server compare what it will load, or load an adapter beside the one it serves, while it samples."""
        assert self.replica is not None
        self._staged = None
        if self._telling is not None:  # it would come behind the version of this one
            await asyncio.wait((self._telling,))
        if published.adapter_config is None:
            names = published.changed(self._loaded)
            await self._carrier(self.replica).stage(published, names)
            self._staged = _Staged(published, published, names)
        else:
            self._staged = await self._stage_adapter(self.replica, version, published)

    async def _stage_adapter(self, replica: VllmReplica, version: int, published: PublishedTensors) -> _Staged:
        base = await self._engine.base()
        if base is None and self._loaded is not None:
            raise EngineError(
                f"version {version} is an adapter to the model in {self._engine.model_folder}, and {self.name} has "
                "other weights by now, which it cannot replace by those of several files; start the service again"
            )
        folder, named = self._engine.adapter_folder(version, published), self._engine.named()
        for loaded in list(self._adapters):
            if loaded not in named and self._adapters[loaded] != folder:
                del self._adapters[loaded]
                await replica.forget_adapter(loaded)
        if version not in self._adapters:
            await replica.stage_adapter(version, folder)
            self._adapters[version] = folder
        names = base.changed(self._loaded) if base is not None else {}
        if base is not None and names:  # a whole model was published since
            await self._carrier(replica).stage(base, names)
        return _Staged(published, base, names)

    async def load(self, version: int, published: PublishedTensors) -> int:
        """Serves `published` as `version`; only while paused. Returns how many bytes the server had to load."""
        assert self.replica is not None
        if self._staged is None or self._staged.published is not published:  # it came to serve after the others' stage
            await self.stage(version, published)
        assert self._staged is not None
        staged, self._staged = self._staged, None
        if not (self._halted or staged.is_named or (self._interrupted and self._swaps_at_once)):
            await self.replica.pause("abort")  # the pause was for an adapter that was staged, and this is another
            self._halted = True
        loaded = 0
        if staged.model is not None and (staged.names or published.adapter_config is None):
            self._loaded = None
            await self._carrier(self.replica).load(version, staged.names)
            self._loaded = staged.model.checksums
            loaded = sum(staged.model.sizes[name] for name in staged.names)
        if published.adapter_config is not None:
            self.replica.name_adapter(version)
            if self._halted:
                await self.replica.tell_version()
            loaded += sum(published.sizes.values())
        return loaded

    async def off(self, probe: Probe) -> float:
        """The largest difference between the server's logprobs and the trainer's. Not while it is paused."""
        assert self.replica is not None
        if not self._has_lora:
            scored = await self.replica.score(probe.token_ids)
            return float(np.abs(np.subtract(scored, probe.logprobs)).max())  # nan, where there is one
        last = len(probe.token_ids) - 1
        positions = np.unique(np.linspace(1, last, min(last, _SCORED_ONE_BY_ONE)).astype(int)).tolist()
        asked = (self.replica.off_at(probe.token_ids, at, probe.logprobs[at - 1]) for at in positions)
        return float(np.max(await asyncio.gather(*asked)))

    async def _check_probe(self) -> None:
        """Raises EngineError where the server has the weights and computes something else."""
        probe = self._engine.probe()
        if probe is not None and not (off := await self.off(probe)) <= probe.tolerance:
            raise EngineError(
                f"its logprobs are off by {off:.2g} with the weights of version {self.status().policy_version}"
            )

    async def pause(self, mode: PauseMode) -> None:
        """For a new adapter no server need stand still, nor anyone wait for the end of its step: a request that is kept
        goes on under the adapter that it named. For a model it need not either, where its requests are ours, all of
        them interrupted, and its weights change in one call. A server that stands still, from an earlier pause, does
        until the end of this one."""
        assert self.replica is not None
        staged = self._staged
        if staged is None or not (staged.is_named or (mode == "abort" and self._swaps_at_once)):
            await self.replica.pause(mode)
            self._halted = True
        elif mode == "abort":
            await self.replica.interrupt()
            self._interrupted = True

    @property
    def _swaps_at_once(self) -> bool:
        """Whether nobody else has requests on the server, and no step of it can come amid a load."""
        return self._options is not None and self._sender is None

    async def resume(self) -> None:
        assert self.replica is not None
        self._interrupted = False
        if self._halted:
            await self.replica.resume()
            self._halted = False
        elif self.replica.adapted:  # between two steps, for which nobody need wait
            self._telling = self._spawn(self._tell_version(self.replica))

    async def _tell_version(self, replica: VllmReplica) -> None:
        try:
            await replica.tell_version()
        except EngineError as error:
            if self.replica is replica:
                self.lose(str(error))

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

    def lose(self, why: str, replica: VllmReplica | None = None) -> None:
        """Takes the server out, for good; the seat is filled again in the background. `replica`: only that one; whoever
        learns late that a server failed may find the next one in its place."""
        if self.state != "serving" or self._closing or replica not in (None, self.replica):
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
            except Exception as error:  # noqa: BLE001  whatever it is, the seat must not stay empty without a word
                said = str(error) if isinstance(error, AgentGymError) else f"{type(error).__name__}: {error}"
                self.state, self.error = "lost", said
                _log.warning("%s does not come back (attempt %d): %s", self.name, attempt, said)
            else:
                self._restarts += 1
                return

    async def _empty(self) -> None:
        replica, self.replica = self.replica, None
        sender, self._sender = self._sender, None
        self._adapters.clear()
        try:
            if sender is not None:  # before the server, whose end it might wait for in a collective
                await sender.close()
            if self.server is not None:
                await self.server.close()
                self.server = None  # behind that: where this is cancelled, whoever cancels closes it
        finally:
            if replica is not None:
                await replica.close()

    async def close(self) -> None:
        """Ends the server if it was started here; one that ran before goes on, with the weights it has."""
        self._closing = True
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._empty()

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work, context=Context())  # nothing of the request that happened to notice first
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task
