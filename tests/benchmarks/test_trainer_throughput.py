"""The benchmark's sides do the same sum; otherwise their ratios would compare different work."""

from __future__ import annotations

import pytest

from benchmarks import trainer_throughput

KEYS = {"tokens_per_s", "unpadded_bound_tokens_per_s", "padded_tokens_per_s", "ratio_bound", "ratio_padded"}


@pytest.fixture
def figures() -> dict[str, object]:
    return trainer_throughput.run(quick=True)


def test_all_layouts_give_one_gradient(figures: dict[str, object]) -> None:
    assert figures.keys() >= KEYS
    difference, largest = figures["max_gradient_difference"], figures["max_gradient"]
    assert isinstance(difference, float)
    assert isinstance(largest, float)
    assert 0.0 < difference < 1e-5 * largest  # equal to rounding, and really four computations
    padding, naive = figures["padding_fraction"], figures["padding_fraction_padded"]
    assert isinstance(padding, float)
    assert isinstance(naive, float)
    assert padding < naive
