"""The torch engine: any transformers causal LM, sampled in this process. Law: a segment has one policy version, and
every key it attended to was computed under that version.

transformers 5.19's continuous batching (ContinuousBatchingManager) runs on a CPU, returns logprobs and can be paused.
What it cannot carry: its pause keeps the KV cache over a change of weights, all requests draw from one generator, and
on a CPU one packed sequence scores every row against every other's columns (1,000 tokens/s on the tiny model).

The event loop stays free: one thread of this engine owns the model and takes requests and commands from an inbox,
between two tokens. All requests and commands may come from any event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Any, TypeVar

import numpy as np
import torch

from agentgym.engine.protocol import EngineStats, PauseMode, WeightUpdate
from agentgym.engine.torch_engine_batch import Outcome, SlotBatch, Work
from agentgym.engine.torch_engine_weights import ServedWeights, checked_dtype, read_model
from agentgym.errors import AgentGymError, EngineDiedError, EngineError, InputError, PromptTooLongError, VersionError
from agentgym.policy import FinishReason, OnTokens, SamplingParams, Segment

_Reply = tuple["asyncio.AbstractEventLoop", "asyncio.Future[Any]"]
_Act = Callable[[], object]  # what an event loop shall do
T = TypeVar("T")


class TorchEngine:
    """Serves the model in `model_folder` as version 0.

    `slots` rows are sampled at a time, others wait. `threads` compute threads; one where a trainer works beside.
    Raises InputError (no such model, context too long), UnavailableError (bfloat16 without hardware), EngineError.

    Example: `engine = TorchEngine(Path("model"), slots=64, max_context=256)`.
    """

    def __init__(
        self, model_folder: Path, *, slots: int, max_context: int, threads: int = 1, dtype: str = "float32"
    ) -> None:
        for name, value in (("slots", slots), ("max_context", max_context), ("threads", threads)):
            if value < 1:
                raise InputError(f"engine {name} must be >= 1, got {value}")
        self.max_context = max_context
        self._threads = threads
        model = read_model(Path(model_folder), checked_dtype(dtype))
        self._weights = ServedWeights(model, Path(model_folder))
        self._batch = SlotBatch(model, slots, max_context)
        with torch.inference_mode():
            self._batch.prove()
        self._inbox: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._replies: dict[Work, _Reply] = {}
        self._listeners: dict[Work, _Listener] = {}
        self._outbox: list[tuple[asyncio.AbstractEventLoop, _Act]] = []
        self._paused = False
        self._ending: EngineDiedError | None = None  # once set, nothing more enters the inbox
        self._posting = threading.Lock()
        self._busy_s = 0.0
        self._thread = threading.Thread(target=self._serve, name="agentgym-torch-engine", daemon=True)
        self._thread.start()

    @property
    def policy_version(self) -> int:
        """The version of the weights now served."""
        return self._batch.policy_version

    # ------------------------------------------------------------------------------------ called from event loops

    async def sample(
        self, prompt_ids: Sequence[int], params: SamplingParams, on_tokens: OnTokens | None = None
    ) -> tuple[Segment, ...]:
        """As Engine.sample."""
        prompt = np.array(prompt_ids, dtype=np.int64)
        self._check(prompt, params)
        work = Work(prompt, params, secrets.randbits(64) if params.seed is None else params.seed)
        reply = self._reply()
        self._post(lambda: self._begin(work, reply, on_tokens))
        try:
            return await reply[1]
        except asyncio.CancelledError:
            work.cancelled = True
            raise

    async def prepare(self, update: WeightUpdate) -> None:
        """As Engine.prepare; the file is mapped when it is loaded, and there is nothing to prepare."""

    async def pause(self, mode: PauseMode = "abort") -> None:
        """As Engine.pause."""
        await self._command(lambda: self._do_pause(mode))

    async def load(self, update: WeightUpdate) -> int:
        """As Engine.load."""
        return await self._command(lambda: self._do_load(update))

    async def resume(self) -> None:
        """As Engine.resume."""
        await self._command(self._do_resume)

    async def stats(self) -> EngineStats:
        """As Engine.stats."""
        batch = self._batch
        return EngineStats(
            policy_version=self.policy_version,
            running=len(batch.running),
            waiting=len(batch.waiting) + self._inbox.qsize(),
            sampled_tokens=batch.sampled_tokens,
            prefilled_tokens=batch.prefilled_tokens,
            busy_s=self._busy_s,
        )

    async def close(self) -> None:
        """Ends every request with EngineDiedError, and the thread; idempotent."""
        with contextlib.suppress(EngineDiedError):  # it has ended already
            self._post(lambda: self._end(EngineDiedError("the torch engine was closed")))
        await asyncio.to_thread(self._thread.join)

    def _check(self, prompt: np.ndarray, params: SamplingParams) -> None:
        if prompt.ndim != 1 or not len(prompt):
            raise InputError("a prompt must have at least one token")
        if prompt.min() < 0 or prompt.max() >= self._batch.vocab_size:
            raise InputError(f"prompt ids must be in [0, {self._batch.vocab_size}), got {prompt.min()}..{prompt.max()}")
        if len(prompt) + params.max_tokens > self.max_context:
            raise PromptTooLongError(
                f"a prompt of {len(prompt)} tokens and max_tokens {params.max_tokens} do not fit the context of "
                f"{self.max_context}; shorten one of them or raise engine.max_context"
            )

    def _reply(self) -> _Reply:
        loop = asyncio.get_running_loop()
        return loop, loop.create_future()

    def _post(self, message: Callable[[], None]) -> None:
        with self._posting:
            if self._ending is not None:
                raise EngineDiedError(str(self._ending))
            self._inbox.put(message)

    async def _command(self, action: Callable[[], T]) -> T:
        reply = self._reply()

        def run() -> None:
            try:
                if self._ending is not None:
                    raise EngineDiedError(str(self._ending))
                result = action()
            except AgentGymError as error:
                self._answer(reply, error)
            except Exception as error:
                self._answer(reply, _death(error))
                raise  # what it left behind nobody knows: the engine ends
            else:
                self._answer(reply, result)

        self._post(run)
        return await reply[1]

    # ------------------------------------------------------------------------------------------- in the one thread

    def _serve(self) -> None:
        torch.set_num_threads(self._threads)
        try:
            with torch.inference_mode():
                while self._ending is None:
                    self._take_messages()
                    if not (self._batch.idle or self._paused) and self._ending is None:
                        start = time.perf_counter()
                        self._settle(self._batch.step())
                        for listener in self._listeners.values():
                            self._tell(listener)
                        self._busy_s += time.perf_counter() - start
                    self._deliver()
        except Exception as error:  # noqa: BLE001  the thread's last words must reach those who wait
            self._end(_death(error))
            self._deliver()

    def _take_messages(self) -> None:
        """Runs what has arrived; waits for something to arrive where there is nothing to compute."""
        if self._batch.idle or self._paused:
            self._inbox.get()()
        while self._ending is None and not self._inbox.empty():
            self._inbox.get()()

    def _begin(self, work: Work, reply: _Reply, on_tokens: OnTokens | None) -> None:
        if work.cancelled:
            return
        self._replies[work] = reply
        if on_tokens is not None:
            self._listeners[work] = _Listener(work, reply, on_tokens)
        if self._paused:
            self._settle([(work, "abort")])
        else:
            self._batch.waiting.append(work)

    def _do_pause(self, mode: PauseMode) -> None:
        self._paused = True
        if mode == "abort":
            self._settle(self._batch.interrupt())

    def _do_resume(self) -> None:
        self._paused = False

    def _do_load(self, update: WeightUpdate) -> int:
        if not self._paused:
            raise EngineError("weights can be loaded only while the engine is paused")
        if update.version <= self.policy_version:
            raise VersionError(
                f"version {update.version} cannot be loaded: the engine serves {self.policy_version}, and versions "
                "only go up"
            )
        loaded_bytes = self._weights.load(update.path)
        self._batch.renew(update.version)
        return loaded_bytes

    def _settle(self, outcomes: Sequence[Outcome]) -> None:
        version = self.policy_version
        for work, outcome in outcomes:
            listener = self._listeners.pop(work, None)
            if listener is not None:
                self._tell(listener)
            if isinstance(outcome, EngineError):
                result: tuple[Segment, ...] | EngineError = EngineError(f"{outcome} (policy version {version})")
            else:
                result = _segments(work, version, outcome)
            self._answer(self._replies.pop(work), result)

    def _tell(self, listener: _Listener) -> None:
        """Hands a listener the tokens that it has not heard of."""
        work, told = listener.work, listener.told
        if len(work.token_ids) > told:
            listener.told = len(work.token_ids)
            said = (work.token_ids[told:], work.logprobs[told:], self.policy_version, work.kv_version)
            self._outbox.append((listener.reply[0], partial(_hear, listener, *said)))

    def _answer(self, reply: _Reply, result: Any) -> None:
        self._outbox.append((reply[0], partial(_resolve, reply[1], result)))

    def _end(self, error: EngineDiedError) -> None:
        """The last act: everybody who waits, or has written into the inbox meanwhile, gets `error`."""
        with self._posting:
            self._ending = error
        while not self._inbox.empty():
            self._inbox.get()()
        self._batch.interrupt()
        for reply in self._replies.values():
            self._answer(reply, EngineDiedError(str(error)))
        self._replies.clear()
        self._listeners.clear()

    def _deliver(self) -> None:
        """Hands results to their event loops, all of one loop in one call."""
        by_loop: dict[asyncio.AbstractEventLoop, list[_Act]] = {}
        for loop, act in self._outbox:
            by_loop.setdefault(loop, []).append(act)
        self._outbox.clear()
        for loop, acts in by_loop.items():
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits there any more
                loop.call_soon_threadsafe(_do, acts)


@dataclass(slots=True)
class _Listener:
    """Who wants to hear of a request's tokens as they come, and of how many it has."""

    work: Work
    reply: _Reply
    on_tokens: OnTokens
    told: int = 0


def _segments(work: Work, version: int, reason: FinishReason) -> tuple[Segment, ...]:
    """What was sampled, cut where weights were loaded while the request was kept."""
    segments: list[Segment] = []
    start = 0
    for end, policy_version, kv_version in work.spans:
        ids, logprobs = tuple(work.token_ids[start:end]), tuple(work.logprobs[start:end])
        segments.append(Segment(ids, logprobs, policy_version, kv_version, "abort"))
        start = end
    kv_version = min(work.kv_version, version) if work.token_ids or work.spans else version
    last = Segment(tuple(work.token_ids[start:]), tuple(work.logprobs[start:]), version, kv_version, reason)
    return (*segments, last)


def _death(error: Exception) -> EngineDiedError:
    return EngineDiedError(f"the torch engine failed: {type(error).__name__}: {error}")


def _do(acts: Sequence[_Act]) -> None:
    for act in acts:
        act()


def _hear(listener: _Listener, *said: Any) -> None:
    if not listener.reply[1].done():
        asyncio.get_running_loop().call_soon(listener.on_tokens, *said)  # so that what it raises stops nobody else


def _resolve(future: asyncio.Future[Any], result: Any) -> None:
    if future.done():
        return
    if isinstance(result, BaseException):
        future.set_exception(result)
    else:
        future.set_result(result)
