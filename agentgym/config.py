"""From a TOML file and dotted overrides to a validated model. Must never know what is configured.

Law: a key that nothing reads is refused, with its path and the nearest key that exists.
"""

from __future__ import annotations

import difflib
import tomllib
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from agentgym.errors import ConfigError


class Section(BaseModel):
    """Base of every configuration section: frozen, unknown keys refused, defaults validated."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


M = TypeVar("M", bound=BaseModel)


def load_config(model: type[M], path: Path | None, overrides: Sequence[str] = ()) -> M:
    """Reads `path` (TOML), applies `overrides` (`a.b=c`, c in TOML syntax or a bare string), validates.

    Raises ConfigError naming the file, the dotted path and the mend.
    """
    values = {} if path is None else read_toml(path)
    for override in overrides:
        _apply(values, override)
    return parse_config(model, values, source=str(path) if path else "the configuration")


def read_toml(path: Path) -> dict[str, Any]:
    """The file as nested dictionaries. Raises ConfigError if it cannot be read or is not TOML."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read the configuration {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from error


def parse_config(model: type[M], values: Mapping[str, Any], source: str = "the configuration") -> M:
    """Validates `values` against `model`. Raises ConfigError; the first problems are all named, one a line."""
    try:
        return model.model_validate(values)
    except ValidationError as error:
        lines = [_describe(model, problem) for problem in error.errors()]
        raise ConfigError(f"{source}: " + "\n  ".join(lines)) from error


def _apply(values: dict[str, Any], override: str) -> None:
    path, equals, text = override.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(keys):
        raise ConfigError(f"an override must read a.b=value, got {override!r}")
    table = values
    for key in keys[:-1]:
        table = table.setdefault(key, {})
        if not isinstance(table, dict):
            raise ConfigError(f"override {override!r}: {key!r} is a value, not a section")
    table[keys[-1]] = _toml_value(text.strip())


def _toml_value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text  # a bare word is a string: model.name=tiny


def _describe(model: type[BaseModel], problem: Any) -> str:
    path = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        known = known_paths(model)
        near = difflib.get_close_matches(path, known, n=1, cutoff=0.5) or [
            name for name in known if name.rpartition(".")[2] == path.rpartition(".")[2]
        ]
        hint = f"; did you mean {near[0]!r}?" if near else ""
        return f"unknown key {path!r}{hint}"
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "missing":
        return f"{path} is required; set it in the file or as {path}=..."
    if problem["type"] == "value_error":
        return f"{path}: {message}" if path else message
    return f"{path}: {message}, got {problem['input']!r}"


def known_paths(model: type[BaseModel], prefix: str = "") -> list[str]:
    """Every dotted path of `model`, sections before their keys."""
    paths = []
    for name, field in model.model_fields.items():
        paths.append(prefix + name)
        for section in _sections(field.annotation):
            paths += known_paths(section, f"{prefix}{name}.")
    return paths


def _sections(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is typing.Union:
        return [section for part in typing.get_args(annotation) for section in _sections(part)]
    return []
