"""Law F from the trainer's own code on a small stream of real rollouts: the shape is the law."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest

from agentgym_trainer.lab.staleness import lab_config
from agentgym_trainer.lab.stream import StreamPlan, measure_stream

PLAN = StreamPlan(
    windows=(0, 4, 16), anchors=("snapshot", "ewma", "resident"), versions=3, groups=3, mismatch="logits:0.1"
)


@pytest.fixture(scope="module")
def measured(maze_model) -> dict[str, Any]:
    config = lab_config(
        [f"model.name={maze_model}", "rollout.groups_per_step=6", "engine.slots=48", "trainer.learning_rate=5e-4"]
    )
    return measure_stream(config, PLAN, print)


def check_law_f(outside: dict[str, list[float]]) -> None:
    snapshot, ewma, resident = outside["snapshot"], outside["ewma"], outside["resident"]
    assert snapshot[0] == ewma[0] == resident[0], outside
    assert max(snapshot) < 0.025, outside
    assert all(later > earlier for earlier, later in pairwise(resident)), outside
    assert resident[-1] > 0.05, outside
    assert resident[-1] > 3 * max(snapshot), outside
    assert 1.5 * sum(snapshot) < sum(ewma) < sum(resident), outside


def test_discrepancy_stays_the_engines_under_exact_old_logprobs_alone(measured) -> None:
    check_law_f(measured["outside"])


@pytest.mark.parametrize(("impostor", "place"), [("resident", "snapshot"), ("resident", "ewma"), ("snapshot", "ewma")])
def test_no_anchor_passes_for_another(measured, impostor, place) -> None:
    with pytest.raises(AssertionError):
        check_law_f(measured["outside"] | {place: measured["outside"][impostor]})


def test_every_anchor_saw_the_same_tokens(measured) -> None:
    """The total ratio R knows no anchor: it differs where the tokens or the policy did."""
    totals = [measured["figures"][name]["total/ess_fraction"] for name in PLAN.anchors]
    assert totals[0] == pytest.approx(totals[1], rel=1e-6)
    assert totals[0] == pytest.approx(totals[2], rel=1e-6)
    assert min(measured["tokens"]) > 200


def test_a_window_is_as_wide_as_it_says(measured) -> None:
    lags = measured["figures"]["snapshot"]["policy/mean_lag"]
    assert lags[0] == 0.0
    assert all(window / 2 < lag <= window for window, lag in zip(PLAN.windows[1:], lags[1:], strict=True))


def test_the_mismatch_is_what_was_injected(measured) -> None:
    largest = measured["figures"]["snapshot"]["discrepancy/max_abs_log_ratio"]
    assert all(0.05 < value < 1.0 for value in largest), largest


def test_copies_of_the_weights_are_counted(measured) -> None:
    assert measured["weight_copies"] == pytest.approx({"snapshot": 1.0, "ewma": 1.0, "resident": 0.0}, abs=0.01)
