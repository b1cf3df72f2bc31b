"""The torch engine in a process of its own. Law: the child lives exactly as long as the socket between the two.

A parent that dies, however it dies, closes its end, and the child leaves; a child that dies fails every pending call
with its last words. The parent side imports no torch, and sampling never waits for its interpreter lock.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import itertools
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import IO, Any, cast

from agentgym import errors
from agentgym.engine.frames import (
    Cancel,
    Command,
    Counted,
    Failed,
    FrameProtocol,
    Load,
    Loaded,
    Obeyed,
    Ready,
    Sample,
    Sampled,
    ToChild,
    Tokens,
    ToParent,
)
from agentgym.engine.protocol import Engine, EngineStats, PauseMode, WeightUpdate
from agentgym.errors import AgentGymError, EngineDiedError, EngineError, UnavailableError
from agentgym.policy import OnTokens, SamplingParams, Segment

_LAST_WORDS = 2000  # bytes of the child's output that an EngineDiedError quotes
_LEAVE_S = 10.0  # a child that has not left so long after its socket closed is killed
_START = 0  # the call number of the start


class ProcessEngine:
    """A TorchEngine behind a socket; make one with `await ProcessEngine.start(...)`, in the event loop that uses it."""

    def __init__(self, process: subprocess.Popen[bytes], output: IO[bytes]) -> None:
        self.max_context = 0
        self.policy_version = 0
        self.pid = process.pid
        self._process = process
        self._output = output
        self._calls: dict[int, asyncio.Future[Any]] = {}
        self._listeners: dict[int, OnTokens] = {}
        self._numbers = itertools.count(_START + 1)
        self._death: asyncio.Task[str] | None = None
        self._closing = False
        self._wire = FrameProtocol(ToParent, self._take, self._lost)

    @classmethod
    async def start(
        cls, model_folder: Path, *, slots: int, max_context: int, threads: int = 1, dtype: str = "float32"
    ) -> ProcessEngine:
        """Starts the child and waits until its model is loaded; raises what TorchEngine raises, and EngineDiedError."""
        options = f"--slots={slots} --max-context={max_context} --threads={threads} --dtype={dtype}".split()
        ours, theirs = socket.socketpair()
        output = tempfile.TemporaryFile()  # noqa: SIM115  lives as long as the child
        with theirs:
            command = [sys.executable, "-m", "agentgym.engine.process", f"--fd={theirs.fileno()}", *options]
            process = await asyncio.to_thread(
                subprocess.Popen,
                [*command, str(model_folder)],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=os.environ | _child_environment(threads),
            )
        engine = cls(process, output)
        loop = asyncio.get_running_loop()
        started = engine._calls[_START] = loop.create_future()
        try:
            await loop.create_unix_connection(lambda: engine._wire, sock=ours)
            ready: Ready = await started
        except BaseException:
            await engine.close()
            raise
        engine.max_context = ready.max_context
        engine.policy_version = ready.policy_version
        return engine

    async def sample(
        self, prompt_ids: Sequence[int], params: SamplingParams, on_tokens: OnTokens | None = None
    ) -> tuple[Segment, ...]:
        """As Engine.sample."""
        call = next(self._numbers)
        if on_tokens is not None:
            self._listeners[call] = on_tokens
        try:
            return await self._call(Sample(call, list(prompt_ids), params, stream=on_tokens is not None))
        except asyncio.CancelledError:
            if self._death is None:
                self._wire.send(Cancel(call))
            raise
        finally:
            self._listeners.pop(call, None)

    async def prepare(self, update: WeightUpdate) -> None:
        """As Engine.prepare; the file is mapped when it is loaded, and there is nothing to prepare."""

    async def pause(self, mode: PauseMode = "abort") -> None:
        """As Engine.pause."""
        await self._call(Command(next(self._numbers), mode))

    async def load(self, update: WeightUpdate) -> int:
        """As Engine.load."""
        path = str(Path(update.path).absolute())
        loaded: Loaded = await self._call(Load(next(self._numbers), update.version, path))
        self.policy_version = loaded.policy_version
        return loaded.loaded_bytes

    async def resume(self) -> None:
        """As Engine.resume."""
        await self._call(Command(next(self._numbers), "resume"))

    async def stats(self) -> EngineStats:
        """As Engine.stats."""
        return await self._call(Command(next(self._numbers), "stats"))

    async def close(self) -> None:
        """Ends the child, and every pending call with EngineDiedError; idempotent."""
        self._closing = True
        self._wire.flush()
        self._wire.close()
        if self._death is None:
            self._death = asyncio.ensure_future(self._bury())
        await asyncio.shield(self._death)

    # ------------------------------------------------------------------------------------------------- the wire

    async def _call(self, message: Sample | Command | Load) -> Any:
        if self._death is not None:
            raise EngineDiedError(await asyncio.shield(self._death))
        future = self._calls[message.call] = asyncio.get_running_loop().create_future()
        self._wire.send(message)
        try:
            return await future
        finally:
            self._calls.pop(message.call, None)

    def _take(self, message: ToParent) -> None:
        if isinstance(message, Tokens):
            self._hear(message)
            return
        call = _START if isinstance(message, Ready) else message.call
        future = self._calls.get(call)
        if future is None or future.done():  # nobody waits any more
            return
        if isinstance(message, Failed):
            future.set_exception(_error(message))
        elif isinstance(message, Ready | Loaded):
            future.set_result(message)
        elif isinstance(message, Sampled):
            future.set_result(message.segments)
        elif isinstance(message, Counted):
            future.set_result(message.stats)
        else:
            future.set_result(message.policy_version)

    def _hear(self, message: Tokens) -> None:
        listener = self._listeners.get(message.call)
        if listener is not None:  # later, so that what it raises stops nobody else
            said = (message.token_ids, message.logprobs, message.policy_version, message.kv_version)
            asyncio.get_running_loop().call_soon(listener, *said)

    def _lost(self) -> None:
        if self._death is None:
            self._death = asyncio.ensure_future(self._bury())

    async def _bury(self) -> str:
        """Waits for the child's end and tells everybody who waits for a reply; returns why it ended."""
        code = await asyncio.to_thread(_reap, self._process)
        if self._closing:
            why = "the engine process was closed"
        else:
            ended = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
            why = f"the engine process {self.pid} {ended}; its last words: {_tail(self._output) or '(none)'}"
        self._output.close()
        for future in self._calls.values():
            if not future.done():
                future.set_exception(EngineDiedError(why))
        return why


def _child_environment(threads: int) -> dict[str, str]:
    """Set before torch is imported: threads that spin while they wait would take the trainer's core."""
    return {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "passive", "MKL_NUM_THREADS": str(threads)}


def _reap(process: subprocess.Popen[bytes]) -> int:
    try:
        return process.wait(_LEAVE_S)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()


def _tail(output: IO[bytes]) -> str:
    size = output.seek(0, os.SEEK_END)
    output.seek(max(0, size - _LAST_WORDS))
    return output.read().decode(errors="replace").strip()


def _error(message: Failed) -> AgentGymError:
    kind = getattr(errors, message.error, None)
    if isinstance(kind, type) and issubclass(kind, AgentGymError):
        return kind(message.message)
    return EngineError(f"{message.error}: {message.message}")


# ------------------------------------------------------------------------------------------------------ the child


class _Child:
    """Serves one TorchEngine to the other end of the socket, until that end is gone."""

    def __init__(self) -> None:
        self.wire = FrameProtocol(ToChild, self._take, lambda: os._exit(0))  # the law: no parent, no child
        self._engine: Engine | None = None
        self._tasks: dict[int, asyncio.Task[None]] = {}

    def serve(self, engine: Engine) -> None:
        self._engine = engine
        self.wire.send(Ready(engine.max_context, engine.policy_version))

    def _take(self, message: ToChild) -> None:
        if isinstance(message, Cancel):
            if message.call in self._tasks:
                self._tasks[message.call].cancel()
            return
        assert self._engine is not None  # the parent speaks only after Ready
        task = asyncio.ensure_future(self._answer(self._engine, message))
        self._tasks[message.call] = task
        task.add_done_callback(lambda _: self._tasks.pop(message.call, None))

    def _say(self, call: int, ids: Sequence[int], logprobs: Sequence[float], version: int, kv_version: int) -> None:
        self.wire.send(Tokens(call, list(ids), list(logprobs), version, kv_version))

    async def _answer(self, engine: Engine, message: Sample | Command | Load) -> None:
        call = message.call
        try:
            if isinstance(message, Sample):
                on_tokens = partial(self._say, call) if message.stream else None
                self.wire.send(Sampled(call, await engine.sample(message.prompt_ids, message.params, on_tokens)))
            elif isinstance(message, Load):
                loaded_bytes = await engine.load(WeightUpdate(message.version, Path(message.path)))
                self.wire.send(Loaded(call, engine.policy_version, loaded_bytes))
            elif message.name == "stats":
                self.wire.send(Counted(call, await engine.stats()))
            else:
                await (engine.resume() if message.name == "resume" else engine.pause(cast(PauseMode, message.name)))
                self.wire.send(Obeyed(call, engine.policy_version))
        except Exception as error:  # noqa: BLE001  whatever it is, the caller in the parent must not wait for ever
            self.wire.send(Failed(call, type(error).__name__, str(error)))


async def _main(fd: int, model_folder: Path, slots: int, max_context: int, threads: int, dtype: str) -> None:
    child = _Child()
    loop = asyncio.get_running_loop()
    await loop.create_unix_connection(lambda: child.wire, sock=socket.socket(fileno=fd))

    def load() -> Engine:
        try:
            from agentgym.engine.torch_engine import TorchEngine
        except ModuleNotFoundError as error:
            raise UnavailableError(f"the torch engine needs {error.name}; install agentgym-rl[train]") from error
        return TorchEngine(model_folder, slots=slots, max_context=max_context, threads=threads, dtype=dtype)

    try:
        engine = await asyncio.to_thread(load)  # in a thread, so that a parent's death is seen meanwhile
        gc.freeze()  # what is loaded stays; collections would only walk over it again
        child.serve(engine)
    except AgentGymError as error:
        child.wire.send(Failed(_START, type(error).__name__, str(error)))
    await loop.create_future()  # until the socket closes


def main() -> None:
    """`python -m agentgym.engine.process`: what ProcessEngine starts; not for people."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    parser = argparse.ArgumentParser()
    for option, kind in (("--fd", int), ("--slots", int), ("--max-context", int), ("--threads", int), ("--dtype", str)):
        parser.add_argument(option, type=kind, required=True)
    parser.add_argument("model_folder", type=Path)
    options = parser.parse_args()
    with contextlib.suppress(asyncio.CancelledError):
        asyncio.run(_main(**vars(options)))


if __name__ == "__main__":
    main()
