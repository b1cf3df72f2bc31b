"""Names of environments: registration, plug-ins, look-up.

Owns which environment a name means, and who plays it as oracle or habit. Must never know what an environment does: it
hands out what the entry point makes. Law: a name is registered under Gymnasium and here at once, or not at all.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import inspect
import logging
import sys
import traceback
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gymnasium
from gymnasium.envs.registration import parse_env_id

from agentgym.errors import InputError, UnknownNameError

PLUGIN_GROUP = "agentgym.envs"
_log = logging.getLogger(__name__)

# what importing a stranger's module can reasonably raise; anything else is shown as it is
_IMPORT_ERRORS = (
    ImportError, SyntaxError, NameError, AttributeError, TypeError, ValueError, LookupError, OSError, RuntimeError,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class EnvRecord:
    """One registered environment. Agents are callables `(env, history, rng) -> Message`.

    Example: `EnvRecord("agentgym/Maze-v0", "agentgym_envs.maze:Maze", 7, "maze", {}, "agentgym_envs.maze:oracle",
    "agentgym_envs.maze:habit")`.
    """

    env_id: str
    entry_point: str | Callable[..., Any]
    max_turns: int
    alias: str | None
    kwargs: Mapping[str, Any]
    oracle_ref: str | Callable[..., Any] | None
    habit_ref: str | Callable[..., Any] | None

    @property
    def env_class(self) -> Callable[..., Any]:
        """The class (or function) that makes the environment."""
        return _resolve(self.entry_point)

    @property
    def oracle(self) -> Callable[..., Any] | None:
        """The agent that solves every task, if there is one."""
        return None if self.oracle_ref is None else _resolve(self.oracle_ref)

    @property
    def habit(self) -> Callable[..., Any] | None:
        """An agent with a bad habit, from which imperfect demonstrations are mixed, if there is one."""
        return None if self.habit_ref is None else _resolve(self.habit_ref)


# What Gymnasium's own registry is for its part: one table a process, written by `register` alone.
_records: dict[str, EnvRecord] = {}
_broken_plugins: dict[str, str] = {}
_loaded: set[str] = set()  # plug-ins and files whose import has been tried


def register(
    env_id: str,
    entry_point: str | Callable[..., Any],
    *,
    max_turns: int,
    oracle: str | Callable[..., Any] | None = None,
    habit: str | Callable[..., Any] | None = None,
    alias: str | None = None,
    **kwargs: Any,
) -> None:
    """Registers an environment here and with Gymnasium, whose TimeLimit becomes `max_turns`.

    `entry_point`, `oracle` and `habit` are objects or "module:name"; `kwargs` go to the constructor. Registering the
    same class again replaces it (a notebook cell run twice). Raises InputError for a bad id and for a taken name.
    """
    try:
        namespace, _, _ = parse_env_id(env_id)
    except gymnasium.error.Error as error:
        raise InputError(f"an environment id must read name/Env-v0, got {env_id!r}") from error
    if namespace is None:
        raise InputError(f"an environment id needs a name space of yours, as in my/{env_id}, got {env_id!r}")
    if max_turns < 1:
        raise InputError(f"{env_id}: max_turns must be >= 1, got {max_turns}")
    known = _records.get(env_id)
    if known is not None and _title(known.entry_point) != _title(entry_point):
        raise InputError(f"{env_id} is already registered for {_title(known.entry_point)}; choose another id")
    for other in _records.values():
        if alias is not None and other.alias == alias and other.env_id != env_id:
            raise InputError(f"{env_id}: the alias {alias!r} already means {other.env_id}")
    gymnasium.registry.pop(env_id, None)
    gymnasium.register(env_id, entry_point=entry_point, max_episode_steps=max_turns, kwargs=dict(kwargs))
    _records[env_id] = EnvRecord(env_id, entry_point, max_turns, alias, dict(kwargs), oracle, habit)


def lookup(name: str) -> EnvRecord:
    """The record of an id, an alias, "module:Id-v0" or "path/to/file.py:Id-v0"; plug-ins are loaded when needed.

    Raises UnknownNameError with the nearest name, InputError for a module or file that cannot be loaded.
    """
    source, colon, name = name.rpartition(":")
    if colon:
        _load_source(source)
    record = _find(name)
    if record is None:
        load_plugins()
        record = _find(name)
    if record is None:
        error = UnknownNameError.of("environment", name, [*_records, *_aliases()])
        broken = "".join(f"; {problem}" for problem in _broken_plugins.values())
        raise UnknownNameError(f"{error}{broken}")
    return record


def make(name: str, **kwargs: Any) -> Any:
    """A new AgentEnv, without Gymnasium's wrappers: limits belong to who plays. (Typed Any because this floor lies
    below AgentEnv's.) Raises as `lookup` does, and InputError for keyword arguments that the constructor refuses."""
    record = lookup(name)
    if kwargs:
        try:
            inspect.signature(record.env_class).bind(**{**record.kwargs, **kwargs})
        except TypeError as error:
            raise InputError(f"{record.env_id} cannot be made with {kwargs!r}: {error}") from error
    return gymnasium.make(record.env_id, disable_env_checker=True, **kwargs).unwrapped


def known_envs() -> list[EnvRecord]:
    """Every registered environment, plug-ins included, by id."""
    load_plugins()
    return [_records[env_id] for env_id in sorted(_records)]


def load_plugins() -> None:
    """Imports each entry point of the group `agentgym.envs` once.

    One that cannot be imported is named with its distribution in a warning and in every failed look-up; it does not
    keep the others from working.
    """
    for entry in importlib.metadata.entry_points(group=PLUGIN_GROUP):
        key = f"{entry.name} = {entry.value}"
        if key in _loaded:
            continue
        _loaded.add(key)
        try:
            entry.load()
        except _IMPORT_ERRORS as error:
            owner = entry.dist.name if entry.dist else "an unknown distribution"
            problem = f"the environment plug-in {key!r} of {owner} cannot be imported: {_describe(error)}"
            _broken_plugins[key] = problem
            _log.warning(problem)


def _find(name: str) -> EnvRecord | None:
    env_id = _aliases().get(name, name)
    return _records.get(env_id)


def _aliases() -> dict[str, str]:
    return {record.alias: env_id for env_id, record in _records.items() if record.alias is not None}


def _load_source(source: str) -> None:
    """Imports a module, or runs a file once."""
    try:
        if not source.endswith(".py"):
            importlib.import_module(source)
            return
        path = Path(source).expanduser().resolve()
        if not path.is_file():
            raise InputError(f"there is no environment file {source!r}")
        _run_file(path)
    except InputError:
        raise
    except _IMPORT_ERRORS as error:
        raise InputError(f"cannot load the environment file or module {source!r}: {_describe(error)}") from error


def _run_file(path: Path) -> None:
    name = f"agentgym_file_{path.stem}_{zlib.crc32(str(path).encode()):08x}"
    if name in sys.modules:
        return
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # before it runs: type hints and pickles look their module up
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise


def _resolve(reference: str | Callable[..., Any]) -> Callable[..., Any]:
    if not isinstance(reference, str):
        return reference
    module, _, name = reference.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise InputError(f"{reference!r} cannot be loaded: {error}") from error


def _title(reference: str | Callable[..., Any]) -> str:
    if isinstance(reference, str):
        return reference
    return f"{reference.__module__}:{getattr(reference, '__qualname__', reference)}"


def _describe(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {error}{where}"
