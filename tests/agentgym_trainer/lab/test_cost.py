"""The cost table: what is counted is right on rows that can be counted by hand; no time is asserted."""

from __future__ import annotations

import pytest

from agentgym.errors import ConfigError
from agentgym_trainer.lab.cost import ANCHORS, CostPlan, measure_cost
from agentgym_trainer.lab.cost_table import render_costs


@pytest.fixture(scope="module")
def measured():
    return measure_cost(CostPlan(model="small", rows=8, tokens=64, repetitions=1), lambda line: None)


def rows(measured, case):
    return {row["anchor"]: row for row in measured["costs"] if row["case"] == case}


def test_scored_tokens_by_anchor(measured) -> None:
    stale, fresh = rows(measured, "stale"), rows(measured, "fresh")
    assert list(stale) == list(fresh) == list(ANCHORS)
    for case in (stale, fresh):
        assert (case["recompute"]["scored_tokens_ratio"], case["ewma"]["scored_tokens_ratio"]) == (1.0, 1.0)
        assert case["resident"]["scored_tokens_ratio"] == 0.0
        # two rows each of 1, 2, 3 and 4 versions; of a row's k-th version, about k/n of its sampled part
        assert 1.6 < case["old_logit_model"]["scored_tokens_ratio"] < 2.1
    assert stale["snapshot"]["scored_tokens_ratio"] == pytest.approx(
        stale["interrupt"]["scored_tokens_ratio"], rel=0.05
    )
    # the newest version of each row, which takes the whole row, needs no forward of its own
    saved = stale["snapshot"]["scored_tokens_ratio"] - fresh["snapshot"]["scored_tokens_ratio"]
    assert saved == pytest.approx(1.0, abs=0.05)


def test_copies_by_anchor(measured) -> None:
    for case in ("stale", "fresh"):
        copies = {name: row["weight_copies"] for name, row in rows(measured, case).items()}
        assert copies == pytest.approx(
            {"recompute": 0, "resident": 0, "snapshot": 1, "old_logit_model": 1, "interrupt": 0, "ewma": 1}, abs=0.05
        )


def test_only_recorded_anchors_score_beside_the_step(measured) -> None:
    beside = {name for name, row in rows(measured, "stale").items() if row["beside_s"] > 0}
    assert beside == {"old_logit_model", "interrupt"}


def test_versions_differ_as_those_of_a_run_do(measured) -> None:
    log = measured["log"]
    assert 0.0 < log["changed_fraction"] < 0.3
    assert 0.0 < log["delta_mb"] < log["full_mb"]


def test_the_page_has_a_row_for_every_anchor(measured) -> None:
    page = render_costs(measured, "two cores", "agentgym lab cost --model small")
    assert "`agentgym lab cost --model small` on two cores" in page
    for case in ("## stale", "## fresh"):
        section = page.partition(case)[2].partition("## ")[0].partition("`beside")[0]
        assert section.count("\n| ") == 1 + len(ANCHORS)
    assert "| Qwen3-4B, snapshots | 5 | 40 GB | +25 |" in page


@pytest.mark.parametrize(
    "change", [{"rows": 1}, {"tokens": 4}, {"anchors": ("ewma",)}, {"anchors": ("recompute", "x")}]
)
def test_plans_without_sense_are_refused(change) -> None:
    with pytest.raises(ConfigError, match=r"a cost plan needs|anchors must be of"):
        CostPlan(model="small", **change)
