"""`[loss]`: what is chosen is what is computed; what makes no sense is refused with the reason and the mend."""

from __future__ import annotations

from typing import Any, get_args

import pytest

from agentgym.config import parse_config
from agentgym.errors import ConfigError
from agentgym_trainer.correction import Correction
from agentgym_trainer.correction_kinds import CORRECTIONS, DEFAULTS
from agentgym_trainer.learner import corrections_of, objective_of
from agentgym_trainer.loss_settings import (
    BOUNDS_OF_CORRECTION,
    BOUNDS_OF_OBJECTIVE,
    ON_TOTAL_RATIO,
    CorrectionName,
    LossSection,
    ObjectiveName,
)
from agentgym_trainer.objectives import Cispo, Gspo, M2po, Objective, Ppo, Topr, TruncatedReinforce
from agentgym_trainer.settings import TrainConfig

ON_R: dict[str, Any] = {"trainer": {"anchor": "behavior"}}


def parse(**sections: dict[str, Any]) -> TrainConfig:
    return parse_config(TrainConfig, {"env": {"id": "maze"}, **sections})


def anchored(name: str) -> dict[str, Any]:
    return ON_R if name in ON_TOTAL_RATIO else {}


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        ({}, Ppo()),
        ({"clip_low": 0.1, "clip_high": 0.3}, Ppo(0.1, 0.3)),
        ({"objective": "ppo_dual_clip"}, Ppo(0.2, 0.28, 3.0)),
        ({"objective": "ppo_dual_clip", "dual_clip": 4, "clip_high": 0.5}, Ppo(0.2, 0.5, 4.0)),
        ({"objective": "gspo"}, Gspo()),
        ({"objective": "gspo", "gspo_clip_low": 0.1, "gspo_clip_high": 0.2}, Gspo(0.1, 0.2)),
        ({"objective": "cispo"}, Cispo()),
        ({"objective": "cispo", "cispo_low": 0.5, "cispo_high": 2}, Cispo(0.5, 2.0)),
        ({"objective": "reinforce_truncated"}, TruncatedReinforce()),
        ({"objective": "reinforce_truncated", "total_truncate_max": 1}, TruncatedReinforce(1.0)),
        ({"objective": "topr"}, Topr()),
        ({"objective": "m2po"}, M2po()),
        ({"objective": "m2po", "m2po_max_second_moment": 0.1}, M2po(0.1)),
    ],
)
def test_the_objective_is_the_one_that_was_asked_for(loss: dict[str, Any], expected: Objective) -> None:
    config = parse(loss=loss, **anchored(loss.get("objective", "")))
    assert objective_of(config.loss) == expected


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        ({}, [Correction("token_mask", 2.0)]),
        ({"correction": "none"}, [Correction("none")]),
        ({"correction": "token_mask", "token_mask_c": 3}, [Correction("token_mask", 3.0)]),
        ({"correction": "icepop", "icepop_low": 0.7}, [Correction("icepop", 5.0, low=0.7)]),
        ({"correction": "geometric_mask"}, [Correction("geometric_mask", 1.01, low=0.99)]),
        ({"correction": "sequence_truncate", "sequence_truncate_max": 8}, [Correction("sequence_truncate", 8.0)]),
        ({"veto": 1e-4}, [Correction("token_mask"), Correction("veto", 1e-4)]),
        (
            {"correction": ["token_truncate", "geometric_mask"], "geometric_high": 1.001, "veto": 1e-3},
            [Correction("token_truncate"), Correction("geometric_mask", 1.001, low=0.99), Correction("veto", 1e-3)],
        ),
    ],
)
def test_the_corrections_are_those_that_were_asked_for(loss: dict[str, Any], expected: list[Correction]) -> None:
    assert list(corrections_of(parse(loss=loss).loss)) == expected


@pytest.mark.parametrize("name", get_args(CorrectionName))
def test_every_correction_can_be_asked_for_and_has_one_default(name: str) -> None:
    section = parse(loss={"correction": name}).loss
    assert corrections_of(section) == (Correction(name),)  # type: ignore[arg-type]
    assert set(get_args(CorrectionName)) | {"veto"} == set(CORRECTIONS) == set(DEFAULTS)


def test_every_bound_has_one_place() -> None:
    bounds = [b for named in (BOUNDS_OF_OBJECTIVE, BOUNDS_OF_CORRECTION) for bs in named.values() for b in bs]
    others = {
        "objective", "correction", "veto", "entropy_coefficient", "reference_coefficient", "max_dropped_fraction",
    }  # fmt: skip
    assert {*bounds, *others} == set(LossSection.model_fields)
    assert set(BOUNDS_OF_OBJECTIVE) == set(get_args(ObjectiveName))


@pytest.mark.parametrize("name", get_args(ObjectiveName))
def test_a_resolved_configuration_can_be_read_again(name: str) -> None:
    """A run's config.toml names every key, and `agentgym train` takes it."""
    once = parse(loss={"objective": name, "veto": 0.0}, **anchored(name))
    again = parse_config(TrainConfig, once.model_dump(mode="json"))
    assert again == once


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        # objectives and anchors
        ({"loss": {"objective": "topr"}}, r"'topr' acts on the total .* trainer.anchor = 'behavior', got 'auto'"),
        ({"loss": {"objective": "m2po"}, "trainer": {"anchor": "snapshot"}}, r"'m2po' .* got 'snapshot'"),
        ({"loss": {"objective": "reinforce_truncated"}, "trainer": {"anchor": "linear"}}, r"got 'linear'"),
        # corrections where there is nothing to correct
        (ON_R | {"loss": {"correction": "icepop"}}, r"loss.correction = 'icepop' does nothing with .*, where r_d is 1"),
        (ON_R | {"loss": {"correction": "token_mask"}}, r"loss.correction = 'token_mask' does nothing"),
        (ON_R | {"loss": {"veto": 1e-4}}, r"loss.veto = 0.0001 does nothing with trainer.anchor = 'behavior'"),
        # corrections among themselves
        ({"loss": {"correction": ["none", "icepop"]}}, r"'none' leaves every weight at 1, so it goes with no other"),
        ({"loss": {"correction": ["token_truncate", "sequence_truncate"]}}, r"the one weight of a token; name one"),
        ({"loss": {"correction": ["icepop", "icepop"]}}, r"icepop is named twice"),
        ({"loss": {"correction": []}}, r"no correction is the correction 'none'"),
        ({"loss": {"correction": "icepops"}}, r"loss.correction.0: .*'icepop'.* got 'icepops'"),
        # bounds that nothing reads
        ({"loss": {"objective": "gspo", "dual_clip": 2.0}}, r"dual_clip = 2 does .* 'gspo': .*ppo_dual_clip"),
        ({"loss": {"dual_clip": 2.0}}, r"dual_clip = 2 does nothing with objective 'ppo'"),
        (ON_R | {"loss": {"objective": "reinforce_truncated", "clip_low": 0.1}}, r"clip_low = 0.1 does nothing"),
        ({"loss": {"objective": "cispo", "gspo_clip_low": 0.1}}, r"belongs to objective = 'gspo'; drop it, or"),
        ({"loss": {"correction": "token_truncate", "token_mask_c": 3.0}}, r"nothing with correction 'token_truncate'"),
        ({"trainer": {"anchor": "ewma", "interpolation_weight": 0.5}}, r"interpolation_weight = 0.5 does nothing with"),
        # inverted thresholds
        ({"loss": {"correction": "icepop", "icepop_low": 5.0, "icepop_high": 0.5}}, r"icepop_low: .*than 1, got 5.0"),
        ({"loss": {"correction": "icepop", "icepop_high": 0.9}}, r"loss.icepop_high: .*greater than 1, got 0.9"),
        ({"loss": {"correction": "geometric_mask", "geometric_low": 1.01}}, r"loss.geometric_low: .*than 1, got 1.01"),
        ({"loss": {"objective": "cispo", "cispo_low": 1.5}}, r"loss.cispo_low: .*less than 1"),
        ({"loss": {"objective": "ppo_dual_clip", "dual_clip": 0.9}}, r"loss.dual_clip: .*greater than 1"),
        ({"loss": {"clip_low": -0.2}}, r"loss.clip_low: .*greater than 0"),
        ({"loss": {"clip_high": -0.1}}, r"loss.clip_high: .*greater than 0"),
        ({"loss": {"token_mask_c": float("nan")}}, r"loss.token_mask_c"),
        ({"loss": {"correction": "token_truncate", "token_truncate_max": float("inf")}}, r"truncate_max: .*finite"),
        # scores
        ({"trainer": {"overlong_tokens": 5000}}, r"must be < rollout.max_episode_tokens \(2048\), got 5000"),
        ({"trainer": {"overlong_penalty": 0.5}}, r"0.5 does nothing without trainer.overlong_tokens"),
        (
            {"rollout": {"drop_zero_variance": True}, "trainer": {"advantages": "batch_mean"}},
            r"drop_zero_variance .* with trainer.advantages = 'batch_mean' they have one; choose 'group_mean'",
        ),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused(sections: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(**sections)


def test_with_the_behavior_anchor_no_correction_named_means_none() -> None:
    assert parse(**ON_R).loss.correction == ("none",)
    assert parse(**ON_R, loss={"correction": "none"}).loss.correction == ("none",)
    assert parse(trainer={"anchor": "loglinear", "interpolation_weight": 0.5}).loss.correction == ("token_mask",)


@pytest.mark.parametrize(
    ("kind", "bounds", "message"),
    [
        ("icepop", {"bound": 0.5, "low": 5.0}, "0 < low < 1 < high"),
        ("geometric_mask", {"low": 1.2}, "0 < low < 1 < high"),
        ("sequence_mask", {"bound": 0.5}, "finite and > 1"),
        ("sequence_truncate", {"bound": 0.0}, "finite and > 0"),
        ("veto", {"bound": 1.0}, "between 0 and 1"),
        ("probability_difference_mask", {"bound": 1.5}, "between 0 and 1"),
        ("bernoulli_kl_mask", {"bound": float("nan")}, "finite and > 0"),
        ("token_mask", {"low": 0.3}, "no lower bound of its own"),
    ],
)
def test_a_correction_with_bounds_that_make_no_sense_is_refused(
    kind: str, bounds: dict[str, float], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        Correction(kind, **bounds)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Ppo(clip_low=1.2), "clips to"),
        (lambda: Gspo(clip_high=-1.0), "clips to"),
        (lambda: Ppo(dual_clip=1.0), "dual_clip must be finite and > 1"),
        (lambda: Cispo(low=2.0, high=0.5), "0 <= low < 1 < high"),
        (lambda: TruncatedReinforce(0.0), "must be finite and > 0"),
        (lambda: M2po(float("inf")), "must be finite and > 0"),
    ],
)
def test_an_objective_with_bounds_that_make_no_sense_is_refused(build: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build()
