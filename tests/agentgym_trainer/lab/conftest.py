"""A model that begins to know mazes, for the laboratories' tests: seconds to build, shared by all of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from agentgym_trainer.lab.staleness import lab_config
from agentgym_trainer.models import tiny
from agentgym_trainer.settings import TrainConfig
from agentgym_trainer.tiny import Recipe


@pytest.fixture(scope="session")
def maze_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    recipe = replace(Recipe(), episodes=800, steps=150)
    return tiny("maze", 0, tmp_path_factory.mktemp("cache"), lambda text: None, recipe)


@pytest.fixture
def small_lab(maze_model: Path) -> list[str]:
    """Settings of a lab whose runs take a second or two."""
    return [
        f"model.name={maze_model}", "rollout.groups_per_step=3", "engine.slots=24", "trainer.steps=4",
        "evaluation.episodes=8",
    ]  # fmt: skip


@pytest.fixture
def small_config(small_lab: list[str]) -> TrainConfig:
    return lab_config(small_lab)
