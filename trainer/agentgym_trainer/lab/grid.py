"""The cells of a lab, run and remembered. Law: a cell's result is one file, whole or absent, so that a lab that was
killed goes on where it was, and a lab that is asked for more runs only what is new. Never mixes results of different
configurations.
"""

from __future__ import annotations

import concurrent.futures
import json
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from transformers.utils.logging import disable_progress_bar

from agentgym.errors import AgentGymError, CheckpointError, ConfigError, InputError, TrainingError
from agentgym_trainer.lab.cell import Cell, Conditions, cell_config, run_cell, use_one_core
from agentgym_trainer.settings import TrainConfig

# What a cell sets itself: two labs that differ in these alone share their results.
_CELL_KEYS = {
    "run": ("name", "seed", "dir"), "model": ("seed",), "rollout": ("seed", "max_staleness"),
    "trainer": ("anchor", "updates_per_batch"), "loss": ("correction",),
}  # fmt: skip
Report = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Grid:
    """Which runs. Seeds outermost: a lab that is stopped early has whole comparisons over fewer seeds.

    Example: `Grid(lags=(0, 4, 8), anchors=("snapshot", "ewma", "resident"), corrections=("token_mask",),
    updates=(1,), seeds=(0, 1, 2))` has 27 cells.
    """

    lags: tuple[int, ...]
    anchors: tuple[str, ...]
    corrections: tuple[str, ...]
    updates: tuple[int, ...]
    seeds: tuple[int, ...]

    def __post_init__(self) -> None:
        for name, values in asdict(self).items():
            if not values or len(set(values)) != len(values):
                raise ConfigError(f"a grid needs one or more different {name}, got {list(values)}")
        low = [value for values in (self.lags, self.seeds) for value in values if value < 0]
        if low or min(self.updates) < 1:
            raise ConfigError(f"lags and seeds must be >= 0 and updates >= 1, got {asdict(self)}")

    def cells(self) -> list[Cell]:
        """`behavior` has no r_d to correct: it is run once, with correction `none`, whatever corrections are asked."""
        chosen: dict[Cell, None] = {}
        for seed in self.seeds:
            for updates in self.updates:
                for lag in self.lags:
                    for correction in self.corrections:
                        for anchor in self.anchors:
                            handled = "none" if anchor == "behavior" else correction
                            chosen[Cell(lag, anchor, handled, updates, seed)] = None
        return list(chosen)


class LabFolder:
    """Where results lie: `lab.json` says under which configuration, `cells/NAME.json` is one result."""

    def __init__(self, path: Path, base: TrainConfig, conditions: Conditions) -> None:
        """Opens or makes the folder. Raises InputError if it holds another configuration's results."""
        self.path = path
        self.base, self.conditions = base, conditions
        setting = {"config": _without_cell_keys(base), "conditions": asdict(conditions)}
        text = json.dumps(setting, indent=2, sort_keys=True)
        try:
            (path / "cells").mkdir(parents=True, exist_ok=True)
            known = path / "lab.json"
            if known.exists() and json.loads(known.read_text(encoding="utf-8")) != json.loads(text):
                raise InputError(
                    f"{path} holds results of another configuration ({_difference(known, text)}); give another --out"
                )
            write_whole(known, text + "\n")
        except (OSError, ValueError) as error:
            if isinstance(error, InputError):
                raise
            raise CheckpointError(f"the lab's folder {path} cannot be used: {error}") from error

    def result(self, cell: Cell) -> dict[str, Any] | None:
        """What the cell came to, or None while it has not been run to its end."""
        try:
            return json.loads((self.path / "cells" / f"{cell.name}.json").read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise CheckpointError(f"the result of {cell.name} in {self.path} cannot be read: {error}") from error

    def kept(self, cells: Sequence[Cell]) -> list[dict[str, Any]]:
        """The results that are there, in the order of the cells."""
        return [result for cell in cells if (result := self.result(cell)) is not None]

    def keep(self, cell: Cell, result: Mapping[str, Any]) -> None:
        write_whole(self.path / "cells" / f"{cell.name}.json", json.dumps(result) + "\n")


def write_whole(path: Path, text: str) -> None:
    """Raises CheckpointError when the disk refuses."""
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be written: {error.strerror}") from error


def run_cells(folder: LabFolder, cells: Sequence[Cell], jobs: int, done: Callable[[Finished], None]) -> None:
    """Runs what has no result yet, `jobs` at a time, each in a process of its own that works on one core; `done` hears
    of each cell as it ends, those of earlier labs first. Raises ConfigError, before anything runs, for cells that the
    configuration refuses, and TrainingError if a process dies."""
    configs = {cell: _checked(folder.base, cell) for cell in cells}
    waiting = []
    for cell in cells:
        result = folder.result(cell)
        if result is None:
            waiting.append(cell)
        else:
            done(Finished(cell, result, None, stored=True))
    if not waiting:
        return
    spawn = multiprocessing.get_context("spawn")
    jobs = min(jobs, len(waiting))
    pool = concurrent.futures.ProcessPoolExecutor(jobs, spawn, initializer=_begin_worker, initargs=(os.getpid(),))
    try:
        runs = {pool.submit(_work, configs[cell], cell, folder.conditions): cell for cell in waiting}
        for run in concurrent.futures.as_completed(runs):
            cell = runs[run]
            result, error = run.result()
            if result is not None:
                folder.keep(cell, result)
            done(Finished(cell, result, error, stored=False))
    except BrokenProcessPool as error:
        raise TrainingError(
            "the process of a run died (out of memory? fewer --jobs); the runs before it are kept, start the lab again"
        ) from error
    except BaseException:  # Ctrl-C: nobody waits for runs that nobody wants any more
        for worker in multiprocessing.active_children():
            worker.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


@dataclass(frozen=True, slots=True)
class Finished:
    """A cell that has ended. Example: `Finished(cell, result={"heldout_reward": 0.96, ...}, error=None, stored=True)`:
    an earlier lab had run it."""

    cell: Cell
    result: dict[str, Any] | None
    error: str | None  # why there is no result
    stored: bool


class Forecast:
    """How long the rest will take, from what the cells that ran here took.

    >>> forecast = Forecast(jobs=1)
    >>> forecast.add(40.0)
    >>> forecast.left_s(9)
    360.0
    """

    def __init__(self, jobs: int) -> None:
        self._jobs = jobs
        self._seconds: list[float] = []

    def add(self, seconds: float) -> None:
        self._seconds.append(seconds)

    def left_s(self, num_cells: int) -> float | None:
        """None before the first cell."""
        if not self._seconds:
            return None
        return sum(self._seconds) / len(self._seconds) * num_cells / self._jobs


def _work(config: TrainConfig, cell: Cell, conditions: Conditions) -> tuple[dict[str, Any] | None, str | None]:
    """In a worker. A run that fails as runs can is a result of a kind: the others go on."""
    try:
        return run_cell(config, cell, conditions), None
    except AgentGymError as error:
        return None, f"{type(error).__name__}: {error}"


def _begin_worker(parent: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # whoever started the lab decides
    use_one_core()
    disable_progress_bar()

    def follow() -> None:  # a lab that was killed, be it before its worker got here, leaves nobody computing
        while os.getppid() == parent:
            time.sleep(1.0)
        os._exit(1)

    threading.Thread(target=follow, name="agentgym-lab-parent", daemon=True).start()


def _checked(base: TrainConfig, cell: Cell) -> TrainConfig:
    try:
        return cell_config(base, cell)
    except ValidationError as error:
        reasons = "; ".join(problem["msg"] for problem in error.errors())
        raise ConfigError(f"the lab's cell {cell.name} makes no sense: {reasons}") from error


def _without_cell_keys(base: TrainConfig) -> dict[str, Any]:
    values = base.model_dump(mode="json", exclude_defaults=True)
    for section, keys in _CELL_KEYS.items():
        for key in keys:
            values.get(section, {}).pop(key, None)
    return {section: part for section, part in values.items() if part}


def _difference(known: Path, text: str) -> str:
    """The first key that differs, for the message."""
    old, new = (_flat(json.loads(source)) for source in (known.read_text(encoding="utf-8"), text))
    keys: Iterable[str] = sorted({*old, *new})
    key = next(key for key in keys if old.get(key) != new.get(key))
    return f"{key} is {old.get(key)!r} there and {new.get(key)!r} here"


def _flat(values: Any, path: str = "") -> dict[str, Any]:
    if not isinstance(values, dict):
        return {path: values}
    return {
        name: leaf for key, part in values.items() for name, leaf in _flat(part, f"{path}.{key}".strip(".")).items()
    }
