"""Which replica a request runs on, and its way from one to the next. Law: a request outlives the replicas that it runs
on, and goes on behind the tokens that it has.

A request goes to the replica that has its session's keys, else to the least busy one. Must never know weights.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from agentgym.engine.vllm.replica import ForeignWeightsError, ReplicaLostError, ReplicaPausedError
from agentgym.engine.vllm.sampling import Sampling
from agentgym.engine.vllm.seat import Seat
from agentgym.errors import EngineDiedError, EngineError

_QUIET_S = 0.03  # what a paused server still says of the requests that it interrupted arrives with no longer gaps
_GRACE_S = 0.5  # and all of it within this
_SESSIONS = 100_000  # remembered
_FRUITLESS = 3  # losses in a row without a token, after which a request fails
_log = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class Call:
    """A request at a server. `ended` says that we ended it: by a pause, or because its server is lost."""

    seat: Seat
    task: asyncio.Task[None]
    version: int  # that was served when it came
    ended: Literal["cut", "lost", ""] = ""

    def end(self, why: Literal["cut", "lost"]) -> None:
        if not self.task.done():
            self.ended = why
            self.task.cancel()


class Dispatch:
    """The requests of one engine; `seats` is the engine's list. `lost_s`: a request waits so long for any replica."""

    def __init__(self, seats: Sequence[Seat], lost_s: float) -> None:
        self.paused = False
        self.closed = False
        self.calls: set[Call] = set()
        self.sampled = 0  # tokens
        self.prompted = 0
        self._seats = seats
        self._lost_s = lost_s
        self._changed = asyncio.Event()  # set and replaced whenever a replica comes or goes, or all is closed
        self._sessions: OrderedDict[str, Seat] = OrderedDict()
        self._busy_s = 0.0
        self._since = 0.0  # what `_busy_s` does not contain yet began then

    async def run(self, work: Sampling) -> None:
        """Samples until the request ends or a pause interrupts it. Raises EngineDiedError when no replica comes back,
        EngineError for a request that only ever loses its replica: the engine lives, and this episode does not."""
        fruitless = 0
        seat: Seat | None = None
        while not self.paused:
            seat = await self._seat_for(work.params.session, failed=seat)
            if seat is None or self.paused:
                return
            before, replica = len(work.token_ids), seat.replica
            try:
                await self._on(seat, work)
                return
            except ReplicaPausedError:  # somebody else paused it: the gate tries again
                return
            except ForeignWeightsError as error:
                seat.lose(str(error), replica)
                raise
            except ReplicaLostError as error:
                fruitless = 0 if len(work.token_ids) > before else fruitless + 1
                if not await seat.is_alive():
                    seat.lose(str(error), replica)
                if fruitless >= _FRUITLESS:
                    raise EngineError(f"a request failed {fruitless} times in a row: {error}") from error
                if work.is_complete():
                    return
                _log.info("a request goes on behind %d tokens: %s", len(work.token_ids), error)
            finally:
                self.sampled += len(work.token_ids) - before

    async def _on(self, seat: Seat, work: Sampling) -> None:
        """Samples on one replica, until the request ends or is interrupted."""
        assert seat.replica is not None
        call = Call(seat, asyncio.ensure_future(seat.replica.sample(work)), seat.replica.version)
        self._count(call, +1)
        self.prompted += len(work.prompt_ids) + len(work.token_ids)
        try:
            await asyncio.wait((call.task,))
        finally:
            self._count(call, -1)
            call.task.cancel()  # where the caller is: closing the connection frees the place in the batch
            work.settle()
        if call.ended == "cut":
            return
        if call.ended == "lost":
            raise ReplicaLostError(f"{seat.name} was taken out: {seat.error}")
        if call.task.cancelled():
            raise EngineDiedError("the vLLM engine was closed")
        call.task.result()

    def _count(self, call: Call, step: int) -> None:
        """A request has gone to a server, or come back; meanwhile the engine is busy."""
        now = time.monotonic()
        if self.calls:
            self._busy_s += now - self._since
        self._since = now
        (self.calls.add if step > 0 else self.calls.discard)(call)
        call.seat.running += step

    @property
    def busy_s(self) -> float:
        """Seconds in which there was a request at a server."""
        return self._busy_s

    async def _seat_for(self, session: str | None, failed: Seat | None) -> Seat | None:
        """A serving replica, another than `failed` where there is one; None when the engine is paused before there
        is any."""
        deadline = time.monotonic() + self._lost_s
        while True:
            if self.closed:
                raise EngineDiedError("the vLLM engine was closed")
            serving = [seat for seat in self._seats if seat.state == "serving"]
            if serving:
                return self._choose([seat for seat in serving if seat is not failed] or serving, session)
            if self.paused:
                return None
            left = deadline - time.monotonic()
            if left <= 0:
                why = "; ".join(f"{seat.name}: {seat.error}" for seat in self._seats)
                raise EngineDiedError(f"no vLLM replica has served for {self._lost_s:.0f} s: {why}")
            try:
                await asyncio.wait_for(self._changed.wait(), left)
            except TimeoutError:
                continue

    def _choose(self, able: Sequence[Seat], session: str | None) -> Seat:
        known = self._sessions.get(session) if session is not None else None
        if known is None or known not in able:
            known = min(able, key=lambda seat: seat.running)
        if session is not None:
            self._sessions[session] = known
            self._sessions.move_to_end(session)
            if len(self._sessions) > _SESSIONS:
                self._sessions.popitem(last=False)
        return known

    async def cut(self) -> None:
        """Ends every request, behind what its server still says of it. One that reached its server after the pause is
        held there without a word, and would go on under other weights."""
        calls = list(self.calls)
        left = {call.task for call in calls}
        deadline = time.monotonic() + _GRACE_S
        while left and time.monotonic() < deadline:
            done, left = await asyncio.wait(left, timeout=_QUIET_S, return_when=asyncio.FIRST_COMPLETED)
            if not done:
                break
        for call in calls:
            call.end("cut")

    def lose(self, seat: Seat) -> None:
        """Ends the requests on `seat`, which go on elsewhere."""
        for call in [call for call in self.calls if call.seat is seat]:
            call.end("lost")

    def wake(self) -> None:
        """Wakes whoever waits for a replica."""
        self._changed.set()
        self._changed = asyncio.Event()

    def close(self) -> None:
        self.closed = True
        for call in list(self.calls):
            call.task.cancel()
        self.wake()
