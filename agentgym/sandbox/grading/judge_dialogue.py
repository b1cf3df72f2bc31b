"""Verification with judge and subject apart: the host's side of the dialogue. Law: the judge's box never executes a
byte of the agent's, the subject's box never holds a byte of the tests, and all that passes between them is what the
judge asks to run and the bytes that came of it.

The judge asks over its descriptor 4 and is answered over its descriptor 3, a worker's pipes that nothing of the agent's
can reach, and so does the verdict travel. What the subject does (no end, a flood, a box brought down) is a result that
the judge sees. It never ends the verification as invalid: a policy that may choose between zero and nobody-knows will.
"""

from __future__ import annotations

import importlib.resources
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from agentgym.errors import InputError, SandboxDiedError, SandboxError, SandboxTimeoutError, UnavailableError
from agentgym.rewards import Score
from agentgym.sandbox.archive import Archive
from agentgym.sandbox.grading.verdict import Blamed, Rubric, Ungraded
from agentgym.sandbox.spec import ExecResult, Sandbox, SandboxSpec

OpenBox = Callable[[SandboxSpec], Sandbox]
T = TypeVar("T")
HELPER = "agentgym_judge.py"
MESSAGE_BYTES = 4 * 2**20  # the most that one question or one answer may carry
LOG_BYTES = 16_384


@dataclass(frozen=True, slots=True)
class Budget:
    """What the subject may use in one verification; beyond it, its runs end before they begin.

    Example: `Budget(runs=1000, run_s=10.0, total_s=60.0, output_bytes=64 * 2**20)`.
    """

    runs: int = 1000  # more than these is a mistake of the judge
    run_s: float = 10.0  # the longest that the judge may grant one run
    total_s: float = 60.0
    output_bytes: int = 64 * 2**20

    def __post_init__(self) -> None:
        for name in ("runs", "run_s", "total_s", "output_bytes"):
            value = getattr(self, name)
            if not (value > 0 and math.isfinite(value)):
                raise InputError(f"verification budget.{name} must be finite and > 0, got {value}")


class Subject:
    """The artifacts in a box of their own, opened when something is asked of it."""

    def __init__(self, spec: SandboxSpec, artifacts: Archive, budget: Budget, open_box: OpenBox) -> None:
        self._spec, self._artifacts, self._budget, self._open_box = spec, artifacts, budget, open_box
        self._box: Sandbox | None = None
        self.runs = 0
        self._seconds = 0.0
        self._bytes = 0

    def answer(self, request: Mapping[str, Any], body: bytes) -> tuple[dict[str, Any], bytes]:
        """One question of the judge; Ungraded if it is none."""
        self.runs += 1
        if self.runs > self._budget.runs:
            raise Ungraded("too_much", f"the judge asked the subject more than {self._budget.runs} times (budget.runs)")
        match request:
            case {
                "do": "run",
                "command": str() | list() as command,
                "timeout_s": timeout_s,
                "cwd": None | str() as cwd,
            }:
                return self._run(command, body, timeout_s, cwd)
            case {"do": "read", "path": str() as path}:
                return self._file(lambda box: box.read_file(path))
            case {"do": "write", "path": str() as path}:
                return self._file(lambda box: box.write_file(path, body) or b"")
            case {"do": "fresh"}:
                self.close()
                return {}, b""
        raise Ungraded("malformed", f"the judge asked what nobody knows: {request!r:.200}")

    def close(self) -> None:
        if self._box is not None:
            box, self._box = self._box, None
            box.close()

    def _run(self, command: str | list[str], stdin: bytes, timeout_s: object, cwd: str | None) -> tuple[dict, bytes]:
        granted = self._budget.run_s if timeout_s is None else timeout_s
        if isinstance(granted, bool) or not isinstance(granted, (int, float)) or not granted > 0:
            raise Ungraded("malformed", f"the judge asked for a run of {granted!r:.50} seconds")
        seconds = min(granted, self._budget.run_s, self._budget.total_s - self._seconds)
        if seconds <= 0 or self._bytes >= self._budget.output_bytes:
            return _ended("budget", "the subject's time or output is used up")
        try:
            result = self._twice(lambda box: box.exec(command, timeout_s=seconds, stdin=stdin, cwd=cwd))
        except SandboxTimeoutError:
            self._seconds += seconds
            return _ended("timeout", f"it had {seconds:g} s")
        except _Died as error:
            self._seconds += seconds
            return _ended("died", str(error))
        except SandboxError as error:  # no process, no memory, no such directory: what it did to its own box
            return _ended("refused", str(error))
        self._seconds += result.seconds
        self._bytes += len(result.stdout) + len(result.stderr) + result.dropped_bytes
        return _described(result, ""), result.stdout + result.stderr

    def _file(self, call: Callable[[Sandbox], bytes]) -> tuple[dict[str, Any], bytes]:
        try:
            data = self._twice(call)
        except (_Died, SandboxError) as error:
            return {"why": str(error)[:2000] or "failed"}, b""
        self._bytes += len(data)
        if len(data) > MESSAGE_BYTES or self._bytes > self._budget.output_bytes:
            return {"why": f"the file has {len(data)} bytes, which is too much"}, b""
        return {"why": ""}, data

    def _twice(self, call: Callable[[Sandbox], T]) -> T:
        """A box may die for reasons of ours, so it gets a second, fresh one. When that dies of the same call, after
        it could be opened, it is what runs in it that kills it."""
        deaths: list[str] = []
        while len(deaths) < 2:
            box = self._opened()
            try:
                return call(box)
            except SandboxDiedError as error:
                deaths.append(str(error))
                self.close()
            except InputError as error:
                raise Ungraded("malformed", f"the judge asked for what cannot be run: {error}") from error
        raise _Died(deaths[-1])

    def _opened(self) -> Sandbox:
        if self._box is None:
            try:
                box = self._open_box(self._spec)
            except (SandboxError, UnavailableError) as error:
                raise Ungraded("sandbox_failed", f"{type(error).__name__}: {error}") from error
            self._box = box
            put_artifacts(box, self._artifacts)
        return self._box


class _Died(Exception):
    """The subject brought its box down."""


def put_artifacts(box: Sandbox, artifacts: Archive) -> None:
    """Where they were in the agent's box."""
    try:
        box.put(artifacts, "/")
    except (SandboxDiedError, SandboxTimeoutError) as error:
        raise Ungraded("sandbox_failed", f"{type(error).__name__}: {error}") from error
    except SandboxError as error:  # they do not fit into a box like the one that they come from
        raise Blamed("artifacts_refused", str(error)) from error


def judge_apart(
    judge: Sandbox, command: tuple[str, ...], cwd: str, subject: Subject, rubric: Rubric, timeout_s: float, log: Log
) -> Score:
    """Lets the judge's program ask until it gives its verdict; `timeout_s` is for its own time, the subject's apart."""
    process = judge.start_process(command, cwd=cwd)
    message = _message({"max_bytes": MESSAGE_BYTES}, b"")
    while True:
        if timeout_s <= 0:
            raise Ungraded("deadline", "the judge's time is used up")
        answer = judge.ask_process(process, message, timeout_s=timeout_s)
        timeout_s -= answer.seconds
        log.add(answer.output)
        if answer.state == "timeout":
            raise Ungraded("deadline", "the judge passed its deadline")
        if answer.state == "died":
            if answer.exit_code == 0:
                raise Ungraded("no_verdict", "the judge ended without a verdict")
            raise Ungraded("judge_crashed", f"the judge ended with exit code {answer.exit_code}: {log.last_line}")
        request, body = read_request(answer.data)
        match request:
            case {"do": "verdict", "components": components}:
                return rubric.score(components)
            case {"do": "blame", "why": str() as why}:
                raise Blamed("subject_failed", why)
        message = _message(*subject.answer(request, body))


class Log:
    """The end of what the tests printed, for people."""

    def __init__(self) -> None:
        self._data = b""

    def add(self, data: bytes) -> None:
        self._data = (self._data + data)[-LOG_BYTES:]

    @property
    def text(self) -> str:
        return self._data.decode("utf-8", "replace")

    @property
    def last_line(self) -> str:
        lines = self.text.strip().splitlines()
        return lines[-1][:500] if lines else "it said nothing"


def helper_source() -> str:
    """The source of the module that a judge's program imports."""
    return (importlib.resources.files("agentgym.sandbox.inside") / "judge.py").read_text()


def read_request(data: bytes) -> tuple[dict[str, Any], bytes]:
    """What the judge asks: a JSON object, a newline, bytes."""
    line, _, body = data.partition(b"\n")
    try:
        request = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise Ungraded("malformed", f"the judge's question is not JSON: {line[:80]!r}") from error
    if not isinstance(request, dict):
        raise Ungraded("malformed", f"the judge's question is no object: {line[:80]!r}")
    return request, body


def _message(header: Mapping[str, Any], body: bytes) -> bytes:
    return json.dumps(header).encode() + b"\n" + body


def _ended(why: str, said: str) -> tuple[dict[str, Any], bytes]:
    result = ExecResult(-9, b"", said.encode(errors="replace")[:2000], 0, 0.0)
    return _described(result, why), result.stderr


def _described(result: ExecResult, why: str) -> dict[str, Any]:
    sizes = {"out": len(result.stdout), "err": len(result.stderr), "dropped": result.dropped_bytes}
    return {"exit_code": result.exit_code, "why": why, "seconds": result.seconds, **sizes}
