"""A verdict: what a grader said, checked. Law: pure; what is no finite number in its declared range never becomes a
score, and silence never becomes a zero.

Three ways to end: *graded*; *the policy's doing* (the artifacts are missing, refused or break the grading), which is
valid and scores the worst there is; *nobody knows* (the judge crashed, a box died, a number is NaN), which is invalid.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from agentgym.errors import AgentGymError, InputError
from agentgym.rewards import Score

Reason = Literal[
    "graded",
    # the policy's doing: the worst score, valid
    "artifacts_missing",
    "artifacts_refused",
    "subject_failed",
    # nobody knows: invalid
    "agent_box_died",  # a policy may have brought it down; whoever ran the episode knows what happened last
    "no_verdict",
    "judge_crashed",
    "deadline",
    "malformed",
    "not_finite",
    "out_of_range",
    "too_much",
    "sandbox_failed",
]
LONGEST = 65_536  # bytes of a verdict
NUMBER = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d+)?")


class Ungraded(AgentGymError, ValueError):
    """No verdict that can be used; becomes an invalid score."""

    def __init__(self, reason: Reason, why: str) -> None:
        super().__init__(why)
        self.reason: Reason = reason


class Blamed(AgentGymError, ValueError):
    """The policy's own doing; becomes the worst score."""

    def __init__(self, reason: Reason, why: str) -> None:
        super().__init__(why)
        self.reason: Reason = reason


@dataclass(frozen=True, slots=True)
class Rubric:
    """The components that a verdict must have, each with its range, and what they weigh (1 where nothing is said).

    Example: `Rubric({"correct": (0.0, 1.0), "style": (-1.0, 1.0)}, {"style": 0.1})`.
    """

    ranges: Mapping[str, tuple[float, float]]
    weights: Mapping[str, float]

    def __post_init__(self) -> None:
        if not self.ranges:
            raise InputError("a verdict needs at least one component, e.g. {'reward': (0.0, 1.0)}")
        for name, (low, high) in self.ranges.items():
            if not (math.isfinite(low) and math.isfinite(high) and low < high):
                raise InputError(f"the range of the component {name!r} must be finite and not empty, got {(low, high)}")
        for name, weight in self.weights.items():
            if name not in self.ranges or not math.isfinite(weight):
                raise InputError(f"a weight must be finite and of a component ({', '.join(self.ranges)}), got {name!r}")

    def score(self, components: object) -> Score:
        """Raises Ungraded for anything but exactly these components, finite and in range."""
        if not isinstance(components, dict) or set(components) != set(self.ranges):
            names = sorted(map(str, components)) if isinstance(components, dict) else components
            raise Ungraded("malformed", f"a verdict needs the components {sorted(self.ranges)}, got {names!r:.200}")
        return Score.of({name: self._checked(name, value) for name, value in components.items()}, self.weights)

    def worst(self, why: str) -> Score:
        """What the policy gets for making a verdict impossible."""
        parts = {name: low if self.weights.get(name, 1.0) >= 0 else high for name, (low, high) in self.ranges.items()}
        score = Score.of(parts, self.weights)
        return Score(score.value, score.components, True, why)

    def _checked(self, name: str, value: object) -> float:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise Ungraded("malformed", f"the component {name!r} must be a number, got {value!r:.200}")
        low, high = self.ranges[name]
        if isinstance(value, float) and not math.isfinite(value):
            raise Ungraded("not_finite", f"the component {name!r} must be finite, got {value}")
        if not low <= value <= high:
            raise Ungraded("out_of_range", f"the component {name!r} must be in [{low:g}, {high:g}], got {value!r:.40}")
        return float(value)


@dataclass(frozen=True, slots=True)
class Verdict:
    """How a verification ended. `log` is what the tests printed, and an invalid score's `why` may hold its last line:
    both may quote the tests, so the policy must never read them.

    Example: `Verdict(Score(1.0, {"reward": 1.0}, True, ""), "graded", runs=20, left_out=(), log="", seconds=0.8)`.
    """

    score: Score
    reason: Reason
    runs: int  # of the subject
    left_out: tuple[str, ...]  # files of the agent's that Python, pytest or a shell would have picked up by themselves
    log: str
    seconds: float


def read_json(data: bytes) -> Any:
    """Strictly: no key twice, no depth that the parser cannot take."""
    if len(data) > LONGEST:
        raise Ungraded("malformed", f"a verdict must have <= {LONGEST} bytes, got {len(data)}")
    try:
        return json.loads(data.decode(), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise Ungraded("malformed", f"the verdict is not JSON ({error!s:.100}): {data[:80]!r}") from error


def read_number(data: bytes) -> float:
    """The one number of a reward.txt."""
    text = data[:LONGEST].decode("utf-8", "replace").strip()
    if text.lower().lstrip("+-") in ("nan", "inf", "infinity"):
        return float(text)
    if len(data) > LONGEST or not text.isascii() or not NUMBER.fullmatch(text):
        raise Ungraded("malformed", f"the verdict is not a number: {data[:80]!r}")
    return float(text)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len({name for name, _ in pairs}) != len(pairs):
        raise ValueError("a name stands there twice")
    return dict(pairs)
