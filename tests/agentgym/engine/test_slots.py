"""Where prompts are placed: every reuse is of equal tokens, and none takes a running request's row."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from agentgym.engine.slots import Placement, SlotTable

NOTHING = np.zeros(0, np.float32)


def fill(table: SlotTable, placement: Placement, prompt: np.ndarray) -> None:
    table.occupy(placement, prompt, NOTHING, 1.0)
    table.filled[placement.slot] = len(prompt)


def place(table: SlotTable, prompt: np.ndarray) -> Placement:
    placement = table.place(prompt)
    assert placement is not None
    return placement


def test_an_extended_row_is_taken_back_and_a_stranger_gets_the_oldest() -> None:
    table = SlotTable(3, 200)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 50, 40) for _ in range(3)]
    for prompt in prompts:
        fill(table, place(table, prompt), prompt)
    assert table.place(rng.integers(0, 50, 30)) is None
    for slot in (1, 2, 0):
        table.release(slot)
    assert place(table, np.append(prompts[2], [1, 2])) == Placement(2, 2, 40)
    assert place(table, rng.integers(50, 90, 30)).slot == 1
    assert place(table, prompts[0]) == Placement(1, 0, 39)  # the last token is computed again, for its logits


def test_a_common_beginning_is_copied_also_from_a_running_row() -> None:
    table = SlotTable(2, 200)
    beginning = np.arange(60)
    fill(table, place(table, np.append(beginning, 7)), np.append(beginning, 7))
    assert place(table, np.append(beginning, 8)) == Placement(1, 0, 60)


def test_a_prompt_waits_for_a_sibling_that_computes_its_beginning() -> None:
    table = SlotTable(4, 200)
    prompt = np.arange(60)
    table.occupy(place(table, prompt), prompt, NOTHING, 1.0)
    assert table.place(prompt) is None
    assert table.place(np.arange(100, 140)) is not None
    table.filled[0] = 60
    assert place(table, prompt) == Placement(1, 0, 59)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_reused_positions_hold_equal_tokens(data: st.DataObject) -> None:
    table = SlotTable(4, 64)
    prompts = st.lists(st.integers(0, 1), min_size=1, max_size=60).map(lambda ids: np.array(ids, np.int64))
    for _ in range(data.draw(st.integers(1, 12))):
        prompt = data.draw(prompts)
        placement = table.place(prompt)
        if placement is None:
            computing = table.running & (table.filled < table.length)
            assert table.running.all() or computing.any()
            table.filled[computing] = table.length[computing]
        else:
            assert not table.running[placement.slot]
            assert 0 <= placement.reused < len(prompt)
            assert placement.reused <= table.filled[placement.source]
            held = table.tokens[placement.source, : placement.reused]
            assert np.array_equal(held, prompt[: placement.reused])
            table.occupy(placement, prompt, NOTHING, 1.0)
            if data.draw(st.booleans()):
                table.filled[placement.slot] = len(prompt)
        for slot in np.flatnonzero(table.running):
            if data.draw(st.booleans()):
                table.release(int(slot))
