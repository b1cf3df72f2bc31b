"""The alarm of a training run: engine and trainer disagree about the same weights. Must never know the loss or the
rollout service.

Law: it looks at every batch before the optimizer step on it, at the start of a run before the first one, and at
tokens of no lag, where a difference is the engine's mismatch and nothing else; where a batch has none of those, at
exact old logprobs. What is above the floor is in every step's figures; in words it is said at once, with its likely
cause, and then ever more rarely, until it is gone.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

from torch import nn

from agentgym.errors import TrainingError, VersionError
from agentgym.trajectory import TokenSequence
from agentgym.versions import VersionReader
from agentgym_trainer.anchors.protocol import VersionSource
from agentgym_trainer.anchors.scoring import ScoringModel
from agentgym_trainer.diagnosis import Diagnosis, Mismatch, diagnose
from agentgym_trainer.logprobs import unwrap
from agentgym_trainer.probes import Prober, choose_targets
from agentgym_trainer.settings import TrainConfig

FLOORS: Mapping[str, float] = {
    # of Mismatch.excess. fp32: a hundred times what a CPU's vLLM shows. bf16: where the field calls a run unhealthy.
    "float32": 1e-4,
    "bfloat16": 0.05,
}
_QUIET_STEPS = 10  # between two alarms in words, doubled by each
_QUIET_MOST = 1280
_RESETS_IN_A_ROW = 3
_OLDER = 2  # versions before the present one that the engine may still have
_EXAMINED = 3  # versions of a batch without a token of no lag, among which the fault is looked for
EXACT_ANCHORS = frozenset({"auto", "snapshot", "old_logit_model", "interrupt"})
log = logging.getLogger(__name__)


class DiscrepancyAlarm:
    """Example: `DiscrepancyAlarm(1e-4, "warn", loud=True).look(mismatch, ask)` before an optimizer step."""

    def __init__(self, floor: float, action: Literal["warn", "stop", "ignore"], *, loud: bool = True) -> None:
        """`loud`: this rank is the one that says it."""
        self.floor = floor  # of Mismatch.excess
        self._action = action
        self._loud = loud
        self._seen = False  # a batch with something to look at
        self._above = False
        self._quiet = _QUIET_STEPS
        self._since = 0
        self._num_alarms = 0
        self._resets = 0.0
        self._resets_in_a_row = 0

    @classmethod
    def of(cls, config: TrainConfig, *, loud: bool) -> DiscrepancyAlarm:
        """As the configuration says; the default floor is that of the loosest dtype that computes."""
        trainer = config.trainer
        floor = trainer.discrepancy_floor or max(FLOORS[trainer.dtype], FLOORS[config.engine.dtype])
        return cls(floor, trainer.on_discrepancy, loud=loud)

    def look(self, mismatch: Mismatch, ask: Callable[[], Diagnosis | None]) -> dict[str, float]:
        """Figures of a batch's mismatch. Above the floor it asks for the diagnosis, says it, and raises TrainingError
        where that is to stop the run: the optimizer step has not been made."""
        above = mismatch.num_tokens > 0 and not mismatch.excess <= self.floor  # nan is above
        figures = {
            "engine_mismatch/num_tokens": float(mismatch.num_tokens),
            "engine_mismatch/above_floor": float(above),
        }
        if mismatch.num_tokens:
            figures |= {
                "engine_mismatch/mean_abs_log_ratio": mismatch.mean_abs,
                "engine_mismatch/max_abs_log_ratio": mismatch.max_abs,
                "engine_mismatch/excess": mismatch.excess,
            }
            if not self._seen or self._above != above:
                self._turn(mismatch, above)
            self._seen, self._above = True, above
        if above and self._action != "ignore" and self._since <= 0:
            self._since, self._quiet = self._quiet, min(2 * self._quiet, _QUIET_MOST)
            figures |= self._alarm(mismatch, ask())
        self._since -= 1
        return figures | {"engine_mismatch/num_alarms": float(self._num_alarms)}

    def _turn(self, mismatch: Mismatch, above: bool) -> None:
        """The first look, or one that differs from the last."""
        if above:
            self._since, self._quiet = 0, _QUIET_STEPS
        elif self._loud and self._action != "ignore":
            again = " again" if self._seen else ""
            log.info(
                "engine and trainer agree%s: mean |dlogp| %.2g over %d tokens", again, mismatch.mean_abs,
                mismatch.num_tokens,
            )  # fmt: skip

    def _alarm(self, mismatch: Mismatch, diagnosis: Diagnosis | None) -> dict[str, float]:
        self._num_alarms += 1
        text = (
            f"engine and trainer disagree about the same weights: mean exp|dlogp| is 1 + {mismatch.excess:.2g} over "
            f"{mismatch.num_tokens} tokens (trainer.discrepancy_floor {self.floor:g})"
        )
        figures: dict[str, float] = {}
        if diagnosis is not None:
            text += f"; {diagnosis}"
            figures = {f"engine_mismatch/cause/{cause}": part for cause, part in explained(diagnosis).items()}
        if self._action == "stop":
            raise TrainingError(f"{text}. trainer.on_discrepancy = 'warn' goes on all the same")
        if self._loud:
            log.warning("%s", text)
        return figures

    def look_at_resets(self, num_resets: float) -> None:
        """After a step, the anchor's count of resets: one at every step is not staleness."""
        reset = num_resets > self._resets
        self._resets = num_resets
        self._resets_in_a_row = self._resets_in_a_row + 1 if reset else 0
        if self._resets_in_a_row == _RESETS_IN_A_ROW and self._loud and self._action != "ignore":
            log.warning(
                "the ewma anchor has reset at %d steps in a row: that is a mismatch of engine and trainer, not "
                "staleness, and a reset cannot mend it; look at engine_mismatch/* and discrepancy/lag0/*",
                _RESETS_IN_A_ROW,
            )


def explained(diagnosis: Diagnosis) -> dict[str, float]:
    """What the best finding of each cause explains, and 1.0 for a named cause that no probe predicted."""
    best: dict[str, float] = {}
    for finding in diagnosis.findings:
        best.setdefault(finding.cause, finding.explained)
    if diagnosis.cause is not None:
        best.setdefault(diagnosis.cause, 1.0)
    return best


def examine(
    model: nn.Module, rows: Sequence[TokenSequence], version: int, temperature: float, versions: VersionSource,
    floor: float,
) -> Diagnosis | None:  # fmt: skip
    """Why the engine's logprobs of these rows differ from those of `model`, which holds policy version `version`: of
    the newest few versions among their tokens, the one whose tokens differ most, all together. None where there is
    nothing to compare. Takes forwards of a few thousand tokens, and a second copy of the weights for as long."""
    sampled = {v for row in rows for v, mask in zip(row.policy_versions, row.loss_mask) if mask and v <= version}
    module, scoring = unwrap(model), ScoringModel(unwrap(model), temperature)

    def prober_of(candidate: int) -> Prober | None:
        holds = module
        if candidate != version:
            try:
                scoring.bring(versions, candidate)
            except VersionError:  # gone from the log, which a fallback is there for: it cannot be asked
                return None
            holds = scoring.module
        targets = choose_targets(rows, candidate, _vocab_size(holds))
        if not targets:
            return None
        before = [v for v in _known(versions, candidate) if v < candidate][-_OLDER:]
        return Prober(holds, targets, candidate, temperature, versions, tuple(reversed(before)))

    off: dict[int, float] = {}
    for candidate in sorted(sampled, reverse=True)[:_EXAMINED]:
        if (prober := prober_of(candidate)) is not None:
            mismatch = prober.compared().mismatch
            off[candidate] = mismatch.num_tokens * mismatch.mean_abs
    if not off:
        return None
    prober = prober_of(max(off, key=lambda candidate: (off[candidate], candidate)))
    assert prober is not None
    compared = prober.compared()
    return diagnose(compared, prober.probes(compared), floor)


def _vocab_size(module: nn.Module) -> int:
    named = getattr(getattr(module, "config", None), "vocab_size", None)
    return named or module.get_output_embeddings().weight.shape[0]  # type: ignore[operator]


def _known(versions: VersionSource, newest: int) -> Sequence[int]:
    return versions.versions if isinstance(versions, VersionReader) else range(max(newest - _OLDER, 0), newest)
