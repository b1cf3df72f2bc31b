"""A shell with a memory, in a box: directory, variables and functions stay from one command to the next. Law: whatever
a command does, a run returns a result; only a dead box is an exception."""

from __future__ import annotations

import importlib.resources
import itertools
import json
from dataclasses import dataclass

from agentgym.errors import InputError
from agentgym.sandbox.spec import Answer, Sandbox

PYTHON = "python3"


@dataclass(frozen=True, slots=True)
class ShellResult:
    """What one command gave.

    Example: `ShellResult(output=b"hi\\n", exit_code=0, state_lost=False, dropped_bytes=0, note="")`.
    """

    output: bytes  # stdout and stderr in their order, cut like those of exec
    exit_code: int | None  # negative: that signal killed the shell; None: it had to be killed, and why is in `note`
    state_lost: bool  # the shell was replaced: directory, variables and functions are as at the start
    dropped_bytes: int
    note: str  # why the state was lost; "" if it was not

    @property
    def text(self) -> str:
        """The output as text, what is no UTF-8 shown as U+FFFD, and the note in brackets after it."""
        text = self.output.decode("utf-8", "replace")
        if not self.note:
            return text
        return f"{text}{chr(10) if text and not text.endswith(chr(10)) else ''}[{self.note}]"


class ShellSession:
    """A shell in `box`: bash where the image has it, else sh.

    Example: `shell.run("cd /tmp; x=5")`, then `shell.run("echo $x in $PWD").text == "5 in /tmp\\n"`.
    """

    def __init__(self, box: Sandbox) -> None:
        self._box = box
        self._process: int | None = None
        self._ids = itertools.count(1)
        self._driver = (importlib.resources.files("agentgym.sandbox.inside") / "shell_driver.py").read_text("utf-8")

    def run(self, command: str, timeout_s: float = 10.0) -> ShellResult:
        """Runs the command. At the deadline, or if it ends the shell, a new one takes its place."""
        if "\0" in command:
            raise InputError(f"a shell command must hold no NUL character, got {command!r:.200}")
        number = next(self._ids)
        if self._process is None:
            # isolated from the environment and the user's site, which are the commands' to change
            self._process = self._box.start_process([PYTHON, "-I", "-S", "-c", self._driver])
        message = json.dumps({"id": number, "command": command}).encode()
        answer = self._box.ask_process(self._process, message, timeout_s=timeout_s)
        if answer.state == "timeout":
            return self._lost(answer, None, f"the deadline of {timeout_s:g} s passed and the command was killed")
        if answer.state == "died":
            return self._lost(answer, None, "the shell was killed, or answered nonsense")
        verdict = _verdict(answer.data, number)
        if verdict is None:
            self.reset()
            return self._lost(answer, None, "the shell answered out of turn and was stopped")
        exit_code, ended = verdict
        if ended:
            self.reset()
            how = f"by signal {-exit_code}" if exit_code < 0 else f"with exit code {exit_code}"
            return self._lost(answer, exit_code, f"the command ended the shell {how}")
        return ShellResult(answer.output, exit_code, state_lost=False, dropped_bytes=answer.dropped_bytes, note="")

    def reset(self) -> None:
        """Ends the shell and what runs in its background: the next run has a new one."""
        if self._process is not None:
            process, self._process = self._process, None
            self._box.stop_process(process)

    def _lost(self, answer: Answer, exit_code: int | None, why: str) -> ShellResult:
        self._process = None
        note = f"{why}; directory, variables and functions are lost"
        return ShellResult(answer.output, exit_code, True, answer.dropped_bytes, note)


def _verdict(data: bytes, number: int) -> tuple[int, bool] | None:
    """(exit code, whether the shell ended); None if this is no answer to that question."""
    try:
        verdict = json.loads(data)
    except (ValueError, RecursionError):
        return None
    if not isinstance(verdict, dict) or verdict.get("id") != number or not isinstance(verdict.get("ended"), bool):
        return None
    code = verdict.get("exit_code")
    return (code, verdict["ended"]) if type(code) is int and -128 <= code <= 255 else None
