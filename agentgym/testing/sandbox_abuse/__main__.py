"""Runs every attack in every tier of this machine and writes what happened. Law: the table is what a run saw; a tier
that cannot be had here has its reason in place of outcomes."""

from __future__ import annotations

import argparse
import os
import platform
import sys
import time
from pathlib import Path

from rich.console import Console

from agentgym.errors import AgentGymError, UnavailableError
from agentgym.sandbox import SandboxSpec, open_sandbox
from agentgym.sandbox.spec import STRENGTH
from agentgym.testing.sandbox_abuse import FORGERIES, MACHINE, TRUST, Attack, Outcome

GROUPS = {"The machine": MACHINE, "Who believes the box": TRUST, "The reward": FORGERIES}
Column = dict[str, Outcome] | str  # by attack, or why the tier is refused
INTRODUCTION = """\
# What became of each attack

Written by `python -m agentgym.testing.sandbox_abuse --out docs/sandbox-abuse.md`, which attacks real boxes of every
tier and looks from the host: at its processes, its listeners, the files and containers that are left, and at what the
verifier says. Tests run the same attacks. After each, the box must work or be dead by name, and nothing of it may be
left on the machine.
"""


def refusal(tier: str) -> str | None:
    """Why boxes of the tier cannot be had here; None if they can."""
    try:
        open_sandbox(tier, SandboxSpec()).close()
    except UnavailableError as error:
        return str(error)
    return None


def outcome(attack: Attack, tier: str) -> Outcome:
    """What happened; a failure of ours in the middle of an attack is not contained."""
    try:
        return attack.run(lambda spec: open_sandbox(tier, spec))
    except AgentGymError as error:
        return Outcome(False, f"{type(error).__name__}: {error}")


def table(attacks: tuple[Attack, ...], columns: dict[str, Column]) -> list[str]:
    """Markdown: a row for each attack, a column for each tier that ran."""
    ran = {tier: column for tier, column in columns.items() if not isinstance(column, str)}
    lines = ["", f"| attack | {' | '.join(ran)} |", f"|---|{'---|' * len(ran)}"]
    for attack in attacks:
        cells = [_cell(column[attack.name]) for column in ran.values()]
        lines.append(f"| **{attack.name}**: {_escaped(attack.what)} | {' | '.join(cells)} |")
    return lines


def _cell(found: Outcome) -> str:
    return ("contained: " if found.contained else "**not contained**: ") + _escaped(found.what_happened)


def _escaped(text: str) -> str:
    """One line that a Markdown table holds, whatever an attack made of it."""
    shown = "".join(c if c.isprintable() else "\ufffd" for c in text.replace("\n", " "))
    for mark in "\\|<>`*_":
        shown = shown.replace(mark, "\\" + mark)
    return shown[:600]


def page(columns: dict[str, Column], took: dict[str, float]) -> str:
    """The whole file."""
    lines = [
        INTRODUCTION,
        f"Linux {platform.release().split('-')[0]}, {platform.machine()}, {os.cpu_count()} cores.",
        "",
    ]
    for tier, column in columns.items():
        if isinstance(column, str):
            lines.append(f"* `{tier}`: refused on this machine. {_escaped(column)}")
        else:
            held = sum(found.contained for found in column.values())
            lines.append(f"* `{tier}`: {held} of {len(column)} contained, {took[tier]:.0f} s.")
    for title, attacks in GROUPS.items():
        lines += ["", f"## {title}", *table(attacks, columns)]
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m agentgym.testing.sandbox_abuse", description=__doc__)
    parser.add_argument("--out", type=Path, help="where the table goes; without it, only the outcomes are shown")
    parser.add_argument("--tier", action="append", choices=STRENGTH, help="only this tier (may be given several times)")
    parser.add_argument("--attack", action="append", help="only the attack of this name (may be given several times)")
    options = parser.parse_args(arguments)
    if options.out and options.attack:
        parser.error("--out writes the whole table, --attack runs a part of it; give one of the two")
    console = Console(stderr=True, highlight=False)
    columns: dict[str, Column] = {}
    took: dict[str, float] = {}
    for tier in options.tier or STRENGTH:
        why = refusal(tier)
        if why is not None:
            columns[tier] = why
            console.print(f"{tier}: refused: {why}", markup=False)
            continue
        started = time.monotonic()
        found: dict[str, Outcome] = {}
        for attack in (attack for attacks in GROUPS.values() for attack in attacks):
            if options.attack and attack.name not in options.attack:
                continue
            result = found[attack.name] = outcome(attack, tier)
            mark = "contained" if result.contained else "NOT CONTAINED"
            console.print(f"{tier}: {attack.name}: {mark}: {result.what_happened}", markup=False, soft_wrap=True)
        columns[tier], took[tier] = found, time.monotonic() - started
    if options.out:
        options.out.write_text(page(columns, took))
    escaped = [
        name for column in columns.values() if isinstance(column, dict) for name, o in column.items() if not o.contained
    ]
    return 1 if escaped else 0


if __name__ == "__main__":
    sys.exit(main())
