"""The commands of the laboratories, mounted as `agentgym lab` through the entry-point group `agentgym.commands`. What
is heavy is imported inside a command."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from agentgym.errors import ConfigError

app = typer.Typer(help="Laboratories: what staleness and engine mismatch do, measured.", no_args_is_help=True)


@app.callback()
def _lab() -> None:
    """Laboratories: what staleness and engine mismatch do, measured."""


@app.command()
def staleness(
    settings: Annotated[
        list[str] | None,
        typer.Argument(help="A TOML file, and key=value for any key of it.", metavar="[CONFIG] [KEY=VALUE]..."),
    ] = None,
    lags: Annotated[str, typer.Option(help="Versions between sampling and training; `full`: 0,1,2,4,8,16.")] = "0,4,8",
    anchors: Annotated[str, typer.Option(help="Sources of proximal logprobs.")] = "snapshot,ewma,resident",
    corrections: Annotated[str, typer.Option(help="How r_d is handled, names of loss.correction.")] = "token_mask",
    updates: Annotated[str, typer.Option(help="Optimizer steps per batch.")] = "1",
    seeds: Annotated[str, typer.Option(help="Of model, tasks and sampling; confidence intervals are over them.")] = (
        "0,1,2"
    ),
    mismatch: Annotated[
        str, typer.Option(help="What is wrong with the engine on purpose: none, bf16 or logits:SCALE.")
    ] = "bf16",
    partial: Annotated[bool, typer.Option(help="Rows hold several versions, from the lag's to the newest.")] = False,
    jobs: Annotated[int, typer.Option(min=1, help="Runs at a time, each on one core.")] = 1,
    windows: Annotated[str, typer.Option(help="Lag windows of law F.")] = "0,4,8,16",
    floor: Annotated[
        Path, typer.Option(help="The stored line of `python -m benchmarks logprob_conformance`, shown beside law F.")
    ] = Path("benchmarks/results/logprob_conformance.json"),
    report_only: Annotated[bool, typer.Option("--report-only", help="Run nothing: report what is there.")] = False,
    out: Annotated[Path, typer.Option(help="The lab's folder; a lab that was stopped goes on in it.")] = (
        Path("runs/staleness")
    ),
) -> None:
    """What staleness does under each anchor: law F, active fractions, cost and reward; writes report.html and .json."""
    from rich.console import Console

    from agentgym_trainer.lab.cell import Conditions
    from agentgym_trainer.lab.grid import Grid
    from agentgym_trainer.lab.staleness import ALL_LAGS, LabOptions, lab_config, run_lab

    config = lab_config(settings or [])
    grid = Grid(
        ALL_LAGS if lags == "full" else _numbers("lags", lags), _names(anchors), _names(corrections),
        _numbers("updates", updates), _numbers("seeds", seeds),
    )  # fmt: skip
    options = LabOptions(
        grid, Conditions(mismatch, partial), out, jobs, shlex.join(["agentgym", *sys.argv[1:]]), floor,
        _numbers("windows", windows), report_only,
    )  # fmt: skip
    print(run_lab(config, options, Console(stderr=True)))


def _names(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _numbers(option: str, text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in _names(text))
    except ValueError as error:
        raise ConfigError(f"--{option} takes whole numbers separated by commas, got {text!r}") from error
