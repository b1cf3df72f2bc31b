"""Figures and the page of a report: from made-up results, whose means, intervals and differences are known."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from agentgym.errors import InputError
from agentgym_trainer.lab.cell import Conditions
from agentgym_trainer.lab.figures import Interval, diagnostic_rows, reward_rows, t_quantile
from agentgym_trainer.lab.grid import Grid
from agentgym_trainer.lab.report import EXACT_AGREE, HOW_TO_FLOOR, make_report, read_floor, write_report

STEP = {
    "policy/active_fraction": 0.9, "policy/mask_pass_fraction": 0.95, "policy/clip_pass_fraction": 0.94,
    "discrepancy/ess_fraction": 0.99, "staleness/ess_fraction": 0.8, "total/ess_fraction": 0.79,
    "discrepancy/k3": 0.001, "staleness/k3": 0.02, "policy/entropy": 0.2, "time/anchor_s": 0.1,
}  # fmt: skip
LAW_F = {
    "windows": [0, 4], "bound": 1.2, "mismatch": "bf16", "outside": {"snapshot": [0.0, 0.0], "resident": [0.0, 0.0371]},
    "figures": {
        name: {key: [0.5, 0.25] for key in (*STEP, "policy/mean_lag")} for name in ("snapshot", "resident")
    },
}  # fmt: skip

COSTS = {
    "plan": {"rows": 32, "tokens": 128, "versions": 4, "repetitions": 5},
    "parameters": 103_552,
    "costs": [
        {
            "case": "stale", "anchor": "snapshot", "weight_copies": 1.0, "extra_mb": 0.41, "step_s": 0.4321,
            "ratio": 1.23, "cpu_ratio": 1.19, "scored_tokens_ratio": 1.82,
        },
    ],
}  # fmt: skip


def result(anchor: str, seed: int, reward: float, step_s: float = 1.0, copies: float = 1.0) -> dict:
    cell = {"lag": 4, "anchor": anchor, "correction": "token_mask", "updates": 1, "seed": seed}
    steps = [{**STEP, "reward": 0.1 * number, "time/train_s": step_s} for number in range(8)]
    for step in steps[:4]:
        step["policy/active_fraction"] = 0.0  # before the lag is reached: in no mean
    return {
        "cell": cell, "heldout_reward": reward, "weight_copies": copies, "parameter_mb": 2.0, "seconds": 30.0,
        "failed_episodes": 0, "steps": steps,
    }  # fmt: skip


RESULTS = [
    *(result("snapshot", seed, reward, 1.5) for seed, reward in enumerate((0.90, 0.94, 0.98))),
    *(result("resident", seed, reward, 1.0, 0.0) for seed, reward in enumerate((0.50, 0.55, 0.57))),
]


def test_student_intervals() -> None:
    interval = Interval.of([0.90, 0.94, 0.98])
    assert interval.mean == pytest.approx(0.94)
    assert interval.low == pytest.approx(0.94 - 4.303 * 0.04 / 3**0.5)
    assert interval.high == pytest.approx(0.94 + 4.303 * 0.04 / 3**0.5)
    assert Interval.of([0.5]) == Interval(0.5, None, None, 1)
    assert [round(t_quantile(n), 3) for n in (1, 4, 10)] == [12.706, 2.776, 2.228]
    assert t_quantile(11) == pytest.approx(2.201, abs=3e-3)  # from a table
    assert t_quantile(60) == pytest.approx(2.000, abs=1e-3)


def test_differences_are_taken_seed_by_seed() -> None:
    rows = {row["anchor"]: row for row in reward_rows(RESULTS)}
    assert rows["snapshot"]["minus_exact"] is None
    paired = rows["resident"]["minus_exact"]
    assert paired["mean"] == pytest.approx(-0.40)
    half = (
        4.303 * 0.01 / 3**0.5
    )  # the differences are -0.40, -0.39, -0.41: closer together than either anchor's rewards
    assert (paired["low"], paired["high"]) == pytest.approx((-0.40 - half, -0.40 + half))
    assert rows["resident"]["late_reward"]["mean"] == pytest.approx(0.65)  # the last two of eight steps
    assert rows["resident"]["values"] == [0.50, 0.55, 0.57]


def test_a_seed_that_one_side_lacks_is_in_no_difference() -> None:
    rows = {row["anchor"]: row for row in reward_rows(RESULTS[1:])}
    assert rows["resident"]["minus_exact"]["mean"] == pytest.approx(-0.40)
    assert rows["resident"]["minus_exact"]["num_seeds"] == 2


def test_diagnostics_are_of_stale_tokens() -> None:
    assert [row["policy/active_fraction"] for row in diagnostic_rows(RESULTS)] == pytest.approx([0.9, 0.9])


def test_the_page_needs_no_other_file_and_shows_every_figure(small_config, tmp_path) -> None:
    grid = Grid((4,), ("snapshot", "resident"), ("token_mask",), (1,), (0, 1, 2))
    command = "agentgym lab staleness --lags 4 'rollout.seed=<1>'"
    report = make_report(small_config, grid, Conditions(), command, RESULTS, LAW_F, None, COSTS)
    page = write_report(tmp_path, report).read_text()
    assert "agentgym lab staleness --lags 4 &#x27;rollout.seed=&lt;1&gt;&#x27;" in page
    for figure in (
        "0.0371",
        "0.940 [0.841, 1.039]",
        "-0.400 [-0.425, -0.375]",
        "0.432",
        "1.19",
        "103,552",
        HOW_TO_FLOOR,
        EXACT_AGREE,
    ):
        assert figure in page
    assert page.count('src="data:image/png;base64,iVBOR') == 4
    assert not re.search(r"(src|href)\s*=\s*[\"']?(?!data:)[a-z/.]", page)
    assert "<script" not in page
    stored = json.loads((tmp_path / "report.json").read_text())
    assert stored["reward"][0]["heldout_reward"]["mean"] == pytest.approx(0.94)
    assert stored["config"]["rollout"]["groups_per_step"] == 3
    assert not list(tmp_path.glob("*.partial"))


def test_the_test_that_the_page_names_is_there() -> None:
    (name,) = re.findall(r"test_the_\w+", EXACT_AGREE)
    (file,) = re.findall(r"tests/\S+\.py", EXACT_AGREE)
    root = Path(__file__).parents[3]
    assert f"def {name}(" in (root / file).read_text()
    assert name in (root / "docs" / "labs.md").read_text()


def test_a_measured_floor_stands_beside_law_f(small_config, tmp_path) -> None:
    stored = {
        "figures": {"engine": ["torch", "vllm"], "tokens": [9, 9], "mean_abs": [3e-7, 4e-7], "max_abs": [2e-6, 5e-6]}
    }
    (tmp_path / "floor.json").write_text(json.dumps(stored))
    floor = read_floor(tmp_path / "floor.json")
    grid = Grid((4,), ("snapshot", "resident"), ("token_mask",), (1,), (0, 1, 2))
    page = write_report(
        tmp_path, make_report(small_config, grid, Conditions(), "x", RESULTS, LAW_F, floor, COSTS)
    ).read_text()
    assert "vllm 4.0e-07 on average, 5.0e-06 at most" in page
    assert read_floor(tmp_path / "absent.json") is None
    (tmp_path / "floor.json").write_text("{}")
    with pytest.raises(InputError, match="is not the stored line of `logprob_conformance`"):
        read_floor(tmp_path / "floor.json")
