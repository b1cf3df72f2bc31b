"""The commands of the laboratories, mounted as `agentgym lab` through the entry-point group `agentgym.commands`. What is
heavy is imported inside a command."""

from __future__ import annotations

import typer

app = typer.Typer(help="Laboratories: what staleness and engine mismatch do, measured.", no_args_is_help=True)


@app.callback()
def _lab() -> None:
    """Laboratories: what staleness and engine mismatch do, measured."""
