"""The mismatch lab against real engines with real faults: each is named, and an engine without one is not accused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import typer
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from agentgym.errors import ConfigError, ServiceError, TrainingError
from agentgym.server.models import resolve_model
from agentgym.trajectory import TokenSequence
from agentgym_trainer.diagnosis import Diagnosis, Finding, Mismatch
from agentgym_trainer.lab.command import app
from agentgym_trainer.lab.mismatch import Line, Phase, Questions, Result, TemplateCheck, perturbed, prompts_of
from agentgym_trainer.lab.mismatch_command import Setup, compare, show
from agentgym_trainer.lab.mismatch_engines import VllmServer
from agentgym_trainer.lab.mismatch_report import shown, to_json, verdict

pytestmark = pytest.mark.timeout(900)  # whole services
FEW = {"num_prompts": 6, "num_tokens": 24, "context": 320}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model untrained: its replies are long, and nothing in them is certain."""
    folder = tmp_path_factory.mktemp("models") / "untrained"
    shutil.copytree(resolve_model("tiny", "maze", 0), folder)
    generator = torch.Generator().manual_seed(1)
    weights = load_file(folder / "model.safetensors")
    for name, tensor in weights.items():
        if tensor.dim() > 1:
            weights[name] = torch.randn(tensor.shape, generator=generator) * 0.25
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture
def rounded(model: Path, tmp_path: Path) -> Path:
    """The model with weights rounded to bfloat16 and a template that says something else."""
    folder = tmp_path / "rounded"
    shutil.copytree(model, folder)
    weights = {name: t.to(torch.bfloat16).to(t.dtype) for name, t in load_file(folder / "model.safetensors").items()}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "tokenizer_config.json").read_text())
    assert config["chat_template"]
    config["chat_template"] = "<pad>" + config["chat_template"]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def phase_of(result: Result, name: str) -> Phase:
    return next(phase for phase in result.phases if phase.name == name)


def test_keys_that_a_publication_keeps_are_named_and_nothing_else_is(model: Path) -> None:
    result = compare(Setup(str(model), publish_mode="keep"), Questions(temperatures=(0.7,), **FEW))
    clean = [phase for phase in result.phases if phase.name != "behind it, in the same replies"]
    assert [phase.name for phase in clean] == [
        "episodes of the environment", "temperature 0.7", "prompts seen before", "before a publication",
        "prompts seen before it",
    ]  # fmt: skip
    for phase in clean:
        assert phase.diagnosis.cause is None, (phase.name, str(phase.diagnosis))
        assert phase.diagnosis.mismatch.max_abs < 1e-4
        assert phase.diagnosis.mismatch.num_tokens > 0
    raw = next(line for line in phase_of(result, "temperature 0.7").lines if line.forward == "raw: at 1")
    assert raw.mismatch.mean_abs > 0.05  # the engine records what it samples from
    kept = phase_of(result, "behind it, in the same replies")
    assert kept.diagnosis.cause == "stale_kv"
    assert kept.diagnosis.findings[0].explained > 0.99
    assert kept.diagnosis.mismatch.mean_abs > 0.01
    assert result.worst is kept
    assert result.template is not None
    assert result.template.first_difference is None
    assert "engine.publish_mode = 'abort'" in verdict(result)


def test_rounded_weights_and_another_template(model: Path, rounded: Path) -> None:
    setup = Setup(str(model), engine_model=rounded, publish_mode="none")
    result = compare(setup, Questions(temperatures=(1.0,), **FEW))
    assert len(result.phases) == 3
    for phase in result.phases:
        assert phase.diagnosis.cause == "bf16_weights", (phase.name, str(phase.diagnosis))
        assert phase.diagnosis.findings[0].explained > 0.99
    assert result.template is not None
    assert result.template.num_engine == result.template.num_trainer + 1
    assert result.template.first_difference is not None
    assert verdict(result).startswith("the prompts differ: ")
    assert "likely cause: bf16_weights" in verdict(result)


def test_the_command_ends_with_the_cause(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "mismatch.json"
    options = ["--temperatures", "0.7", "--score-at", "1", "--publish-mode", "none", "--prompts", "6", "--tokens", "24",
               "--context", "320", "--json", "--check", "--out", str(out)]  # fmt: skip
    done = CliRunner().invoke(app, ["mismatch", str(model), *options])
    assert isinstance(done.exception, TrainingError)
    assert "temperature 0.7: likely cause: temperature (the record is of temperature 0.7" in str(done.exception)
    told = json.loads(out.read_text())
    assert told == json.loads(done.stdout.splitlines()[-1])
    phase = next(phase for phase in told["phases"] if phase["name"] == "temperature 0.7")
    assert phase["cause"] == "temperature"
    assert phase["findings"][0]["explained"] > 0.99
    assert "rollout.temperature" in phase["mend"]
    seen = next(phase for phase in told["phases"] if phase["name"] == "prompts seen before")
    assert seen["cause"] is None


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--temperatures", "warm"], "takes numbers"),
        (["--temperatures", "0"], "between 0.05 and 2"),
        (["--vllm-python", "python"], "is for --engine vllm"),
        (["--vllm-url", "http://x", "--engine-model", "tiny"], "for an engine that is started"),
    ],
)
def test_what_makes_no_sense_is_refused(arguments: list[str], says: str) -> None:
    done = CliRunner().invoke(app, ["mismatch", "tiny", *arguments])
    assert isinstance(done.exception, ConfigError)
    assert says in str(done.exception)


def test_a_server_that_is_not_there() -> None:
    with pytest.raises(ServiceError, match=r"vLLM at http://127\.0\.0\.1:9 does not answer"):
        VllmServer("http://127.0.0.1:9")


# ---------------------------------------------------------------------------------------------------- pure parts


def test_prompts_are_the_turns_of_episodes() -> None:
    def row(mask: str) -> TokenSequence:
        loss = tuple(m == "x" for m in mask)
        return TokenSequence(tuple(range(len(mask))), loss, (0.0,) * len(mask), (0,) * len(mask), (0,) * len(mask))

    questions = Questions(num_prompts=3, num_tokens=4, context=10)
    assert prompts_of([row("..xx.xx."), row("...x")], questions) == [[0, 1], [0, 1, 2], [0, 1, 2, 3, 4]]
    assert prompts_of([row(".......x")], questions) == []  # leaves no room for a reply
    assert len(prompts_of([row("." * n + "x") for n in range(1, 7)], questions)) == 3


def test_the_published_weights_are_others() -> None:
    weights = {"a": torch.randn(50, 4).numpy(), "b": torch.ones(3).numpy()}
    changed = perturbed(weights, 0)
    off = (changed["a"] - weights["a"]).std() / weights["a"].std()
    assert 0.01 < off < 0.03
    assert (changed["b"] == weights["b"]).all()


def result_of(*phases: Phase, template: TemplateCheck | None = None) -> Result:
    return Result("torch engine", "m", 1e-4, phases, template, (0, 3))


def phase(name: str, cause: str | None, mean: float, *forwards: str) -> Phase:
    mismatch = Mismatch(10, mean, 2 * mean, mean)
    findings = (Finding("bf16_head", "x", 0.9, 0.1),)
    diagnosis = Diagnosis(cause, "x", mismatch, findings)  # type: ignore[arg-type]
    lines = [Line(forward, Mismatch(10, 0.1 * n, 1.0, 1.0)) for n, forward in enumerate(forwards)]
    return Phase(name, (Line("as the trainer scores it", mismatch), *lines), diagnosis)


def test_the_verdict_puts_the_worst_first() -> None:
    result = result_of(phase("a", None, 1e-6), phase("b", "bf16_head", 0.1), phase("c", "stale_kv", 0.3))
    assert [line.partition(":")[0] for line in verdict(result).splitlines()] == ["c", "b"]
    assert result.worst.name == "c"
    assert verdict(result_of(phase("a", None, 1e-6))) == (
        "torch engine and the trainer agree: at most 1e-06 a token in any phase"
    )
    differs = result_of(phase("a", None, 1e-6), template=TemplateCheck(5, 6, 3, "'x'", "'y'"))
    assert verdict(differs).startswith("the prompts differ: of one conversation the engine's side makes 5 ids")
    with pytest.raises(TrainingError):
        show(differs, as_json=True, out=None, check=True)
    assert to_json(differs)["template"]["first_difference"] == 3


def test_a_table_has_room_for_what_tells_something() -> None:
    forwards = ("temperature: t", "bf16_head: h", "stale_prefix_cache: 1", "stale_prefix_cache: 16", "wrong_version: v",
                "context_drift: c", "raw: at 1")  # fmt: skip
    told = [line.forward for line in shown(phase("a", "temperature", 1.0, *forwards))]
    assert told == ["as the trainer scores it", "temperature: t", "bf16_head: h", "stale_prefix_cache: 1", "raw: at 1"]
    told = [line.forward for line in shown(phase("a", None, 1e-6, *forwards))]
    assert told == ["as the trainer scores it", "bf16_head: h", "raw: at 1"]


def test_the_command_is_part_of_the_group() -> None:
    names = {info.name or info.callback.__name__ for info in app.registered_commands if info.callback}
    assert "mismatch" in names
    assert isinstance(app, typer.Typer)
