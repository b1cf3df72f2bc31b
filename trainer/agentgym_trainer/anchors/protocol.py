"""What an anchor is: where proximal logprobs come from. Must never know the loss.

Law: proximal logprobs carry no gradient, and a token whose exact logprobs were asked for and are not there is an
error or a counted fallback, never a silent approximation.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from agentgym.errors import TrainingError
from agentgym.versions import Delta
from agentgym_trainer.batch import MicroBatch


class VersionSource(Protocol):
    """Where published weights are read back from: `agentgym.versions.VersionLog`, or a dictionary in a test."""

    def read(self, version: int) -> Mapping[str, np.ndarray]:
        """The published weights of `version` by parameter name. Raises VersionError for one that is not there."""
        ...


@runtime_checkable
class VersionChain(VersionSource, Protocol):
    """A source that also knows what changed between two versions, so that one copy can be switched in place."""

    def steps(self, start: int, stop: int) -> Iterator[Delta] | None:
        """What turns the weights of `start` into those of `stop`, in order; None where nothing connects them."""
        ...


@dataclass(frozen=True, slots=True)
class Proximal:
    """Proximal logprobs [B, T] of one micro-batch.

    `from_policy` marks tokens whose version is the weights about to be updated: there the old logprobs ARE the policy
    forward's own values before the optimizer step, and a second forward would compute the same numbers. None means
    nowhere.

    Example: a row of a stale and a fresh token: `Proximal(tensor([[-1.1, 0.0]]), tensor([[False, True]]))`.
    """

    logprobs: Tensor
    from_policy: Tensor | None

    def resolve(self, policy_logprobs: Tensor) -> Tensor:
        """The proximal logprobs [B, T], given this micro-batch's policy logprobs before the optimizer step."""
        if self.from_policy is None:
            return self.logprobs
        return torch.where(self.from_policy, policy_logprobs.detach(), self.logprobs.to(policy_logprobs.dtype))


class Resolvable(Protocol):
    """Proximal logprobs of one micro-batch: `Proximal`, or what is made of the policy's own logprobs."""

    def resolve(self, policy_logprobs: Tensor) -> Tensor:
        """The proximal logprobs [B, T], without a gradient, given this micro-batch's policy logprobs before the
        optimizer step on it."""
        ...


class Anchor(Protocol):
    """A source of proximal logprobs that follows the published weights.

    The order of a step at trainer version v: `proximal` for the batch, one or more optimizer steps, publication of
    v + 1, `published(v + 1, ...)`.
    """

    name: str

    def proximal(
        self, micro_batches: Sequence[MicroBatch], *, trainer_version: int, reuse_policy: bool
    ) -> Sequence[Resolvable]:
        """Proximal logprobs of each micro-batch (this rank's own), before the optimizer step on them.

        `reuse_policy`: the batch is used for exactly one optimizer step, so tokens scored by the trainer's present
        weights may be left to the policy forward (`Proximal.from_policy`). With more steps per batch pass False.
        """
        ...

    def published(self, version: int, *, active_fraction: float, mean_lag: float) -> None:
        """The trainer's weights have become policy version `version`. The figures are those of the step that made
        them, over all ranks (`StepMetrics.active_fraction`, `.mean_lag`)."""
        ...

    def metrics(self) -> dict[str, float]:
        """Figures of the last `proximal` call and of the anchor's state on this rank, by flat name `anchor/...`.
        Names that begin with `anchor/num_` are counts to be added over ranks; the others are equal on all."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must hold; tensors and numbers by name. Empty for anchors without a state."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


def require_finite(logprobs: Tensor, anchor: str, what: str) -> Tensor:
    """Scored logprobs as they are, or TrainingError: a nan here would end up in the ratio of every token."""
    if not bool(torch.isfinite(logprobs).all()):
        raise TrainingError(f"anchor {anchor} scored a non-finite logprob with {what}; the weights are broken")
    return logprobs
