"""A configuration that cannot run is refused with its path, its value and the mend."""

from pathlib import Path

import pytest
import torch

from agentgym.config import load_config, parse_config
from agentgym.errors import ConfigError, UnavailableError
from agentgym_trainer import preflight
from agentgym_trainer.settings import TrainConfig

CONFIGS = Path(__file__).parents[2] / "configs"


def parse(**sections):
    return parse_config(TrainConfig, {"env": {"id": "maze"}, **sections})


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.toml")), ids=lambda path: path.stem)
def test_bundled_configurations_are_valid(path):
    assert load_config(TrainConfig, path).run.name == path.stem


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"rollout": {"group_size": 1}}, r"rollout.group_size:? must be >= 2 for group advantages, got 1"),
        ({"trainer": {"anchor": "snapshoot"}}, r"trainer.anchor: .*'snapshot'.* got 'snapshoot'"),
        ({"trainer": {"stepz": 3}}, r"unknown key 'trainer.stepz'; did you mean 'trainer.steps'"),
        ({"lossy": {}}, r"unknown key 'lossy'; did you mean 'loss'"),
        ({"loss": {"token_mask_c": 0.5}}, r"loss.token_mask_c: .*greater than 1.* got 0.5"),
        (
            {"rollout": {"cipo": {}}, "trainer": {"advantages": "batch_mean"}},
            r"rollout.cipo needs baselines of groups, .*'batch_mean'.* choose 'group_mean'",
        ),
        ({"trainer": {"updates_per_batch": 99}}, r"updates_per_batch \(99\) must be <= rollout.groups_per_step"),
        (
            {"trainer": {"anchor": "interrupt", "updates_per_batch": 2}},
            r"'interrupt' .* one optimizer step per publication, trainer.updates_per_batch = 1, got 2",
        ),
        (
            {"trainer": {"anchor": "interrupt"}, "engine": {"publish_mode": "keep"}},
            r"engine.publish_mode must be 'abort', got 'keep'",
        ),
        (
            {"trainer": {"anchor": "snapshot", "anchor_fallback": "ewma"}},
            r"anchor_fallback does nothing with trainer.anchor = 'snapshot': .*'auto' or 'old_logit_model' or 'inter",
        ),
        ({"trainer": {"anchor": "auto", "anchor_fallback": "snapshot"}}, r"trainer.anchor_fallback"),
        ({"trainer": {"old_logit_device": "cpu"}}, r"old_logit_device does nothing with trainer.anchor = 'auto'"),
        ({"trainer": {"old_logit_queue_tokens": 9}}, r"old_logit_queue_tokens does nothing"),
        ({"trainer": {"interrupt_limit_s": 9.0}}, r"interrupt_limit_s does nothing .* choose 'interrupt'"),
        ({"run": {"name": "../x"}}, r"run.name"),
        ({"trainer": {"betas": [0.9, 1.5]}}, r"trainer.betas: must be two numbers .* below 1.* got \[0.9, 1.5\]"),
        ({"trainer": {"learning_rate": float("inf")}}, r"trainer.learning_rate: .*finite.* got inf"),
        ({"trainer": {"max_sequence_tokens": 0}}, r"trainer.max_sequence_tokens: .*equal to 2, got 0"),
        ({"trainer": {"probe_tokens": 1}}, r"trainer: probe_tokens must be 0 \(none\) or >= 2"),
        ({"trainer": {"probe_tokens": 0, "probe_tolerance": 0.1}}, r"probe_tolerance = 0.1 does nothing"),
        ({"loss": {"clip_high": float("inf")}}, r"loss.clip_high: .*finite.* got inf"),
        ({"loss": {"entropy_coefficient": float("inf")}}, r"loss.entropy_coefficient: .*finite.* got inf"),
    ],
)
def test_bad_values_name_path_value_and_mend(sections, message):
    with pytest.raises(ConfigError, match=message):
        parse(**sections)


def test_a_tracker_that_is_not_installed_is_refused_by_name(monkeypatch):
    monkeypatch.setattr(preflight.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UnavailableError, match="'wandb', which is not installed: pip install wandb"):
        preflight.check(parse(trainer={"trackers": ["wandb"]}))


def test_one_seed_serves_every_section_that_names_none():
    seeded = parse(run={"seed": 7}, model={"seed": 3})
    assert (seeded.rollout.seed, seeded.model.seed) == (7, 3)


def test_the_service_gets_exactly_its_sections():
    asked = parse(rollout={"group_size": 4}, trainer={"steps": 3})
    assert asked.service().rollout.group_size == 4
    assert not hasattr(asked.service(), "trainer")


def test_bfloat16_is_refused_where_nothing_multiplies_it(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(preflight, "cpu_has_bfloat16", lambda: False)
    with pytest.raises(UnavailableError, match=r"trainer.dtype=bfloat16 needs .* use trainer.dtype=float32"):
        preflight.check(parse(trainer={"dtype": "bfloat16"}))
    monkeypatch.setattr(preflight, "cpu_has_bfloat16", lambda: True)
    preflight.check(parse(trainer={"dtype": "bfloat16"}))


def test_without_an_environment_nothing_is_evaluated() -> None:
    values = {"model": {"name": "/a/folder"}, "rollout": {"source": "sessions"}}
    with pytest.raises(ConfigError, match=r"evaluation\.episodes must be 0 without env\.id"):
        parse_config(TrainConfig, values)
    assert parse_config(TrainConfig, values | {"evaluation": {"episodes": 0}}).env.id == "outside"


def test_a_device_that_is_not_here_is_refused_before_any_work():
    config = parse(trainer={"anchor": "old_logit_model", "old_logit_device": "tpu9"})
    with pytest.raises(UnavailableError, match=r"trainer.old_logit_device 'tpu9' is no device of this machine"):
        preflight.check(config)
    preflight.check(parse(trainer={"anchor": "old_logit_model", "old_logit_device": "cpu"}))
