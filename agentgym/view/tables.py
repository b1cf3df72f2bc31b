"""Tables for the end of a command. Pure functions of their rows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text


def final_table(rows: Mapping[str, object], console: Console, title: str | None = None) -> None:
    """Prints names and values, in the order given; floats with four digits."""
    table = Table(title=title, show_header=False, title_justify="left")
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value in rows.items():
        table.add_row(Text(name), Text(show(value)))
    console.print(table)


def columns_table(header: Sequence[str], rows: Iterable[Sequence[object]], console: Console) -> None:
    """Prints a table with a header."""
    table = Table()
    for index, name in enumerate(header):
        table.add_column(name, overflow="fold", no_wrap=index == 0)  # the first one is what people copy
    for row in rows:
        table.add_row(*(Text(show(value)) for value in row))
    console.print(table)


def show(value: object) -> str:
    """How a value is written: `None` as a dash, floats short, everything else as itself.

    >>> show(0.98765), show(None), show(True), show(12)
    ('0.9877', '-', 'yes', '12')
    """
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4f}" if abs(value) < 1000 else f"{value:,.0f}"
    return str(value)
