"""The commands of the laboratories, mounted as `agentgym lab` through the entry-point group `agentgym.commands`. What
is heavy is imported inside a command."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from agentgym.errors import ConfigError

app = typer.Typer(help="Laboratories: what staleness and engine mismatch do, measured.", no_args_is_help=True)


@app.callback()
def _lab() -> None:
    """Laboratories: what staleness and engine mismatch do, measured."""


@app.command()
def staleness(
    settings: Annotated[
        list[str] | None,
        typer.Argument(help="A TOML file, and key=value for any key of it.", metavar="[CONFIG] [KEY=VALUE]..."),
    ] = None,
    lags: Annotated[str, typer.Option(help="Versions between sampling and training; `full`: 0,1,2,4,8,16.")] = "0,4,8",
    anchors: Annotated[str, typer.Option(help="Sources of proximal logprobs.")] = "snapshot,ewma,resident",
    corrections: Annotated[str, typer.Option(help="How r_d is handled, names of loss.correction.")] = "token_mask",
    updates: Annotated[str, typer.Option(help="Optimizer steps per batch.")] = "1",
    seeds: Annotated[str, typer.Option(help="Of model, tasks and sampling; confidence intervals are over them.")] = (
        "0,1,2"
    ),
    mismatch: Annotated[
        str, typer.Option(help="What is wrong with the engine on purpose: none, bf16 or logits:SCALE.")
    ] = "bf16",
    partial: Annotated[bool, typer.Option(help="Rows hold several versions, from the lag's to the newest.")] = False,
    jobs: Annotated[int, typer.Option(min=1, help="Runs at a time, each on one core.")] = 1,
    windows: Annotated[str, typer.Option(help="Lag windows of law F.")] = "0,4,8,16",
    floor: Annotated[
        Path, typer.Option(help="The stored line of `python -m benchmarks logprob_conformance`, shown beside law F.")
    ] = Path("benchmarks/results/logprob_conformance.json"),
    report_only: Annotated[bool, typer.Option("--report-only", help="Run nothing: report what is there.")] = False,
    out: Annotated[Path, typer.Option(help="The lab's folder; a lab that was stopped goes on in it.")] = (
        Path("runs/staleness")
    ),
) -> None:
    """What staleness does under each anchor: law F, active fractions, cost and reward; writes report.html and .json."""
    from rich.console import Console

    from agentgym_trainer.lab.cell import Conditions
    from agentgym_trainer.lab.grid import Grid
    from agentgym_trainer.lab.staleness import ALL_LAGS, LabOptions, lab_config, run_lab

    config = lab_config(settings or [])
    grid = Grid(
        ALL_LAGS if lags == "full" else _numbers("lags", lags), _names(anchors), _names(corrections),
        _numbers("updates", updates), _numbers("seeds", seeds),
    )  # fmt: skip
    options = LabOptions(
        grid, Conditions(mismatch, partial), out, jobs, shlex.join(["agentgym", *sys.argv[1:]]), floor,
        _numbers("windows", windows), report_only,
    )  # fmt: skip
    print(run_lab(config, options, Console(stderr=True)))


@app.command()
def mismatch(
    model: Annotated[str, typer.Argument(help="What the trainer computes: a name such as tiny, or a folder.")],
    env: Annotated[str, typer.Option(help="What a model that is built by name is built for.")] = "maze",
    engine: Annotated[Literal["torch", "vllm"], typer.Option(help="What is started.")] = "torch",
    engine_model: Annotated[Path | None, typer.Option(help="A folder that the engine serves instead.")] = None,
    vllm_url: Annotated[str | None, typer.Option(help="A vLLM server that runs, taken as it is.")] = None,
    vllm_python: Annotated[Path | None, typer.Option(help="The interpreter that has vllm.")] = None,
    previous: Annotated[
        list[Path] | None, typer.Option(help="A model that the engine may still have, or keys of it; repeat it.")
    ] = None,
    temperatures: Annotated[str, typer.Option(help="To sample at.")] = "1,0.7",
    score_at: Annotated[float | None, typer.Option(help="The trainer's temperature, where it is another.")] = None,
    dtype: Annotated[Literal["float32", "bfloat16"], typer.Option(help="The engine's.")] = "float32",
    publish_mode: Annotated[
        Literal["abort", "wait", "keep", "none"], typer.Option(help="How weights are published; none: they are not.")
    ] = "abort",
    prompts: Annotated[int, typer.Option(min=1, help="Sampled together.")] = 16,
    tokens: Annotated[int, typer.Option(min=4, help="Of each reply.")] = 48,
    context: Annotated[int, typer.Option(min=16, help="Tokens of a prompt and its replies.")] = 1024,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    floor: Annotated[float | None, typer.Option(help="Of mean exp|dlogp| - 1; by default 1e-4, in bf16 0.05.")] = None,
    check: Annotated[bool, typer.Option("--check", help="End with exit code 1 where they disagree.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON line instead of a table.")] = False,
    out: Annotated[Path | None, typer.Option(help="A file for the JSON.")] = None,
) -> None:
    """Compare an engine with the trainer's forward on the same tokens, and name what makes them differ."""
    from agentgym_trainer.lab.mismatch import Questions
    from agentgym_trainer.lab.mismatch_command import Setup, compare, show

    questions = Questions(_heats(temperatures), prompts, tokens, context, seed, score_at)
    setup = Setup(
        model=model, env=env, engine=engine, engine_model=engine_model, vllm_url=vllm_url, vllm_python=vllm_python,
        previous=tuple(previous or ()), dtype=dtype, publish_mode=publish_mode, floor=floor,
    )  # fmt: skip
    show(compare(setup, questions), as_json=as_json, out=out, check=check)


def _heats(text: str) -> tuple[float, ...]:
    try:
        heats = tuple(float(part) for part in _names(text))
    except ValueError as error:
        raise ConfigError(f"--temperatures takes numbers separated by commas, got {text!r}") from error
    if not heats or not all(0.05 <= heat <= 2.0 for heat in heats):
        raise ConfigError(f"--temperatures must be between 0.05 and 2, got {text!r}: greedy replies say little")
    return heats


@app.command()
def cost(
    model: Annotated[
        str, typer.Option(help="A name such as smollm2-135m, a folder, or a random model: medium, small.")
    ] = "smollm2-135m",
    rows: Annotated[int, typer.Option(help="Of the batch.")] = 8,
    tokens: Annotated[int, typer.Option(help="Of the longest row.")] = 96,
    repetitions: Annotated[int, typer.Option(help="Of every anchor, interleaved.")] = 3,
    out: Annotated[Path, typer.Option(help="The page; its figures go beside it, as JSON.")] = Path(
        "old-logits-cost.md"
    ),
) -> None:
    """What exact old logprobs cost an optimizer step, beside the usual recompute and ewma: a table as in the paper."""
    import json
    import os
    import platform

    from rich.console import Console

    from agentgym_trainer.lab.cost import CostPlan, measure_cost
    from agentgym_trainer.lab.cost_table import render_costs
    from agentgym_trainer.lab.grid import write_whole

    console = Console(stderr=True)
    plan = CostPlan(model=model, rows=rows, tokens=tokens, repetitions=repetitions)
    measured = measure_cost(plan, lambda line: console.print(line, markup=False, highlight=False))
    machine = f"{len(os.sched_getaffinity(0))} {platform.machine()} cores"
    write_whole(out.with_suffix(".json"), json.dumps(measured, indent=1) + "\n")
    write_whole(out, render_costs(measured, machine, shlex.join(["agentgym", *sys.argv[1:]])))
    print(out)


def _names(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _numbers(option: str, text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in _names(text))
    except ValueError as error:
        raise ConfigError(f"--{option} takes whole numbers separated by commas, got {text!r}") from error
