"""docs/benchmarks.md from stored results. A pure function of the files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from agentgym.errors import InputError

HEAD = """# Benchmarks

Written by `python -m benchmarks table` from `benchmarks/results/`; each row by `python -m benchmarks NAME --out
benchmarks/results/NAME.json`. Targets are for two quiet cores; nothing here is asserted.
"""


def write_table(results: Path, out: Path, targets: Mapping[str, str]) -> Path:
    """Writes the page from `results`/*.json. Raises InputError if there is none."""
    stored = [_read(path) for path in sorted(results.glob("*.json"))]
    if not stored:
        raise InputError(f"no results in {results}: run python -m benchmarks NAME --out {results}/NAME.json first")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(render_table(stored, targets), encoding="utf-8")
    return out


def render_table(stored: list[dict[str, Any]], targets: Mapping[str, str]) -> str:
    """The page: one section a benchmark, one row a figure."""
    parts = [HEAD]
    for result in stored:
        name, machine = result["benchmark"], result["machine"]
        parts.append(f"## {name}\n")
        if result.get("quick"):
            parts.append("**A smoke run: these figures mean nothing.**\n")
        parts.append("| figure | value |\n|---|---|")
        parts += [f"| {key} | {_value(value)} |" for key, value in result["figures"].items()]
        parts.append("")
        if name in targets:
            parts.append(f"Target: {targets[name]}.\n")
        parts.append(
            f"Commit {result['commit']}, {result['seconds']:.0f} s, on {machine['cores']} cores of {machine['cpu']}, "
            f"{machine['memory_mb']} MiB, Python {machine['python']}, load before {machine['load_1min']}.\n"
        )
    return "\n".join(parts)


def _value(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(_value(item) for item in value)
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return "-" if value is None else str(value)


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise InputError(f"{path} is not the JSON line of a benchmark: {error}") from error
