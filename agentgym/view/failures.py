"""How a command ends and what it says on the way. Law: every failure of ours ends in one message on stderr and an exit
code (2: the person's turn, 1: a failure at work), never in a traceback; stdout is for results.

A room of its own because two programs end so: `agentgym`, and the trainer under `accelerate launch`.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import logging
import sys
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import typer

from agentgym.errors import AgentGymError, UnavailableError


def guarded(command: Callable[..., None]) -> Callable[..., None]:
    """`command`, whose failures end in one message and an exit code."""

    @functools.wraps(command)
    def run(*arguments: Any, **options: Any) -> None:
        with _one_message():
            command(*arguments, **options)

    return run


@contextlib.contextmanager
def _one_message() -> Iterator[None]:
    try:
        yield
    except AgentGymError as error:
        _fail(f"error: {error}", error.exit_code)
    except ModuleNotFoundError as error:
        extra = {"torch": "train", "accelerate": "train", "tomli_w": "train", "gguf": "smollm"}.get(error.name or "")
        if extra is None:
            raise
        _fail(f"error: this needs {error.name}: pip install 'agentgym-rl[{extra}]'", UnavailableError.exit_code)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        where = f" (writing {error.filename})" if error.filename else ""
        _fail(f"error: the disk is full{where}: make room and try again", 1)
    except KeyboardInterrupt:
        _fail("interrupted", 1)


def _fail(message: str, code: int) -> NoReturn:
    print(message, file=sys.stderr, flush=True)
    raise typer.Exit(code)


class _StderrHandler(logging.StreamHandler[Any]):
    """Writes to what sys.stderr is now: a live progress line puts itself in its place."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> Any:
        return sys.stderr


def log_to_stderr(level: int) -> None:
    """Sends our packages' log from `level` on, and everybody's warnings, to stderr."""
    handler = _StderrHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    logging.basicConfig(handlers=[handler], level=logging.WARNING)
    for package in ("agentgym", "agentgym_envs", "agentgym_trainer"):
        logging.getLogger(package).setLevel(level)
