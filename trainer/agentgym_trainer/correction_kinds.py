"""Which handlings of the discrepancy ratio r_d = pi_prox/mu_old there are, with the field's defaults, and which go
together. Must never know a tensor: the configuration is made of these. What they compute is `correction.py`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from agentgym.errors import ConfigError, UnknownNameError

CorrectionKind = Literal[
    "none", "token_mask", "token_truncate", "sequence_truncate", "icepop", "geometric_mask", "sequence_mask",
    "bernoulli_kl_mask", "probability_difference_mask", "veto",
]  # fmt: skip
CORRECTIONS: tuple[str, ...] = get_args(CorrectionKind)
TRUNCATIONS = ("token_truncate", "sequence_truncate")


DEFAULTS: dict[str, tuple[float, float]] = {  # (lower bound or 0, bound)
    "none": (0.0, 1.0),
    "token_mask": (0.0, 2.0),
    "token_truncate": (0.0, 2.0),
    "sequence_truncate": (0.0, 2.0),
    "icepop": (0.5, 5.0),
    "geometric_mask": (0.99, 1.01),
    "sequence_mask": (0.0, 2.0),
    "bernoulli_kl_mask": (0.0, 0.05),
    "probability_difference_mask": (0.0, 0.2),
    "veto": (0.0, 1e-4),
}


@dataclass(frozen=True, slots=True)
class Correction:
    """One handling of r_d, by kind. `bound` and `low` have the field's defaults where they are None.

    Truncations, W without a mask:

    * `none`: M_d = W = 1.
    * `token_truncate`: W = min(r_d, bound), 2. TIS (Yao et al., "Your efficient RL framework secretly brings you
      off-policy RL training"; V-trace's rho, arXiv 1802.01561).
    * `sequence_truncate`: W = min(exp(sum over the row of log r_d), bound), 2; 2 to 10 in use. Sequence TIS (Liu et
      al., "When speed kills stability").

    Masks, with W = r_d on what they keep:

    * `token_mask`: M_d = 1[1/bound <= r_d <= bound], 2. The decoupled objective (arXiv 2605.12070); MIS on tokens.
    * `icepop`: M_d = 1[low <= r_d <= bound], 0.5 and 5 (Ling team, "Every step evolves", arXiv 2510.18855).
    * `geometric_mask`: M_d = 1[low <= exp(mean over the row of log r_d) <= bound], 0.99 and 1.01; 0.999 and 1.001 is
      very strict. The whole row goes (Liu et al., Geo-RS).
    * `sequence_mask`: M_d = 1[1/bound <= exp(sum over the row of log r_d) <= bound], 2. The whole row goes (Liu et
      al., Seq-MIS, rejection of sequences).
    * `bernoulli_kl_mask`: M_d = 1[D <= bound], 0.05, with D = mu log(mu/p) + (1-mu) log((1-mu)/(1-p)), the divergence
      of "this token or another" under mu and p = pi_prox (binary KL of DPPO, arXiv 2602.04879; here on r_d, hence
      whatever the advantage's sign). DPPO's bounds are 0.05 for the KL and 0.15 for the TV (as TRL's DPPOConfig and
      open-instruct have them).
    * `probability_difference_mask`: drops A > 0 where pi_prox - mu > bound and A < 0 where pi_prox - mu < -bound, 0.2
      (binary TV of DPPO, arXiv 2602.04879; prime-rl's default).

    Stackable on any of them, without a weight of its own:

    * `veto`: a row with a token of r_d < bound, 1e-4, is dropped whole (Liu et al.; verl's token veto).

    Example: `Correction("token_mask")` (the default), `Correction("icepop", 5.0, low=0.5)`.
    """

    kind: CorrectionKind = "token_mask"
    bound: float = None  # type: ignore[assignment]  # given or the kind's default: never None once it is made
    low: float = None  # type: ignore[assignment]  # the lower bound; 0 for kinds without one

    def __post_init__(self) -> None:
        if self.kind not in CORRECTIONS:
            raise UnknownNameError.of("correction", self.kind, CORRECTIONS)
        low, bound = DEFAULTS[self.kind]
        if self.low and not low:
            raise ConfigError(f"correction {self.kind} has no lower bound of its own, got low={self.low}")
        object.__setattr__(self, "bound", bound if self.bound is None else float(self.bound))
        object.__setattr__(self, "low", low if self.low is None else float(self.low))
        self._check()

    def _check(self) -> None:
        finite = math.isfinite(self.bound) and math.isfinite(self.low)
        if self.kind in ("token_mask", "sequence_mask") and not (finite and self.bound > 1.0):
            raise ConfigError(f"the bound c of {self.kind} must be finite and > 1, got {self.bound}")
        if self.kind in TRUNCATIONS and not (finite and self.bound > 0.0):
            raise ConfigError(f"the bound C of {self.kind} must be finite and > 0, got {self.bound}")
        if self.kind in ("icepop", "geometric_mask") and not (finite and 0.0 < self.low < 1.0 < self.bound):
            raise ConfigError(f"{self.kind} keeps [low, high] with 0 < low < 1 < high, got [{self.low}, {self.bound}]")
        if self.kind == "bernoulli_kl_mask" and not (finite and self.bound > 0.0):
            raise ConfigError(f"the bound of bernoulli_kl_mask must be finite and > 0, got {self.bound}")
        if self.kind in ("probability_difference_mask", "veto") and not 0.0 < self.bound < 1.0:
            raise ConfigError(f"the bound of {self.kind} must be between 0 and 1, got {self.bound}")


def check_stack(kinds: Sequence[str]) -> None:
    """Raises ConfigError for kinds of corrections that make no sense together."""
    if not kinds:
        raise ConfigError("no correction is the correction 'none'")
    if twice := sorted({kind for kind in kinds if kinds.count(kind) > 1}):
        raise ConfigError(f"correction {twice[0]} is named twice; name it once")
    if "none" in kinds and set(kinds) - {"none", "veto"}:
        raise ConfigError(f"correction 'none' leaves every weight at 1, so it goes with no other, got {kinds}")
    if all(kind in kinds for kind in TRUNCATIONS):
        raise ConfigError("token_truncate and sequence_truncate each give the one weight of a token; name one of them")
