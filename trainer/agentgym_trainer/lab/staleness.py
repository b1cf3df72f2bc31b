"""The staleness lab: law F on one frozen stream, short runs over lags, anchors, corrections and seeds, and the report.

Law: every figure of the report is in its JSON, and the folder holds what each of them was computed from.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from transformers.utils.logging import disable_progress_bar

from agentgym.config import load_config
from agentgym.errors import CheckpointError, ConfigError, TrainingError
from agentgym.server.models import resolve_model
from agentgym_trainer.anchors import RECORDED
from agentgym_trainer.lab.cell import Cell, Conditions, use_one_core
from agentgym_trainer.lab.cost import BASELINE, CostPlan, measure_cost
from agentgym_trainer.lab.distortion import Distortion
from agentgym_trainer.lab.grid import Finished, Forecast, Grid, LabFolder, run_cells, write_whole
from agentgym_trainer.lab.report import make_report, read_floor, write_report
from agentgym_trainer.lab.stream import WINDOWS, StreamPlan, measure_stream
from agentgym_trainer.settings import TrainConfig

ALL_LAGS = (0, 1, 2, 4, 8, 16)
RECIPE = Path(__file__).with_name("recipe.toml")


@dataclass(frozen=True, slots=True)
class LabOptions:
    """What a staleness lab is asked for.

    Example: `LabOptions(Grid((0, 4, 8), ("snapshot", "ewma", "resident"), ("token_mask",), (1,), (0, 1, 2)),
    Conditions(), out=Path("runs/staleness"), jobs=2, command="agentgym lab staleness", floor=Path("floor.json"))`.
    """

    grid: Grid
    conditions: Conditions
    out: Path
    jobs: int
    command: str  # as it was typed, for the report
    floor: Path  # the stored line of `python -m benchmarks logprob_conformance`; it need not be there
    windows: tuple[int, ...] = WINDOWS  # of law F
    report_only: bool = False  # run nothing: report what earlier labs have left


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
    if config.evaluation.episodes < 1:
        raise ConfigError("evaluation.episodes must be >= 1: held-out reward is what runs are compared by")
    without_service = {
        "trainer.lora": config.trainer.lora is not None,
        "engine.kind": config.engine.kind != "torch",
        "rollout.source": config.rollout.source != "environment",
        "rollout.drop_zero_variance": config.rollout.drop_zero_variance,
    }
    for key, is_set in without_service.items():
        if is_set:
            raise ConfigError(f"{key} does nothing in the staleness lab, which has no rollout service: leave it out")
    recorded = sorted(set(options.grid.anchors) & set(RECORDED))
    if recorded:
        raise ConfigError(
            f"{', '.join(recorded)} scores while a rollout service samples, and the lab has none; its old logprobs are "
            "those of snapshot"
        )
    if options.jobs < 1:
        raise ConfigError(f"jobs must be >= 1, got {options.jobs}")
    if max(options.grid.lags) >= config.trainer.steps:
        raise ConfigError(
            f"at lag {max(options.grid.lags)} a run of trainer.steps={config.trainer.steps} never trains on what it "
            "has learned; take more steps or smaller lags"
        )


def run_lab(config: TrainConfig, options: LabOptions, console: Console) -> Path:
    """Law F, the grid, the report; returns the page. What an earlier lab in the same folder finished is not done
    again. Raises TrainingError, after all others ran, if runs failed; the report is of the others then."""
    check_options(config, options)
    use_one_core()
    disable_progress_bar()
    folder = LabFolder(options.out, config, options.conditions)
    law_f = _law_f(config, options, console)
    cells = options.grid.cells()
    failed = [] if options.report_only else run_grid(folder, cells, options.jobs, console)
    results = folder.kept(cells)
    if not results:
        raise TrainingError(f"{options.out} holds no result of this grid: " + ("; ".join(failed) or "nothing was run"))
    report = make_report(
        config, options.grid, options.conditions, options.command, results, law_f, read_floor(options.floor),
        _costs(config, options, console),
    )  # fmt: skip
    page = write_report(options.out, report)
    if failed:
        raise TrainingError(f"{len(failed)} of {len(cells)} runs failed, {page} is of the others: " + "; ".join(failed))
    return page


def _law_f(config: TrainConfig, options: LabOptions, console: Console) -> dict[str, Any]:
    """Measured once for a plan, and remembered."""
    anchors = tuple(anchor for anchor in options.grid.anchors if anchor != "behavior")  # its r_d is 1 by definition
    plan = StreamPlan(
        windows=options.windows, anchors=anchors or StreamPlan().anchors, groups=config.rollout.groups_per_step,
        mismatch=options.conditions.mismatch, seed=min(options.grid.seeds),
    )  # fmt: skip

    def measure() -> dict[str, Any]:
        console.print("law F: one frozen stream, seen by every anchor", highlight=False)
        return measure_stream(config, plan, lambda line: console.print(line, markup=False, highlight=False))

    return _remembered(options.out / "law_f.json", plan, measure)


def _costs(config: TrainConfig, options: LabOptions, console: Console) -> dict[str, Any]:
    """Of the lab's own model under the grid's anchors."""
    folder = resolve_model(config.model.name, config.env.id, min(options.grid.seeds))
    plan = CostPlan(
        model=str(folder), anchors=(BASELINE, *options.grid.anchors), rows=32, tokens=128, repetitions=5,
        publish_dtype=config.trainer.publish_dtype,
    )  # fmt: skip

    def measure() -> dict[str, Any]:
        console.print("cost: one optimizer step under each anchor", highlight=False)
        return measure_cost(plan, lambda line: None)

    measured = _remembered(options.out / "cost.json", plan, measure)
    return measured | {"plan": measured["plan"] | {"model": config.model.name}}


def _remembered(path: Path, plan: Any, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What was measured for this plan, by this lab or one before it in the folder."""
    described = json.loads(json.dumps(asdict(plan)))
    try:
        known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}; remove it, and it is measured again") from error
    if known.get("plan") == described:
        return known["figures"]
    figures = measure()
    write_whole(path, json.dumps({"plan": described, "figures": figures}) + "\n")
    return figures


def run_grid(folder: LabFolder, cells: Sequence[Cell], jobs: int, console: Console) -> list[str]:
    """Runs what has no result yet; returns what failed, a line a cell."""
    failed: list[str] = []
    with _Shown(len(cells), jobs, console) as shown:

        def done(finished: Finished) -> None:
            shown.add(finished)
            if finished.error is not None:
                failed.append(f"{finished.cell.name}: {finished.error}")

        run_cells(folder, cells, jobs, done)
    return failed


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
