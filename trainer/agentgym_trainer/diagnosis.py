"""From a mismatch between engine and trainer to its likely cause. Pure: logprobs in, a verdict with its figures out.
Must never know a model, an engine or where tokens came from.

Law: nothing is concluded from a symptom's name. Each suspected cause predicts what an engine with that fault would have
recorded, token by token (`probes.py` computes it with the trainer's own model); a cause explains as much as its
prediction comes nearer to the record than the trainer's own logprobs do:

    explained = 1 - mean|predicted - recorded| / mean|trainer - recorded|

Rounding at every step is the one fault that cannot be predicted so: an engine that adds in another order rounds to
other numbers. What is left of it is its size, and at which tokens it is large; where nothing explains a mismatch and
both are as a bfloat16 forward's, that is the likely cause.

A temperature is told from raw logprobs by two fits: which temperature the recorded logprobs are of, and at which one
the tokens were drawn (maximum likelihood). Where the two differ, what was recorded is not what was sampled from.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

Cause = Literal[
    "temperature", "raw_logprobs", "wrong_version", "stale_kv", "stale_prefix_cache", "bf16_weights", "bf16_head",
    "bf16_compute", "context_drift", "unexplained",
]  # fmt: skip
CAUSES: tuple[Cause, ...] = get_args(Cause)  # of equal evidence, the earlier one is named
MENDS: dict[Cause, str] = {
    "temperature": "score and sample at one temperature: rollout.temperature, and no other for requests in training",
    "raw_logprobs": "have the engine record what it samples from: vLLM's --logprobs-mode processed_logprobs",
    "wrong_version": "the engine serves other weights than it says: look at what was loaded at the last publication",
    "stale_kv": "engine.publish_mode = 'abort' prefills again under the new weights; 'keep' goes on with the old keys",
    "stale_prefix_cache": "reset the engine's prefix cache at each publication, or salt it with the policy version",
    "bf16_weights": "trainer.publish_dtype = 'bfloat16': then the trainer computes with the weights that are served",
    "bf16_head": "compute the output layer in float32 on the engine, or round the trainer's in the same way",
    "bf16_compute": "engine.dtype = 'float32', or trainer.dtype = 'bfloat16' so that both round alike",
    "context_drift": "the engine read other tokens than the trainer: compare prompt ids; never encode a text again",
    "unexplained": "run `agentgym lab mismatch` on this engine and model: it varies one thing at a time",
}
LIKELY = 0.5  # a cause that explains less than this is not named
_TIE = 0.02
_OF_A_SIZE = 2.0  # two means of |dlogp| are of one size within this factor,
# and large at the same tokens from this rank correlation on. The torch engine in bfloat16 has 0.8 to 0.98, noise 0.
_AT_THE_SAME_TOKENS = 0.5
_SIGMAS = 2.0  # between two temperatures before they are called different
_TEMPERATURES = (0.1, 10.0)


@dataclass(frozen=True, slots=True)
class Compared:
    """The same n tokens as the engine recorded and the trainer scored them; `rows` says which sequence each is of,
    in order within it.

    Example: two tokens of one row, the second one off:
    `Compared(recorded=tensor([-1.0, -2.0]), scored=tensor([-1.0, -1.5]), rows=tensor([0, 0]))`.
    """

    recorded: Tensor  # [n] behavior logprobs
    scored: Tensor  # [n] the trainer's own
    rows: Tensor  # [n] int64

    @property
    def mismatch(self) -> Mismatch:
        return Mismatch.of(self.scored, self.recorded)


@dataclass(frozen=True, slots=True)
class Mismatch:
    """How far two lists of logprobs are apart. `excess` = mean(exp|dlogp|) - 1, which healthy runs keep below 0.03 to
    0.05 in bf16 (arXiv 2605.14220) and near 1e-6 in fp32.

    Example: `Mismatch(num_tokens=1024, mean_abs=4e-6, max_abs=2.4e-5, excess=4e-6)`.
    """

    num_tokens: int
    mean_abs: float
    max_abs: float
    excess: float

    @classmethod
    def of(cls, one: Tensor, other: Tensor) -> Mismatch:
        """Of two lists of equal length; nothing apart where they are empty."""
        off = (one.double() - other.double()).abs()
        if not off.numel():
            return cls(0, 0.0, 0.0, 0.0)
        return cls(off.numel(), float(off.mean()), float(off.max()), float(torch.expm1(off.clamp(max=20.0)).mean()))


@dataclass(frozen=True, slots=True)
class Probe:
    """What an engine with one fault would have recorded of the same n tokens.

    Example: `Probe("wrong_version", tensor([-1.0, -2.0]), "version 3 instead of 4")`.
    """

    cause: Cause
    predicted: Tensor  # [n]
    detail: str


@dataclass(frozen=True, slots=True)
class Finding:
    """One suspected cause and what speaks for it.

    Example: `Finding("bf16_head", "the output layer in bfloat16", explained=0.97, left=3e-5)`.
    """

    cause: Cause
    detail: str
    explained: float  # 1: the prediction is the record; 0: no better than the trainer's own; below 0: worse
    left: float  # mean |predicted - recorded|


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """The verdict: the cause that is named, and all findings, the most telling first.

    Example: `Diagnosis("stale_kv", "tokens behind a publication ...", Mismatch(...), (Finding(...), ...))`.
    """

    cause: Cause | None  # None: the mismatch is below the floor
    detail: str
    mismatch: Mismatch
    findings: tuple[Finding, ...]

    @property
    def mend(self) -> str:
        return MENDS[self.cause] if self.cause is not None else ""

    def __str__(self) -> str:
        seen = f"mean |dlogp| {self.mismatch.mean_abs:.2g}, largest {self.mismatch.max_abs:.2g}"
        seen += f" over {self.mismatch.num_tokens} tokens"
        if self.cause is None:
            return f"engine and trainer agree: {seen}"
        return f"likely cause: {self.cause} ({self.detail}); {seen}. Mend: {self.mend}"


def diagnose(compared: Compared, probes: Sequence[Probe], floor: float) -> Diagnosis:
    """Names the cause whose prediction explains most of the mismatch, where `Mismatch.excess` is above `floor`."""
    mismatch = compared.mismatch
    findings = tuple(sorted((_weigh(probe, compared) for probe in probes), key=lambda finding: -finding.explained))
    if mismatch.excess <= floor:  # nan is not
        return Diagnosis(None, "", mismatch, findings)
    likely = [finding for finding in findings if finding.explained >= LIKELY]
    if likely:
        equal = [finding for finding in likely if finding.explained >= likely[0].explained - _TIE]
        best = min(equal, key=lambda finding: (CAUSES.index(finding.cause), -finding.explained))
        detail = f"{best.detail}; it explains {best.explained:.1%} and leaves {best.left:.2g} a token"
        return Diagnosis(best.cause, detail, mismatch, findings)
    broken, rows = rows_with_onset(compared)
    nearest = f"nearest: {findings[0].cause}, {findings[0].explained:.0%}" if findings else "nothing was probed"
    if rows and broken / rows >= LIKELY:
        detail = f"{broken} of {rows} rows agree up to a token and not from there on; {nearest}"
        return Diagnosis("context_drift", detail, mismatch, findings)
    if rounding := _as_rounding(compared, probes):
        return Diagnosis("bf16_compute", rounding, mismatch, findings)
    return Diagnosis("unexplained", nearest, mismatch, findings)


def _weigh(probe: Probe, compared: Compared) -> Finding:
    before = compared.mismatch.mean_abs
    left = Mismatch.of(probe.predicted, compared.recorded).mean_abs
    return Finding(probe.cause, probe.detail, 1.0 - left / before if before > 0 else 0.0, left)


def _as_rounding(compared: Compared, probes: Sequence[Probe]) -> str:
    """What speaks for a forward in bfloat16 that adds in another order; "" where nothing does."""
    off = (compared.scored.double() - compared.recorded.double()).abs()
    for probe in probes:
        if probe.cause != "bf16_compute":
            continue
        rounded = (probe.predicted.double() - compared.scored.double()).abs()
        ratio = float(off.mean() / rounded.mean().clamp_min(1e-30))
        together = float(torch.corrcoef(torch.stack([_ranks(off), _ranks(rounded)]))[0, 1])
        if 1.0 / _OF_A_SIZE <= ratio <= _OF_A_SIZE and together >= _AT_THE_SAME_TOKENS:
            return (
                f"{probe.detail}, added in another order: the differences are {ratio:.2g} times those of such a "
                f"forward here, and large at the same tokens (rank correlation {together:.2f})"
            )
    return ""


def _ranks(values: Tensor) -> Tensor:
    return values.argsort().argsort().double()


def rows_with_onset(compared: Compared, *, contrast: float = 10.0, least: int = 4) -> tuple[int, int]:
    """(rows that agree up to some token and are off from there on, rows that are off at all). In such a row the median
    |dlogp| behind a cut is at least `contrast` times the largest before it, with `least` tokens on either side: what a
    wrong token in the context does, and rounding does not."""
    off = (compared.scored.double() - compared.recorded.double()).abs()
    typical = float(off.mean())
    broken = seen = 0
    for row in compared.rows.unique().tolist():
        values = off[compared.rows == row]
        if float(values.mean()) < 0.1 * typical:
            continue
        seen += 1
        largest = values.cummax(0).values
        broken += any(
            float(values[cut:].median()) >= contrast * max(float(largest[cut - 1]), 1e-12)
            for cut in range(least, len(values) - least + 1)
        )
    return broken, seen


# ------------------------------------------------------------------------------------------------- temperatures


@dataclass(frozen=True, slots=True)
class TemperatureFit:
    """Which temperature the recorded logprobs are of, and at which one the tokens were drawn (with its standard error
    in the inverse temperature).

    Example: raw logprobs of tokens drawn at 0.7: `TemperatureFit(recorded=1.0, sampled=0.71, inverse_error=0.04)`.
    """

    recorded: float
    sampled: float
    inverse_error: float

    def probe(self, predicted: Tensor, scored_at: float) -> Probe:
        """The suspicion that the temperature is what differs, under the name that the two fits give it."""
        drawn = f"the tokens were drawn at about {self.sampled:.3g}"
        from_record = abs(1.0 / self.recorded - 1.0 / self.sampled)
        from_asked = abs(1.0 / scored_at - 1.0 / self.sampled)
        if abs(self.recorded - 1.0) < 0.02 and from_record > max(_SIGMAS * self.inverse_error, from_asked):
            detail = f"the record is of temperature {self.recorded:.3g}, {drawn}: logprobs of the raw distribution"
            return Probe("raw_logprobs", predicted, detail)
        detail = f"the record is of temperature {self.recorded:.4g}, {drawn}; the trainer scores at {scored_at:g}"
        return Probe("temperature", predicted, detail)


def fit_temperatures(logits: Tensor, targets: Tensor, recorded: Tensor) -> TemperatureFit:
    """From raw logits [n, V] of the trainer, the tokens drawn [n] and their recorded logprobs [n]."""
    sampled, error = _drawn_at(logits, targets)
    return TemperatureFit(_recorded_at(logits, targets, recorded), sampled, error)


def logprobs_at(logits: Tensor, targets: Tensor, temperature: float) -> Tensor:
    """Logprobs [n] of `targets` under softmax(logits / temperature)."""
    return -torch.nn.functional.cross_entropy(logits / temperature, targets, reduction="none")


def _recorded_at(logits: Tensor, targets: Tensor, recorded: Tensor) -> float:
    """argmin over T of mean |log softmax(logits/T) - recorded|: a grid, then a golden section around its best."""

    def off(inverse: float) -> float:
        return float((logprobs_at(logits, targets, 1.0 / inverse) - recorded).abs().mean())

    low, high = 1.0 / _TEMPERATURES[1], 1.0 / _TEMPERATURES[0]
    grid = [low * (high / low) ** (index / 40) for index in range(41)]
    best = min(range(41), key=lambda index: off(grid[index]))
    left, right = grid[max(best - 1, 0)], grid[min(best + 1, 40)]
    shrink = (math.sqrt(5.0) - 1.0) / 2.0
    inner, outer = right - shrink * (right - left), left + shrink * (right - left)
    at_inner, at_outer = off(inner), off(outer)
    while right - left > 1e-5 * left:
        if at_inner <= at_outer:
            right, outer, at_outer = outer, inner, at_inner
            inner = right - shrink * (right - left)
            at_inner = off(inner)
        else:
            left, inner, at_inner = inner, outer, at_outer
            outer = left + shrink * (right - left)
            at_outer = off(outer)
    return 2.0 / (left + right)


def _drawn_at(logits: Tensor, targets: Tensor) -> tuple[float, float]:
    """Maximum likelihood of b = 1/T, by Newton's method (the likelihood is concave in b), and b's standard error."""
    logits = logits.double()
    chosen = logits.gather(1, targets[:, None])[:, 0]
    low, high = 1.0 / _TEMPERATURES[1], 1.0 / _TEMPERATURES[0]
    inverse, spread = 1.0, 0.0
    for _ in range(50):
        probabilities = (inverse * logits).softmax(-1)
        mean = (probabilities * logits).sum(-1)
        spread = float(((probabilities * logits**2).sum(-1) - mean**2).clamp_min(0).sum())
        if spread <= 1e-12:  # every distribution is flat or a spike: the tokens say nothing of a temperature
            return 1.0 / inverse, math.inf
        step = float((chosen - mean).sum()) / spread
        step = max(min(step, 0.5 * inverse), -0.5 * inverse)
        inverse = min(max(inverse + step, low), high)
        if abs(step) < 1e-6 * inverse:
            break
    return 1.0 / inverse, 1.0 / math.sqrt(spread)
