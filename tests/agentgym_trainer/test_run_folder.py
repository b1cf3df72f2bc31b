"""A run folder is written whole, never over another run, and cut back on resume."""

import json
import os

import pytest

from agentgym.config import load_config, parse_config
from agentgym.errors import CheckpointError, ConfigError
from agentgym_trainer.run_folder import RunFolder
from agentgym_trainer.settings import TrainConfig


def config(tmp_path, **sections):
    return parse_config(TrainConfig, {"env": {"id": "maze"}, "run": {"dir": str(tmp_path), "name": "r"}, **sections})


def test_the_resolved_config_reads_back_as_the_same_run(tmp_path):
    asked = config(tmp_path, trainer={"steps": 7, "betas": [0.9, 0.98]}, rollout={"max_turns": 3})
    folder = RunFolder.create(asked)
    assert load_config(TrainConfig, folder.path / "config.toml") == asked


def test_an_earlier_run_of_the_name_is_kept_beside(tmp_path):
    first = RunFolder.create(config(tmp_path))
    first.log_metrics(1, {"reward_mean": 0.5})
    RunFolder.create(config(tmp_path))
    RunFolder.create(config(tmp_path))
    kept = sorted(path for path in tmp_path.iterdir() if path.name.startswith("r-"))
    assert len(kept) == 2
    assert sum((path / "metrics.jsonl").exists() for path in kept) == 1
    assert not (tmp_path / "r" / "metrics.jsonl").exists()


def test_a_refused_run_is_taken_back_and_the_earlier_one_returns(tmp_path):
    RunFolder.create(config(tmp_path)).log_metrics(1, {"x": 1.0})
    RunFolder.create(config(tmp_path)).discard()
    assert [path.name for path in tmp_path.iterdir()] == ["r"]
    assert (tmp_path / "r" / "metrics.jsonl").exists()


def test_metrics_are_json_also_when_not_finite(tmp_path):
    folder = RunFolder.create(config(tmp_path))
    folder.log_metrics(1, {"a": float("nan"), "b": float("inf"), "c": 0.5})
    assert json.loads(folder.metrics_path.read_text()) == {"step": 1, "a": None, "b": None, "c": 0.5}


def test_steps_that_are_done_again_leave_the_metrics(tmp_path):
    folder = RunFolder.create(config(tmp_path))
    for step in (1, 2, 3):
        folder.log_metrics(step, {"x": float(step)})
    folder.forget_metrics_from(2)
    assert [json.loads(line)["step"] for line in folder.metrics_path.read_text().splitlines()] == [1]


def test_a_line_that_a_killed_run_cut_short_is_none(tmp_path):
    folder = RunFolder.create(config(tmp_path))
    for path, log in ((folder.metrics_path, folder.log_metrics), (folder.evaluations_path, folder.log_evaluation)):
        log(1, {"x": 1.0})
        whole = path.read_text()
        log(2, {"x": 2.0})
        for length in range(len(whole) + 1, 2 * len(whole)):
            os.truncate(path, length)
            assert folder.evaluations() in ([], [{"step": 1, "x": 1.0}])
            folder.forget_metrics_from(5)
            assert path.read_text() == whole
            log(2, {"x": 2.0})


def test_ctrl_c_leaves_no_half_file(tmp_path, monkeypatch):
    folder = RunFolder.create(config(tmp_path))
    before = sorted(folder.path.iterdir())

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        folder.write_summary({"steps": 1})
    assert sorted(folder.path.iterdir()) == before


def test_a_folder_that_is_no_run_cannot_be_resumed(tmp_path):
    with pytest.raises(ConfigError, match=r"holds no config\.toml"):
        RunFolder.existing(tmp_path)


def test_a_path_that_cannot_be_made_is_a_typed_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot be made"):
        RunFolder.create(config(tmp_path / "file"))
