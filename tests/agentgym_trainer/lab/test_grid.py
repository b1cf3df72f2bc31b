"""A grid of runs: which cells, what is remembered, and a lab that is killed and goes on."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from agentgym.errors import ConfigError, InputError, TrainingError
from agentgym_trainer.lab.cell import Cell, Conditions
from agentgym_trainer.lab.grid import Finished, Forecast, Grid, LabFolder, run_cells
from agentgym_trainer.lab.staleness import LabOptions, check_options, lab_config

GRID = Grid((0, 4), ("snapshot", "behavior"), ("none", "token_mask"), (1, 4), (0, 1))


def test_seeds_are_outermost_and_behavior_has_nothing_to_correct() -> None:
    cells = GRID.cells()
    assert len(cells) == len(set(cells)) == 2 * 2 * 2 * 3
    assert [cell.seed for cell in cells] == [0] * 12 + [1] * 12
    assert {cell.correction for cell in cells if cell.anchor == "behavior"} == {"none"}
    assert {cell.correction for cell in cells if cell.anchor == "snapshot"} == {"none", "token_mask"}


@pytest.mark.parametrize(
    "change", [{"lags": ()}, {"lags": (-1,)}, {"updates": (0,)}, {"seeds": (1, 1)}, {"anchors": ("ewma", "ewma")}]
)
def test_a_grid_without_sense_is_refused(change) -> None:
    values = {"lags": (0,), "anchors": ("ewma",), "corrections": ("none",), "updates": (1,), "seeds": (0,)}
    with pytest.raises(ConfigError, match=r"grid needs one|lags and seeds must be >= 0"):
        Grid(**(values | change))


def test_a_cell_that_the_configuration_refuses_is_named_before_anything_runs(small_config, tmp_path) -> None:
    folder = LabFolder(tmp_path, small_config, Conditions())
    cells = [Cell(0, "snapshot", "token_mask", 1, 0), Cell(0, "nobody", "token_mask", 1, 0)]
    with pytest.raises(ConfigError, match="lag0-nobody-token_mask-updates1-seed0 makes no sense"):
        run_cells(folder, cells, 1, lambda finished: None)
    assert not list((tmp_path / "cells").iterdir())


def test_a_folder_never_mixes_configurations(small_lab, small_config, tmp_path) -> None:
    LabFolder(tmp_path, small_config, Conditions())
    LabFolder(tmp_path, lab_config([*small_lab, "run.seed=5", "trainer.anchor=ewma"]), Conditions())  # a cell's own
    with pytest.raises(InputError, match=r"trainer.steps is 4 there and 5 here"):
        LabFolder(tmp_path, lab_config([*small_lab, "trainer.steps=5"]), Conditions())
    with pytest.raises(InputError, match=r"conditions.mismatch is 'bf16' there and 'none' here"):
        LabFolder(tmp_path, small_config, Conditions("none"))


def test_a_forecast_is_what_runs_here_took() -> None:
    forecast = Forecast(jobs=2)
    assert forecast.left_s(9) is None
    forecast.add(30.0)
    forecast.add(50.0)
    assert forecast.left_s(9) == 180.0


@pytest.mark.parametrize(
    ("settings", "grid", "mismatch", "said"),
    [
        ([], {}, "loud", "an injected mismatch is one of"),
        (["trainer.publish_dtype=bfloat16"], {}, "bf16", "mismatch bf16 does nothing"),
        ([], {"lags": (0, 4)}, "bf16", "never trains on what it has learned"),
        ([], {"anchors": ("interrupt",)}, "bf16", "the lab has none"),
        (
            ["rollout.drop_zero_variance=true"],
            {},
            "bf16",
            "rollout.drop_zero_variance does nothing in the staleness lab",
        ),
        (["engine.kind=vllm"], {}, "bf16", "engine.kind does nothing in the staleness lab"),
        (["evaluation.episodes=0"], {}, "bf16", "evaluation.episodes must be >= 1"),
    ],
)
def test_what_would_do_nothing_is_refused(small_lab, tmp_path, settings, grid, mismatch, said) -> None:
    values = {"lags": (0,), "anchors": ("ewma",), "corrections": ("none",), "updates": (1,), "seeds": (0,)}
    options = LabOptions(Grid(**(values | grid)), Conditions(mismatch), tmp_path, 1, "", tmp_path / "none.json")
    with pytest.raises(ConfigError, match=said):
        check_options(lab_config([*small_lab, *settings]), options)


def test_a_run_whose_process_dies_ends_the_lab_in_one_sentence_and_keeps_the_others(small_config, tmp_path) -> None:
    folder = LabFolder(tmp_path, small_config, Conditions())
    cells = [Cell(lag, "resident", "none", 1, 0) for lag in range(40)]  # more than end before anybody is killed
    ended: list[Cell] = []

    def kill_the_worker(finished: Finished) -> None:
        ended.append(finished.cell)
        for child in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                if "spawn_main" in " ".join(child.cmdline()):
                    child.kill()

    with pytest.raises(TrainingError, match="the process of a run died"):
        run_cells(folder, cells, 1, kill_the_worker)
    assert ended[0] == cells[0]
    assert [cell for cell in cells if folder.result(cell) is not None] == ended
    assert len(ended) < len(cells)


def test_a_worker_that_begins_when_its_lab_is_gone_ends() -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    begins = f"from agentgym_trainer.lab.grid import _begin_worker; _begin_worker({gone.pid})"
    worker = subprocess.run([sys.executable, "-c", f"{begins}; import time; time.sleep(600)"], timeout=200)
    assert worker.returncode == 1


def start(small_lab: list[str], out: Path, num_seeds: int) -> subprocess.Popen[str]:
    """A lab of three cells a seed."""
    command = [sys.executable, "-m", "agentgym.cli", "lab", "staleness", *small_lab, "--out", str(out)]
    seeds = ",".join(map(str, range(num_seeds)))
    command += ["--lags", "1", "--anchors", "snapshot,ewma,resident", "--seeds", seeds, "--windows", "0"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_killed_lab_leaves_nobody_computing_and_goes_on_where_it_was(small_lab, tmp_path) -> None:
    cells = tmp_path / "cells"
    first = start(small_lab, tmp_path, num_seeds=20)  # more than end before it is killed
    deadline = time.monotonic() + 400
    while not (cells.is_dir() and list(cells.glob("*.json"))):
        assert first.poll() is None, first.communicate()[1][-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    workers = psutil.Process(first.pid).children(recursive=True)
    os.kill(first.pid, signal.SIGKILL)
    first.communicate()
    _, alive = psutil.wait_procs(workers, timeout=100)
    assert not [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]
    before = {path.name: path.read_text() for path in cells.glob("*.json")}
    num_seeds = len(before) // 3 + 1  # so that something is left to run
    assert num_seeds < 20

    second = start(small_lab, tmp_path, num_seeds)
    page, said = second.communicate(timeout=500)
    assert second.returncode == 0, said[-3000:]
    assert page.strip() == str(tmp_path / "report.html")
    after = {path.name: path.read_text() for path in cells.glob("*.json")}
    assert len(after) == 3 * num_seeds
    assert {name: after[name] for name in before} == before  # not run again
    assert said.count("(from before)") == len(before)
    assert "min left" in said
    assert "window 0" not in said  # law F was remembered, too
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["num_runs"] == 3 * num_seeds
    assert report["command"].startswith("agentgym lab staleness")
