"""Which finished episodes are shown again for correction, and when: CIPO (arXiv 2605.14539). Pure; no clock, no chance.

Laws: an original is a valid episode of a plain group that will be trained on, no older than the staleness bound when
its correction begins, and used once; revisions are no originals. Of all groups begun, corrections are at most `share`;
what could not be begun for want of an original is not made up for later.

Of a finished group at most one wrong and one correct member wait as originals (the one with the least hash of its id,
so that neither short nor quick ones are favoured). Of those waiting, the one whose group's pass rate is nearest to 1/2
goes first, then the one of the newest policy.

The adaptive ratio is ours: the paper says that correct and failed originals are balanced, and we know no formula of it.
Let e_c and e_w be how often, lately, revisions of correct and of wrong originals were wrong. Correct originals get
e_c / (e_c + e_w) of the corrections, within [correct_min, correct_max]: each kind in proportion to what is left to
learn from it. A policy that breaks what was correct meets more correct originals; one that keeps it, fewer. Both rates
start at 1/2 and forget 2 % a revision. A correct original never takes a wrong one's place: if no wrong one waits, no
correction begins.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping
from typing import Any, TypeGuard

from pydantic import Field, field_validator, model_validator

from agentgym.config import Section
from agentgym.errors import InputError
from agentgym.rollout.buffer import ReadyGroup
from agentgym.rollout.correction import Correction, Original
from agentgym.rollout.summary import succeeded
from agentgym.trajectory import Trajectory

INSTRUCTION = (
    "Above is an earlier attempt at this task; it may be right or wrong. The task now starts again from its beginning. "
    "Check the attempt, keep what was right, and correct what was wrong."
)
FORGET = 0.02  # the weight of a revision in the rates that the ratio adapts to
_WHOLE = 1.0 - 1e-9  # ten tenths are one


class CipoSection(Section):
    """Correction prompts: some groups play a task again with an earlier episode of it in their prompt, and learn to
    correct it. Whoever turns it on gives `rollout.max_episode_tokens` room for two episodes."""

    share: float = 0.25  # of the groups begun, as long as there are originals
    penalty: float = Field(default=0.5, allow_inf_nan=False)  # off the score of a wrong revision of a correct original
    correct_min: float = 0.1  # correct originals, of all: the adaptive ratio stays within these two
    correct_max: float = 0.5
    max_original_tokens: int | None = None  # longer episodes are no originals; None: half of rollout.max_episode_tokens
    instruction: str = INSTRUCTION  # before the task's repetition; "" for a model that has no words for it

    @field_validator("share")
    @classmethod
    def _between(cls, value: float) -> float:
        if not 0.0 < value < 1.0:
            raise ValueError(f"must be > 0 and < 1, got {value}; to correct nothing, leave [rollout.cipo] out")
        return value

    @field_validator("correct_min", "correct_max")
    @classmethod
    def _fraction(cls, value: float) -> float:
        if not 0.0 <= value <= 1.0:
            raise ValueError(f"must be >= 0 and <= 1, got {value}")
        return value

    @field_validator("penalty")
    @classmethod
    def _not_negative(cls, value: float) -> float:
        if value < 0:
            raise ValueError(f"must be >= 0, got {value}: it is taken off the score")
        return value

    @field_validator("max_original_tokens")
    @classmethod
    def _at_least_one(cls, value: int | None) -> int | None:
        if value is not None and value < 1:
            raise ValueError(f"must be >= 1, got {value}")
        return value

    @model_validator(mode="after")
    def _in_order(self) -> CipoSection:
        if self.correct_min > self.correct_max:
            raise ValueError(f"correct_min ({self.correct_min}) must be <= correct_max ({self.correct_max})")
        return self


class Corrections:
    """The originals that wait, and the correction that comes next.

    >>> corrections = Corrections(CipoSection(share=0.5), max_staleness=2, max_original_tokens=512)
    >>> corrections.offer(group)
    >>> [corrections.next(version=3) for _ in range(2)]
    [None, Correction(number=0, original=Original(...), ...)]
    """

    def __init__(self, settings: CipoSection, max_staleness: int, max_original_tokens: int) -> None:
        self._settings = settings
        self._max_staleness = max_staleness
        self._max_original_tokens = max_original_tokens
        self._waiting: list[Original] = []
        self._number = 0
        self._due = 0.0  # a correction is due when it reaches 1
        self._due_correct = 0.0  # the same of a correct original among corrections
        # how often, lately, revisions were wrong, by whether their originals were correct
        self._errors: dict[bool, float] = {False: 0.5, True: 0.5}
        self._too_long = 0

    @property
    def correct_share(self) -> float:
        """The share of corrections that show a correct original."""
        whole = self._errors[True] + self._errors[False]
        share = self._errors[True] / whole if whole else 0.0
        return min(max(share, self._settings.correct_min), self._settings.correct_max)

    def figures(self) -> dict[str, float]:
        """Where the ratio stands, how many originals wait, and how many groups had only ones that are too long."""
        return {
            "cipo/correct_share": self.correct_share,
            "cipo/waiting": float(len(self._waiting)),
            "cipo/too_long": float(self._too_long),
        }

    def offer(self, group: ReadyGroup) -> None:
        """A plain group that will be trained on."""
        valid = [member for member in group.members if member.score is not None and member.score.valid]
        pass_rate = sum(map(succeeded, valid)) / len(valid)
        for correct in (False, True):
            kind = [m for m in valid if succeeded(m) is correct and m.oldest_version is not None]
            short = [member for member in kind if _num_tokens(member) <= self._max_original_tokens]
            self._too_long += bool(kind and not short)
            if short:
                chosen = min(short, key=lambda member: zlib.crc32(member.trajectory_id.encode()))
                self._waiting.append(Original.of(chosen, pass_rate))

    def next(self, version: int) -> Correction | None:
        """The correction that begins now, under `version`, or None for a plain group. Asked once a group."""
        self._waiting = [o for o in self._waiting if version - o.oldest_version <= self._max_staleness]
        self._due += self._settings.share
        original = self._choose() if self._due >= _WHOLE else None
        if original is None:
            self._due = min(self._due, 1.0)
            return None
        self._due -= 1.0
        self._waiting.remove(original)
        self._number += 1
        return Correction(self._number - 1, original, self._settings.instruction, self._settings.penalty)

    def note(self, correction: Correction, revision: Trajectory) -> None:
        """What became of a correction, for the ratio."""
        if revision.score is not None and revision.score.valid:
            kind = correction.original.correct
            self._errors[kind] += FORGET * ((not succeeded(revision)) - self._errors[kind])

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps: the number of the next correction, and the rates. Originals are not kept: a resumed
        run makes its own."""
        return {"next": self._number, "wrong_errors": self._errors[False], "correct_errors": self._errors[True]}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continues from `state`. Raises InputError for what is none."""
        number, wrong, correct = (state.get(key) for key in ("next", "wrong_errors", "correct_errors"))
        if not isinstance(number, int) or number < 0 or not (_is_rate(wrong) and _is_rate(correct)):
            raise InputError(f"the state of corrections needs 'next' and two rates in [0, 1], got {dict(state)!r}")
        self._number = number
        self._errors = {False: wrong, True: correct}

    def _choose(self) -> Original | None:
        due = self._due_correct + self.correct_share
        original = self._best(True) if due >= _WHOLE else None
        original = original or self._best(False)
        if original is not None:
            self._due_correct = due - 1.0 if original.correct else min(due, 1.0)
        return original

    def _best(self, correct: bool) -> Original | None:
        kind: Iterable[Original] = (original for original in self._waiting if original.correct is correct)
        return min(kind, key=lambda o: (abs(o.pass_rate - 0.5), -o.oldest_version), default=None)


def _num_tokens(trajectory: Trajectory) -> int:
    last = trajectory.turns[-1]
    return len(last.prompt_ids) + len(last.completion.token_ids)


def _is_rate(value: Any) -> TypeGuard[float]:
    return isinstance(value, float | int) and 0.0 <= value <= 1.0
