"""The benchmarks of old logits: their figures have the keys that are quoted, and the shape that does not depend on a
machine."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest

from benchmarks import exact_cost, separation


@pytest.mark.slow  # what is counted is tested with the lab's cost table
def test_exact_cost_has_an_entry_for_every_anchor() -> None:
    figures = exact_cost.run(quick=True)
    anchors = figures["anchors"]
    assert {"recompute", "resident", "snapshot", "old_logit_model", "interrupt", "ewma"} == set(anchors)
    lists = {name: value for name, value in figures.items() if isinstance(value, list)}
    assert {"score_tokens_ratio", "step_time_ratio", "extra_memory_mb", "fresh_step_time_ratio"} <= lists.keys()
    assert {len(value) for value in lists.values()} == {len(anchors)}
    assert figures["step_time_ratio"][anchors.index("recompute")] == 1.0
    fewer, more = (
        figures[name][anchors.index("snapshot")] for name in ("fresh_score_tokens_ratio", "score_tokens_ratio")
    )
    assert fewer < more
    json.dumps(figures)


@pytest.mark.slow  # law F's shape is tested with the lab; this is the benchmark's own way to it, with the tiny model
def test_separation_has_a_list_for_every_anchor() -> None:
    figures = separation.run(quick=True)
    assert figures["window"] == [0, 2, 4]
    assert figures["snapshot"][0] == figures["resident"][0] == figures["ewma"][0]
    assert all(later > earlier for earlier, later in pairwise(figures["resident"]))
    assert max(figures["snapshot"]) < figures["resident"][-1]
    json.dumps(figures)
