"""Prefixes: nothing behind a version's last token, every token of it exactly once."""

from __future__ import annotations

from collections.abc import Callable

import torch
from hypothesis import given
from hypothesis import strategies as st

from agentgym_trainer.anchors.prefixes import Prefix, gather, plan_prefixes, scatter
from agentgym_trainer.batch import Row, build_micro_batches

Masks = list[list[list[bool]]]


@st.composite
def some_masks(draw: st.DrawFn) -> Masks:
    return [
        [draw(st.lists(st.booleans(), min_size=width, max_size=width)) for _ in range(draw(st.integers(1, 4)))]
        for width in draw(st.lists(st.integers(1, 9), min_size=1, max_size=4))
    ]


@given(some_masks(), st.integers(1, 40))
def test_each_row_with_a_token_is_there_once_up_to_its_last(masks: Masks, max_tokens: int) -> None:
    parts = plan_prefixes([torch.tensor(mask) for mask in masks], max_tokens)
    expected = {
        Prefix(number, row, max(place + 1 for place, here in enumerate(line) if here))
        for number, mask in enumerate(masks)
        for row, line in enumerate(mask)
        if any(line)
    }
    flat = [prefix for part in parts for prefix in part]
    assert len(flat) == len(expected)
    assert set(flat) == expected
    for part in parts:
        assert len(part) == 1 or len(part) * part[0].length <= max_tokens
        assert part[0].length == max(prefix.length for prefix in part)


def test_tokens_are_gathered_and_brought_back(make_rows: Callable[..., list[Row]]) -> None:
    batches = build_micro_batches(make_rows((9, 30, 4, 17, 2, 12)), max_tokens=40)
    assert len(batches) > 2
    masks = [batch.loss_mask & (batch.policy_versions == 2) for batch in batches]
    targets = [torch.full(batch.token_ids.shape, -1) for batch in batches]
    num_tokens = 0
    for prefixes in plan_prefixes(masks, max_tokens=1000):
        part = gather(batches, masks, prefixes)
        num_tokens += part.num_tokens
        assert bool((part.policy_versions[part.loss_mask] == 2).all())
        scatter(part.token_ids, prefixes, masks, targets)
    for batch, mask, target in zip(batches, masks, targets):
        assert torch.equal(target, torch.where(mask, batch.token_ids, -1))
    assert 0 < num_tokens < sum(batch.num_tokens for batch in batches)


def test_a_version_without_tokens_needs_nothing() -> None:
    assert plan_prefixes([torch.zeros(2, 3, dtype=torch.bool)], 10) == []
