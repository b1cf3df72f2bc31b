"""Where environments get boxes from. Law: a box is handed out once, after it answered, and never again; what was used
is thrown away. A box that cannot be had is the infrastructure's failure, typed, and never looks like the policy's.

`box_source("docker")` starts a box when it is asked for; a `SandboxPool` over it holds some of each spec ready, started
in the background by few threads (a Docker daemon starts about five a second, however many ask at once).
"""

from __future__ import annotations

import dataclasses
import logging
import os
import statistics
import threading
import time
from collections import deque
from collections.abc import Hashable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from agentgym.errors import AgentGymError, InputError, SandboxDiedError, SandboxError
from agentgym.sandbox.box import checked_timeout
from agentgym.sandbox.choose import choose_tier, open_sandbox
from agentgym.sandbox.spec import Sandbox, SandboxSpec, Tier
from agentgym.sandbox.warm.pooled_box import PooledBox
from agentgym.sandbox.warm.shelf import Shelf, spec_key

if TYPE_CHECKING:
    from agentgym.sandbox.docker.host import DockerHost

logger = logging.getLogger(__name__)

KEPT_SPECS = 8  # of more different specs, only those asked for last are kept warm
IDLE_S = 300.0  # a spec that nobody asked for in so long is not kept warm
ANSWER_S = 2.0  # a warm box does nothing else; one that takes longer to say that it is there counts as dead
BACKLOG = 32  # used boxes that wait for their end; whoever closes one more ends it himself
RECENT = 256  # starts that the median is of


class BoxSource(Protocol):
    """Gives boxes; whoever got one closes it. Thread-safe."""

    @property
    def tier(self) -> str: ...

    def open(self, spec: SandboxSpec | None = None) -> Sandbox:
        """A running box that nothing has run in. Raises SandboxError and its kin, UnavailableError."""
        ...

    def prefetch(self, spec: SandboxSpec) -> None:
        """Says that boxes of this spec will be asked for."""
        ...


class ColdBoxes:
    """Starts each box when it is asked for. Got by `box_source`."""

    def __init__(self, tier: Tier | str, host: DockerHost | None = None) -> None:
        self.tier = choose_tier(tier, host=host)
        self._host = host

    def open(self, spec: SandboxSpec | None = None) -> Sandbox:
        return open_sandbox(self.tier, spec, host=self._host)

    def prefetch(self, spec: SandboxSpec) -> None:
        pass


def box_source(tier: Tier | BoxSource, host: DockerHost | None = None) -> BoxSource:
    """What an environment's argument `sandbox` means: a tier's name, or a source that is there already. Raises
    UnavailableError if the tier is not on this machine."""
    return ColdBoxes(tier, host) if isinstance(tier, str) else tier


@dataclass(frozen=True, slots=True)
class PoolMetrics:
    """What a pool holds and did. A hit is a box that was ready when it was asked for.

    Example: `PoolMetrics(warm=4, starting=1, in_use=16, ending=2, hits=90, misses=10, ended=82, dead_at_handout=0,
    failed_starts=0, start_p50_s=0.31)`.
    """

    warm: int
    starting: int
    in_use: int
    ending: int  # used, and not gone yet
    hits: int
    misses: int
    ended: int
    dead_at_handout: int
    failed_starts: int
    start_p50_s: float  # of the last starts; 0 before the first

    @property
    def hit_rate(self) -> float:
        """0 before the first box was handed out."""
        return self.hits / max(self.hits + self.misses, 1)

    def named(self) -> dict[str, float]:
        """As a step's metrics."""
        values = dataclasses.asdict(self) | {"hit_rate": self.hit_rate}
        return {f"sandbox_{name}": float(value) for name, value in values.items()}


class SandboxPool:
    """Warm boxes. Implements BoxSource.

    Example: `with SandboxPool("docker", warm=4) as pool: box = pool.open(SandboxSpec(memory_mb=256))`. `warm` boxes of
    each spec are held ready, `starters` are started at once; `source` may be a tier or another source. `answer_s` is
    what a box may take to answer when it is handed out: raise it on a machine that stands still for seconds.
    """

    def __init__(
        self,
        source: Tier | BoxSource,
        *,
        warm: int = 4,
        starters: int = 2,
        host: DockerHost | None = None,
        idle_s: float = IDLE_S,
        answer_s: float = ANSWER_S,
    ) -> None:
        for name, value, least in (("warm", warm, 0), ("starters", starters, 1)):
            if value < least:
                raise InputError(f"sandbox.{name} must be >= {least}, got {value}")
        checked_timeout(answer_s)
        self._source = box_source(source, host)
        self._warm, self._starters, self._idle_s, self._answer_s = warm, starters, idle_s, answer_s
        self._changed = threading.Condition()
        self._shelves: dict[Hashable, Shelf] = {}
        self._in_use: set[PooledBox] = set()
        self._used: deque[Sandbox] = deque()
        self._ending = 0  # boxes whose end is under way; those in _used come on top
        self._hits = self._misses = self._ended = self._dead = self._failed = 0
        self._start_s: deque[float] = deque(maxlen=RECENT)
        self._threads: dict[str, threading.Thread] = {}
        self._closed = False
        self._pid = os.getpid()

    @property
    def tier(self) -> str:
        return self._source.tier

    def open(self, spec: SandboxSpec | None = None) -> Sandbox:
        """A box that answered just now. Waits for one to be started if none is ready; raises what kept it from it."""
        spec = spec or SandboxSpec()
        self._check_process()
        was_ready = True
        while True:
            box, had_to_wait = self._take(spec)
            was_ready = was_ready and not had_to_wait
            try:
                box.ping(timeout_s=self._answer_s)
            except (SandboxError, OSError) as error:
                box.close()
                with self._changed:
                    self._check_open()
                    self._dead += 1
                logger.warning("a warm sandbox was dead when it was asked for, another one is taken: %s", error)
            else:
                with self._changed:
                    self._hits += was_ready
                    self._misses += not was_ready
                return box

    def prefetch(self, spec: SandboxSpec) -> None:
        self._check_process()
        with self._changed:
            self._shelf(spec)
            self._wake()

    def metrics(self) -> PoolMetrics:
        with self._changed:
            return PoolMetrics(
                warm=sum(len(shelf.warm) for shelf in self._shelves.values()),
                starting=sum(shelf.starting for shelf in self._shelves.values()),
                in_use=len(self._in_use),
                ending=len(self._used) + self._ending,
                hits=self._hits,
                misses=self._misses,
                ended=self._ended,
                dead_at_handout=self._dead,
                failed_starts=self._failed,
                start_p50_s=statistics.median(self._start_s) if self._start_s else 0.0,
            )

    def close(self) -> None:
        """Ends all boxes, those in use too; returns when nothing is left. Idempotent."""
        if os.getpid() != self._pid:
            return  # a forked child: the boxes are its parent's
        with self._changed:
            self._closed = True
            in_use, threads = list(self._in_use), list(self._threads.values())
            for shelf in self._shelves.values():
                self._used.extend(shelf.warm)
                shelf.warm.clear()
            self._changed.notify_all()
        for box in in_use:
            box.close()
        for thread in threads:
            thread.join()
        while self._end_one():  # what a starter brought when the others had gone
            pass
        with self._changed:
            self._changed.wait_for(lambda: not self._ending)

    def __enter__(self) -> SandboxPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ------------------------------------------------------------------------------------------------ handing out

    def _take(self, spec: SandboxSpec) -> tuple[PooledBox, bool]:
        """A box off the shelf, and whether it had to be waited for."""
        with self._changed:
            shelf = self._shelf(spec)
            waited = not shelf.warm
            shelf.waiting += 1
            try:
                while True:
                    self._check_open()
                    if shelf.warm:
                        box = PooledBox(shelf.warm.popleft(), self._give_back, self._adopt)
                        self._in_use.add(box)
                        return box, waited
                    if shelf.failure is not None:
                        raise shelf.told()
                    self._wake()
                    self._changed.wait()
            finally:
                shelf.waiting -= 1
                self._wake()  # a place on the shelf is free

    def _give_back(self, pooled: PooledBox, box: Sandbox) -> None:
        """Ends a used box, in the background unless too many wait for that already."""
        if os.getpid() != self._pid:
            return  # a forked child: the box is its parent's
        with self._changed:
            self._in_use.discard(pooled)
            self._used.append(box)
            if not self._closed and len(self._used) <= BACKLOG:
                self._wake()
                return
        self._end_one()

    def _adopt(self, box: Sandbox) -> PooledBox:
        """A fork of a box in use is in use, too."""
        pooled = PooledBox(box, self._give_back, self._adopt)
        with self._changed:
            is_late = self._closed
            self._in_use.add(pooled)
        if is_late:
            pooled.close()
        return pooled

    def _shelf(self, spec: SandboxSpec) -> Shelf:
        """Call with the lock held."""
        self._check_open()
        key = spec_key(spec)
        now = time.monotonic()
        shelf = self._shelves.get(key)
        if shelf is None:
            shelf = self._shelves[key] = Shelf(spec, now)
        shelf.asked = now
        return shelf

    def _check_open(self) -> None:
        if self._closed:
            raise SandboxDiedError("the pool of sandboxes was closed")

    def _check_process(self) -> None:
        if os.getpid() != self._pid:
            raise SandboxError("a pool of sandboxes is of use only in the process that made it")

    # ---------------------------------------------------------------------------------------------- the background

    def _wake(self) -> None:
        """Lets the threads look for work; starts those that are not there. Call with the lock held."""
        for index in range(0 if self._closed else self._starters):
            for kind, work in (("start", self._start_boxes), ("end", self._end_boxes)):
                name = f"sandbox-{kind}-{index}"
                if name not in self._threads:
                    self._threads[name] = threading.Thread(target=work, name=name, daemon=True)
                    self._threads[name].start()
        self._changed.notify_all()

    def _start_boxes(self) -> None:
        while True:
            with self._changed:
                while (shelf := self._next_start()) is None and not self._closed:
                    self._changed.wait(self._pause_s())
                if shelf is None or self._closed:
                    return
                shelf.starting += 1
            began = time.monotonic()
            box, failure = None, None
            try:
                box = self._source.open(shelf.spec)
            except AgentGymError as error:
                failure = error
            except BaseException as error:  # a bug; whoever waits for this box must hear of it
                failure = SandboxError(f"a sandbox could not be started: {type(error).__name__}: {error}")
                with self._changed:
                    self._threads.pop(threading.current_thread().name)  # another one takes its place
                raise
            finally:
                self._started(shelf, box, failure, time.monotonic() - began)

    def _started(self, shelf: Shelf, box: Sandbox | None, failure: AgentGymError | None, seconds: float) -> None:
        with self._changed:
            shelf.starting -= 1
            if box is not None:
                shelf.succeeded()
                self._start_s.append(seconds)
                (self._used if self._closed else shelf.warm).append(box)
            elif failure is not None:
                self._failed += 1
                shelf.failed(failure)
                logger.warning("a sandbox could not be started (%d in a row): %s", shelf.failures, failure)
            self._changed.notify_all()

    def _next_start(self) -> Shelf | None:
        """What is missing most: a box that is waited for, then one to be held ready. Call with the lock held."""
        if self._closed:
            return None
        now = time.monotonic()
        self._drop_idle(now)
        recent = sorted(self._shelves.values(), key=lambda shelf: -shelf.asked)
        ready = [shelf for shelf in recent if shelf.retry_at <= now]
        # one try at a time while they fail
        ready = [shelf for shelf in ready if not (shelf.failures and shelf.starting)]
        for shelf in sorted(ready, key=lambda shelf: shelf.asked):
            is_to_be_told = shelf.is_refused and shelf.failure is not None  # to all that wait
            if shelf.waiting > shelf.starting + len(shelf.warm) and not is_to_be_told:
                return shelf
        for shelf in ready:
            is_kept = shelf in recent[:KEPT_SPECS] and not shelf.is_refused
            if is_kept and shelf.starting + len(shelf.warm) < shelf.waiting + self._warm:
                return shelf
        return None

    def _drop_idle(self, now: float) -> None:
        """Ends the warm boxes of specs that nobody asks for any more. Call with the lock held."""
        recent = sorted(self._shelves.items(), key=lambda entry: -entry[1].asked)
        for rank, (key, shelf) in enumerate(recent):
            if shelf.waiting or shelf.starting or (rank < KEPT_SPECS and now - shelf.asked < self._idle_s):
                continue
            del self._shelves[key]
            if shelf.warm:
                self._used.extend(shelf.warm)
                self._changed.notify_all()

    def _pause_s(self) -> float:
        """How long there is surely nothing to start. Call with the lock held."""
        now = time.monotonic()
        idle = [shelf for shelf in self._shelves.values() if not shelf.waiting and not shelf.starting]
        times = [shelf.asked + self._idle_s for shelf in idle]
        times += [shelf.retry_at for shelf in self._shelves.values() if shelf.retry_at > now]
        return max(0.01, min([60.0, *(moment - now for moment in times)]))

    def _end_boxes(self) -> None:
        while True:
            with self._changed:
                while not self._used and not self._closed:
                    self._changed.wait()
                if not self._used:
                    return
            self._end_one()

    def _end_one(self) -> bool:
        """Ends a used box; False if there is none."""
        with self._changed:
            if not self._used:
                return False
            box = self._used.popleft()
            self._ending += 1
        try:
            box.close()
        except (AgentGymError, OSError) as error:
            logger.warning("a used sandbox could not be taken away; its lease will end it: %s", error)
        finally:
            with self._changed:
                self._ending -= 1
                self._ended += 1
                self._changed.notify_all()
        return True
