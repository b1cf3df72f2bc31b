"""A shell with a memory: what stays, what is lost and how that is said, with bash and with the plainest of shells."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from agentgym.errors import InputError, SandboxDiedError
from agentgym.sandbox import Sandbox, SandboxSpec, ShellSession, open_sandbox
from agentgym.testing.sandbox_conformance.questions import eventually

WITHOUT_BASH = "mkdir /work/bin && ln -s /usr/bin/* /work/bin && rm /work/bin/bash"


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(("namespace", ""), marks=pytest.mark.bubblewrap, id="bash"),
        pytest.param(("namespace", "/work/bin"), marks=pytest.mark.bubblewrap, id="sh"),
        pytest.param(("docker", ""), marks=pytest.mark.docker, id="docker"),
    ],
)
def box(request: pytest.FixtureRequest) -> Iterator[Sandbox]:
    tier, path = request.param
    spec = SandboxSpec(output_limit=4000, pids=40, environment={"PATH": path} if path else {})
    with open_sandbox(tier, spec) as box:
        if path:
            assert box.exec(f"PATH=/usr/bin; {WITHOUT_BASH}", timeout_s=60).exit_code == 0
        yield box


@pytest.fixture
def shell(box: Sandbox) -> Iterator[ShellSession]:
    session = ShellSession(box)
    session.run("", timeout_s=60)  # until it is there
    yield session
    session.reset()


def test_it_is_bash_where_there_is_one(shell: ShellSession, request: pytest.FixtureRequest) -> None:
    name = shell.run("echo ${BASH_VERSION:+bash}").text.strip()
    assert name == ("" if "[sh]" in request.node.name else "bash")


def test_directory_variables_functions_and_exit_code_stay(shell: ShellSession) -> None:
    assert shell.run("cd /tmp; x='a b'; export y=2; f() { echo f $1; return 4; }; umask 077").text == ""
    assert shell.run('echo "$x" $PWD; sh -c "echo $y"; umask').text == "a b /tmp\n2\n0077\n"
    called = shell.run("f 7")
    assert (called.text, called.exit_code) == ("f 7\n", 4)
    assert shell.run("echo $?").text == "4\n"
    assert shell.run("(exit 300)").exit_code == 300 % 256
    shell.reset()
    assert shell.run('echo "[$x]" $PWD', timeout_s=60).text == "[] /work\n"


@pytest.mark.parametrize(
    ("command", "text"),
    [
        ("", ""),
        ("   # only a comment", ""),
        ("cat <<END\nfirst \\\\ $((1 + 1))\nEND\n", "first \\ 2\n"),
        ("printf '%s|' 'a\nb' \"c\td\" 'e\\nf' '\\\\' '%s' '\x01'", "a\nb|c\td|e\\nf|\\\\|%s|\x01|"),
        ("echo é世\U0001f600", "é世\U0001f600\n"),
        ("printf 'no end of line'", "no end of line"),
        ("for i in 1 2; do\n  echo $i\ndone", "1\n2\n"),
        ("echo out; echo err >&2; echo out", "out\nerr\nout\n"),
        ("printf '\\377\\n'", "\ufffd\n"),
        ("cat; read line; echo $?", "1\n"),
        ("while true; do break; done; echo on", "on\n"),
        ("break; continue", ""),
        ("sh -c 'echo /proc/self/fd/*'", "/proc/self/fd/0 /proc/self/fd/1 /proc/self/fd/2 /proc/self/fd/3\n"),
        ("yes | head -n 1", "y\n"),
    ],
    ids=range(14),
)
def test_any_command_is_one_command(shell: ShellSession, command: str, text: str) -> None:
    shell.run("kept=1")
    result = shell.run(command)
    shown = [line for line in result.text.splitlines(keepends=True) if "only meaningful in a" not in line]
    assert ("".join(shown), result.state_lost, result.note) == (text, False, "")
    assert shell.run("echo $kept").text == "1\n"


@pytest.mark.parametrize("command", ["if", "echo '", "foo(", ") echo"])
def test_a_syntax_error_costs_nothing(shell: ShellSession, command: str) -> None:
    shell.run("kept=1")
    result = shell.run(command)
    assert (result.exit_code, result.state_lost) == (2, False)
    assert "yntax error" in result.text or "unexpected" in result.text
    assert shell.run("echo $kept").text == "1\n"


@pytest.mark.parametrize(
    ("command", "exit_code", "said"),
    [
        ("exit 7", 7, "ended the shell with exit code 7"),
        ("kill -KILL $$", -9, "by signal 9"),
        ("exec sh -c 'sleep 1; echo last; exit 3'", 3, "exit code 3"),
        ("set -e; false", 1, "exit code 1"),
        ("sleep 600 & exit", 0, "exit code 0"),
        ("kill -KILL $PPID; sleep 500", None, "was killed, or answered nonsense"),
        ("echo nonsense > /proc/$PPID/fd/4", None, "was killed, or answered nonsense"),
        ("sleep 600", None, "the deadline of 1 s passed"),
        ("trap '' TERM INT; while :; do :; done", None, "the deadline of 1 s passed"),
    ],
)
def test_a_lost_shell_is_said_and_replaced(
    shell: ShellSession, box: Sandbox, command: str, exit_code: int | None, said: str
) -> None:
    for timeout_s in (1, 30) if "deadline" in said else (60,):
        shell.run("kept=1", timeout_s=60)
        result = shell.run(f"echo before; {command}", timeout_s=timeout_s)
        if result.text.startswith("before"):
            break  # else the machine stood still for a second
    said = said.replace("1 s", f"{timeout_s} s")
    assert (result.exit_code, result.state_lost) == (exit_code, True)
    printed = "before\nlast\n" if "last" in command else "before\n"
    assert said in result.note
    assert result.text == f"{printed}[{result.note}]"
    assert shell.run("echo [$kept]", timeout_s=60).text == "[]\n"
    names = "cat /proc/[0-9]*/comm"
    eventually(lambda: b"sleep" not in box.exec(names).stdout, "what it left running is not gone with it")


def test_forged_answers_are_nonsense_or_ones_own_exit_code(shell: ShellSession) -> None:
    for target in range(3, 24):
        result = shell.run(f"exec 5>/proc/$PPID/fd/{target} && printf '\\0\\0\\0\\050{{}}' >&5", timeout_s=2)
        assert result.state_lost or result.exit_code in (0, 1, 2), result
    shell.reset()
    assert shell.run("echo alive", timeout_s=60).text == "alive\n"


def test_an_answer_to_another_question_is_none(shell: ShellSession) -> None:
    forged = '{"id": 99, "exit_code": 0, "ended": false}'
    result = shell.run(f"printf '\\0\\0\\0\\{len(forged):03o}{forged}' > /proc/$PPID/fd/4; sleep 1", timeout_s=60)
    assert (result.exit_code, result.state_lost) == (None, True)
    assert "out of turn" in result.note
    assert shell.run("echo alive", timeout_s=60).text == "alive\n"


def test_output_is_cut_and_counted(shell: ShellSession) -> None:
    result = shell.run("printf BEGIN; head -c 1000000 /dev/zero | tr '\\0' x; printf END")
    assert result.output.startswith(b"BEGINx")
    assert result.output.endswith(b"xEND")
    assert result.dropped_bytes == 1_000_008 - 4000
    assert len(result.output) < 4100


def test_what_is_no_command_is_refused(shell: ShellSession) -> None:
    with pytest.raises(InputError, match="NUL"):
        shell.run("a\0b")
    with pytest.raises(InputError, match="timeout_s"):
        shell.run("true", timeout_s=0)


@pytest.mark.bubblewrap
def test_two_shells_of_a_box_know_nothing_of_each_other() -> None:
    with open_sandbox("namespace") as box:
        one, two = ShellSession(box), ShellSession(box)
        one.run("x=1", timeout_s=60)
        two.run("x=2", timeout_s=60)
        assert (one.run("echo $x").text, two.run("echo $x").text) == ("1\n", "2\n")
        assert one.run("exit").state_lost
        assert two.run("echo $x").text == "2\n"
    with pytest.raises(SandboxDiedError):
        two.run("true")
