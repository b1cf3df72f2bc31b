"""How a check asks a box."""

from __future__ import annotations

import json
import time
from collections.abc import Callable

from agentgym.sandbox.spec import ExecResult, Sandbox, SandboxSpec

Opener = Callable[[SandboxSpec], Sandbox]
Check = Callable[[Opener], None]


def python(box: Sandbox, code: str, timeout_s: float = 30.0) -> ExecResult:
    """Runs a Python program in the box."""
    return box.exec(["python3", "-I", "-c", code], timeout_s=timeout_s)


def answer(box: Sandbox, code: str) -> object:
    """What a Python program in the box prints as JSON."""
    result = python(box, code)
    assert result.exit_code == 0, result.stderr.decode(errors="replace")
    return json.loads(result.stdout)


def eventually(holds: Callable[[], object], what: str, seconds: float = 60.0) -> None:
    """Waits until it is so, on a machine that may stand still for seconds."""
    until = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < until, what
        time.sleep(0.05)


def raises(kind: type[Exception], call: Callable[[], object]) -> Exception:
    """The error, which must be exactly of this class."""
    raised: list[Exception] = []
    try:
        call()
    except kind as error:
        raised.append(error)
    assert [type(error) for error in raised] == [kind], f"{kind.__name__} was not raised, but {raised!r}"
    return raised[0]
