"""The environments that episodes run in: made on demand, used again, closed by their keeper.

Law: an environment serves one episode at a time, and one whose episode failed or was cancelled is closed, not used
again. An environment that blocks is only ever called in a thread, and nobody waits for it without a deadline.
"""

from __future__ import annotations

import asyncio
import functools
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from agentgym.env import AgentEnv, Split
from agentgym.errors import AgentGymError, EnvError

T = TypeVar("T")
CLOSE_S = 15.0
log = logging.getLogger(__name__)


class EnvironmentPool:
    """Environments of one kind. `make` builds one; `most` is how many are in use at once.

    >>> pool = EnvironmentPool(lambda: make("maze"), most=64, max_call_s=120.0)
    >>> env = await pool.acquire()
    >>> opening, _ = await pool.call("reset", env, lambda: env.reset(seed=1, options={"task": "train-1"}))
    >>> pool.release(env)
    """

    def __init__(self, make: Callable[[], AgentEnv], most: int, max_call_s: float) -> None:
        """Makes one environment, which shows whether they block. Raises what the environment raises."""
        self._make = make
        self._max_call_s = max_call_s
        first = make()
        self.blocking = first.blocking
        self.tools = tuple(first.tools)
        self._idle: list[AgentEnv] = [first]
        self._task_ids = functools.lru_cache(first.task_ids)
        self._threads = ThreadPoolExecutor(max(most, 1), "environment") if self.blocking else None

    def task_ids(self, split: Split) -> Sequence[str]:
        return self._task_ids(split)

    async def acquire(self) -> AgentEnv:
        """An environment that nobody else has; its state is that of an earlier episode until it is reset."""
        if self._idle:
            return self._idle.pop()
        if self._threads is None:
            return self._make()
        making = self._threads.submit(self._make)
        try:
            return await self._wait("make", "the environment", making, self._max_call_s)
        except BaseException:
            making.add_done_callback(_close_orphan)  # whoever asked for it is gone
            raise

    def release(self, env: AgentEnv) -> None:
        self._idle.append(env)

    async def call(self, what: str, env: AgentEnv, function: Callable[[], T]) -> T:
        """Runs a call of `env`. Raises EnvError at the deadline; the thread that hangs is then given up."""
        if self._threads is None:
            return function()
        return await self._in_thread(what, type(env).__name__, function, self._max_call_s)

    async def discard(self, env: AgentEnv) -> None:
        """Closes `env`; a failure to do so is logged, since its episode has ended for another reason already."""
        try:
            if self._threads is None:
                env.close()
            else:
                await self._in_thread("close", type(env).__name__, env.close, CLOSE_S)
        except (AgentGymError, OSError, RuntimeError, ValueError) as error:
            log.warning("closing %s: %s: %s", type(env).__name__, type(error).__name__, error)

    async def close(self) -> None:
        """Closes those that are idle; those in use are closed by the episodes that use them."""
        idle, self._idle = self._idle, []
        await asyncio.gather(*(self.discard(env) for env in idle))
        if self._threads is not None:
            self._threads.shutdown(wait=False, cancel_futures=True)

    async def _in_thread(self, what: str, name: str, function: Callable[[], T], deadline_s: float) -> T:
        assert self._threads is not None
        return await self._wait(what, name, self._threads.submit(function), deadline_s)

    async def _wait(self, what: str, name: str, call: Future[T], deadline_s: float) -> T:
        done, _ = await asyncio.wait((asyncio.wrap_future(call),), timeout=deadline_s)
        if not done:
            raise EnvError(f"{what} of {name} did not return within {deadline_s:g} s")
        return done.pop().result()


def _close_orphan(making: Future[AgentEnv]) -> None:
    if not making.cancelled() and making.exception() is None:
        making.result().close()
