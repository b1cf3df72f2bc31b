"""Named reward components. Law: invalid is not zero, and every component is logged beside the value it makes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Score:
    """What an episode earned.

    `valid=False` means that nobody knows what it earned (a grader failed, a component was NaN): such an episode is
    left out of group baselines, counted and shown, and its `value` must not be read as a zero.

    Example: `Score(1.0, {"correct": 1.0}, True, "")`.
    """

    value: float
    components: Mapping[str, float]
    valid: bool
    why: str

    @classmethod
    def of(cls, components: Mapping[str, float], weights: Mapping[str, float] | None = None) -> Score:
        """The weighted sum of `components` (weight 1 where `weights` names none); NaN or infinity makes it invalid."""
        weights = weights or {}
        bad = {name: value for name, value in components.items() if not math.isfinite(value)}
        if bad:
            return cls.invalid(f"reward components must be finite, got {bad}")
        try:
            value = math.fsum(weights.get(name, 1.0) * part for name, part in components.items())
        except OverflowError:
            value = math.inf
        if not math.isfinite(value):
            return cls.invalid(f"the sum of the reward components must be finite, got {dict(components)}")
        return cls(value, {name: float(part) for name, part in components.items()}, True, "")

    @classmethod
    def invalid(cls, why: str) -> Score:
        """A score that says nothing about the policy, and why."""
        return cls(0.0, {}, False, why)
