"""The staleness lab: law F on one frozen stream, short runs over lags, anchors, corrections and seeds, and the report.

Law: every figure of the report is in its JSON, and the folder holds what each of them was computed from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from agentgym.config import load_config
from agentgym.errors import ConfigError, TrainingError
from agentgym_trainer.lab.cell import Conditions
from agentgym_trainer.lab.distortion import Distortion
from agentgym_trainer.lab.grid import Finished, Forecast, Grid, LabFolder, run_cells
from agentgym_trainer.settings import TrainConfig

ALL_LAGS = (0, 1, 2, 4, 8, 16)
RECIPE = Path(__file__).with_name("recipe.toml")


@dataclass(frozen=True, slots=True)
class LabOptions:
    """What a staleness lab is asked for.

    Example: `LabOptions(Grid((0, 4, 8), ("snapshot", "ewma", "resident"), ("token_mask",), (1,), (0, 1, 2)),
    Conditions(), out=Path("runs/staleness"), jobs=2, command="agentgym lab staleness")`.
    """

    grid: Grid
    conditions: Conditions
    out: Path
    jobs: int
    command: str  # as it was typed, for the report


def lab_config(settings: Sequence[str]) -> TrainConfig:
    """The lab's recipe, or the TOML file that comes first, with `key=value` overrides. Raises ConfigError."""
    if settings and "=" not in settings[0]:
        return load_config(TrainConfig, Path(settings[0]), settings[1:])
    return load_config(TrainConfig, RECIPE, settings)


def check_options(config: TrainConfig, options: LabOptions) -> None:
    """Raises ConfigError for what would do nothing, before any work starts."""
    distortion = Distortion.parse(options.conditions.mismatch)
    if distortion.kind == "bf16" and config.trainer.publish_dtype == "bfloat16":
        raise ConfigError("mismatch bf16 does nothing where trainer.publish_dtype = 'bfloat16'; take logits:SCALE")
    if options.jobs < 1:
        raise ConfigError(f"jobs must be >= 1, got {options.jobs}")
    if max(options.grid.lags) >= config.trainer.steps:
        raise ConfigError(
            f"at lag {max(options.grid.lags)} a run of trainer.steps={config.trainer.steps} never trains on what it "
            "has learned; take more steps or smaller lags"
        )


def run_grid(config: TrainConfig, options: LabOptions, console: Console) -> list[dict[str, Any]]:
    """Every cell's result, in the grid's order. Raises TrainingError, after all others ran, if cells failed."""
    cells = options.grid.cells()
    folder = LabFolder(options.out, config, options.conditions)
    results: dict[str, dict[str, Any]] = {}
    failed: list[str] = []
    with _Shown(len(cells), options.jobs, console) as shown:

        def done(finished: Finished) -> None:
            shown.add(finished)
            if finished.result is not None:
                results[finished.cell.name] = finished.result
            else:
                failed.append(f"{finished.cell.name}: {finished.error}")

        run_cells(folder, cells, options.jobs, done)
    if failed:
        raise TrainingError(f"{len(failed)} of {len(cells)} runs failed, the others are kept: " + "; ".join(failed))
    return [results[cell.name] for cell in cells]


class _Shown:
    """The progress of a grid: a bar on a terminal, elsewhere a line a cell; and how long the rest will take."""

    def __init__(self, total: int, jobs: int, console: Console) -> None:
        self._total, self._done, self._console = total, 0, console
        self._forecast = Forecast(jobs)
        self._bar = Progress(
            TextColumn("run"), MofNCompleteColumn(), BarColumn(bar_width=24), TimeElapsedColumn(),
            TextColumn("{task.fields[left]}"), console=console, disable=not console.is_terminal,
        )  # fmt: skip
        self._task = self._bar.add_task("cells", total=total, left="the first run will say how long")

    def __enter__(self) -> _Shown:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def add(self, finished: Finished) -> None:
        self._done += 1
        if finished.result is None:
            line = f"{finished.cell.name}: {finished.error}"
        else:
            line = f"{finished.cell.name}: held-out reward {finished.result['heldout_reward']:.3f}"
            line += " (from before)" if finished.stored else f", {finished.result['seconds']:.0f} s"
            if not finished.stored:
                self._forecast.add(finished.result["seconds"])
        left = self._forecast.left_s(self._total - self._done)
        remaining = "" if left is None else f"about {left / 60:.0f} min left"
        self._bar.update(self._task, completed=self._done, left=remaining)
        self._console.print(
            f"{self._done}/{self._total} {line}" + (f"; {remaining}" if remaining else ""),
            markup=False, highlight=False, soft_wrap=True,
        )  # fmt: skip
