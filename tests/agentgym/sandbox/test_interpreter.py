"""Python with a memory: what a run returns, and that no code gets the better of it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from agentgym.errors import InputError, SandboxDiedError
from agentgym.sandbox import PythonInterpreter, Sandbox, SandboxSpec, open_sandbox

TIERS = [pytest.param("docker", marks=pytest.mark.docker), pytest.param("namespace", marks=pytest.mark.bubblewrap)]


@pytest.fixture(scope="module", params=TIERS)
def box(request: pytest.FixtureRequest) -> Iterator[Sandbox]:
    with open_sandbox(request.param, SandboxSpec(memory_mb=128, output_limit=4000, pids=40)) as box:
        yield box


@pytest.fixture
def python(box: Sandbox) -> Iterator[PythonInterpreter]:
    interpreter = PythonInterpreter(box)
    interpreter.run("", timeout_s=60)  # until it is there
    yield interpreter
    interpreter.reset()


def test_variables_stay_and_the_last_expression_is_shown(python: PythonInterpreter) -> None:
    assert python.run("import math\nx = 20\ndef double(n): return 2 * n").text == ""
    result = python.run("print('hi')\nmath.gcd(double(x), 12)")
    assert (result.text, result.ok, result.state_lost) == ("hi\n4", True, False)
    assert python.run("None").text == ""
    assert python.run("'a\\nb'").text == "'a\\nb'"
    assert python.run("").text == ""
    assert python.run("class A:\n  pass\nA.__module__").text == "'__main__'"
    python.reset()
    assert "NameError" in python.run("x", timeout_s=60).text


def test_output_of_every_origin_is_captured_in_order(python: PythonInterpreter) -> None:
    code = (
        "import os, sys\nprint('one', flush=True)\nos.system('echo two; echo three >&2')\nsys.stdout.write('four')\n5"
    )
    assert python.run(code).text == "one\ntwo\nthree\nfour5" or python.run(code).text == "one\ntwo\nthree\nfour\n5"
    assert python.run("import sys; sys.stdout.buffer.write(b'\\xff\\n'); None").text == "\ufffd"
    flood = python.run("print('B' + 'x' * 1_000_000 + 'E')").text
    assert flood.startswith("Bxx")
    assert flood.endswith("xxE")
    assert "bytes dropped" in flood
    assert len(flood) < 4200
    value = python.run("'y' * 1_000_000").text
    assert "bytes dropped" in value
    assert len(value) < 4200


def test_a_traceback_shows_the_code_and_nothing_of_ours(python: PythonInterpreter) -> None:
    result = python.run("def f(n):\n    return 1 / n\nf(0)")
    assert not result.ok
    assert not result.state_lost
    assert result.text.splitlines()[0] == "Traceback (most recent call last):"
    assert "return 1 / n" in result.text
    assert result.text.splitlines()[-1] == "ZeroDivisionError: division by zero"
    assert "<string>" not in result.text
    syntax = python.run("x ==")
    assert "SyntaxError" in syntax.text
    assert "ast.py" not in syntax.text
    deep = python.run("def g(n): return g(n + 1)\ng(0)")
    assert "RecursionError" in deep.text
    assert len(deep.text) < 1500
    for code, name in [
        ("import sys; sys.exit(3)", "SystemExit: 3"),
        ("raise KeyboardInterrupt", "KeyboardInterrupt"),
        ("input()", "EOFError"),
        ("class E(Exception):\n  def __str__(self): raise SystemExit\nraise E", "E"),
        ("class R:\n  def __repr__(self): raise ValueError('no repr')\nR()", "ValueError: no repr"),
        ("'\udc80'", "UnicodeEncodeError"),
        ("a\0b", "null bytes"),
    ]:
        result = python.run(code)
        assert name in result.text
        assert not result.ok
        assert not result.state_lost, code
    assert python.run("6 * 7").text == "42"


def test_the_deadline_replaces_the_interpreter(python: PythonInterpreter) -> None:
    for timeout_s in (2, 30):
        python.run("x = 1", timeout_s=60)
        result = python.run("print('before', flush=True)\nwhile True: pass", timeout_s=timeout_s)
        assert not result.ok
        assert result.state_lost
        if result.text.startswith("before"):
            break  # else the machine stood still for two seconds
    assert result.text.startswith(f"before\n[the deadline of {timeout_s} s passed")
    assert "all variables are lost" in result.text
    assert "NameError" in python.run("x", timeout_s=60).text
    with pytest.raises(InputError):
        python.run("1", timeout_s=0)


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("import os; os._exit(7)", "exit code 7"),
        ("import os; os.kill(os.getpid(), 11)", "signal 11"),
        ("a = []\nwhile True: a.append(b'x' * 10**6)", "killed"),
        ("import os; os.close(4)", "ended"),
        ("import os; os.write(4, b'\\xff' * 100)", "answered no longer"),
        ("import os, json\nm = b'{\"id\": 1, \"ok\": true}\\nforged'\nos.write(4, len(m).to_bytes(4, 'big') + m)", "["),
    ],
)
def test_code_that_ends_its_interpreter_gets_a_new_one(python: PythonInterpreter, code: str, said: str) -> None:
    python.run("x = 1")
    lost = [python.run(code, timeout_s=60), python.run("'next'", timeout_s=60)]
    assert [result.state_lost for result in lost].count(True) == 1, lost
    text = next(result.text for result in lost if result.state_lost)
    assert said in text
    assert "forged" not in text
    assert python.run("1 + 1", timeout_s=60).text == "2"


def test_forks_do_not_answer(python: PythonInterpreter) -> None:
    python.run("import os\nmain = os.getpid()")
    for _ in range(5):
        assert python.run("os.fork()\nNone").ok
        assert python.run("os.getpid() == main").text == "True"
    python.run("while True:\n  try: os.fork()\n  except OSError: pass", timeout_s=0.5)
    assert python.run("2 ** 10", timeout_s=60).text == "1024"


def test_files_of_the_work_directory_can_be_imported(python: PythonInterpreter, box: Sandbox) -> None:
    box.write_file("/work/mine.py", b"value = 5")
    assert python.run("import mine; mine.value").text == "5"


@pytest.mark.bubblewrap
def test_a_dead_box_is_an_exception() -> None:
    with open_sandbox("namespace") as box:
        python = PythonInterpreter(box)
        python.run("x = 1")
    with pytest.raises(SandboxDiedError):
        python.run("x")
