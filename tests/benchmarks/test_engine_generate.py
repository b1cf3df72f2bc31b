"""The two sides of engine_generate play the same episodes."""

from __future__ import annotations

import pytest

from benchmarks.engine_generate import make_plans, run


def test_plans_are_unequal_and_fit_the_context() -> None:
    plans = make_plans(64)
    assert plans == make_plans(64)
    assert len({len(plan.reply_lengths) for plan in plans}) >= 5
    for plan in plans:
        assert len(plan.reply_lengths) == len(plan.observations)
        assert len(plan.prompt) + sum(plan.reply_lengths) + sum(map(len, plan.observations)) <= 1280


def test_a_smoke_run_gives_every_figure() -> None:
    figures = run(quick=True)
    assert {"tokens_per_s", "generate_tokens_per_s", "ratio"} <= set(figures)
    assert figures["tokens"] == sum(sum(plan.reply_lengths) for plan in make_plans(8))
    speed, plain, ratio = (figures[name] for name in ("tokens_per_s", "generate_tokens_per_s", "ratio"))
    assert isinstance(speed, float)
    assert isinstance(plain, float)
    assert ratio == pytest.approx(speed / plain, rel=0.05, abs=0.01)  # each is rounded, on however slow a machine
