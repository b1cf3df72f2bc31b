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
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np
import torch

from agentgym.engine.protocol import EngineStats, WeightUpdate
from agentgym.engine.torch_engine_batch import Outcome, SlotBatch, Work
from agentgym.engine.torch_engine_weights import checked_dtype, load_weights, read_model
from agentgym.errors import AgentGymError, EngineDiedError, EngineError, InputError, PromptTooLongError, VersionError
from agentgym.policy import SamplingParams, Segment

_Reply = tuple["asyncio.AbstractEventLoop", "asyncio.Future[Any]"]


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
        self.policy_version = 0
        self._threads = threads
        self._batch = SlotBatch(read_model(Path(model_folder), checked_dtype(dtype)), slots, max_context)
        with torch.inference_mode():
            self._batch.prove()
        self._inbox: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._replies: dict[Work, _Reply] = {}
        self._outbox: list[tuple[_Reply, Any]] = []
        self._paused = False
        self._ending: EngineDiedError | None = None  # once set, nothing more enters the inbox
        self._posting = threading.Lock()
        self._busy_s = 0.0
        self._thread = threading.Thread(target=self._serve, name="agentgym-torch-engine", daemon=True)
        self._thread.start()

    # ------------------------------------------------------------------------------------ called from event loops

    async def sample(self, prompt_ids: Sequence[int], params: SamplingParams) -> Segment:
        """As Engine.sample."""
        prompt = np.array(prompt_ids, dtype=np.int64)
        self._check(prompt, params)
        work = Work(prompt, params, secrets.randbits(64) if params.seed is None else params.seed)
        reply = self._reply()
        self._post(lambda: self._begin(work, reply))
        try:
            return await reply[1]
        except asyncio.CancelledError:
            work.cancelled = True
            raise

    async def pause(self) -> None:
        """As Engine.pause."""
        await self._command(self._do_pause)

    async def load(self, update: WeightUpdate) -> None:
        """As Engine.load."""
        await self._command(lambda: self._do_load(update))

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
        if self._ending is None:
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

    async def _command(self, action: Callable[[], None]) -> None:
        reply = self._reply()

        def run() -> None:
            try:
                if self._ending is not None:
                    raise EngineDiedError(str(self._ending))
                action()
            except AgentGymError as error:
                self._outbox.append((reply, error))
            else:
                self._outbox.append((reply, None))

        self._post(run)
        await reply[1]

    # ------------------------------------------------------------------------------------------- in the one thread

    def _serve(self) -> None:
        torch.set_num_threads(self._threads)
        try:
            with torch.inference_mode():
                while self._ending is None:
                    self._take_messages()
                    if not self._batch.idle and self._ending is None:
                        start = time.perf_counter()
                        self._settle(self._batch.step())
                        self._busy_s += time.perf_counter() - start
                    self._deliver()
        except Exception as error:  # noqa: BLE001  the thread's last words must reach those who wait
            self._end(EngineDiedError(f"the torch engine failed: {type(error).__name__}: {error}"))
            self._deliver()

    def _take_messages(self) -> None:
        """Runs what has arrived; waits for something to arrive where there is nothing to compute."""
        if self._batch.idle:
            self._inbox.get()()
        while self._ending is None and not self._inbox.empty():
            self._inbox.get()()

    def _begin(self, work: Work, reply: _Reply) -> None:
        if work.cancelled:
            return
        self._replies[work] = reply
        if self._paused:
            self._settle([(work, "abort")])
        else:
            self._batch.waiting.append(work)

    def _do_pause(self) -> None:
        self._paused = True
        self._settle(self._batch.interrupt())

    def _do_resume(self) -> None:
        self._paused = False

    def _do_load(self, update: WeightUpdate) -> None:
        if not self._paused:
            raise EngineError("weights can be loaded only while the engine is paused")
        if update.version <= self.policy_version:
            raise VersionError(
                f"version {update.version} cannot be loaded: the engine serves {self.policy_version}, and versions "
                "only go up"
            )
        load_weights(self._batch.model, update.path)
        self._batch.forget()
        self.policy_version = update.version

    def _settle(self, outcomes: Sequence[Outcome]) -> None:
        version = self.policy_version
        for work, outcome in outcomes:
            reply = self._replies.pop(work)
            if isinstance(outcome, EngineError):
                result: Segment | EngineError = EngineError(f"{outcome} (policy version {version})")
            else:
                result = Segment(tuple(work.token_ids), tuple(work.logprobs), version, version, outcome)
            self._outbox.append((reply, result))

    def _end(self, error: EngineDiedError) -> None:
        """The last act: everybody who waits, or has written into the inbox meanwhile, gets `error`."""
        with self._posting:
            self._ending = error
        while not self._inbox.empty():
            self._inbox.get()()
        self._batch.interrupt()
        for reply in self._replies.values():
            self._outbox.append((reply, EngineDiedError(str(error))))
        self._replies.clear()

    def _deliver(self) -> None:
        """Hands results to their event loops, all of one loop in one call."""
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[asyncio.Future[Any], Any]]] = {}
        for (loop, future), result in self._outbox:
            by_loop.setdefault(loop, []).append((future, result))
        self._outbox.clear()
        for loop, results in by_loop.items():
            if not loop.is_closed():
                loop.call_soon_threadsafe(_resolve, results)


def _resolve(results: Sequence[tuple[asyncio.Future[Any], Any]]) -> None:
    for future, result in results:
        if future.done():
            continue
        if isinstance(result, BaseException):
            future.set_exception(result)
        else:
            future.set_result(result)
