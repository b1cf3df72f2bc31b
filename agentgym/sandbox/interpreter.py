"""Python with a memory, in a box: what a notebook's kernel is, as a tool for a model. Law: whatever the code does, a
run returns text; only a dead box is an exception."""

from __future__ import annotations

import importlib.resources
import itertools
import json
from dataclasses import dataclass

from agentgym.sandbox.spec import Answer, Sandbox

PYTHON = "python3"


@dataclass(frozen=True, slots=True)
class PythonResult:
    """What running one piece of code gave: what it printed, then the value of a trailing expression or the traceback.

    Example: `PythonResult(text="hi\\n42", ok=True, state_lost=False)`.
    """

    text: str
    ok: bool
    state_lost: bool  # the interpreter was replaced, so all variables are gone; the text says why


class PythonInterpreter:
    """A Python in `sandbox` whose variables stay from one run to the next.

    Example: `python.run("x = 20")`, then `python.run("print('hi'); x + 1").text == "hi\\n21"`.
    """

    def __init__(self, sandbox: Sandbox) -> None:
        self._sandbox = sandbox
        self._process: int | None = None
        self._ids = itertools.count(1)
        self._driver = (importlib.resources.files("agentgym.sandbox.inside") / "python_driver.py").read_text()

    def run(self, code: str, timeout_s: float = 10.0) -> PythonResult:
        """Runs the code. At the deadline, or if the code ends the interpreter, a new one takes its place."""
        number = next(self._ids)
        if self._process is None:
            self._process = self._start()
        message = json.dumps({"id": number, "code": code, "limit": self._sandbox.spec.output_limit // 2}).encode()
        answer = self._sandbox.ask_process(self._process, message, timeout_s=timeout_s)
        printed = answer.output.decode("utf-8", "replace")
        if answer.state == "timeout":
            return self._lost(printed, f"the deadline of {timeout_s:g} s passed and the code was stopped")
        if answer.state == "died":
            return self._lost(printed, f"the code ended the interpreter ({_ending(answer)})")
        verdict, _, value = answer.data.partition(b"\n")
        ok = _verdict(verdict, number)
        if ok is None:
            self.reset()
            return self._lost(printed, "the interpreter answered out of turn and was stopped")
        return PythonResult(_joined(printed, value.decode("utf-8", "replace")), ok, state_lost=False)

    def reset(self) -> None:
        """Forgets all variables: the next run has a new interpreter."""
        if self._process is not None:
            process, self._process = self._process, None
            self._sandbox.stop_process(process)

    def _start(self) -> int:
        # isolated from the environment and the user's site, but packages of the image can be imported
        return self._sandbox.start_process([PYTHON, "-I", "-c", self._driver])

    def _lost(self, printed: str, why: str) -> PythonResult:
        self._process = None
        return PythonResult(_joined(printed, f"[{why}; all variables are lost]"), ok=False, state_lost=True)


def _verdict(line: bytes, number: int) -> bool | None:
    """Whether the code went well; None if this is no answer to that question."""
    try:
        verdict = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(verdict, dict) or verdict.get("id") != number or not isinstance(verdict.get("ok"), bool):
        return None
    return verdict["ok"]


def _ending(answer: Answer) -> str:
    code = answer.exit_code
    if code is None:
        return "it answered no longer"
    if code == -9:
        return "it was killed, perhaps for its memory"
    return f"signal {-code}" if code < 0 else f"exit code {code}"


def _joined(printed: str, value: str) -> str:
    if printed and value and not printed.endswith("\n"):
        printed += "\n"
    return (printed + value).rstrip("\n")
