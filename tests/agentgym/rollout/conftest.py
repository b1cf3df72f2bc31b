"""The tokenizer and template of a tiny maze model, without a model."""

from __future__ import annotations

from pathlib import Path

import pytest

from agentgym.render import ChatTemplateRenderer, load_renderer
from agentgym.rollout.demonstrations import Mixture, write_demonstrations


@pytest.fixture(scope="session")
def maze_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("maze-tokenizer")
    write_demonstrations("maze", 200, 0, folder, Mixture())
    return folder


@pytest.fixture(scope="session")
def renderer(maze_folder: Path) -> ChatTemplateRenderer:
    return load_renderer(maze_folder, "plain")
