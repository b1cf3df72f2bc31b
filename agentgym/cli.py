"""The command line. Law: it reads arguments, calls one room, and shows what came back; every failure of ours ends in
one message on stderr and an exit code (2: the person's turn, 1: a failure at work), never in a traceback.

Other packages add commands through the entry-point group `agentgym.commands`: the entry's name is the command's, its
value a function with type hints that typer understands (`Annotated[..., typer.Option(help=...)]`), whose docstring
is the help. The module that holds it is imported for every `agentgym --help`, so it imports what is heavy inside the
function. The function returns nothing, and raises AgentGymError; `train` of the trainer is the example. The value may
be a `typer.Typer` of such functions instead: a group of commands, as `lab` is.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import json
import logging
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console

from agentgym import __version__
from agentgym.errors import EnvError, InputError, SandboxError, UnavailableError
from agentgym.view.failures import guarded, log_to_stderr

COMMANDS = "agentgym.commands"
CONFIGS = "agentgym.configs"
AGENTS = ("oracle", "habit", "nop", "random")  # what plays without weights; anything else is a model

Split = Literal["train", "heldout"]
SandboxTier = Literal["auto", "namespace", "docker", "gvisor"]

EnvName = Annotated[str, typer.Argument(help="An id, an alias, module:Id-v0 or path/to/file.py:Id-v0.")]
Settings = Annotated[
    list[str] | None,
    typer.Argument(help="A TOML file, and key=value for any key of it.", metavar="[CONFIG] [KEY=VALUE]..."),
]
PolicyName = Annotated[
    str, typer.Option(help="oracle, habit, nop, random, openai:URL#NAME, or a model: a name such as tiny, or a folder.")
]


# ----------------------------------------------------------------------------------------------------- the commands


def envs(
    as_json: Annotated[bool, typer.Option("--json", help="One JSON line an environment.")] = False,
) -> None:
    """List the registered environments."""
    from agentgym.registry import known_envs

    rows = [_env_row(record) for record in known_envs()]
    if as_json:
        for row in rows:
            print(json.dumps(row))
        return
    from agentgym.view.tables import columns_table

    header = ("id", "alias", "turns", "tools", "oracle")
    lines = [
        (row["id"], row["alias"], row["max_turns"], row.get("error") or ", ".join(row["tools"]) or None, row["oracle"])
        for row in rows
    ]
    columns_table(header, lines, Console())


def evaluate(
    env: EnvName,
    settings: Settings = None,
    policy: PolicyName = "oracle",
    episodes: Annotated[int, typer.Option(min=1)] = 100,
    split: Annotated[Split, typer.Option(help="Which tasks.")] = "heldout",
    seed: Annotated[int, typer.Option(min=0, help="Chooses tasks and randomness.")] = 0,
    temperature: Annotated[float, typer.Option(min=0.0, help="Of a model; 0 is greedy.")] = 1.0,
    sandbox: Annotated[SandboxTier, typer.Option(help="Where environments run code.")] = "auto",
    max_tokens: Annotated[int | None, typer.Option(min=1, help="For openai: of one reply.")] = None,
    key_file: Annotated[Path | None, typer.Option(help="For openai: a file that holds the API key.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON line instead of a table.")] = False,
) -> None:
    """Play an environment and print what was earned."""
    if policy in AGENTS or policy.startswith("openai:"):
        if settings:
            raise InputError(f"settings are for models, and {policy!r} has none: leave out {' '.join(settings)}")
        request = {"temperature": temperature} | ({"max_tokens": max_tokens} if max_tokens else {})
        result = _play_agent(env, policy, episodes, split, seed, sandbox, key_file, request)
    else:
        result = _play_model(env, policy, episodes, split, seed, temperature, sandbox, settings or [])
    result = {"env": env, "policy": policy, "split": split, "seed": seed, **result}
    if as_json:
        print(json.dumps(result))
        return
    from agentgym.view.tables import final_table

    final_table(result, Console())


def serve(
    settings: Settings = None,
    model: Annotated[str | None, typer.Option(help="A name such as tiny, or a folder that transformers loads.")] = None,
    env: Annotated[str | None, typer.Option(help="The environment that a trainer's episodes are played in.")] = None,
    host: Annotated[str | None, typer.Option(help="Where to listen; by default 127.0.0.1.")] = None,
    port: Annotated[int | None, typer.Option(help="By default a free one, which is printed.")] = None,
    engine: Annotated[str | None, typer.Option(help="What samples: torch (the default), or vllm.")] = None,
    replicas: Annotated[int | None, typer.Option(help="vLLM servers to start.")] = None,
    vllm_url: Annotated[list[str] | None, typer.Option(help="A vLLM server that runs already; repeat it.")] = None,
    run_dir: Annotated[Path, typer.Option(help="Where trajectories and the trainer's key go.")] = Path("runs/serve"),
) -> None:
    """Run the rollout service: a server that speaks OpenAI's API and Anthropic's, with ids, logprobs and versions."""
    from agentgym.server.models import resolve_model
    from agentgym.server.process import serve as run
    from agentgym.server.settings import ServiceConfig

    if vllm_url and engine is None:
        engine = "vllm"
    given = {
        "model.name": model, "env.id": env, "server.host": host, "server.port": port, "engine.kind": engine,
        "engine.replicas": replicas, "engine.vllm_urls": vllm_url,
    }  # fmt: skip
    kind = _kind_of_file(ServiceConfig, settings or [])
    config = _service_config(kind, settings or [], {k: v for k, v in given.items() if v is not None})
    config = config if kind is ServiceConfig else config.service()
    folder = resolve_model(config.model.name, config.env.id, config.model.seed, report=_say)
    raise typer.Exit(run(config, folder, run_dir, _say))


def build_base(
    force: Annotated[bool, typer.Option("--force", help="Build it even if it is there.")] = False,
    mirror: Annotated[str | None, typer.Option(help="Debian mirror; by default the one that apt uses here.")] = None,
) -> None:
    """Build the Docker image that sandboxes start from, with debootstrap; no image registry is asked."""
    from agentgym.sandbox.base_image import main as build

    options = [*(["--force"] if force else []), *(["--mirror", mirror] if mirror else [])]
    raise typer.Exit(build(options))


def list_sandboxes(
    as_json: Annotated[bool, typer.Option("--json", help="One JSON line a box.")] = False,
) -> None:
    """List the boxes of every owner on this machine, and those of others that its Docker daemons hold."""
    from agentgym.sandbox.ownership.gc import list_boxes

    rows, problems = list_boxes()
    for problem in problems:
        _say(problem)
    if as_json:
        for row in rows:
            print(json.dumps(asdict(row)))
        return
    from agentgym.view.tables import columns_table

    header = ("box", "tier", "state", "age", "owner", "relaxed", "image")
    lines = [
        (row.name, row.tier, row.state, f"{row.age_s:.0f} s", row.owner, ", ".join(row.relaxed) or None, row.image)
        for row in rows
    ]
    columns_table(header, lines, Console())


def collect_sandboxes(
    images: Annotated[bool, typer.Option("--images", help="Also images built for tasks.")] = False,
    volumes: Annotated[bool, typer.Option("--volumes", help="Also volumes of ours that no box uses.")] = False,
    all_hosts_older_than: Annotated[
        float | None,
        typer.Option(min=60.0, help="Also boxes of other machines' owners, alive or not, older than so many seconds."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON line instead of a table.")] = False,
) -> None:
    """Remove what no living owner holds: boxes, their processes, cgroups, images and leases."""
    from agentgym.sandbox.ownership.gc import collect_garbage

    removed = asdict(collect_garbage(images=images, volumes=volumes, others_older_than_s=all_hosts_older_than))
    problems = removed.pop("problems")
    if as_json:
        print(json.dumps(removed))
    elif any(removed.values()):
        from agentgym.view.tables import columns_table

        lines = [(name, kind) for kind, names in removed.items() for name in names]
        columns_table(("removed", "of the"), lines, Console())
    else:
        print("nothing was left behind")
    if problems:
        raise SandboxError("; ".join(problems))


# ------------------------------------------------------------------------------------------------- what they call


def _env_row(record: Any) -> dict[str, Any]:
    """What `agentgym envs` tells of one environment; one that cannot be loaded does not hide the others."""
    row = {"id": record.env_id, "alias": record.alias, "max_turns": record.max_turns}
    try:
        tools = [spec.name for spec in getattr(record.env_class, "tools", ())]
    except InputError as error:
        return {**row, "tools": [], "oracle": False, "error": str(error)}
    return {**row, "tools": tools, "oracle": record.oracle_ref is not None}


def _play_agent(
    env: str, policy: str, episodes: int, split: Split, seed: int, tier: SandboxTier, key_file: Path | None,
    request: dict[str, Any],
) -> dict[str, Any]:  # fmt: skip
    from agentgym.agents import agent_from
    from agentgym.registry import lookup
    from agentgym.rollout.play import evaluate_agent
    from agentgym.sandbox.warm.pool import SandboxPool

    record = lookup(env)
    agent = agent_from(policy, record, _read_key(key_file), **request)
    takes_sandbox = "sandbox" in inspect.signature(record.env_class).parameters
    with SandboxPool(tier, warm=1, starters=1) if takes_sandbox else contextlib.nullcontext() as boxes:
        kwargs = {"sandbox": boxes} if takes_sandbox else {}
        summary = evaluate_agent(env, agent, episodes, split=split, seed=seed, env_kwargs=kwargs)
    if summary.failed:
        first = next(episode for episode in summary.episodes if episode.error is not None)
        _say(f"{summary.failed} of {episodes} episodes failed; the first, {first.task_id!r}: {first.error}")
    if not summary.valid:
        raise EnvError(f"no episode of {env} was valid: {summary.failed} failed, {summary.invalid} without a score")
    figures = {item.name: getattr(summary, item.name) for item in fields(summary) if item.name != "episodes"}
    return {"episodes": episodes, **figures}


def _play_model(
    env: str, model: str, episodes: int, split: Split, seed: int, temperature: float, tier: SandboxTier,
    settings: Sequence[str],
) -> dict[str, Any]:  # fmt: skip
    from agentgym.server.client import start_service
    from agentgym.server.models import resolve_model
    from agentgym.server.settings import ServiceConfig

    config = _service_config(ServiceConfig, settings, {"env.id": env, "model.name": model, "sandbox.tier": tier})
    folder = resolve_model(config.model.name, config.env.id, config.model.seed, report=_say)
    with tempfile.TemporaryDirectory(prefix="agentgym-eval-") as scratch:
        run_dir = Path(scratch)
        with start_service(config, folder, run_dir, run_dir / "versions") as client:
            return asdict(client.evaluate(episodes, split, temperature, seed))


def _service_config(kind: type[Any], settings: Sequence[str], given: dict[str, Any]) -> Any:
    """A configuration from at most one file and any number of key=value; options win over both."""
    from agentgym.config import load_config

    file = _file_of(settings)
    overrides = [text for text in settings if "=" in text]
    overrides += [f"{path}={json.dumps(value, ensure_ascii=False)}" for path, value in given.items()]
    return load_config(kind, file, overrides)


def _file_of(settings: Sequence[str]) -> Path | None:
    files = [text for text in settings if "=" not in text]
    if len(files) > 1:
        raise InputError(f"one configuration file at most, got {' and '.join(files)}")
    return Path(files[0]) if files else None


def _kind_of_file(service: type[Any], settings: Sequence[str]) -> type[Any]:
    """`service`, or the configuration of the entry-point group `agentgym.configs` (which holds the service's sections,
    and gives them by `service()`) that knows every section of the file: a run's file serves, too."""
    from agentgym.config import read_toml

    file = _file_of(settings)
    if file is None:
        return service
    sections = set(read_toml(file))
    kinds = [service, *(point.load() for point in entry_points(group=CONFIGS))]
    return next((kind for kind in kinds if sections <= set(kind.model_fields)), service)


def _read_key(path: Path | None) -> str | None:
    if path is None:
        return None
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError as error:
        raise InputError(f"cannot read the API key from {path}: {error.strerror}") from error


def _say(text: str) -> None:
    """One line on stderr; stdout is for results."""
    print(text, file=sys.stderr, flush=True)


# ------------------------------------------------------------------------------------------------------ the program


def build_app() -> typer.Typer:
    """The whole command tree, plug-ins included."""
    app = typer.Typer(
        name="agentgym",
        help="A gym of multi-turn, tool-using environments for language models, with the trainer built in.",
        no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
    )  # fmt: skip
    app.callback()(_root)
    app.command("envs")(guarded(envs))
    app.command("eval")(guarded(evaluate))
    app.command("serve")(guarded(serve))
    sandbox = typer.Typer(help="Sandboxes.", no_args_is_help=True)
    sandbox.command("build-base")(guarded(build_base))
    sandbox.command("list")(guarded(list_sandboxes))
    sandbox.command("gc")(guarded(collect_sandboxes))
    app.add_typer(sandbox, name="sandbox")
    for entry in sorted(entry_points(group=COMMANDS), key=lambda entry: entry.name):
        loaded = _load_command(entry)
        if isinstance(loaded, typer.Typer):
            app.add_typer(_guarded_group(loaded), name=entry.name)
        else:
            app.command(entry.name)(guarded(loaded))
    return app


def _guarded_group(group: typer.Typer) -> typer.Typer:
    """The group with its commands guarded; the plug-in's own object stays as it is."""
    ours = copy.copy(group)
    ours.registered_commands = [copy.copy(info) for info in group.registered_commands]
    for info in ours.registered_commands:
        if info.callback is not None:
            info.callback = guarded(info.callback)
    return ours


def _print_version(asked: bool) -> None:
    if asked:
        print(__version__)
        raise typer.Exit


def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and end.", is_eager=True, callback=_print_version)
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Only warnings and results.")] = False,
) -> None:
    log_to_stderr(logging.WARNING if quiet else logging.INFO)


def _load_command(entry: EntryPoint) -> Callable[..., None] | typer.Typer:
    """The plug-in's function or group, or one that says why there is none."""
    try:
        return entry.load()
    except (ImportError, AttributeError) as error:
        why = f"the command {entry.name!r} cannot be loaded from {entry.value}: {error}"

    def unavailable() -> None:
        raise UnavailableError(why)

    unavailable.__doc__ = f"(unavailable: {why})"
    return unavailable


def main() -> None:
    """The program `agentgym`."""
    # Read by OpenMP when torch is imported, here or in a child: teams that spin starve the other process.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    build_app()()


if __name__ == "__main__":
    main()
