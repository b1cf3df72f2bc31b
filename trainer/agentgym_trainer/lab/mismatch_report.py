"""What the mismatch lab found, for people and for programs. Pure functions of a result."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from agentgym_trainer.lab.mismatch import Line, Phase, Result, TemplateCheck

_NEAREST = 3  # predictions shown beside those that are always, where there is something to explain


def verdict(result: Result) -> str:
    """The diagnosis in words, one line each phase that has one, the worst first."""
    named = [phase for phase in result.phases if phase.diagnosis.cause is not None]
    named.sort(key=lambda phase: -phase.diagnosis.mismatch.mean_abs)
    lines = [f"{phase.name}: {phase.diagnosis}" for phase in named]
    if result.template is not None and result.template.first_difference is not None:
        lines.insert(0, f"the prompts differ: {_template(result.template)}")
    if not lines:
        worst = result.worst.diagnosis.mismatch
        lines = [f"{result.engine} and the trainer agree: at most {worst.mean_abs:.2g} a token in any phase"]
    return "\n".join(lines)


def render(result: Result, console: Console) -> None:
    """The table, the tokens and the verdict."""
    table = Table(title=f"{result.engine} against {result.model}", title_justify="left")
    table.add_column("tokens sampled", no_wrap=True)
    table.add_column("compared with the trainer's forward", overflow="fold")
    for name in ("tokens", "mean |dlogp|", "largest", "exp|dlogp| - 1"):
        table.add_column(name, justify="right", no_wrap=True)
    for phase in result.phases:
        for number, line in enumerate(shown(phase)):
            m = line.mismatch
            figures = (str(m.num_tokens), f"{m.mean_abs:.2g}", f"{m.max_abs:.2g}", f"{m.excess:.2g}")
            style = "" if number == 0 else "dim"
            table.add_row(phase.name if number == 0 else "", Text(line.forward), *figures, style=style)
        table.add_section()
    console.print(Group(table, Text(_tokens(result)), Text(verdict(result), style="bold")))


def shown(phase: Phase) -> list[Line]:
    """The lines of a phase that a table has room for: all but the predictions that come not near."""
    best: dict[str, Line] = {}
    for line in phase.lines[1:]:
        cause = line.forward.partition(":")[0]
        if cause not in best or line.mismatch.mean_abs < best[cause].mismatch.mean_abs:
            best[cause] = line
    always = ("raw: at", "tokens that", "bf16_", "stale_kv")
    kept = {id(line) for line in best.values() if line.forward.startswith(always)}
    if phase.diagnosis.cause is not None:
        nearest = sorted(best.values(), key=lambda line: line.mismatch.mean_abs)
        kept |= {id(line) for line in nearest[:_NEAREST]}
    return [phase.lines[0], *(line for line in phase.lines[1:] if id(line) in kept)]


def to_json(result: Result) -> dict[str, Any]:
    """Everything, for a file."""
    phases = []
    for phase in result.phases:
        diagnosis = phase.diagnosis
        phases.append(
            {
                "name": phase.name,
                "comparisons": [{"forward": line.forward, **asdict(line.mismatch)} for line in phase.lines],
                "cause": diagnosis.cause,
                "detail": diagnosis.detail,
                "mend": diagnosis.mend,
                "findings": [asdict(finding) for finding in diagnosis.findings],
            }
        )
    return {
        "engine": result.engine,
        "model": result.model,
        "floor": result.floor,
        "phases": phases,
        "template": None if result.template is None else asdict(result.template),
        "retokenised_replies": result.retokenised[0],
        "replies": result.retokenised[1],
        "verdict": verdict(result),
    }


def _tokens(result: Result) -> str:
    lost, replies = result.retokenised
    text = f"{lost} of {replies} replies encode to other ids once they are text: token ids are what must travel"
    if not lost:
        text = f"all {replies} replies encode to the same ids again"
    if result.template is None:
        return f"{text}; the engine's side renders no conversations"
    return f"{text}; {_template(result.template)}"


def _template(check: TemplateCheck) -> str:
    if check.first_difference is None:
        return f"both sides make the same {check.num_engine} prompt ids of a conversation"
    return (
        f"of one conversation the engine's side makes {check.num_engine} ids and the trainer's {check.num_trainer}; "
        f"from index {check.first_difference} on they differ: {check.engine} there, {check.trainer} here"
    )
