"""The gate between sampling and new weights. Law: a segment is sampled under exactly one policy version.

A publication has one of three modes. "abort" interrupts every running request, replaces the weights, and lets the
requests go on from behind their partial tokens: what was sampled before is prefilled again, and no token attends to
keys of another version. "wait" lets running requests end first, while no other begins. "keep" holds running requests
and lets them go on with the keys they have: cheapest, and what is sampled then is the forward of no version;
kv_versions say which tokens those are. Must never know a message, or what an engine is made of.

A pause closes the gate without a publication: running requests are interrupted, and go on when a publication comes,
when it is ended, or when its time is over, so that whoever paused may crash.
"""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

from agentgym.engine.protocol import Engine, Probe, VerifyingEngine, WeightUpdate
from agentgym.errors import EngineError, InputError, VersionError
from agentgym.policy import Completion, FinishReason, OnTokens, SamplingParams, Segment

_log = logging.getLogger(__name__)

PublishMode = Literal["abort", "wait", "keep"]

_RETRY_S = (0.0, 0.005, 0.02, 0.1)  # waits after 1, 2, ... empty answers in a row of an engine that someone else paused


@dataclass(frozen=True, slots=True)
class PublishReport:
    """What one publication cost.

    Example: `PublishReport(version=3, pause_s=0.012, total_s=0.013, mode="abort", loaded_bytes=1240064)`.
    """

    version: int
    pause_s: float  # nothing was sampled for so long
    total_s: float  # with the preparation, the probe, and the wait for other publications and ("wait") running requests
    mode: PublishMode
    loaded_bytes: int  # by the engine: less than the file holds, where only what changed has to be loaded
    ended_pause: int | None = None  # the pause that it ended; pause_s counts from its beginning
    probe_off: float | None = None  # the engine's largest difference to the probe; None: nothing was compared


@dataclass(frozen=True, slots=True)
class Publications:
    """All publications since the start, for progress and metrics.

    Example: `Publications(done=3, failed=0, pause_s=0.04, loaded_bytes=3720192, last=report)`.
    """

    done: int
    failed: int
    pause_s: float  # of all together
    loaded_bytes: int  # of all together
    last: PublishReport | None


@dataclass(frozen=True, slots=True)
class Pause:
    """The pause under way. Example: `Pause(pause_id=4, since=12.5, until=42.5)`, seconds of `time.monotonic`."""

    pause_id: int
    since: float
    until: float


@dataclass(frozen=True, slots=True)
class Pauses:
    """All pauses since the start. Example: `Pauses(done=9, expired=1)`."""

    done: int
    expired: int  # of them, ended by their time limit: whoever paused did not say that it was over


@dataclass(slots=True)
class InFlight:
    """A completion that is being sampled, up to its last interruption: segments that ended."""

    session: str | None
    prompt_ids: Sequence[int]
    segments: list[Segment] = field(default_factory=list)


class _Empty:
    """The empty answers in a row that a completion got while the gate was open: somebody else paused the engine."""

    def __init__(self, report_after_s: float) -> None:
        self._report_after_s = report_after_s
        self._answers = 0
        self._since = time.monotonic()
        self._reports = 0

    async def wait(self, sampled: int) -> None:
        """Before the next try; says in the log what for."""
        await asyncio.sleep(_RETRY_S[min(self._answers, len(_RETRY_S) - 1)])
        self._answers += 1
        waited_s = time.monotonic() - self._since
        if waited_s >= self._report_after_s * (self._reports + 1):
            self._reports += 1
            _log.warning(
                "a completion interrupted after %d tokens has got no token for %.0f s: the engine is paused, and "
                "not by this gate; whoever paused it must resume it",
                sampled,
                waited_s,
            )


OnCompletion = Callable[[Sequence[int], SamplingParams, Completion], None]


class VersionedPolicy:
    """A policy whose weights change while it is sampling: an engine behind the gate.

    Example: `completion = await VersionedPolicy(engine).complete([5, 9], SamplingParams(max_tokens=8, seed=7))`.
    """

    def __init__(self, engine: Engine, *, publish_mode: PublishMode = "abort", report_after_s: float = 30.0) -> None:
        self.engine = engine
        self._publish_mode: PublishMode = publish_mode
        self._report_after_s = report_after_s  # a wait at the closed gate that lasts longer is logged
        self._published = {engine.policy_version}
        self._turn = asyncio.Lock()
        self._open = asyncio.Event()
        self._open.set()
        self._closed_for: int | None = None  # the version being published now
        self._sampling = 0  # requests in the engine
        self._drained = asyncio.Event()
        self._drained.set()
        self.publications = Publications(0, 0, 0.0, 0, None)
        self.pauses = Pauses(0, 0)
        self.on_completion: OnCompletion = lambda prompt_ids, params, completion: (
            None
        )  # told of each, before its caller
        self._in_flight: dict[int, InFlight] = {}
        self._numbers = itertools.count()
        self._pause: Pause | None = None
        self._expiry: asyncio.Task[None] | None = None

    @property
    def pause_under_way(self) -> Pause | None:
        return self._pause

    def in_flight(self) -> Iterator[InFlight]:
        """The completions being sampled now. While paused, they hold all that was sampled."""
        return iter(list(self._in_flight.values()))

    @property
    def publishing(self) -> int | None:
        """The version for which the gate is closed now."""
        return self._closed_for

    @property
    def policy_version(self) -> int:
        """The version that the next segment will be sampled under, if nothing is published before."""
        return self.engine.policy_version

    async def complete(
        self, prompt_ids: Sequence[int], params: SamplingParams, on_tokens: OnTokens | None = None
    ) -> Completion:
        """Samples a completion of `prompt_ids` [P] to its end, over as many versions as are published meanwhile.

        Raises PromptTooLongError, EngineError, EngineDiedError, or VersionError when the engine serves a version that
        was not published through this gate.
        """
        number = next(self._numbers)
        under_way = self._in_flight[number] = InFlight(params.session, prompt_ids)
        try:
            completion = await self._complete(prompt_ids, params, on_tokens, under_way.segments)
            self.on_completion(prompt_ids, params, completion)
        finally:
            del self._in_flight[number]
        return completion

    async def _complete(
        self, prompt_ids: Sequence[int], params: SamplingParams, on_tokens: OnTokens | None, segments: list[Segment]
    ) -> Completion:
        context = list(prompt_ids)
        sampled = 0
        empty = _Empty(self._report_after_s)
        while True:
            await self._pass(sampled)
            remaining = params.max_tokens - sampled
            got = await self._sample(context, dataclasses.replace(params, max_tokens=remaining), on_tokens)
            for segment in got:
                self._check(segment, segments)
                if segment.token_ids or segment.finish_reason != "abort":
                    segments.append(segment)
                    context += segment.token_ids
                    sampled += len(segment.token_ids)
            ended = _ended(got[-1], context[len(prompt_ids) :], params)
            if ended is not None:
                segments[-1] = dataclasses.replace(segments[-1], finish_reason=ended)
                return Completion.from_segments(segments)
            if any(segment.token_ids for segment in got) or not self._open.is_set():
                empty = _Empty(self._report_after_s)
            else:
                await empty.wait(sampled)

    async def _sample(
        self, context: Sequence[int], params: SamplingParams, on_tokens: OnTokens | None
    ) -> tuple[Segment, ...]:
        self._sampling += 1
        self._drained.clear()
        try:
            return await self.engine.sample(context, params, on_tokens)
        finally:
            self._sampling -= 1
            if not self._sampling:
                self._drained.set()

    async def pause(self, limit_s: float) -> Pause:
        """Interrupts all sampling until the next publication or `resume`, but at most `limit_s` from now. During a
        pause: gives it so much time from now on; the same `pause_id` then says that nothing was sampled in between.

        When it returns, `in_flight` holds every token that was sampled. Raises EngineError; then sampling goes on.
        """
        return await asyncio.shield(asyncio.ensure_future(self._begin_pause(limit_s)))

    async def _begin_pause(self, limit_s: float) -> Pause:
        if not 0.0 < limit_s < float("inf"):
            raise InputError(f"a pause needs a time limit in seconds, got {limit_s}")
        async with self._turn:
            now = time.monotonic()
            if self._pause is None:
                self._open.clear()
                try:
                    await self.engine.pause("abort")
                except EngineError:
                    self._open.set()
                    raise
                await self._drained.wait()
                self._pause = Pause(next(self._numbers), now, now)
            if self._expiry is not None:
                self._expiry.cancel()
            self._pause = dataclasses.replace(self._pause, until=time.monotonic() + limit_s)
            self._expiry = asyncio.create_task(self._expire(self._pause))
            return self._pause

    async def resume(self) -> None:
        """Ends the pause under way, if there is one. Raises EngineError."""
        async with self._turn:
            if self._pause is not None:
                await self._end_pause()

    async def _end_pause(self, expired: bool = False) -> None:
        try:
            await self.engine.resume()
        finally:  # also when the engine died: whoever waits shall learn it from the engine
            self._note_end_of_pause(expired)
            self._open.set()

    def _note_end_of_pause(self, expired: bool = False) -> None:
        self._pause = None
        self.pauses = Pauses(self.pauses.done + 1, self.pauses.expired + expired)
        if self._expiry is not None and not expired:
            self._expiry.cancel()

    async def _expire(self, pause: Pause) -> None:
        await asyncio.sleep(pause.until - time.monotonic())
        async with self._turn:
            if self._pause is pause:
                _log.warning("a pause was neither ended nor followed by a publication in time; sampling goes on")
                await self._end_pause(expired=True)

    async def publish(
        self, update: WeightUpdate, mode: PublishMode | None = None, probe: Probe | None = None
    ) -> PublishReport:
        """Serves `update` from now on; one publication at a time, in the order of the calls. `mode` is that of this
        policy where none is given. Ends a pause, in any case. An engine that can be verified is compared with `probe`
        once it samples again.

        Raises VersionError or EngineError, and then the old version goes on being served; or none, where no server of
        the engine agrees with the probe. A cancelled caller does not stop a publication half-way.
        """
        return await asyncio.shield(asyncio.ensure_future(self._counted(update, mode or self._publish_mode, probe)))

    async def _counted(self, update: WeightUpdate, mode: PublishMode, probe: Probe | None) -> PublishReport:
        try:
            report = await self._publish(update, mode, probe)
        except (VersionError, EngineError):
            before = self.publications
            self.publications = dataclasses.replace(before, failed=before.failed + 1)
            raise
        before = self.publications
        pause_s, loaded_bytes = before.pause_s + report.pause_s, before.loaded_bytes + report.loaded_bytes
        self.publications = Publications(before.done + 1, before.failed, pause_s, loaded_bytes, report)
        return report

    async def _publish(self, update: WeightUpdate, mode: PublishMode, probe: Probe | None) -> PublishReport:
        asked = time.perf_counter()
        async with self._turn:
            if update.version <= self.engine.policy_version:
                raise VersionError(
                    f"version {update.version} cannot be published: the engine serves {self.engine.policy_version}, "
                    "and versions only go up"
                )
            await self.engine.prepare(update)
            paused = self._pause
            self._closed_for = update.version
            self._open.clear()
            try:
                if mode == "wait":
                    await self._drained.wait()
                closed = time.perf_counter() - (time.monotonic() - paused.since if paused else 0.0)
                await self.engine.pause("keep" if mode == "keep" else "abort")
                try:
                    loaded_bytes = await self.engine.load(update)
                    self._published.add(update.version)
                finally:
                    await self.engine.resume()
            finally:  # also when the engine died: whoever waits shall learn it from the engine
                if paused:
                    self._note_end_of_pause()
                self._open.set()
                self._closed_for = None
            opened = time.perf_counter()
            ended = paused.pause_id if paused else None
            off = None
            if probe is not None and isinstance(self.engine, VerifyingEngine):
                off = await self.engine.verify(probe)
            pause_s, total_s = opened - closed, time.perf_counter() - asked
            return PublishReport(update.version, pause_s, total_s, mode, loaded_bytes, ended, off)

    async def _pass(self, sampled: int) -> None:
        """Waits at the closed gate, and says in the log what for."""
        waited_s = 0.0
        while not self._open.is_set():
            try:
                await asyncio.wait_for(self._open.wait(), self._report_after_s)
            except TimeoutError:
                waited_s += self._report_after_s
                _log.warning(
                    "a completion interrupted after %d tokens has waited %.0f s for version %s to be loaded",
                    sampled,
                    waited_s,
                    self._closed_for,
                )

    def _check(self, segment: Segment, before: Sequence[Segment]) -> None:
        version = segment.policy_version
        if version not in self._published:
            raise VersionError(
                f"the engine sampled under version {version}, which was not published here (last: "
                f"{max(self._published)}); publish only through the gate"
            )
        if segment.kv_version > version:
            raise VersionError(f"the engine reports keys of version {segment.kv_version} under weights of {version}")
        if before and version < before[-1].policy_version:
            raise VersionError(f"the engine went back from version {before[-1].policy_version} to {version}")


def _ended(last: Segment, sampled: Sequence[int], params: SamplingParams) -> FinishReason | None:
    """Why the completion ends with this segment, or None. An interruption may fall on the very last token."""
    if last.finish_reason != "abort":
        return last.finish_reason
    if sampled and sampled[-1] in params.stop_token_ids:
        return "stop"
    if len(sampled) >= params.max_tokens:
        return "length"
    return None
