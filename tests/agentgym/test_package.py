"""The public names of `agentgym`, and what importing it must not import."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import agentgym as ag

HEAVY = ("torch", "transformers", "docker", "accelerate", "fastapi", "gymnasium", "pydantic", "matplotlib", "openai")
ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("module", "forbidden"),
    [("agentgym", HEAVY), ("agentgym.cli", ("torch", "transformers", "docker", "accelerate", "fastapi", "matplotlib"))],
)
def test_importing_imports_nothing_heavy(module: str, forbidden: tuple[str, ...]) -> None:
    source = f"import sys, {module}; print(*sorted(set({forbidden!r}) & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=True)
    assert result.stdout.split() == []


def test_every_public_name_is_there() -> None:
    for name in ag.__all__:
        assert getattr(ag, name) is not None
    assert dir(ag) == sorted(ag.__all__)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        ag.nonsense  # noqa: B018


def test_the_version_is_that_of_the_distribution() -> None:
    assert ag.__version__ == tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]


def test_every_room_of_the_core_has_a_floor() -> None:
    """import-linter says nothing about a module that no layer names."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"][
        "contracts"
    ]
    floors = next(contract["layers"] for contract in contracts if contract["type"] == "layers")
    named = {name for layer in floors for name in layer.replace("|", " ").replace(":", " ").split()}
    places = [path for path in (ROOT / "agentgym").iterdir() if not path.name.startswith(("_", "."))]
    rooms = {f"agentgym.{path.stem}" for path in places if path.is_dir() or path.suffix == ".py"}
    assert rooms | {"agentgym_envs", "agentgym_trainer"} == named


def test_the_distribution_is_typed() -> None:
    assert (ROOT / "agentgym" / "py.typed").exists()
