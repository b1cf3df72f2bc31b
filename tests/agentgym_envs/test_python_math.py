"""Arithmetic with a Python tool, in real boxes of both tiers."""

from __future__ import annotations

import contextlib
import io
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from agentgym import agents, registry
from agentgym.errors import InputError, SandboxDiedError, SandboxError
from agentgym.messages import Message, ToolCall, call
from agentgym.rollout.play import evaluate_agent
from agentgym.sandbox.spec import Sandbox, SandboxSpec
from agentgym.sandbox.warm.pool import BoxSource, SandboxPool, box_source
from agentgym.testing.env_checks import check_environment
from agentgym_envs.python_math import _KINDS, BOX_LOST, EXAMPLES, PythonMath, make_problem

TIERS = [
    pytest.param("docker", marks=pytest.mark.docker),
    pytest.param("namespace", marks=pytest.mark.bubblewrap),
]


@pytest.fixture(params=TIERS)
def tier(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def env(tier: str) -> Iterator[PythonMath]:
    env = registry.make("python_math", sandbox=tier)
    env.reset(seed=0)
    yield env
    env.close()


def python(env: PythonMath, code: str) -> str:
    return env.step(call("python", code=code))[0][0].content


def printed_by(program: str) -> str:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(program, {})
    return printed.getvalue().strip()


# --------------------------------------------------------------------------------------------------- without a box


@pytest.mark.parametrize("kind", [*_KINDS["easy"], *_KINDS["standard"]], ids=lambda kind: kind.__name__)
def test_the_programs_print_the_answers(kind):
    """The answer is computed one way, the oracle's program computes it another: two that agree."""
    for seed in range(20):
        problem = kind(np.random.default_rng(seed))
        assert printed_by(problem.program) == str(problem.answer), problem


def test_problems_follow_their_generator_and_vary():
    problems = [make_problem(np.random.default_rng(seed)) for seed in range(200)]
    assert problems == [make_problem(np.random.default_rng(seed)) for seed in range(200)]
    assert len({problem.text for problem in problems}) > 195
    assert not [problem for problem in problems if str(problem.answer) in problem.text.split()]


def test_the_levels_differ_and_the_standard_one_is_the_default():
    texts = [make_problem(np.random.default_rng(seed), "easy").text for seed in range(50)]
    assert all(len(text.split()) == 5 for text in texts), texts  # What is 214 * 57?
    assert make_problem(np.random.default_rng(1)) == make_problem(np.random.default_rng(1), "standard")


def test_worked_examples_are_right():
    assert [printed_by(problem.program) for problem in EXAMPLES] == [str(problem.answer) for problem in EXAMPLES]


@pytest.mark.parametrize("kwargs", [{"level": "esay"}, {"worked_examples": 4}, {"worked_examples": -1}])
def test_options_that_do_not_exist(tier: str, kwargs: dict[str, Any]):
    with pytest.raises(InputError, match=next(iter(kwargs))):
        registry.make("python_math", sandbox=tier, **kwargs)


def test_a_tier_that_does_not_exist():
    with pytest.raises(InputError, match="dokcer"):
        registry.make("python_math", sandbox="dokcer")


# ------------------------------------------------------------------------------------------------------ with a box


def test_it_passes_the_public_checks(tier: str):
    check_environment("python_math", episodes=4, sandbox=tier)


def test_worked_examples_stand_before_the_question_and_open_no_box(tier: str):
    plain = registry.make("python_math", sandbox=tier, level="easy")
    shown = registry.make("python_math", sandbox=tier, level="easy", worked_examples=2)
    question, _ = plain.reset(seed=3, options={"task": "train-3"})
    opening, _ = shown.reset(seed=3, options={"task": "train-3"})
    assert opening[-1:] == question
    assert [m.role for m in opening] == [*["user", "assistant", "tool", "assistant", "tool"] * 2, "user"]
    assert [call.name for m in opening for call in m.tool_calls] == ["python", "submit"] * 2
    assert shown._box is None
    assert shown.step(call("submit", answer=shown.problem.answer))[1] == 1.0
    plain.close()
    shown.close()


@pytest.mark.parametrize("kwargs", [{}, {"level": "easy", "worked_examples": 3}])
def test_the_oracle_computes_in_the_box(tier: str, kwargs: dict[str, Any]):
    oracle = agents.oracle(registry.lookup("python_math"))
    summary = evaluate_agent("python_math", oracle, 8, env_kwargs={"sandbox": tier, **kwargs})
    assert (summary.mean_reward, summary.failed) == (1.0, 0), summary.episodes
    assert all(episode.turns == 2 for episode in summary.episodes)


def test_variables_stay_within_an_episode_and_no_longer(env: PythonMath):
    assert python(env, "x = 20") == "(nothing was printed)"
    assert python(env, "print(x + 1)") == "21"
    python(env, "open('/tmp/note', 'w').write('secret')")
    env.reset(seed=1)
    assert "NameError" in python(env, "print(x)")
    assert "FileNotFoundError" in python(env, "open('/tmp/note')")


def test_errors_and_endings_are_told_to_the_policy(env: PythonMath):
    assert "ZeroDivisionError" in python(env, "1 / 0")
    assert "SyntaxError" in python(env, "def (")
    python(env, "x = 1")
    assert "all variables are lost" in python(env, "import os; os._exit(3)")
    assert "NameError" in python(env, "x")
    assert len(python(env, "print('x' * 10**6)")) < 10_000


@pytest.mark.parametrize("off", [0, 1])
def test_the_answer_is_exact_and_ends_it(env: PythonMath, off: int):
    python(env, "x = 1")
    box = env._box
    assert box is not None
    _, reward, terminated, _, info = env.step(call("submit", answer=env.problem.answer + off))
    assert (reward, terminated, info["score"].components) == (1.0 - off, True, {"correct": 1.0 - off})
    assert env._box is None


def test_an_answer_need_not_open_a_box(env: PythonMath):
    env.step(call("submit", answer=env.problem.answer))
    env.reset(seed=3)
    submit_then_run = (
        ToolCall("a", "submit", '{"answer": 1}'),
        ToolCall("b", "python", '{"code": "print(1)"}'),
    )
    observation = env.step(Message("assistant", "", submit_then_run))[0]
    assert [message.content for message in observation] == ["submitted", "the episode has ended"]
    assert env._box is None


def test_closing_twice_is_allowed(env: PythonMath):
    python(env, "1")
    env.close()
    env.close()
    env.reset(seed=0)
    assert python(env, "print(1)") == "1"


# -------------------------------------------------------------------------------------------------- whose failure it is


class Fickle:
    """Boxes of a real source, of which the test says which starts fail."""

    def __init__(self, tier: str) -> None:
        self._source: BoxSource = box_source(tier)
        self.tier = self._source.tier
        self.failures: list[SandboxError | None] = []
        self.opened: list[Sandbox] = []
        self.expected: list[SandboxSpec] = []
        self.asked = threading.Event()
        self.may_open = threading.Event()
        self.may_open.set()

    def open(self, spec: SandboxSpec | None = None) -> Sandbox:
        self.asked.set()
        assert self.may_open.wait(200)
        if self.failures and (failure := self.failures.pop(0)):
            raise failure
        self.opened.append(self._source.open(spec))
        return self.opened[-1]

    def prefetch(self, spec: SandboxSpec) -> None:
        self.expected.append(spec)


@pytest.fixture
def boxes(tier: str) -> Iterator[Fickle]:
    boxes = Fickle(tier)
    yield boxes
    for box in boxes.opened:
        box.close()


@pytest.fixture
def fickle(boxes: Fickle) -> Iterator[PythonMath]:
    env = registry.make("python_math", sandbox=boxes)
    env.reset(seed=0)
    yield env
    env.close()


def test_memory_that_the_code_takes_is_told_to_the_policy(env: PythonMath):
    python(env, "x = 1")
    said = python(env, "y = bytearray(2 * 10**9)\nfor i in range(0, len(y), 4096): y[i] = 1")
    assert "MemoryError" in said or "all variables are lost" in said, said
    assert python(env, "print(2)") == "2"


def test_a_box_that_is_lost_to_the_code_in_it_is_told_and_replaced(fickle: PythonMath, boxes: Fickle):
    python(fickle, "x = 1")
    boxes.opened[0].close()
    assert python(fickle, "x") == BOX_LOST
    assert "NameError" in python(fickle, "x")
    assert len(boxes.opened) == 2
    assert fickle.step(call("submit", answer=fickle.problem.answer))[1] == 1.0


def test_no_box_in_place_of_a_lost_one_is_the_infrastructures_failure(fickle: PythonMath, boxes: Fickle):
    python(fickle, "x = 1")
    boxes.opened[0].close()
    boxes.failures = [SandboxError("the daemon is gone")]
    with pytest.raises(SandboxError, match="the daemon is gone"):
        python(fickle, "x")
    fickle.reset(seed=1)
    assert python(fickle, "print(1)") == "1"


def test_an_episode_without_a_box_has_no_score(boxes: Fickle):
    boxes.failures = [None, SandboxDiedError("no daemon"), None]
    oracle = agents.oracle(registry.lookup("python_math"))
    summary = evaluate_agent("python_math", oracle, 3, env_kwargs={"sandbox": boxes})
    assert (summary.mean_reward, summary.valid, summary.failed) == (1.0, 2, 1)
    assert [episode.error for episode in summary.episodes if episode.error] == ["SandboxDiedError: no daemon"]


def test_a_box_without_a_python_that_works_is_the_infrastructures_failure(fickle: PythonMath, boxes: Fickle):
    real = boxes.open

    def without_python(spec: SandboxSpec | None = None) -> Sandbox:
        box = real(spec)
        box.close()
        return box

    boxes.open = without_python
    with pytest.raises(SandboxError):
        python(fickle, "1")
    assert fickle._box is None


def test_an_environment_that_was_closed_while_its_box_was_opened_keeps_none(fickle: PythonMath, boxes: Fickle):
    """What the rollout does with a call that passed its deadline."""
    boxes.may_open.clear()
    failures: list[BaseException] = []

    def late() -> None:
        try:
            python(fickle, "1")
        except SandboxError as error:
            failures.append(error)

    thread = threading.Thread(target=late)
    thread.start()
    assert boxes.asked.wait(200)
    fickle.close()
    boxes.may_open.set()
    thread.join(200)
    assert "the episode ended" in str(failures[0])
    assert fickle._box is None
    with pytest.raises(SandboxDiedError):
        boxes.opened[0].ping()


def test_boxes_out_of_a_pool(tier: str):
    with SandboxPool(tier, warm=1, starters=1) as pool:
        oracle = agents.oracle(registry.lookup("python_math"))
        summary = evaluate_agent("python_math", oracle, 4, env_kwargs={"sandbox": pool})
        assert (summary.mean_reward, summary.failed) == (1.0, 0)
        metrics = pool.metrics()
        assert (metrics.hits + metrics.misses, metrics.in_use) == (4, 0)


def test_the_spec_is_asked_for_before_the_first_episode(boxes: Fickle):
    env = registry.make("python_math", sandbox=boxes)
    assert boxes.expected == [SandboxSpec(output_limit=4096)]
    assert boxes.opened == []
    env.close()
