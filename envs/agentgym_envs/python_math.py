"""Arithmetic too large for a head: a stateful Python tool in a sandbox, and a tool that submits the answer.

Reward 1 for exactly the right integer, else 0. The problem is made from the episode's generator; its answer is
computed here, by code of its own and not by the program that the oracle runs in the box.

For small models: `level="easy"` asks for one operation on two numbers, and `worked_examples=3` opens each episode
with that many problems that are solved already, the same ones every time.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import numpy as np

from agentgym.env import ToolEnv
from agentgym.errors import InputError, SandboxDiedError, SandboxError
from agentgym.messages import Message, call
from agentgym.sandbox.interpreter import PythonInterpreter
from agentgym.sandbox.spec import Sandbox, SandboxSpec, Tier
from agentgym.sandbox.warm.pool import BoxSource, box_source
from agentgym.tools import tool

Level = Literal["easy", "standard"]
CALL_S = 10.0  # of one run of the policy's code
READY_S = 60.0  # until an interpreter answers for the first time, on a machine that may stand still
SPEC = SandboxSpec(output_limit=4096)
BOX_LOST = (
    "[the sandbox ended, perhaps for its memory or its processes; a new one took its place, all variables are lost]"
)
_SUBMITTED = "submitted"
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Problem:
    """A question, its answer, and a program that prints the answer.

    Example: `Problem("What is 1234 * 5678 - 90?", 7006562, "print(1234 * 5678 - 90)")`.
    """

    text: str
    answer: int
    program: str


EXAMPLES = (
    Problem("What is 214 * 57?", 12198, "print(214 * 57)"),
    Problem("What is 380 + 645?", 1025, "print(380 + 645)"),
    Problem("What is 902 - 137?", 765, "print(902 - 137)"),
)


class PythonMath(ToolEnv):
    """Solve a problem with `python(code)`, answer with `submit(answer)`. The box is opened at the first use in an
    episode and never outlives it into the next one.

    Whose failure is it when a box is lost? Once the policy's code ran in it, the policy's: it is told so, as text, and
    goes on in a new box, for a failed episode would be a way out of a bad one. A box that cannot be had, or that fails
    before any of the policy's code ran in it, is the infrastructure's failure and fails the episode.
    """

    blocking: ClassVar[bool] = True
    reward_weights = {"correct": 1.0}  # noqa: RUF012

    problem: Problem

    def __init__(
        self, sandbox: Tier | BoxSource = "auto", *, level: Level = "standard", worked_examples: int = 0
    ) -> None:
        """`sandbox` is a tier, or where the boxes come from (a pool).

        `worked_examples` puts that many solved problems (at most 3) before the episode's own: a question, a call
        of python, what it printed, a call of submit. A policy that calls no tool from its description alone imitates
        them; no code of an example is run.

        Raises UnavailableError if the tier that was asked for is not on this machine, InputError for another level or
        number.
        """
        if level not in get_args(Level):
            raise InputError(f"level must be one of {', '.join(get_args(Level))}, got {level!r}")
        self._level: Level = level
        if not 0 <= worked_examples <= len(EXAMPLES):
            raise InputError(f"worked_examples must be 0 to {len(EXAMPLES)}, got {worked_examples!r}")
        self._examples = [message for problem in EXAMPLES[:worked_examples] for message in solved(problem)]
        self._boxes = box_source(sandbox)
        self._boxes.prefetch(SPEC)
        self._box: Sandbox | None = None
        self._interpreter: PythonInterpreter | None = None
        self._boxes_closed = 0

    def reset_task(self, task: str, rng: np.random.Generator) -> Sequence[Message]:
        self._close_box()
        self.problem = make_problem(rng, self._level)
        return [*self._examples, _question(self.problem)]

    @tool
    def python(self, code: str) -> str:
        """Run Python code and see what it prints. Variables stay for the next call.

        Args:
            code: the code; print what you want to see.
        """
        interpreter = self._interpreter or self._open_box()
        try:
            return interpreter.run(code, timeout_s=CALL_S).text or "(nothing was printed)"
        except SandboxError as error:
            log.warning("a sandbox was lost to the code in it: %s", error)
            self._close_box()
            self._open_box()
            return BOX_LOST

    @tool
    def submit(self, answer: int) -> str:
        """Give the final answer and end the task.

        Args:
            answer: the integer asked for.
        """
        self.finish(correct=float(answer == self.problem.answer))
        self._close_box()  # nobody may use it any more, and the environment may lie idle for long
        return _SUBMITTED

    def close(self) -> None:
        self._close_box()

    def _open_box(self) -> PythonInterpreter:
        """A box with an interpreter that answered: what goes wrong from then on is the policy's doing."""
        closed = self._boxes_closed
        self._box = self._boxes.open(SPEC)
        if self._boxes_closed != closed:  # who waited for it was given up meanwhile, and closed this environment
            self._close_box()
            raise SandboxDiedError("the episode ended while its sandbox was opened")
        try:
            interpreter = PythonInterpreter(self._box)
            if not (first := interpreter.run("", timeout_s=READY_S)).ok:
                raise SandboxError(f"the interpreter in sandbox {self._box.name} does not work: {first.text}")
        except SandboxError:
            self._close_box()
            raise
        self._interpreter = interpreter
        return interpreter

    def _close_box(self) -> None:
        self._boxes_closed += 1
        box, self._box, self._interpreter = self._box, None, None
        if box is not None:
            box.close()


def oracle(env: Any, history: Sequence[Message], rng: np.random.Generator) -> Message:
    """Runs the problem's program in the box and submits what it printed."""
    asked = max(index for index, message in enumerate(history) if message.role == "user")  # a worked example is before
    results = [message.content for message in history[asked:] if message.role == "tool"]
    if not results:
        return call("python", code=env.unwrapped.problem.program)
    return call("submit", answer=int(results[-1].strip()))


# --------------------------------------------------------------------------------------------------------- openings


def solved(problem: Problem) -> list[Message]:
    """`problem` asked and solved, as an episode of it reads."""
    steps = (
        (call("python", code=problem.program), str(problem.answer)),
        (call("submit", answer=problem.answer), _SUBMITTED),
    )
    messages = [_question(problem)]
    for action, result in steps:
        messages += [action, Message("tool", result, tool_call_id=action.tool_calls[0].call_id)]
    return messages


def _question(problem: Problem) -> Message:
    return Message("user", f"{problem.text} Compute it with the tool python, then give the integer to the tool submit.")


# --------------------------------------------------------------------------------------------------------- problems


def make_problem(rng: np.random.Generator, level: Level = "standard") -> Problem:
    """One problem of a kind of `level` that `rng` chooses."""
    kinds = _KINDS[level]
    return kinds[int(rng.integers(len(kinds)))](rng)


def _small_sum(rng: np.random.Generator) -> Problem:
    first, second = (int(number) for number in rng.integers(100, 1000, size=2))
    return Problem(f"What is {first} + {second}?", first + second, f"print({first} + {second})")


def _small_difference(rng: np.random.Generator) -> Problem:
    second, first = sorted(int(number) for number in rng.integers(100, 1000, size=2))
    return Problem(f"What is {first} - {second}?", first - second, f"print({first} - {second})")


def _small_product(rng: np.random.Generator) -> Problem:
    first, second = int(rng.integers(100, 1000)), int(rng.integers(12, 100))
    return Problem(f"What is {first} * {second}?", first * second, f"print({first} * {second})")


def _prime_sum(rng: np.random.Generator) -> Problem:
    below = int(rng.integers(200, 3000))
    composite = bytearray(below)
    for number in range(2, math.isqrt(below) + 1):
        composite[number * number :: number] = b"\1" * len(range(number * number, below, number))
    program = f"print(sum(n for n in range(2, {below}) if all(n % d for d in range(2, int(n ** 0.5) + 1))))"
    answer = sum(number for number in range(2, below) if not composite[number])
    return Problem(f"What is the sum of all prime numbers below {below}?", answer, program)


def _power_end(rng: np.random.Generator) -> Problem:
    base, exponent = int(rng.integers(12, 1000)), int(rng.integers(50, 1000))
    answer = 1
    for _ in range(exponent):
        answer = answer * base % 10_000
    text = f"What is the remainder of {base} to the power of {exponent} when divided by 10000?"
    return Problem(text, answer, f"print({base} ** {exponent} % 10000)")


def _common_divisor(rng: np.random.Generator) -> Problem:
    shared = int(rng.integers(2, 500))
    first, second = shared * int(rng.integers(1000, 100_000)), shared * int(rng.integers(1000, 100_000))
    text = f"What is the greatest common divisor of {first} and {second}?"
    program = f"a, b = {first}, {second}\nwhile b:\n    a, b = b, a % b\nprint(a)"
    return Problem(text, math.gcd(first, second), program)


def _common_multiple(rng: np.random.Generator) -> Problem:
    first, second = int(rng.integers(1000, 10_000)), int(rng.integers(1000, 10_000))
    text = f"What is the least common multiple of {first} and {second}?"
    return Problem(
        text, math.lcm(first, second), f"import math\nprint({first} * {second} // math.gcd({first}, {second}))"
    )


def _product(rng: np.random.Generator) -> Problem:
    first, second, third = (int(number) for number in rng.integers(1000, 1_000_000, size=3))
    text = f"What is {first} * {second} - {third}?"
    return Problem(text, first * second - third, f"print({first} * {second} - {third})")


def _digit_sum(rng: np.random.Generator) -> Problem:
    number = int(rng.integers(20, 200))
    answer, left = 0, math.factorial(number)
    while left:
        left, digit = divmod(left, 10)
        answer += digit
    program = f"import math\nprint(sum(int(d) for d in str(math.factorial({number}))))"
    return Problem(f"What is the sum of the decimal digits of {number}! (the factorial of {number})?", answer, program)


def _collatz(rng: np.random.Generator) -> Problem:
    start = int(rng.integers(50, 10_000))
    answer, number = 0, start
    while number != 1:
        number = number // 2 if number % 2 == 0 else 3 * number + 1
        answer += 1
    text = (
        f"Begin with {start}. Halve an even number, replace an odd n by 3n + 1, and go on until you reach 1. "
        "How many steps is that?"
    )
    program = (
        f"n, k = {start}, 0\nwhile n > 1:\n    n, k = (n // 2, k + 1) if n % 2 == 0 else (3 * n + 1, k + 1)\nprint(k)"
    )
    return Problem(text, answer, program)


_KINDS: Mapping[Level, tuple[Callable[[np.random.Generator], Problem], ...]] = {
    "easy": (_small_sum, _small_difference, _small_product),
    "standard": (_prime_sum, _power_end, _common_divisor, _common_multiple, _product, _digit_sum, _collatz),
}
