"""vLLM as one engine: N stock servers behind the protocol. Law: a replica serves the version of the engine, or nothing.

Requests go to the replica that has their session's keys, else to the least busy one. A replica that dies is restarted
and brought to the current version before it serves again; its requests go on elsewhere from the tokens they have. One
that fails to take new weights is treated as dead. Servers are started here (`VllmEngine.start`) or run already
(`VllmEngine.connect`). Must never know a message.
"""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from agentgym.engine.protocol import EngineStats, PauseMode, WeightUpdate
from agentgym.engine.vllm_replica import ForeignWeightsError, ReplicaLostError, ReplicaPausedError, Sampling
from agentgym.engine.vllm_seat import ReplicaStatus, Seat
from agentgym.engine.vllm_server import VllmServerOptions, python_with_vllm
from agentgym.engine.vllm_weights import PublishedTensors
from agentgym.errors import EngineDiedError, EngineError, InputError, PromptTooLongError, VersionError
from agentgym.policy import OnTokens, SamplingParams, Segment

_GRACE_S = 0.5  # what a paused server still says of the requests that it interrupted arrives within this
_SESSIONS = 100_000  # remembered
_FRUITLESS = 3  # losses in a row without a token, after which a request fails
_log = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class _Call:
    """A request at a server. `ended` says that we ended it: by a pause, or because its server is lost."""

    seat: Seat
    task: asyncio.Task[None]
    ended: Literal["cut", "lost", ""] = ""

    def end(self, why: Literal["cut", "lost"]) -> None:
        if not self.task.done():
            self.ended = why
            self.task.cancel()


class VllmEngine:
    """Make one with `await VllmEngine.start(...)` or `connect(...)`, in the event loop that uses it.

    Example: `engine = await VllmEngine.start(Path("model"), options, replicas=2)`.
    """

    def __init__(self, model_folder: Path, max_context: int, dtype: str, lost_s: float = 600.0) -> None:
        self.max_context = max_context
        self.policy_version = 0
        self.loaded_bytes = 0  # by the replica that had to load most, at the last publication
        self.run = secrets.token_hex(4)
        self.seats: list[Seat] = []
        self.model_folder = model_folder
        self.dtype = dtype
        self.going = asyncio.Event()
        self.going.set()
        self._vocab_size = _vocab_size(model_folder)
        self._lost_s = lost_s  # a request waits so long for any replica to serve again
        self._update: WeightUpdate | None = None  # what is served; None: the weights of the model's folder
        self._prepared: tuple[WeightUpdate, PublishedTensors] | None = None
        self._paused: PauseMode | None = None
        self._changed = asyncio.Event()  # set and replaced whenever a replica comes or goes, or the engine closes
        self._calls: set[_Call] = set()
        self._sessions: OrderedDict[str, Seat] = OrderedDict()
        self._sampled = 0
        self._prompted = 0
        self._busy_s = 0.0
        self._since = 0.0  # what `_busy_s` does not contain yet began then
        self._closed = False

    @classmethod
    async def start(cls, model_folder: Path, options: VllmServerOptions, *, replicas: int = 1) -> VllmEngine:
        """Starts `replicas` servers and waits until all serve. Raises InputError and its kin, EngineDiedError."""
        if replicas < 1:
            raise InputError(f"engine.replicas must be >= 1, got {replicas}")
        await python_with_vllm(options.python)
        engine = cls(model_folder, options.max_context, options.dtype)
        engine.seats = [Seat(engine, f"vllm {index}", options, None) for index in range(replicas)]
        return await engine._begin()

    @classmethod
    async def connect(
        cls, model_folder: Path, urls: Sequence[str], *, max_context: int, dtype: str = "float32"
    ) -> VllmEngine:
        """Takes over running servers, which get the weights of `model_folder`. Raises InputError for one that lacks
        what correctness needs, EngineDiedError for one that does not answer."""
        if not urls or len(set(urls)) != len(urls):
            raise InputError(f"engine.vllm_urls must be one or more different URLs, got {list(urls)}")
        engine = cls(model_folder, max_context, dtype)
        engine.seats = [Seat(engine, f"vllm at {url}", None, url) for url in urls]
        return await engine._begin()

    async def _begin(self) -> VllmEngine:
        try:
            async with asyncio.TaskGroup() as group:  # one that cannot start ends the start of all
                for seat in self.seats:
                    group.create_task(seat.fill())
        except BaseExceptionGroup as errors:
            await self.close()
            raise errors.exceptions[0] from None
        except BaseException:
            await self.close()
            raise
        return self

    # ------------------------------------------------------------------------------------------------- sampling

    async def sample(
        self, prompt_ids: Sequence[int], params: SamplingParams, on_tokens: OnTokens | None = None
    ) -> tuple[Segment, ...]:
        """As Engine.sample. A request outlives the replicas that it runs on; EngineDiedError when none comes back."""
        self._check(prompt_ids, params)
        work = Sampling(list(prompt_ids), params, on_tokens)
        fruitless = 0
        while self._paused is None:
            seat = await self._seat_for(params.session)
            if seat is None or self._paused is not None:
                break
            before = len(work.token_ids)
            try:
                await self._run(seat, work)
                break
            except ReplicaPausedError:  # somebody else paused it: the gate tries again
                break
            except ForeignWeightsError as error:
                seat.lose(str(error))
                raise
            except ReplicaLostError as error:
                fruitless = 0 if len(work.token_ids) > before else fruitless + 1
                if not await seat.is_alive():
                    seat.lose(str(error))
                if fruitless >= _FRUITLESS:
                    raise EngineDiedError(f"a request failed {fruitless} times in a row: {error}") from error
                if work.is_complete():
                    break
                _log.warning("a request goes on behind %d tokens: %s", len(work.token_ids), error)
            finally:
                self._sampled += len(work.token_ids) - before
        return work.segments(self.policy_version)

    async def _run(self, seat: Seat, work: Sampling) -> None:
        """Samples on one replica, until the request ends or is interrupted."""
        assert seat.replica is not None
        call = _Call(seat, asyncio.ensure_future(seat.replica.sample(work)))
        self._count(call, +1)
        self._prompted += len(work.prompt_ids) + len(work.token_ids)
        try:
            await asyncio.wait((call.task,))
        finally:
            self._count(call, -1)
            call.task.cancel()  # where the caller is: closing the connection frees the place in the batch
        if call.ended == "cut":
            return
        if call.ended == "lost":
            raise ReplicaLostError(f"{seat.name} was taken out: {seat.error}")
        if call.task.cancelled():
            raise EngineDiedError("the vLLM engine was closed")
        call.task.result()

    def _count(self, call: _Call, step: int) -> None:
        """A request has gone to a server, or come back; meanwhile the engine is busy."""
        now = time.monotonic()
        if self._calls:
            self._busy_s += now - self._since
        self._since = now
        (self._calls.add if step > 0 else self._calls.discard)(call)
        call.seat.running += step

    async def _seat_for(self, session: str | None) -> Seat | None:
        """A serving replica; None when the engine is paused before there is one."""
        deadline = time.monotonic() + self._lost_s
        while True:
            if self._closed:
                raise EngineDiedError("the vLLM engine was closed")
            serving = [seat for seat in self.seats if seat.state == "serving"]
            if serving:
                return self._choose(serving, session)
            if self._paused is not None:
                return None
            left = deadline - time.monotonic()
            if left <= 0:
                why = "; ".join(f"{seat.name}: {seat.error}" for seat in self.seats)
                raise EngineDiedError(f"no vLLM replica has served for {self._lost_s:.0f} s: {why}")
            try:
                await asyncio.wait_for(self._changed.wait(), left)
            except TimeoutError:
                continue

    def _choose(self, serving: Sequence[Seat], session: str | None) -> Seat:
        known = self._sessions.get(session) if session is not None else None
        if known is None or known.state != "serving":
            known = min(serving, key=lambda seat: seat.running)
        if session is not None:
            self._sessions[session] = known
            self._sessions.move_to_end(session)
            if len(self._sessions) > _SESSIONS:
                self._sessions.popitem(last=False)
        return known

    def _check(self, prompt_ids: Sequence[int], params: SamplingParams) -> None:
        if self._closed:
            raise EngineDiedError("the vLLM engine was closed")
        if not prompt_ids:
            raise InputError("a prompt must have at least one token")
        least, most = min(prompt_ids), max(prompt_ids)
        if least < 0 or most >= self._vocab_size:
            raise InputError(f"prompt ids must be in [0, {self._vocab_size}), got {least}..{most}")
        if len(prompt_ids) + params.max_tokens > self.max_context:
            raise PromptTooLongError(
                f"a prompt of {len(prompt_ids)} tokens and max_tokens {params.max_tokens} do not fit the context of "
                f"{self.max_context}; shorten one of them or raise engine.max_context"
            )

    # -------------------------------------------------------------------------------------------------- weights

    async def prepare(self, update: WeightUpdate) -> None:
        """As Engine.prepare: the file is read, and every replica has compared what it mapped with what was read."""
        self._check_newer(update)
        published = await asyncio.to_thread(PublishedTensors.read, update.path.absolute())
        serving = [seat for seat in self.seats if seat.state == "serving"]
        results = await asyncio.gather(*(seat.stage(published) for seat in serving), return_exceptions=True)
        failures = [result for result in results if isinstance(result, BaseException)]
        for seat, result in zip(serving, results, strict=True):
            if isinstance(result, ReplicaLostError):
                seat.lose(str(result))
        if failures and len(failures) == len(serving):
            raise failures[0]
        self._prepared = update, published

    async def pause(self, mode: PauseMode = "abort") -> None:
        """As Engine.pause. A replica that does not obey is taken out."""
        if self._closed:
            raise EngineDiedError("the vLLM engine was closed")
        self._paused = mode
        self.going.clear()
        serving = [seat for seat in self.seats if seat.state == "serving"]
        results = await asyncio.gather(*(seat.pause(mode) for seat in serving), return_exceptions=True)
        for seat, result in zip(serving, results, strict=True):
            if isinstance(result, BaseException):
                seat.lose(f"does not pause: {result}")
        if mode == "abort" and self._calls:
            # a request that reached its server after the pause is held there, and would go on under other weights
            calls = list(self._calls)
            await asyncio.wait([call.task for call in calls], timeout=_GRACE_S)
            for call in calls:
                call.end("cut")

    async def load(self, update: WeightUpdate) -> None:
        """As Engine.load. Replicas that fail are taken out and restarted; EngineError when every one has failed."""
        if self._paused is None:
            raise EngineError("weights can be loaded only while the engine is paused")
        if self._prepared is None or self._prepared[0] != update:
            await self.prepare(update)
        self._check_newer(update)
        assert self._prepared is not None
        published = self._prepared[1]
        serving = [seat for seat in self.seats if seat.state == "serving"]
        results = await asyncio.gather(
            *(seat.load(update.version, published) for seat in serving), return_exceptions=True
        )
        self._prepared = None
        loaded = [result for result in results if isinstance(result, int)]
        for seat, result in zip(serving, results, strict=True):
            if isinstance(result, BaseException):
                seat.lose(f"failed to load version {update.version}: {result}")
        if serving and not loaded:
            raise EngineError(f"no replica could load version {update.version}: {results[0]}")
        self.loaded_bytes = max(loaded, default=0)  # where none serves just now, each loads it before it does
        self.policy_version, self._update = update.version, update

    async def resume(self) -> None:
        """As Engine.resume."""
        serving = [seat for seat in self.seats if seat.state == "serving"]
        results = await asyncio.gather(*(seat.resume() for seat in serving), return_exceptions=True)
        for seat, result in zip(serving, results, strict=True):
            if isinstance(result, BaseException):
                seat.lose(f"does not resume: {result}")
        self._paused = None
        self.going.set()
        self._wake()

    def _check_newer(self, update: WeightUpdate) -> None:
        if update.version <= self.policy_version:
            raise VersionError(
                f"version {update.version} cannot be loaded: the engine serves {self.policy_version}, and versions "
                "only go up"
            )

    async def verify(self, token_ids: Sequence[int], logprobs: Sequence[float], tolerance: float) -> dict[str, float]:
        """Compares each replica's logprobs of `token_ids[1:]` with the trainer's, and takes out what is further off
        than `tolerance`. Not while paused. Returns the largest difference by replica."""
        differences: dict[str, float] = {}
        for seat in [seat for seat in self.seats if seat.state == "serving"]:
            assert seat.replica is not None
            scored = await seat.replica.score(token_ids)
            off = max(abs(ours - theirs) for ours, theirs in zip(scored, logprobs, strict=True))
            differences[seat.name] = off
            if not off <= tolerance:
                seat.lose(f"its logprobs are off by {off:.2g} after version {self.policy_version}")
        return differences

    # ------------------------------------------------------------------------------------------------- everybody's

    def replicas(self) -> tuple[ReplicaStatus, ...]:
        """All replicas and what they serve."""
        return tuple(seat.status() for seat in self.seats)

    def serves(self) -> tuple[int, Path | None]:
        """The version that a replica must have, and the file that has its weights (None: the model's folder)."""
        return self.policy_version, self._update.path if self._update is not None else None

    def seat_changed(self, seat: Seat) -> None:
        """A replica has come to serve, or is lost with the requests on it, which go on elsewhere."""
        if seat.state != "serving":
            for call in [call for call in self._calls if call.seat is seat]:
                call.end("lost")
        self._wake()

    def _wake(self) -> None:
        """Wakes whoever waits for a replica."""
        self._changed.set()
        self._changed = asyncio.Event()

    async def stats(self) -> EngineStats:
        """As Engine.stats; a server's queue is part of what is running."""
        running = sum(seat.running for seat in self.seats)
        return EngineStats(self.policy_version, running, 0, self._sampled, self._prompted, self._busy_s)

    async def close(self) -> None:
        """Ends servers that were started here, and every request with EngineDiedError; idempotent."""
        self._closed = True
        for call in list(self._calls):
            call.task.cancel()
        self._wake()
        await asyncio.gather(*(seat.close() for seat in self.seats))


def _vocab_size(model_folder: Path) -> int:
    """What the model's config says. Raises InputError where there is none."""
    try:
        config: dict[str, Any] = json.loads((model_folder / "config.json").read_text(encoding="utf-8"))
        return int((config.get("text_config") or config)["vocab_size"])
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise InputError(f"no model at {model_folder}: its config.json says no vocab_size ({error!r})") from error
