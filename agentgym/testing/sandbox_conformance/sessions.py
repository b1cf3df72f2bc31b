"""What stays between calls: resident processes, a shell, a Python."""

from __future__ import annotations

from agentgym.errors import SandboxError
from agentgym.sandbox.interpreter import PythonInterpreter
from agentgym.sandbox.shell import ShellSession
from agentgym.sandbox.spec import SandboxSpec
from agentgym.testing.sandbox_conformance.questions import Opener, eventually, raises


def keeps_resident_processes(open_box: Opener) -> None:
    echo = """
import os, struct, sys
count = 0
while True:
    size = struct.unpack(">I", os.read(3, 4))[0]
    data = os.read(3, size)
    count += 1
    if data == b"die": os._exit(5)
    if data == b"hang":
        while True: pass
    if data == b"huge":
        os.write(4, struct.pack(">I", 1 << 31)); continue
    print("printed", count, flush=True)
    os.write(4, struct.pack(">I", size + 2) + data + b"%2d" % count)
"""
    with open_box(SandboxSpec()) as box:
        one, two = (box.start_process(["python3", "-I", "-c", echo]) for _ in range(2))
        first = box.ask_process(one, b"a", timeout_s=60)
        assert (first.state, first.data, first.output, first.exit_code) == ("answered", b"a 1", b"printed 1\n", None)
        assert box.ask_process(one, b"b").data == b"b 2"
        dead = box.ask_process(one, b"die")
        assert (dead.state, dead.exit_code, dead.data) == ("died", 5, b"")
        assert box.ask_process(two, b"c", timeout_s=60).data == b"c 1", "another resident process must not suffer"
        raises(SandboxError, lambda: box.ask_process(one, b"x"))
        assert box.ask_process(two, b"hang", timeout_s=0.5).state == "timeout"
        three = box.start_process(["python3", "-I", "-c", echo])
        assert box.ask_process(three, b"huge", timeout_s=60).state == "died"
        assert box.ask_process(box.start_process(["true"]), b"x").state == "died"
        raises(SandboxError, lambda: box.start_process(["no-such-command"]))
        four = box.start_process(["python3", "-I", "-c", echo])
        box.stop_process(four)
        raises(SandboxError, lambda: box.ask_process(four, b"x"))
        others = "cat /proc/[02-9]*/comm /proc/1[0-9]*/comm"  # what was killed may take a while to be gone
        eventually(lambda: b"python3" not in box.exec(others).stdout, "a resident process is left")


def keeps_a_shell(open_box: Opener) -> None:
    with open_box(SandboxSpec(output_limit=1000)) as box:
        shell = ShellSession(box)
        assert shell.run("cd /tmp; x=5; f() { echo f of $1; }", timeout_s=60).output == b""
        result = shell.run("echo $x in $PWD; f 7; echo err >&2; false")
        assert (result.text, result.exit_code, result.state_lost) == ("5 in /tmp\nf of 7\nerr\n", 1, False)
        assert shell.run("echo $?").text == "1\n", "the exit code of the last command stays, too"
        assert shell.run("if").exit_code == 2
        assert shell.run("echo $x").text == "5\n", "nonsense costs nothing"
        flood = shell.run("yes | head -c 1000000")
        assert (len(flood.output) < 1100, flood.dropped_bytes) == (True, 999_000)
        lost = shell.run("sleep 600 & sleep 600", timeout_s=0.5)
        assert (lost.exit_code, lost.state_lost) == (None, True)
        assert "deadline of 0.5 s" in lost.text
        assert shell.run("echo [$x] in $PWD", timeout_s=60).text == "[] in /work\n"
        gone = shell.run("exit 7")
        assert (gone.exit_code, gone.state_lost) == (7, True)
        killed = shell.run("kill -KILL $$", timeout_s=60)
        assert (killed.exit_code, killed.state_lost) == (-9, True)
        eventually(lambda: b"sleep" not in box.exec("cat /proc/[0-9]*/comm").stdout, "a background process is left")
        assert shell.run("echo alive", timeout_s=60).text == "alive\n"


def keeps_a_python(open_box: Opener) -> None:
    with open_box(SandboxSpec()) as box:
        python = PythonInterpreter(box)
        assert python.run("x = 20", timeout_s=60).text == ""
        assert python.run("print('hi'); x + 1").text == "hi\n21"
        lost = python.run("while True: pass", timeout_s=0.5)
        assert (lost.ok, lost.state_lost) == (False, True)
        assert "NameError" in python.run("x", timeout_s=60).text
