"""The section `[loss]`: which objective, which handling of r_d, and their bounds. Must never know a tensor.

Law: an option does something or is refused. A bound that the chosen objective and corrections do not read may only
stand at its default (a run's own config.toml names them all).
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator, model_validator

from agentgym.config import Section
from agentgym_trainer.correction_kinds import DEFAULTS, check_stack

ObjectiveName = Literal["ppo", "ppo_dual_clip", "gspo", "cispo", "reinforce_truncated", "topr", "m2po"]
CorrectionName = Literal[
    "none", "token_mask", "token_truncate", "sequence_truncate", "icepop", "geometric_mask", "sequence_mask",
    "bernoulli_kl_mask", "probability_difference_mask",
]  # fmt: skip
ON_TOTAL_RATIO: tuple[ObjectiveName, ...] = ("reinforce_truncated", "topr", "m2po")

BOUNDS_OF_OBJECTIVE: dict[ObjectiveName, tuple[str, ...]] = {
    "ppo": ("clip_low", "clip_high"),
    "ppo_dual_clip": ("clip_low", "clip_high", "dual_clip"),
    "gspo": ("gspo_clip_low", "gspo_clip_high"),
    "cispo": ("cispo_low", "cispo_high"),
    "reinforce_truncated": ("total_truncate_max",),
    "topr": (),
    "m2po": ("m2po_max_second_moment",),
}
BOUNDS_OF_CORRECTION: dict[CorrectionName, tuple[str, ...]] = {  # (low, high), or the one bound
    "none": (),
    "token_mask": ("token_mask_c",),
    "token_truncate": ("token_truncate_max",),
    "sequence_truncate": ("sequence_truncate_max",),
    "icepop": ("icepop_low", "icepop_high"),
    "geometric_mask": ("geometric_low", "geometric_high"),
    "sequence_mask": ("sequence_mask_c",),
    "bernoulli_kl_mask": ("bernoulli_kl_max",),
    "probability_difference_mask": ("probability_difference_max",),
}


class LossSection(Section):
    """The decoupled objective. Whoever sees healthy tokens masked raises `token_mask_c`; whoever trains on one
    version only (max_staleness=0) can turn the correction off; a mixture of experts wants `icepop` or a mask of rows.

    `correction` is a name, or several: their masks multiply. Formulas and sources: docs/training.md,
    correction_kinds.py and objectives.py."""

    objective: ObjectiveName = "ppo"
    correction: tuple[CorrectionName, ...] = ("token_mask",)
    veto: float = Field(default=0.0, ge=0.0, lt=1.0)  # 0: none; 1e-4 where an engine may be badly wrong on a token

    clip_low: float = Field(default=0.2, gt=0.0, lt=1.0)
    clip_high: float = Field(default=0.28, gt=0.0, allow_inf_nan=False)
    dual_clip: float = Field(default=3.0, gt=1.0, allow_inf_nan=False)
    gspo_clip_low: float = Field(default=3e-4, gt=0.0, lt=1.0)
    gspo_clip_high: float = Field(default=4e-4, gt=0.0, allow_inf_nan=False)
    cispo_low: float = Field(default=0.0, ge=0.0, lt=1.0)
    cispo_high: float = Field(default=5.0, gt=1.0, allow_inf_nan=False)
    total_truncate_max: float = Field(default=2.0, gt=0.0, allow_inf_nan=False)
    m2po_max_second_moment: float = Field(default=0.04, gt=0.0, allow_inf_nan=False)

    token_mask_c: float = Field(default=DEFAULTS["token_mask"][1], gt=1.0, allow_inf_nan=False)
    token_truncate_max: float = Field(default=DEFAULTS["token_truncate"][1], gt=0.0, allow_inf_nan=False)
    sequence_truncate_max: float = Field(default=DEFAULTS["sequence_truncate"][1], gt=0.0, allow_inf_nan=False)
    icepop_low: float = Field(default=DEFAULTS["icepop"][0], gt=0.0, lt=1.0)
    icepop_high: float = Field(default=DEFAULTS["icepop"][1], gt=1.0, allow_inf_nan=False)
    geometric_low: float = Field(default=DEFAULTS["geometric_mask"][0], gt=0.0, lt=1.0)
    geometric_high: float = Field(default=DEFAULTS["geometric_mask"][1], gt=1.0, allow_inf_nan=False)
    sequence_mask_c: float = Field(default=DEFAULTS["sequence_mask"][1], gt=1.0, allow_inf_nan=False)
    bernoulli_kl_max: float = Field(default=DEFAULTS["bernoulli_kl_mask"][1], gt=0.0, allow_inf_nan=False)
    probability_difference_max: float = Field(default=DEFAULTS["probability_difference_mask"][1], gt=0.0, lt=1.0)

    entropy_coefficient: float = Field(default=0.0, ge=0.0, allow_inf_nan=False)
    # of k3 against the initial weights; costs their copy
    reference_coefficient: float = Field(default=0.0, ge=0.0, allow_inf_nan=False)
    max_dropped_fraction: float = Field(default=0.01, ge=0.0, lt=1.0)  # of loss tokens without a finite logprob

    @field_validator("correction", mode="before")
    @classmethod
    def _one_or_several(cls, value: object) -> object:
        return (value,) if isinstance(value, str) else value

    @field_validator("correction")
    @classmethod
    def _go_together(cls, value: tuple[CorrectionName, ...]) -> tuple[CorrectionName, ...]:
        check_stack(value)
        return value

    @model_validator(mode="after")
    def _every_bound_is_read(self) -> LossSection:
        read = {
            *BOUNDS_OF_OBJECTIVE[self.objective],
            *(b for name in self.correction for b in BOUNDS_OF_CORRECTION[name]),
        }
        readers = {b: f"objective = '{name}'" for name, bounds in BOUNDS_OF_OBJECTIVE.items() for b in bounds}
        readers |= {
            "clip_low": "objective = 'ppo' or 'ppo_dual_clip'",
            "clip_high": "objective = 'ppo' or 'ppo_dual_clip'",
        }
        readers |= {b: f"correction = '{name}'" for name, bounds in BOUNDS_OF_CORRECTION.items() for b in bounds}
        for bound, reader in readers.items():
            if bound not in read and getattr(self, bound) != type(self).model_fields[bound].default:
                chosen = self.objective if reader.startswith("objective") else " and ".join(self.correction)
                raise ValueError(
                    f"{bound} = {getattr(self, bound):g} does nothing with {reader.split()[0]} {chosen!r}: "
                    f"it belongs to {reader}; drop it, or choose that"
                )
        return self
