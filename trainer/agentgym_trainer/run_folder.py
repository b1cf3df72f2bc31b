"""The folder that a run leaves behind: what it was asked, what it measured, what it learned.

runs/quickstart/config.toml       the resolved configuration; `agentgym train` takes it as it is
                metrics.jsonl     one line a step
                evaluations.jsonl one line a held-out evaluation
                summary.json      the figures of the whole run
                reward.png        reward against steps, held-out success before and after
                diagnostics.png   k3, ESS and active fraction against steps, by lag
                trajectories/     one file a step (written by the rollout service)
                versions/         published weights that something still refers to
                checkpoints/      what `--resume` continues from
                model/            the trained model, in the layout that transformers loads
                adapter/          what was trained of it with LoRA, in the layout that PEFT loads
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tomli_w

from agentgym.errors import CheckpointError, ConfigError
from agentgym_trainer.settings import TrainConfig


class RunFolder:
    """Paths of one run, and the writing of its small files. Raises CheckpointError when the disk refuses."""

    def __init__(self, path: Path, earlier: Path | None = None) -> None:
        self.path = path
        self._earlier = earlier  # where a run of the same name was moved to
        self.metrics_path = path / "metrics.jsonl"
        self.evaluations_path = path / "evaluations.jsonl"
        self.summary_path = path / "summary.json"
        self.plot_path = path / "reward.png"
        self.diagnostics_path = path / "diagnostics.png"
        self.versions_path = path / "versions"
        self.checkpoints_path = path / "checkpoints"
        self.model_path = path / "model"

    @classmethod
    def create(cls, config: TrainConfig) -> RunFolder:
        """A fresh folder for `config`; one of an earlier run under the name is kept beside it."""
        path, earlier = config.run.dir / config.run.name, None
        try:
            if path.exists():
                made = time.strftime("%Y%m%d-%H%M%S", time.localtime(path.stat().st_mtime))
                earlier = _free_name(path.with_name(f"{path.name}-{made}"))
                path.rename(earlier)
            path.mkdir(parents=True)
        except OSError as error:
            raise CheckpointError(f"the run folder {path} cannot be made: {error.strerror}") from error
        folder = cls(path, earlier)
        folder._write(path / "config.toml", tomli_w.dumps(_without_none(config.model_dump(mode="json"))))
        return folder

    @classmethod
    def existing(cls, path: Path) -> RunFolder:
        """The folder of a run to resume. Raises ConfigError if it is none."""
        if not (path / "config.toml").is_file():
            raise ConfigError(f"cannot resume {path}: it holds no config.toml; give the folder of a run")
        return cls(path)

    def discard(self) -> None:
        """Takes back `create`, for a run that was refused before it began; an earlier run returns to its name."""
        shutil.rmtree(self.path, ignore_errors=True)
        if self._earlier is not None:
            self._earlier.rename(self.path)
        with contextlib.suppress(OSError):
            self.path.parent.rmdir()  # only if this run made it: an empty folder is nobody's

    def log_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        """Appends one line; non-finite values are written as null, which JSON has."""
        _append(self.metrics_path, step, metrics)

    def log_evaluation(self, steps_done: int, figures: Mapping[str, float]) -> None:
        """Appends one held-out evaluation, made after `steps_done` steps."""
        _append(self.evaluations_path, steps_done, figures)

    def evaluations(self) -> list[dict[str, float]]:
        """Every held-out evaluation of the run, those before a resume included, oldest first."""
        return [json.loads(line) for line in _lines(self.evaluations_path)] if self.evaluations_path.exists() else []

    def forget_metrics_from(self, step: int) -> None:
        """Cuts the lines of steps that a resumed run does again, and what a killed one left of a line."""
        for path in (self.metrics_path, self.evaluations_path):
            if path.exists():
                self._write(path, "".join(line for line in _lines(path) if json.loads(line)["step"] < step))

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        self._write(self.summary_path, json.dumps(summary, indent=2) + "\n")

    def _write(self, path: Path, text: str) -> None:
        partial = path.with_name(path.name + ".partial")
        try:
            partial.write_text(text, encoding="utf-8")
            os.replace(partial, path)
        except BaseException as error:
            partial.unlink(missing_ok=True)
            if not isinstance(error, OSError):  # Ctrl-C
                raise
            raise CheckpointError(f"{path} cannot be written: {error.strerror}") from error


def _append(path: Path, step: int, figures: Mapping[str, float]) -> None:
    row = {"step": step, **{name: _finite(value) for name, value in figures.items()}}
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
    except OSError as error:
        raise CheckpointError(f"{path} cannot be written: {error.strerror}") from error


def _lines(path: Path) -> list[str]:
    """Whole lines. The last may be cut short: a run that is killed while it writes leaves some pages of it."""
    return [line for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")]


def _free_name(path: Path) -> Path:
    candidate, number = path, 1
    while candidate.exists():
        number += 1
        candidate = path.with_name(f"{path.name}-{number}")
    return candidate


def _without_none(value: Any) -> Any:
    """TOML has no null: a key that is not set is left out, which reads back as its default."""
    if isinstance(value, dict):
        return {key: _without_none(part) for key, part in value.items() if part is not None}
    return value


def _finite(value: float) -> float | None:
    return value if value == value and abs(value) != float("inf") else None
