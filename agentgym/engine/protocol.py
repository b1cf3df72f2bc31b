"""What every inference engine is: tokens in, segments out, and new weights between two tokens. Must never know a
message or an environment."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol, runtime_checkable

from agentgym.policy import OnTokens, SamplingParams, Segment

PauseMode = Literal["abort", "keep"]
"""What becomes of running requests. "abort": each answers with what it has. "keep": each is held where it is, and goes
on at `resume`, with the keys and values that it has, under whatever weights are served then."""


@dataclass(frozen=True, slots=True)
class WeightUpdate:
    """The published weights of one version: a safetensors file that the engine can read, names as in the model.

    Example: `WeightUpdate(version=3, path=Path("runs/quickstart/versions/000003.safetensors"))`.
    """

    version: int
    path: Path


@dataclass(frozen=True, slots=True)
class Probe:
    """What the trainer computes for a few tokens with the weights that it publishes, at temperature 1.

    Example: `Probe(token_ids=(1, 7, 5), logprobs=(-0.4, -2.1), tolerance=1e-3)`.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]  # of token_ids[1:]
    tolerance: float  # the largest difference that is none


@dataclass(frozen=True, slots=True)
class EngineStats:
    """Counters since the start, for progress and metrics.

    Example: `EngineStats(policy_version=3, running=40, waiting=8, sampled_tokens=12000, prefilled_tokens=30000,
    busy_s=4.2)`.
    """

    policy_version: int
    running: int
    waiting: int
    sampled_tokens: int
    prefilled_tokens: int
    busy_s: float  # seconds spent computing


class Engine(Protocol):
    """An inference engine. Law: a segment is sampled under exactly one policy version, and says which."""

    max_context: int  # tokens, prompt and completion together

    @property
    def policy_version(self) -> int:
        """The version of the weights now served."""
        ...

    async def sample(
        self, prompt_ids: Sequence[int], params: SamplingParams, on_tokens: OnTokens | None = None
    ) -> tuple[Segment, ...]:
        """Samples until a stop token, `max_tokens`, or an interruption: one segment, and one more for each version
        that was loaded meanwhile while the request was kept.

        An interrupted request answers with what it has (possibly one empty segment) and `finish_reason="abort"`, also
        one that arrives while the engine is paused. All segments but the last say "abort". A seeded request draws from
        a stream that depends on the seed and on the position in the context, so that one resumed behind its partial
        tokens never draws the same numbers again. A cancelled call frees its place in the batch. Raises
        PromptTooLongError (prompt + max_tokens > max_context), EngineError or EngineDiedError.
        """
        ...

    async def prepare(self, update: WeightUpdate) -> None:
        """Does what can be done for `load(update)` while sampling goes on. Raises what `load` would."""
        ...

    async def pause(self, mode: PauseMode = "abort") -> None:
        """Interrupts or holds every running request and accepts no other until `resume`; idempotent. Returns when
        no token is sampled any more."""
        ...

    async def load(self, update: WeightUpdate) -> int:
        """Replaces the weights; only while paused. Returns how many bytes had to be loaded: of several servers, by the
        one that had to load most. A failed load leaves the old weights and version served.

        Raises VersionError if `update.version` is not newer than the one served, EngineError if the file does not fit.
        """
        ...

    async def resume(self) -> None: ...

    async def stats(self) -> EngineStats: ...

    async def close(self) -> None: ...


@runtime_checkable
class VerifyingEngine(Protocol):
    """An engine of several servers that somebody else wrote, which can be asked what they really compute."""

    async def verify(self, probe: Probe) -> float | None:
        """Compares the logprobs of the weights now served with the trainer's, while sampling goes on; a server that
        is further off than the tolerance is taken out. Returns the largest difference, None if nothing was there to
        compare. Raises EngineError where every server is off."""
        ...
