"""Calls: commands, files, deadlines, output, and what is said when something is wrong."""

from __future__ import annotations

import os
import time

from agentgym.errors import InputError, SandboxError, SandboxLimitError, SandboxTimeoutError
from agentgym.sandbox.spec import SandboxSpec
from agentgym.testing.sandbox_conformance.questions import Opener, eventually, python, raises


def runs_commands(open_box: Opener) -> None:
    with open_box(SandboxSpec()) as box:
        result = box.exec("cat; echo $((6 * 7)); echo err >&2; exit 3", stdin=b"in \x00\xff\n")
        assert (result.exit_code, result.stdout, result.stderr) == (3, b"in \x00\xff\n42\n", b"err\n")
        assert (result.dropped_bytes, result.seconds > 0) == (0, True)
        assert box.exec(["printf", "%s|", "a b", "$HOME", ""]).stdout == b"a b|$HOME||"
        assert box.exec("pwd").stdout == b"/work\n"
        assert box.exec("pwd", cwd="/usr/bin").stdout == b"/usr/bin\n"
        assert box.exec("pwd").stdout == b"/work\n", "cwd must hold for one call only"
        assert box.exec("kill -TERM $$").exit_code == -15
        big = os.urandom(1_000_000)
        assert box.exec("sha256sum", stdin=big).stdout == box.exec("cat > f; sha256sum < f", stdin=big).stdout
        assert box.exec("exec true", stdin=big).exit_code == 0, "a command need not read its input"


def moves_files(open_box: Opener) -> None:
    with open_box(SandboxSpec(tmpfs_mb=4)) as box:
        data = bytes(range(256)) * 4096
        box.write_file("/work/deep name.bin", data)
        assert box.read_file("/work/deep name.bin") == data
        box.write_file("relative", b"short")
        assert box.exec(["cat", "/work/relative"]).stdout == b"short"
        box.write_file("relative", b"")
        assert box.read_file("relative") == b""
        raises(SandboxError, lambda: box.read_file("/work/absent"))
        raises(SandboxError, lambda: box.read_file("/work"))
        raises(SandboxError, lambda: box.write_file("/work/absent/file", b"x"))
        raises(SandboxError, lambda: box.write_file("/usr/bin/python3", b"x"))
        box.exec(["mkfifo", "/work/fifo"])
        raises(SandboxError, lambda: box.read_file("/work/fifo"))
        raises(SandboxError, lambda: box.write_file("/work/fifo", b"x"))
        raises(SandboxError, lambda: box.read_file("/dev/zero"))
        box.exec("truncate -s 4M hole; ln -s hole link")
        assert len(box.read_file("link")) == 4 * 2**20
        raises(SandboxLimitError, lambda: box.write_file("/work/large", bytes(5 * 2**20)))
        raises(SandboxLimitError, lambda: box.write_file("/work/large", bytes(4 * 2**20)))
        assert box.exec("echo alive").stdout == b"alive\n"


def tells_what_is_wrong(open_box: Opener) -> None:
    with open_box(SandboxSpec()) as box:
        missing = box.exec(["no-such-command", "x"])
        assert missing.exit_code == 127
        assert b"no-such-command" in missing.stderr
        assert box.exec("no-such-command").exit_code == 127
        box.write_file("/work/plain", b"echo no")
        assert box.exec(["/work/plain"]).exit_code == 126
        assert "/nowhere" in str(raises(SandboxError, lambda: box.exec("true", cwd="/nowhere")))
        for timeout_s in (0, -1, float("nan"), float("inf")):
            raises(InputError, lambda timeout_s=timeout_s: box.exec("true", timeout_s=timeout_s))
        for command in ([], [""], ["a\0b"], "a\0b", "\ud800"):
            raises(InputError, lambda command=command: box.exec(command))
        raises(InputError, lambda: box.read_file("a\0b"))
        assert box.exec("echo alive").stdout == b"alive\n"
    raises(InputError, lambda: open_box(SandboxSpec(environment={"A=B": "c"})))


def cuts_a_flood_of_output(open_box: Opener) -> None:
    with open_box(SandboxSpec(output_limit=1000)) as box:
        flood = "printf BEGIN; head -c 20000000 /dev/zero | tr '\\0' x; printf END"
        result = box.exec(f"{flood}; ({flood}) >&2", timeout_s=60)
        for stream in (result.stdout, result.stderr):
            assert stream.startswith(b"BEGINxxx")
            assert stream.endswith(b"xxxEND")
            assert b"19999008 bytes dropped" in stream
            assert len(stream) < 1000 + 64
        assert result.dropped_bytes == 2 * (20_000_008 - 1000)
        exact = box.exec("head -c 1000 /dev/zero")
        assert (len(exact.stdout), exact.dropped_bytes) == (1000, 0)


def keeps_bytes_as_they_are(open_box: Opener) -> None:
    with open_box(SandboxSpec()) as box:
        data = b"\xff\xfe\x00 \x1b[31m \xc3\x28 <|im_end|>\r\n\n"
        box.write_file("bytes", data)
        result = box.exec("cat bytes; cat bytes >&2")
        assert (result.stdout, result.stderr) == (data, data)
        assert box.exec(["printf", "%s", "\u00e9\u4e16"]).stdout == "\u00e9\u4e16".encode()


def kills_at_the_deadline(open_box: Opener) -> None:
    daemon = """
import os, time
for _ in range(3):
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            for fd in range(3): os.close(fd)
            while True: time.sleep(0.01)
        os._exit(0)
print("started", flush=True)
time.sleep(60)
"""
    with open_box(SandboxSpec()) as box:
        box.exec("sleep 600 >/dev/null 2>&1 &")  # of an earlier call: it stays
        eventually(lambda: b"sleep" in box.exec("cat /proc/[0-9]*/comm").stdout, "it did not begin")
        before = sorted(box.exec("cat /proc/[0-9]*/comm").stdout.split())
        started = time.monotonic()
        raises(SandboxTimeoutError, lambda: python(box, daemon, timeout_s=1.0))
        assert time.monotonic() - started > 0.9
        comms = "cat /proc/[0-9]*/comm"  # what was killed does nothing more, but may take a while to be gone
        eventually(lambda: sorted(box.exec(comms).stdout.split()) == before, f"more is left than {before}")
        raises(SandboxTimeoutError, lambda: box.exec("trap '' TERM INT HUP; while :; do :; done", timeout_s=0.3))
        raises(SandboxTimeoutError, lambda: box.exec("kill -STOP $$", timeout_s=0.3))


def does_not_wait_for_background_processes(open_box: Opener) -> None:
    with open_box(SandboxSpec()) as box:
        result = box.exec("echo first; (while :; do echo flood; done) &", timeout_s=120)
        assert (result.exit_code, result.seconds < 90) == (0, True)
        assert result.stdout.startswith(b"first\n")
        assert box.exec("sleep 600 & echo done", timeout_s=120).stdout == b"done\n"


def reaps_orphans(open_box: Opener) -> None:
    orphans = "import os\nfor _ in range(30):\n if os.fork() == 0:\n  if os.fork() == 0: os._exit(0)\n  os._exit(0)"
    with open_box(SandboxSpec(pids=100)) as box:
        for _ in range(4):
            python(box, orphans)
            eventually(lambda: int(box.exec("echo /proc/[0-9]* | wc -w").stdout) < 6, "the orphans live on")
        eventually(lambda: b"Z" not in box.exec("cut -d' ' -f3 /proc/[0-9]*/stat").stdout, "orphans are not reaped")
