from __future__ import annotations

import io

import pytest
from rich.console import Console

from agentgym.view.tables import columns_table, final_table, show


def test_the_final_table_holds_every_row_as_it_is() -> None:
    out = io.StringIO()
    rows = {"held-out after": 0.98765, "run folder": "runs/[x]", "plot": None}
    final_table(rows, Console(file=out, width=80), title="run")
    text = out.getvalue()
    assert "0.9877" in text
    assert "runs/[x]" in text
    assert text.index("held-out after") < text.index("run folder") < text.index("plot")


def test_columns() -> None:
    out = io.StringIO()
    columns_table(["id", "turns"], [["agentgym/Maze-v0", 7]], Console(file=out, width=80))
    assert "agentgym/Maze-v0" in out.getvalue()
    assert "7" in out.getvalue()


@pytest.mark.parametrize(
    ("value", "text"), [(None, "-"), (True, "yes"), (False, "no"), (12, "12"), (0.5, "0.5000"), (12345.6, "12,346")]
)
def test_show(value: object, text: str) -> None:
    assert show(value) == text
