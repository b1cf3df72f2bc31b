from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field, field_validator

from agentgym.config import Section, known_paths, load_config, parse_config
from agentgym.errors import ConfigError


class Rollout(Section):
    group_size: int = 8
    temperature: float = Field(default=1.0, gt=0.0)

    @field_validator("group_size")
    @classmethod
    def _siblings(cls, value: int) -> int:
        if value < 2:
            raise ValueError(f"rollout.group_size must be >= 2, got {value}")
        return value


class Model(Section):
    name: str = "tiny"
    tags: list[str] = Field(default_factory=list)
    path: Path | None = None


class Config(Section):
    rollout: Rollout = Rollout()
    model: Model = Model()
    judge: Model | None = None


def load(*overrides: str, path: Path | None = None) -> Config:
    return load_config(Config, path, overrides)


def refused(*overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load(*overrides)
    return str(caught.value)


def test_a_file_then_overrides(tmp_path: Path) -> None:
    file = tmp_path / "c.toml"
    file.write_text('[rollout]\ngroup_size = 4\ntemperature = 0.5\n[model]\nname = "big"\n', encoding="utf-8")
    config = load("rollout.group_size=6", path=file)
    assert (config.rollout.group_size, config.rollout.temperature, config.model.name) == (6, 0.5, "big")


@pytest.mark.parametrize(
    ("override", "name"),
    [("model.name=tiny", "tiny"), ('model.name="a b"', "a b"), ("model.name = x=y", "x=y"), ("model.name=", "")],
)
def test_a_bare_word_is_a_string(override: str, name: str) -> None:
    assert load(override).model.name == name


def test_overrides_are_toml_values() -> None:
    config = load('model.tags=["a", "b"]', "rollout.temperature=2", "judge.name=x")
    assert config.model.tags == ["a", "b"]
    assert config.rollout.temperature == 2.0
    assert config.judge is not None
    assert config.judge.name == "x"


def test_an_unknown_key_is_refused_with_its_path_and_the_nearest() -> None:
    assert "unknown key 'rollout.grup_size'; did you mean 'rollout.group_size'?" in refused("rollout.grup_size=4")


def test_a_key_in_the_wrong_section_finds_its_own() -> None:
    assert "unknown key 'model.temperature'; did you mean 'rollout.temperature'?" in refused("model.temperature=1")


def test_an_unknown_section_is_refused() -> None:
    assert "unknown key 'rolout'; did you mean 'rollout'?" in refused("rolout.group_size=4")


def test_a_bad_value_is_named_with_its_path() -> None:
    assert "rollout.temperature: Input should be greater than 0, got -1" in refused("rollout.temperature=-1")


def test_a_validators_own_words_are_kept() -> None:
    assert "rollout.group_size must be >= 2, got 1" in refused("rollout.group_size=1")


def test_every_problem_is_named() -> None:
    message = refused("rollout.temperature=-1", "model.nam=x")
    assert "rollout.temperature" in message
    assert "'model.nam'" in message


@pytest.mark.parametrize("override", ["rollout.group_size", "=3", "rollout..x=1", ""])
def test_what_is_no_override_is_refused(override: str) -> None:
    assert "an override must read a.b=value" in refused(override)


def test_a_value_is_no_section(tmp_path: Path) -> None:
    file = tmp_path / "c.toml"
    file.write_text("rollout = 3\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="'rollout' is a value, not a section"):
        load("rollout.group_size=4", path=file)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read the configuration .*none\.toml: No such file"):
        load(path=tmp_path / "none.toml")


@pytest.mark.parametrize("content", [b"a = ", b"\xff\xfe"])
def test_a_file_that_is_no_toml_is_named(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "c.toml"
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=r"c\.toml is not valid TOML"):
        load(path=file)


def test_known_paths_go_into_optional_sections() -> None:
    assert {"rollout", "rollout.group_size", "judge.name"} <= set(known_paths(Config))


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=12), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.sampled_from(["rollout", "model", "judge", "x"]), values, max_size=4))
def test_whatever_is_given_a_config_or_a_config_error(given_values: dict[str, Any]) -> None:
    with contextlib.suppress(ConfigError):
        assert parse_config(Config, given_values).rollout.group_size >= 2


@given(st.text(max_size=40))
def test_no_override_ends_in_another_error(override: str) -> None:
    with contextlib.suppress(ConfigError):
        load(override)


@given(st.text(alphabet=st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"]), max_size=20))
def test_a_quoted_override_is_the_text_in_the_quotes(name: str) -> None:
    assert load(f"model.name={json.dumps(name, ensure_ascii=False)}").model.name == name
