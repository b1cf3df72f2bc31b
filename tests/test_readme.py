"""What README.md says, done: its environment plays and trains, and its commands exist."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer.main

from agentgym.cli import build_app

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
AGENTGYM = (sys.executable, "-m", "agentgym.cli")
SMALL = ("trainer.steps=2", "rollout.groups_per_step=4", "rollout.in_flight=32", "evaluation.episodes=16")


def blocks(path: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", path.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def commands() -> list[str]:
    """Every command line of the pages, comments cut, continued lines joined; those in tables too."""
    lines = [
        line.split("  #")[0].strip()
        for page in PAGES
        for block in blocks(page, "bash")
        for line in block.replace("\\\n", " ").splitlines()
    ]
    text = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
    lines += re.findall(r"`((?:agentgym|make) [^`<]+)`", text)
    return sorted({line.strip() for line in lines if line.strip()})


@pytest.fixture
def readme_environment(tmp_path: Path) -> Path:
    (source,) = blocks(ROOT / "README.md", "python")
    (tmp_path / "my_env.py").write_text(source, encoding="utf-8")
    return tmp_path


def test_the_environment_has_25_lines() -> None:
    (source,) = blocks(ROOT / "README.md", "python")
    assert len([line for line in source.splitlines() if line.strip()]) <= 25


def test_the_environment_plays(readme_environment: Path) -> None:
    command = next(line for line in commands() if line.startswith("agentgym eval my_env.py"))
    arguments = [*shlex.split(command)[1:], "--episodes", "20", "--json"]
    result = subprocess.run(
        [*AGENTGYM, *arguments], capture_output=True, text=True, cwd=readme_environment, timeout=280
    )
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["mean_reward"] == 1.0


@pytest.mark.timeout(900)
def test_the_environment_trains(readme_environment: Path) -> None:
    command = next(line for line in commands() if line.startswith("agentgym train") and "my_env.py" in line)
    arguments = [*shlex.split(command)[1:], *SMALL]
    arguments[arguments.index("configs/quickstart.toml")] = str(ROOT / "configs" / "quickstart.toml")
    environment = {**os.environ, "XDG_CACHE_HOME": str(readme_environment / "cache")}
    result = subprocess.run(
        [*AGENTGYM, *arguments], capture_output=True, text=True, cwd=readme_environment, env=environment, timeout=850
    )
    assert result.returncode == 0, result.stderr
    folder = readme_environment / "runs" / "my_env"
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["step"] for row in rows] == [1, 2]
    assert {"reward_before", "reward_after"} <= set(json.loads((folder / "summary.json").read_text(encoding="utf-8")))
    assert (folder / "reward.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("command", [line for line in commands() if line.startswith("make")])
def test_every_make_command_has_its_target(command: str) -> None:
    result = subprocess.run(["make", "-n", *shlex.split(command)[1:]], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("command", [line for line in commands() if line.startswith("agentgym")])
def test_every_agentgym_command_can_be_parsed(command: str) -> None:
    parser = typer.main.get_command(build_app())
    words = shlex.split(command)[1:]
    while hasattr(parser, "commands"):
        parser = parser.commands[words.pop(0)]  # pyright: ignore[reportAttributeAccessIssue]
    if words:  # else the text only names the command
        parser.make_context("agentgym", words)
    for word in words:
        if word.startswith("configs/"):
            assert (ROOT / word).exists()


def test_links_between_pages_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
