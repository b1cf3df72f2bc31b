from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import pytest

from agentgym.errors import CheckpointError, InputError
from agentgym.view.plot import lag_lines, moving_mean, plot_diagnostics, plot_rewards, read_metrics


def write(path: Path, rows: list[dict[str, Any]], tail: str = "") -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + tail, encoding="utf-8")
    return path


def test_the_plot_is_a_picture_and_nothing_else_is_left(tmp_path: Path) -> None:
    metrics = write(tmp_path / "metrics.jsonl", [{"step": i, "reward_mean": i / 10} for i in range(10)])
    plot_rewards(metrics, tmp_path / "reward.png", before=0.1, after=0.9)
    assert (tmp_path / "reward.png").read_bytes().startswith(b"\x89PNG")
    assert {path.name for path in tmp_path.iterdir()} == {"metrics.jsonl", "reward.png"}


def test_a_line_that_a_crash_cut_short_is_left_out(tmp_path: Path) -> None:
    metrics = write(tmp_path / "metrics.jsonl", [{"step": 1, "reward_mean": 0.5}], tail='{"step": 2, "rew')
    assert read_metrics(metrics) == [{"step": 1, "reward_mean": 0.5}]


def test_a_broken_line_in_the_middle_is_named(tmp_path: Path) -> None:
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text('{"step": 1}\nnonsense\n{"step": 2}\n', encoding="utf-8")
    with pytest.raises(InputError, match=r"metrics\.jsonl:2 is not JSON"):
        read_metrics(metrics)


@pytest.mark.parametrize(
    "rows", [[], [{"step": 1}], [{"step": 1, "reward_mean": float("nan")}], [{"step": 1, "reward_mean": None}]]
)
def test_nothing_to_plot_is_an_error(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    with pytest.raises(InputError, match="no step with a reward_mean"):
        plot_rewards(write(tmp_path / "metrics.jsonl", rows), tmp_path / "reward.png")
    assert not (tmp_path / "reward.png").exists()


def test_missing_metrics_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"metrics\.jsonl: No such file"):
        read_metrics(tmp_path / "metrics.jsonl")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_leaves_nothing_half_written(tmp_path: Path) -> None:
    metrics = write(tmp_path / "metrics.jsonl", [{"step": 1, "reward_mean": 0.5}])
    (tmp_path / "reward.png.partial").symlink_to("/dev/full")
    with pytest.raises(CheckpointError) as caught:
        plot_rewards(metrics, tmp_path / "reward.png")
    assert isinstance(caught.value.__cause__, OSError)
    assert caught.value.__cause__.errno == errno.ENOSPC
    assert {path.name for path in tmp_path.iterdir()} == {"metrics.jsonl"}


def test_moving_mean() -> None:
    assert moving_mean([1.0, 3.0, 5.0, 7.0], 2) == [1.0, 2.0, 4.0, 6.0]
    assert moving_mean([], 3) == []


LAGGED = [
    {"step": step, "discrepancy/k3": 0.5, "discrepancy/lag0/k3": 1e-9, "discrepancy/lag3_4/k3": 0.01 * step,
     "staleness/lag0/k3": 0.0, "total/lag0/ess_fraction": 0.99, "policy/lag0/active_fraction": 1.0}
    for step in (1, 2)
]  # fmt: skip


def test_diagnostics_are_drawn_by_lag(tmp_path: Path) -> None:
    metrics, out = tmp_path / "metrics.jsonl", tmp_path / "diagnostics.png"
    metrics.write_text("".join(json.dumps(row) + "\n" for row in LAGGED))
    assert plot_diagnostics(metrics, out)
    assert out.read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["diagnostics.png", "metrics.jsonl"]


def test_the_lines_of_each_lag() -> None:
    assert lag_lines(LAGGED, "discrepancy", "k3") == {
        "lag0": [(1.0, 1e-9), (2.0, 1e-9)], "lag3_4": [(1.0, 0.01), (2.0, 0.02)],
    }  # fmt: skip
    gap = [*LAGGED, {"step": 3, "discrepancy/lag0/k3": None}]  # nan is written as null
    assert len(lag_lines(gap, "discrepancy", "k3")["lag0"]) == 2
    assert lag_lines(LAGGED, "policy", "k3") == {}


def test_a_run_without_tokens_by_lag_has_no_diagnostics(tmp_path: Path) -> None:
    metrics, out = tmp_path / "metrics.jsonl", tmp_path / "diagnostics.png"
    metrics.write_text('{"step": 1, "reward_mean": 0.5}\n')
    assert not plot_diagnostics(metrics, out)
    assert not out.exists()
