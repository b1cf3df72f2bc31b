"""A `[trainer.lora]` that cannot run is refused with its path, its value and the mend."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaForCausalLM

from agentgym.config import parse_config
from agentgym.errors import ConfigError, UnavailableError
from agentgym_trainer import preflight
from agentgym_trainer.lora import adapt, require_targets
from agentgym_trainer.settings import LoraSection, TrainConfig

MakeModel = Callable[..., LlamaForCausalLM]
LORA = {"rank": 2, "alpha": 6}


def config_of(lora: dict[str, Any]) -> TrainConfig:
    return parse_config(TrainConfig, {"env": {"id": "maze"}, "trainer": {"lora": lora}})


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"rank": 0}, r"trainer\.lora\.rank: .*greater than or equal to 1, got 0"),
        ({}, r"trainer\.lora\.rank is required"),
        ({"rank": 4, "alpha": 0}, r"trainer\.lora\.alpha: .*got 0"),
        ({"rank": 4, "dropout": 0.1}, r"trainer\.lora\.dropout: must be 0, got 0.1: old logprobs"),
        ({"rank": 4, "target_modules": []}, r"trainer\.lora\.target_modules"),
        ({"rank": 4, "targets": "x"}, r"unknown key 'trainer\.lora\.targets'; did you mean 'trainer\.lora\."),
    ],
)
def test_bad_sections_name_path_value_and_mend(section: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config_of(section)


@pytest.mark.parametrize("lora", [{}, {"lora": LORA}])
def test_an_engine_that_would_round_what_is_published_is_refused(lora: dict[str, Any]) -> None:
    sections = {"env": {"id": "maze"}, "engine": {"dtype": "bfloat16"}}
    with pytest.raises(ConfigError, match=r"trainer\.publish_dtype must be 'bfloat16' where engine\.dtype is 'bfl"):
        parse_config(TrainConfig, {**sections, "trainer": lora})
    parse_config(TrainConfig, {**sections, "trainer": {**lora, "publish_dtype": "bfloat16"}})


def test_servers_are_started_for_the_rank_that_is_published() -> None:
    sections = {"env": {"id": "maze"}, "trainer": {"lora": LORA}}
    assert parse_config(TrainConfig, {**sections, "engine": {"kind": "vllm"}}).service().engine.max_lora_rank == 2
    assert parse_config(TrainConfig, sections).service().engine.max_lora_rank is None
    with pytest.raises(ConfigError, match=r"engine\.max_lora_rank \(1\) must be >= trainer\.lora\.rank \(2\)"):
        parse_config(TrainConfig, {**sections, "engine": {"kind": "vllm", "max_lora_rank": 1}})


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (["q_proj", "query"], r"names 'query', which the model has not; its linear layers are down_proj, gate_proj"),
        (["lm_head"], r"names the output layer 'lm_head', .* other linear layers are down_proj, gate_proj, k_proj"),
    ],
)
def test_unknown_targets_are_refused_with_those_that_exist(
    make_model: MakeModel, tmp_path: Path, targets: list[str], message: str
) -> None:
    make_model().save_pretrained(tmp_path)
    section = LoraSection(rank=2, target_modules=targets)
    with pytest.raises(ConfigError, match=message):
        require_targets(tmp_path, section)
    with pytest.raises(ConfigError, match=message):
        adapt(make_model(), section, base_dtype="float32", compute_dtype="float32")


def test_a_missing_peft_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UnavailableError, match=r"trainer\.lora needs the package peft: pip install"):
        preflight.check(config_of(LORA))
