"""A run of the lab: the lag is what it says, the mismatch is the engine's alone, and equal cells give equal figures."""

from __future__ import annotations

import pytest

from agentgym.errors import ConfigError
from agentgym_trainer.lab.cell import Cell, Conditions, cell_config, run_cell
from agentgym_trainer.lab.distortion import Distortion

CELL = Cell(lag=2, anchor="snapshot", correction="token_mask", updates=1, seed=3)


def figures(config, cell=CELL, conditions=Conditions("none")) -> list[dict[str, float]]:  # noqa: B008
    result = run_cell(cell_config(config, cell), cell, conditions)
    return [{name: value for name, value in step.items() if not name.startswith("time/")} for step in result["steps"]]


def test_a_batch_is_as_old_as_the_cell_says(small_config) -> None:
    steps = figures(small_config)
    assert [step["policy/mean_lag"] for step in steps] == [0.0, 1.0, 2.0, 2.0]
    assert all(step["discrepancy/max_abs_log_ratio"] < 1e-4 for step in steps)  # exact, and no mismatch was injected
    assert steps[-1]["staleness/k3"] > 1e-6
    assert steps[0]["staleness/k3"] == 0.0


def test_partial_rows_hold_versions_up_to_the_newest(small_config) -> None:
    steps = figures(small_config, conditions=Conditions("none", partial=True))
    assert [step["policy/mean_lag"] for step in steps] == pytest.approx([0.0, 0.8, 1.4, 1.4], abs=0.6)
    assert 0.0 < steps[-1]["policy/mean_lag"] < 2.0
    assert all(step["discrepancy/max_abs_log_ratio"] < 1e-4 for step in steps)


def test_equal_cells_give_equal_figures_and_other_seeds_others(small_config) -> None:
    noisy = Conditions("logits:0.1")
    first = figures(small_config, conditions=noisy)
    assert first == figures(small_config, conditions=noisy)
    other = Cell(CELL.lag, CELL.anchor, CELL.correction, CELL.updates, seed=4)
    assert first != figures(small_config, other, noisy)


@pytest.mark.parametrize(("mismatch", "low", "high"), [("bf16", 1e-3, 0.3), ("logits:0.1", 0.05, 1.0)])
def test_an_injected_mismatch_is_seen_at_lag_0(small_config, mismatch, low, high) -> None:
    steps = figures(small_config, conditions=Conditions(mismatch))
    assert low < steps[0]["discrepancy/max_abs_log_ratio"] < high


def test_several_optimizer_steps_need_old_logprobs_at_lag_0_too(small_config) -> None:
    cell = Cell(lag=0, anchor="resident", correction="none", updates=3, seed=0)
    steps = figures(small_config, cell)
    assert steps[0]["staleness/k3"] > 0.0  # the second and third step are no longer at the weights that sampled
    assert steps[0]["discrepancy/max_abs_log_ratio"] < 1e-4


@pytest.mark.parametrize("text", ["noise", "logits", "logits:0", "logits:-1", "logits:nan", "bf16:2", "none:1"])
def test_what_is_no_mismatch_is_refused(text) -> None:
    with pytest.raises(ConfigError, match="an injected mismatch is one of"):
        Distortion.parse(text)


def test_a_mismatch_reads_as_it_is_written() -> None:
    assert [str(Distortion.parse(text)) for text in ("none", "bf16", "logits:0.05")] == ["none", "bf16", "logits:0.05"]
