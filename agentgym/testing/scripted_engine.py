"""An engine whose distribution is a known function. Law: it keeps the whole engine protocol; nothing in it is a mock.

Its weights are the version number itself: the logits of the next token are a pure function of (version, prefix), so
that a test can recompute every recorded logprob. It can be told to hold after its k-th token until it is paused, which
makes "new weights after token k" exact. Must never know messages.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from agentgym.engine.noise import uniforms
from agentgym.engine.protocol import EngineStats, PauseMode, WeightUpdate
from agentgym.errors import EngineDiedError, EngineError, InputError, PromptTooLongError, VersionError
from agentgym.policy import FinishReason, OnTokens, SamplingParams, Segment

Logits = Callable[[int, Sequence[int]], np.ndarray]
"""(version, prefix ids) -> logits [V]; pure."""


def hashed_logits(vocab_size: int, *, seed: int = 0, scale: float = 1.0) -> Logits:
    """Normal logits that look random in (seed, version, prefix) and never change between runs."""

    def logits(version: int, prefix: Sequence[int]) -> np.ndarray:
        rng = np.random.default_rng([seed, version, len(prefix), *prefix])
        return scale * rng.standard_normal(vocab_size)

    return logits


def forced_logits(vocab_size: int, next_token: Callable[[Sequence[int]], int], *, margin: float = 30.0) -> Logits:
    """Logits that make `next_token(prefix)` all but certain under every version: replays chosen replies."""

    def logits(version: int, prefix: Sequence[int]) -> np.ndarray:
        values = np.zeros(vocab_size)
        values[next_token(prefix)] = margin
        return values

    return logits


def log_distribution(logits: np.ndarray, temperature: float) -> np.ndarray:
    """log softmax(logits / temperature); at temperature 0 that of temperature 1, as SamplingParams lays down."""
    scaled = np.asarray(logits, np.float64) / (temperature or 1.0)
    shifted = scaled - scaled.max()
    return shifted - np.log(np.exp(shifted).sum())


class ScriptedEngine:
    """Samples from `logits(version, prefix)`, one event-loop turn (or `latency_s()` seconds) a token.

    `script[k]` is called after the k-th token sampled over all requests; the request that sampled it then holds until
    the engine is paused. Versions in `refused` fail to load. The logits know no keys: a request that was kept over a
    load samples from the new version's, and says that its keys are older.

    Example: `ScriptedEngine(hashed_logits(8), script={5: lambda: asyncio.ensure_future(policy.publish(update))})`.
    """

    def __init__(
        self,
        logits: Logits,
        *,
        max_context: int = 512,
        policy_version: int = 0,
        latency_s: Callable[[], float] = lambda: 0.0,
        load_s: float = 0.0,
        script: Mapping[int, Callable[[], object]] | None = None,
        refused: frozenset[int] = frozenset(),
    ) -> None:
        self.max_context = max_context
        self.policy_version = policy_version
        self._logits = logits
        self._latency_s = latency_s
        self._load_s = load_s
        self._script = dict(script or {})
        self._refused = refused
        self._pausing = asyncio.Event()
        self._going = asyncio.Event()  # the opposite
        self._going.set()
        self._keeping = False  # paused with running requests held
        self._idle = asyncio.Event()
        self._idle.set()
        self._running = 0
        self._sampled = 0
        self._prefilled = 0
        self._unseeded = 0
        self._busy_s = 0.0
        self._closed = False

    async def sample(
        self, prompt_ids: Sequence[int], params: SamplingParams, on_tokens: OnTokens | None = None
    ) -> tuple[Segment, ...]:
        """As Engine.sample."""
        self._check_alive()
        if not prompt_ids:
            raise InputError("a prompt must have at least one token")
        if len(prompt_ids) + params.max_tokens > self.max_context:
            raise PromptTooLongError(
                f"a prompt of {len(prompt_ids)} tokens and max_tokens {params.max_tokens} do not fit the context of "
                f"{self.max_context}; shorten one of them"
            )
        if self._pausing.is_set():
            return (Segment((), (), self.policy_version, self.policy_version, "abort"),)
        self._running += 1
        self._idle.clear()
        try:
            return await self._run(list(prompt_ids), params, on_tokens)
        finally:
            self._running -= 1
            if not self._running:
                self._idle.set()

    async def _run(self, context: list[int], params: SamplingParams, on_tokens: OnTokens | None) -> tuple[Segment, ...]:
        version = kv_version = self.policy_version
        self._prefilled += len(context)
        segments: list[Segment] = []
        tokens: list[int] = []
        logprobs: list[float] = []
        reason: FinishReason = "length"
        draws = uniforms(self._seed_of(params), len(context), params.max_tokens)
        for draw in draws:
            await asyncio.sleep(self._latency_s())
            self._check_alive()
            while self._keeping:
                await self._going.wait()
                self._check_alive()
            if self._pausing.is_set():
                reason = "abort"
                break
            if version != self.policy_version:  # loaded while this request was kept
                if tokens:
                    segments.append(Segment(tuple(tokens), tuple(logprobs), version, kv_version, "abort"))
                    tokens, logprobs = [], []
                version = self.policy_version
            token, logprob = self._next(version, context, params.temperature, float(draw))
            tokens.append(token)
            logprobs.append(logprob)
            context.append(token)
            self._sampled += 1
            if on_tokens is not None:
                on_tokens((token,), (logprob,), version, kv_version)
            action = self._script.pop(self._sampled, None)
            if action is not None:
                action()
                await self._pausing.wait()
            if token in params.stop_token_ids:
                reason = "stop"
                break
        return (*segments, Segment(tuple(tokens), tuple(logprobs), version, kv_version, reason))

    def _next(self, version: int, context: Sequence[int], temperature: float, draw: float) -> tuple[int, float]:
        start = time.perf_counter()
        distribution = log_distribution(self._logits(version, context), temperature)
        if temperature == 0:
            token = int(distribution.argmax())
        else:
            cumulated = np.exp(distribution).cumsum()
            token = int(np.searchsorted(cumulated, draw * cumulated[-1], side="right"))
        self._busy_s += time.perf_counter() - start
        return token, float(distribution[token])

    def _seed_of(self, params: SamplingParams) -> int:
        if params.seed is not None:
            return params.seed
        self._unseeded += 1
        return 2**63 + self._unseeded

    def _check_alive(self) -> None:
        if self._closed:
            raise EngineDiedError("the scripted engine was closed")

    async def prepare(self, update: WeightUpdate) -> None:
        """As Engine.prepare; there is nothing to prepare."""
        self._check_alive()

    async def pause(self, mode: PauseMode = "abort") -> None:
        """As Engine.pause."""
        self._check_alive()
        self._keeping = mode == "keep"
        self._pausing.set()
        if self._keeping:
            self._going.clear()
        else:
            self._going.set()  # frees what an earlier pause holds
            await self._idle.wait()

    async def load(self, update: WeightUpdate) -> int:
        """As Engine.load; the file is not read, the version is the weights: eight bytes."""
        self._check_alive()
        if not self._pausing.is_set() or (self._running and not self._keeping):
            raise EngineError("weights can be loaded only while the engine is paused")
        if update.version <= self.policy_version:
            raise VersionError(f"version {update.version} is not newer than {self.policy_version}")
        await asyncio.sleep(self._load_s)
        if update.version in self._refused:
            raise EngineError(f"version {update.version} is refused by the script")
        self.policy_version = update.version
        return 8

    async def resume(self) -> None:
        """As Engine.resume."""
        self._check_alive()
        self._keeping = False
        self._pausing.clear()
        self._going.set()

    async def stats(self) -> EngineStats:
        """As Engine.stats."""
        self._check_alive()
        return EngineStats(self.policy_version, self._running, 0, self._sampled, self._prefilled, self._busy_s)

    async def close(self) -> None:
        """Ends every running request with EngineDiedError."""
        self._closed = True
        self._keeping = False
        self._pausing.set()  # frees requests that the script holds
        self._going.set()
