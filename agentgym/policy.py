"""What a policy is to a rollout: token ids in, a completion out. Must never know a message.

Law: every sampled token carries the logprob of the distribution it was sampled from, the policy version that sampled
it, and the oldest version among the KV entries it attended to.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from agentgym.errors import InputError

FinishReason = Literal["stop", "length", "abort"]

OnTokens = Callable[[Sequence[int], Sequence[float], int, int], None]
"""Called as tokens come: (token ids, their logprobs, policy version, kv version). It runs in the caller's event loop,
must not wait, and has been given every token of a completion, once and in order, when the completion is returned."""


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to sample one completion. `temperature=0` is greedy, and then the logprob recorded is that at temperature 1.

    Example: `SamplingParams(max_tokens=8, temperature=1.0, stop_token_ids=(2,), seed=7)`. `seed` makes the stream of
    uniform numbers of this request its own, so that what else is in the batch does not change it. `session` says whose
    request it is: an engine of several replicas sends those of one session to the same one, which has its keys.
    """

    max_tokens: int
    temperature: float = 1.0
    stop_token_ids: tuple[int, ...] = ()
    seed: int | None = None
    session: str | None = None

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise InputError(f"max_tokens must be >= 1, got {self.max_tokens}")
        if not 0.0 <= self.temperature < float("inf"):
            raise InputError(f"temperature must be finite and >= 0, got {self.temperature}")


@dataclass(frozen=True, slots=True)
class Segment:
    """One uninterrupted sample [C] under exactly one policy version, with keys no older than `kv_version`.

    `finish_reason="abort"` means interrupted: the tokens are good, and sampling can go on from behind them. A stop
    token that ended the segment is its last token.

    Example: `Segment((5, 9, 2), (-0.1, -1.2, -0.01), policy_version=3, kv_version=3, finish_reason="stop")`.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    policy_version: int
    kv_version: int  # the oldest version among the KV entries that these tokens attended to
    finish_reason: FinishReason

    def __post_init__(self) -> None:
        if len(self.token_ids) != len(self.logprobs):
            raise InputError(f"a segment has {len(self.token_ids)} tokens and {len(self.logprobs)} logprobs")


@dataclass(frozen=True, slots=True)
class Completion:
    """One model reply of C tokens, made of one or more segments; four parallel tuples.

    Example: `Completion((5, 9, 2), (-0.1, -1.2, -0.01), (3, 3, 4), (3, 3, 4), "stop")`: the weights changed before
    the last token.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    policy_versions: tuple[int, ...]
    kv_versions: tuple[int, ...]
    finish_reason: FinishReason

    def __post_init__(self) -> None:
        lengths = {len(self.token_ids), len(self.logprobs), len(self.policy_versions), len(self.kv_versions)}
        if len(lengths) != 1:
            raise InputError(f"a completion's arrays must be of one length, got {sorted(lengths)}")

    @classmethod
    def from_segments(cls, segments: Sequence[Segment]) -> Completion:
        """Joins segments in the order of sampling; the last one's finish reason is the completion's."""
        if not segments:
            raise InputError("a completion needs at least one segment")
        return cls(
            tuple(token for segment in segments for token in segment.token_ids),
            tuple(logprob for segment in segments for logprob in segment.logprobs),
            tuple(segment.policy_version for segment in segments for _ in segment.token_ids),
            tuple(segment.kv_version for segment in segments for _ in segment.token_ids),
            segments[-1].finish_reason,
        )


class Policy(Protocol):
    """Whatever can continue a prompt: the version gate over an engine, or a scripted policy."""

    async def complete(self, prompt_ids: Sequence[int], params: SamplingParams) -> Completion:
        """Samples a completion of `prompt_ids` [P]. Raises PromptTooLongError or EngineError."""
        ...
