"""What the policy's side of the loss is: from logprobs and advantages to the surrogate of every token. Must never know
how r_d is handled, a denominator, a model or a batch.

Law: a surrogate is what is maximised. Its gradient flows through `policy` alone; whatever else stands in it (a ratio
used as a weight, a bound) is a constant. Every surrogate is multiplied by the handling of r_d, token by token.

r_s = pi_theta/pi_prox is the staleness ratio, R = pi_theta/mu_old the total one. Objectives on R ignore the anchor:
they are run with anchor `behavior`, where pi_prox is mu_old and r_s is R.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from agentgym.errors import ConfigError
from agentgym_trainer.correction import clamp_log, log_ratio, over_row, stop_gradient


@dataclass(frozen=True, slots=True)
class PolicyTokens:
    """What an objective sees of every token [.., T]: zeros where not counted, a gradient in `policy` alone.

    Example: a token whose probability grew from 0.2 to 0.3 since it was sampled: policy log(0.3), behavior log(0.2).
    """

    policy: Tensor
    proximal: Tensor
    behavior: Tensor
    advantages: Tensor
    counted: Tensor  # bool


@dataclass(frozen=True, slots=True)
class Surrogate:
    """The value of every token [.., T], to be maximised, and why some have no gradient.

    Example: PPO at A = 1, r_s = 1.5: value 1.28 (a constant), clip_high True.
    """

    value: Tensor
    clip_high: Tensor  # bool: no gradient, since the ratio is too high
    clip_low: Tensor  # bool: no gradient, since it is too low
    limited: Tensor  # bool: a gradient whose weight stands at its bound


class Objective(Protocol):
    """One objective with its bounds."""

    kind: ClassVar[str]
    on_total_ratio: ClassVar[bool]  # acts on R: wants anchor `behavior`
    by_row: ClassVar[bool]  # a row's tokens are averaged, then the step's non-empty rows

    def surrogate(self, tokens: PolicyTokens) -> Surrogate: ...


@dataclass(frozen=True, slots=True)
class Ppo:
    """min(r_s A, clip(r_s, 1 - clip_low, 1 + clip_high) A): arXiv 1707.06347, the bounds of DAPO (arXiv 2503.14476).

    With `dual_clip` = c, also max(.., c A) where A < 0: a token that the old policy hardly knew cannot push without
    end (arXiv 1912.09729; 3).

    Example: `Ppo()`; at r_s = 1.5 a token of A = 1 is clipped, one of A = -1 is not.
    """

    clip_low: float = 0.2
    clip_high: float = 0.28
    dual_clip: float | None = None
    kind: ClassVar[str] = "ppo"
    on_total_ratio: ClassVar[bool] = False
    by_row: ClassVar[bool] = False

    def __post_init__(self) -> None:
        _check_clip(self.kind, self.clip_low, self.clip_high)
        if self.dual_clip is not None and not 1.0 < self.dual_clip < math.inf:
            raise ConfigError(f"dual_clip must be finite and > 1, got {self.dual_clip}")

    def surrogate(self, tokens: PolicyTokens) -> Surrogate:
        ratio = log_ratio(tokens.policy, tokens.proximal).exp()
        return _clipped(ratio, tokens.advantages, self.clip_low, self.clip_high, self.dual_clip)


@dataclass(frozen=True, slots=True)
class Gspo:
    """min(s A, clip(s, 1 - clip_low, 1 + clip_high) A) with the row's ratio s = exp(mean over the row of log r_s):
    arXiv 2507.18071. A row's value is the mean of its tokens, and non-empty rows of the whole step are averaged.

    Token by token s is sg[s] pi_theta/sg[pi_theta] (its GSPO-token): the same value, and the same gradient where the
    handling of r_d is one for the row; where it is not, a masked token has no gradient and a weight is its token's own.

    Example: `Gspo()`: s = 1.001 clips a row of A = 1.
    """

    clip_low: float = 3e-4
    clip_high: float = 4e-4
    kind: ClassVar[str] = "gspo"
    on_total_ratio: ClassVar[bool] = False
    by_row: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _check_clip(self.kind, self.clip_low, self.clip_high)

    def surrogate(self, tokens: PolicyTokens) -> Surrogate:
        row = over_row(log_ratio(tokens.policy, tokens.proximal), tokens.counted, mean=True)
        ratio = stop_gradient(clamp_log(row).exp()) * (tokens.policy - stop_gradient(tokens.policy)).exp()
        return _clipped(ratio, tokens.advantages, self.clip_low, self.clip_high, None)


@dataclass(frozen=True, slots=True)
class Cispo:
    """sg(clip(r_s, low, high)) A log pi_theta: no token loses its gradient (MiniMax-M1, arXiv 2506.13585).

    Example: `Cispo()`: at r_s = 9 the weight is 5.
    """

    low: float = 0.0
    high: float = 5.0
    kind: ClassVar[str] = "cispo"
    on_total_ratio: ClassVar[bool] = False
    by_row: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not 0.0 <= self.low < 1.0 < self.high < math.inf:
            raise ConfigError(f"cispo clips to [low, high] with 0 <= low < 1 < high, got [{self.low}, {self.high}]")

    def surrogate(self, tokens: PolicyTokens) -> Surrogate:
        ratio = stop_gradient(log_ratio(tokens.policy, tokens.proximal).exp())
        limited = (ratio < self.low) | (ratio > self.high)
        return _weighted(tokens, ratio.clamp(self.low, self.high), limited)


@dataclass(frozen=True, slots=True)
class TruncatedReinforce:
    """sg(min(R, bound)) A log pi_theta: V-trace's actor (arXiv 1802.01561), REINFORCE with truncated importance
    weights.

    Example: `TruncatedReinforce()`: at R = 3 the weight is 2.
    """

    bound: float = 2.0
    kind: ClassVar[str] = "reinforce_truncated"
    on_total_ratio: ClassVar[bool] = True
    by_row: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not 0.0 < self.bound < math.inf:
            raise ConfigError(f"the bound of reinforce_truncated must be finite and > 0, got {self.bound}")

    def surrogate(self, tokens: PolicyTokens) -> Surrogate:
        ratio = stop_gradient(log_ratio(tokens.policy, tokens.behavior).exp())
        return _weighted(tokens, ratio.clamp(max=self.bound), ratio > self.bound)


@dataclass(frozen=True, slots=True)
class Topr:
    """A log pi_theta where A > 0, sg(clip(R, 0, 1)) A log pi_theta where A <= 0: what went well is imitated whoever
    sampled it, what went badly is pushed away only as far as the policy still does it (tapered off-policy REINFORCE,
    arXiv 2503.14286).

    Example: at R = 0.1 a token of A = 1 has weight 1, one of A = -1 weight 0.1.
    """

    kind: ClassVar[str] = "topr"
    on_total_ratio: ClassVar[bool] = True
    by_row: ClassVar[bool] = False

    def surrogate(self, tokens: PolicyTokens) -> Surrogate:
        ratio = stop_gradient(log_ratio(tokens.policy, tokens.behavior).exp())
        good = tokens.advantages > 0
        return _weighted(tokens, torch.where(good, 1.0, ratio.clamp(max=1.0)), ~good & (ratio > 1.0))


@dataclass(frozen=True, slots=True)
class M2po:
    """R A, without the tokens of the largest log^2 R: as many are dropped as make the mean log^2 R of the rest fall
    below `max_second_moment` (arXiv 2510.01161).

    The rest is of a whole optimizer step over all ranks, so the step's `cut` (see `cut_of`) comes before its first
    micro-batch; None means that the call is the whole step.

    Example: `M2po()` drops log R = 1 of (0.1, 0.1, 1): the mean square of all is 0.34, of the rest 0.01.
    """

    max_second_moment: float = 0.04
    cut: float | None = None  # tokens of log^2 R at or above it are dropped
    kind: ClassVar[str] = "m2po"
    on_total_ratio: ClassVar[bool] = True
    by_row: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not 0.0 < self.max_second_moment < math.inf:
            raise ConfigError(f"the second moment of m2po must be finite and > 0, got {self.max_second_moment}")

    def cut_of(self, squares: Tensor) -> float:
        """From the log^2 R [n] of all counted tokens of the step to the least one that is dropped; inf if none is.
        Equal ones are dropped together."""
        ascending = squares.double().flatten().sort().values
        means = ascending.cumsum(0) / torch.arange(1, len(ascending) + 1, device=ascending.device)
        too_many = (means >= self.max_second_moment).nonzero()
        return float(ascending[too_many[0, 0]]) if len(too_many) else math.inf

    @staticmethod
    def squares(policy: Tensor, behavior: Tensor) -> Tensor:
        """log^2 R."""
        return stop_gradient(log_ratio(policy, behavior)) ** 2

    def surrogate(self, tokens: PolicyTokens) -> Surrogate:
        log_total = log_ratio(tokens.policy, tokens.behavior)
        squares = self.squares(tokens.policy, tokens.behavior)
        cut = self.cut_of(squares[tokens.counted]) if self.cut is None else self.cut
        dropped = tokens.counted & (squares.double() >= cut)
        value = torch.where(dropped, 0.0, log_total.exp() * tokens.advantages)
        high = stop_gradient(log_total) > 0
        return Surrogate(value, dropped & high, dropped & ~high, torch.zeros_like(dropped))


def _clipped(
    ratio: Tensor, advantages: Tensor, clip_low: float, clip_high: float, dual_clip: float | None
) -> Surrogate:
    """PPO's minimum, written by cases: what is clipped is a constant."""
    too_high = (advantages > 0) & (ratio > 1.0 + clip_high)
    too_low = (advantages < 0) & (ratio < 1.0 - clip_low)
    bounded = torch.where(too_high, 1.0 + clip_high, torch.where(too_low, 1.0 - clip_low, ratio))
    if dual_clip is not None:
        too_far = (advantages < 0) & (ratio > dual_clip)
        too_high, bounded = too_high | too_far, torch.where(too_far, dual_clip, bounded)
    return Surrogate(bounded * advantages, too_high, too_low, torch.zeros_like(too_high))


def _weighted(tokens: PolicyTokens, weights: Tensor, limited: Tensor) -> Surrogate:
    """REINFORCE with weights: the gradient of weights * A * log pi_theta."""
    nowhere = torch.zeros_like(limited)
    return Surrogate(weights * tokens.advantages * tokens.policy, nowhere, nowhere, limited)


def _check_clip(kind: str, clip_low: float, clip_high: float) -> None:
    if not (0.0 < clip_low < 1.0 and 0.0 < clip_high < math.inf):
        raise ConfigError(
            f"{kind} clips to [1 - low, 1 + high] with 0 < low < 1 and 0 < high, got {clip_low}, {clip_high}"
        )
