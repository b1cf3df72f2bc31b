"""The trainer's commands, mounted under `agentgym` through the entry-point group `agentgym.commands`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def train(
    config: Annotated[Path, typer.Argument(help="A TOML file; with --resume, a run folder.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, e.g. trainer.steps=10")] = None,
    resume: Annotated[bool, typer.Option(help="Continue the run in folder CONFIG.")] = False,
) -> None:
    """Train a policy by reinforcement learning; leaves a folder with config, metrics, trajectories and a plot."""
    from agentgym.config import load_config
    from agentgym_trainer.loop import train as run
    from agentgym_trainer.run_folder import RunFolder
    from agentgym_trainer.settings import TrainConfig

    folder = RunFolder.existing(config) if resume else None
    source = folder.path / "config.toml" if folder else config
    run(load_config(TrainConfig, source, overrides or ()), resume=folder)
