"""A request's way through servers. Law: a token that it has got is never lost, and has the version that sampled it.
Must never know HTTP, or which servers there are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from agentgym.policy import FinishReason, OnTokens, SamplingParams, Segment


@dataclass(slots=True)
class Sampling:
    """A request's way through servers: what it asked for, and what it has got.

    `labels` are (index of the first token, policy version, kv version), one entry where either changes.
    """

    prompt_ids: list[int]
    params: SamplingParams
    on_tokens: OnTokens | None
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    labels: list[tuple[int, int, int]] = field(default_factory=list)
    doubtful: int | None = None  # from this token on, labels may be those of arrival and not those of sampling
    finish_reason: FinishReason | None = None

    def add(self, token_ids: Sequence[int], logprobs: Sequence[float], version: int, kv_version: int) -> None:
        if not token_ids:
            return
        if not self.labels or self.labels[-1][1:] != (version, kv_version):
            self.labels.append((len(self.token_ids), version, kv_version))
        self.token_ids += token_ids
        self.logprobs += logprobs
        if self.on_tokens is not None:
            self.on_tokens(token_ids, logprobs, version, kv_version)

    def relabel(self, start: int, labels: Sequence[tuple[int, int, int]]) -> None:
        """Puts exact labels in the place of those of arrival, from token `start` on."""
        self.labels = [label for label in self.labels if label[0] < start] + list(labels)
        self.doubtful = None

    def settle(self) -> None:
        """The server will say no more of what it sampled: what nobody can label is sampled again, unless it was told.
        What is told comes token by token, and arrives before anything is published behind it."""
        if self.doubtful is not None and self.on_tokens is None:
            del self.token_ids[self.doubtful :], self.logprobs[self.doubtful :]
            self.relabel(self.doubtful, ())
        self.doubtful = None

    def is_complete(self) -> bool:
        """Whether nothing is left to sample, although no server has said so."""
        return len(self.token_ids) >= self.params.max_tokens or (
            bool(self.token_ids) and self.token_ids[-1] in self.params.stop_token_ids
        )

    def segments(self, version: int) -> tuple[Segment, ...]:
        """What was sampled, in the protocol's shape; `version` labels a request that got nothing."""
        reason = self.finish_reason or "abort"
        if not self.token_ids:
            return (Segment((), (), version, version, reason),)
        ends = [label[0] for label in self.labels[1:]] + [len(self.token_ids)]
        return tuple(
            Segment(
                tuple(self.token_ids[start:end]), tuple(self.logprobs[start:end]), label, kv_version,
                reason if end == len(self.token_ids) else "abort",
            )
            for (start, label, kv_version), end in zip(self.labels, ends, strict=True)
        )  # fmt: skip
