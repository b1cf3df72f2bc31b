"""`agentgym lab mismatch`: from what a person asks to an engine that answers. Must never know what is compared."""

from __future__ import annotations

import contextlib
import json
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from agentgym.errors import ConfigError, TrainingError
from agentgym.server.models import resolve_model
from agentgym.server.settings import EngineSection, EnvSection, ModelSection, RolloutSection, ServiceConfig
from agentgym_trainer.alarm import FLOORS
from agentgym_trainer.lab.mismatch import Questions, Result, load_reference, run_mismatch
from agentgym_trainer.lab.mismatch_engines import LabEngine, ServedEngine, VllmServer
from agentgym_trainer.lab.mismatch_report import render, to_json, verdict
from agentgym_trainer.publish import published_weights


@dataclass(frozen=True, slots=True)
class Setup:
    """Which engine meets which model.

    Example: `Setup(model="tiny")` or `Setup(model="runs/x/model", vllm_url="http://127.0.0.1:8000")`.
    """

    model: str
    env: str = "maze"
    engine: str = "torch"
    engine_model: Path | None = None
    vllm_url: str | None = None
    vllm_python: Path | None = None
    previous: tuple[Path, ...] = ()
    dtype: str = "float32"
    publish_mode: str = "abort"
    floor: float | None = None

    def __post_init__(self) -> None:
        if self.vllm_url is not None and self.engine_model is not None:
            raise ConfigError("--engine-model is for an engine that is started; --vllm-url serves what it serves")
        if self.vllm_python is not None and self.engine != "vllm":
            raise ConfigError("--vllm-python is for --engine vllm")


def compare(setup: Setup, questions: Questions) -> Result:
    """Runs the lab. Raises InputError and its kin, and the failures of what it starts."""
    folder = resolve_model(setup.model, setup.env, 0, report=_say)
    previous = [resolve_model(str(path), setup.env, 0) for path in setup.previous]
    floor = setup.floor or FLOORS[setup.dtype]
    with _engine(setup, folder, questions) as engine:
        return run_mismatch(engine, folder, questions, floor, previous, setup.publish_mode != "none", _say)


def show(result: Result, *, as_json: bool, out: Path | None, check: bool) -> None:
    """Prints the table, or one line of JSON; raises TrainingError where `check` and they disagree."""
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(to_json(result), indent=2) + "\n", encoding="utf-8")
    if as_json:
        print(json.dumps(to_json(result)))
    else:
        render(result, Console())
    differs = result.template is not None and result.template.first_difference is not None
    if check and (differs or any(phase.diagnosis.cause is not None for phase in result.phases)):
        raise TrainingError(verdict(result))


@contextlib.contextmanager
def _engine(setup: Setup, folder: Path, questions: Questions) -> Iterator[LabEngine]:
    if setup.vllm_url is not None:
        with contextlib.closing(VllmServer(setup.vllm_url)) as server:
            yield server
        return
    served = resolve_model(str(setup.engine_model), setup.env, 0) if setup.engine_model else folder
    config = service_config(setup, questions)
    with tempfile.TemporaryDirectory(prefix="agentgym-mismatch-") as scratch:
        _say(f"starting the {setup.engine} engine on {served}")
        weights = published_weights(load_reference(served))
        with ServedEngine.started(config, served, weights, Path(scratch)) as engine:
            yield engine


def service_config(setup: Setup, questions: Questions) -> ServiceConfig:
    """A rollout service as training has it, small."""
    mode = "abort" if setup.publish_mode == "none" else setup.publish_mode
    asked = {"kind": setup.engine, "dtype": setup.dtype, "vllm_python": setup.vllm_python, "publish_mode": mode}
    engine = EngineSection.model_validate({**asked, "slots": 4 * questions.num_prompts})
    rollout = RolloutSection(
        group_size=2, groups_per_step=questions.num_prompts, in_flight=2 * questions.num_prompts,
        max_tokens_per_turn=questions.num_tokens, max_episode_tokens=questions.context,
    )  # fmt: skip
    return ServiceConfig(
        env=EnvSection(id=setup.env), model=ModelSection(name=setup.model), rollout=rollout, engine=engine
    )


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
