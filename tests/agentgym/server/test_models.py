"""From a name to a model's folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from agentgym.errors import InputError, UnavailableError, UnknownNameError
from agentgym.server import models
from agentgym.server.models import resolve_model


class Builder:
    """An entry point as importlib.metadata gives it."""

    def __init__(self, name: str, missing: str | None = None) -> None:
        self.name = name
        self.missing = missing
        self.built: list[tuple[str, int, Path]] = []

    def load(self) -> Callable[..., Path]:
        if self.missing is not None:
            raise ModuleNotFoundError(f"No module named {self.missing!r}", name=self.missing)

        def build(env_id: str, seed: int, cache: Path, report: Callable[[str], None]) -> Path:
            report(f"building for {env_id}")
            self.built.append((env_id, seed, cache))
            return cache / self.name

        return build


@pytest.fixture
def builders(monkeypatch: pytest.MonkeyPatch) -> list[Builder]:
    found = [Builder("tiny"), Builder("huge", missing="torch")]
    monkeypatch.setattr(models, "entry_points", lambda group: found if group == "agentgym.models" else [])
    return found


def test_a_builder_is_called_with_environment_seed_and_cache(builders: list[Builder], tmp_path: Path) -> None:
    said: list[str] = []
    folder = resolve_model("tiny", "agentgym/Maze-v0", 3, cache=tmp_path, report=said.append)
    assert folder == tmp_path / "tiny"
    assert builders[0].built == [("agentgym/Maze-v0", 3, tmp_path)]
    assert said == ["building for agentgym/Maze-v0"]


def test_the_cache_follows_the_environment(
    builders: list[Builder], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert resolve_model("tiny", "e", 0) == tmp_path / "agentgym" / "tiny"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert resolve_model("tiny", "e", 0) == tmp_path / "home" / ".cache" / "agentgym" / "tiny"


def test_a_builder_without_its_packages_says_what_to_install(builders: list[Builder]) -> None:
    with pytest.raises(UnavailableError, match=r"model 'huge' needs torch: pip install 'agentgym-rl\[train\]'"):
        resolve_model("huge", "e", 0)


def test_a_folder_that_holds_a_model(builders: list[Builder], tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"holds no config\.json"):
        resolve_model(str(tmp_path), "e", 0)
    (tmp_path / "config.json").write_text("{}")
    assert resolve_model(str(tmp_path), "e", 0) == tmp_path


@pytest.mark.parametrize("name", ["tinny", "/no/such/folder", ""])
def test_an_unknown_name_is_told_the_nearest(builders: list[Builder], name: str) -> None:
    with pytest.raises(UnknownNameError, match="unknown model") as caught:
        resolve_model(name, "e", 0)
    assert ("did you mean 'tiny'" in str(caught.value)) == (name == "tinny")


def test_the_bundled_models_are_registered() -> None:
    from importlib.metadata import entry_points

    assert {"tiny", "smollm2-135m"} <= {point.name for point in entry_points(group=models.GROUP)}
