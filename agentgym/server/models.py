"""From a model's name to a folder that transformers loads. Must never know how a model is built.

A name is an entry point of the group `agentgym.models`, whose builder makes (or finds in its cache) the folder; or it
is the path of a folder.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path

from agentgym.errors import InputError, UnavailableError, UnknownNameError
from agentgym.server.settings import OUTSIDE

GROUP = "agentgym.models"
log = logging.getLogger(__name__)


def cache_dir() -> Path:
    """Where built models live: `$XDG_CACHE_HOME/agentgym`, by default `~/.cache/agentgym`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "agentgym"


def resolve_model(
    name: str,
    env_id: str,
    seed: int,
    *,
    cache: Path | None = None,
    report: Callable[[str], None] = log.info,
) -> Path:
    """The folder of model `name`, built if need be for `env_id` from `seed`; `report` is told what is being done.

    Raises UnknownNameError, with the nearest name, for what is neither a builder nor a folder, and InputError for a
    folder that holds no model.
    """
    builders = {point.name: point for point in entry_points(group=GROUP)}
    if name == "tiny" and env_id == OUTSIDE:
        raise InputError(
            "the tiny model begins as an imitation of an environment: set env.id, or model.name to another one"
        )
    if name in builders:
        try:
            build = builders[name].load()
            return build(env_id, seed, cache or cache_dir(), report)
        except ImportError as error:
            raise UnavailableError(f"model {name!r} needs {error.name}: pip install 'agentgym-rl[train]'") from error
    folder = Path(name).expanduser()
    if not name or not folder.is_dir():
        raise UnknownNameError.of("model", name, builders)
    if not (folder / "config.json").is_file():
        raise InputError(f"model folder {name} holds no config.json; save a model there with save_pretrained")
    return folder


_OF_A_COPY = ("_name_or_path", "transformers_version", "torch_dtype", "dtype", "use_cache")  # not of the model


def model_id(folder: Path) -> str:
    """Tells models apart: a digest of what config.json says of one, whoever saved it and however it is computed.

    Raises InputError for a folder without a readable config.json.
    """
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"model folder {folder} holds no readable config.json: {error}") from error
    said = {key: value for key, value in config.items() if key not in _OF_A_COPY}
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:16]
