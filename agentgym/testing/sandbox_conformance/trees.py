"""Trees of files into a box and out of it, boxes that stand still, and copies of boxes."""

from __future__ import annotations

import contextlib
import tempfile
import threading
import time
from pathlib import Path

from agentgym.errors import ArchiveError, InputError, SandboxError, SandboxLimitError
from agentgym.sandbox.archive import Archive, ArchivedFile
from agentgym.sandbox.spec import Sandbox, SandboxSpec
from agentgym.testing.sandbox_conformance.questions import Opener, eventually, raises

# one write for each line, so a file is never seen between two states
COUNTER = "i=0; while :; do i=$((i + 1)); echo $i >> /work/a; echo $i >> /work/b; done"


def last(data: bytes) -> int:
    """The last number of a log, 0 of an empty one."""
    return int((data.split() or [b"0"])[-1])


def puts_trees(open_box: Opener) -> None:
    big = bytes(range(256)) * 12_000  # more than one frame
    long = "/".join(["folder" * 4] * 6) + "/file"
    archive = Archive.of({"a/run": "#!/bin/sh\necho ran", "big": big, long: "deep"}, executable=["a/run"])
    with open_box(SandboxSpec(tmpfs_mb=8)) as box, tempfile.TemporaryDirectory() as folder:
        box.put(archive)
        assert box.exec(["/work/a/run"]).stdout == b"ran\n"
        assert box.exec(["find", "/work/a/run", "/work/big", "-printf", "%m "]).stdout == b"755 644 "
        assert box.read_file("/work/big") == big
        assert box.read_file(long) == b"deep"
        box.put({"a/run": b"\xff", "a/new": "\u00e9"}, "/work")
        assert (box.read_file("/work/a/run"), box.read_file("/work/a/new")) == (b"\xff", "\u00e9".encode())
        assert box.exec(["test", "-x", "/work/a/run"]).exit_code == 1, "a file is replaced as a whole"
        archive.write_to(Path(folder))
        box.put(Path(folder), "/tmp/made/for/it")
        assert box.exec("cd /tmp/made/for/it && cmp big /work/big && a/run").stdout == b"ran\n"
        raises(SandboxError, lambda: box.put({"x": b""}, "/usr/share"))
        raises(SandboxError, lambda: box.put({"x": b""}, "/work/big"))
        raises(SandboxLimitError, lambda: box.put({"x": bytes(8 * 2**20)}))
        assert box.exec("echo alive").stdout == b"alive\n"


def puts_through_no_link(open_box: Opener) -> None:
    with open_box(SandboxSpec()) as box:
        box.exec("mkdir out; echo old > out/f; ln -s /work/out folder; ln -s /work/out/f file; ln out/f hard")
        raises(ArchiveError, lambda: box.put({"folder/f": "new"}))
        box.put({"file": "new", "hard": "new"})
        assert box.exec("cat out/f file hard").stdout == b"old\nnewnew"
        for path in ("../x", "/x", "a//b", "."):
            raises(ArchiveError, lambda path=path: box.put({path: "x"}))


def exports_files_and_folders_only(open_box: Opener) -> None:
    with open_box(SandboxSpec(tmpfs_mb=4)) as box:
        files = {"out/a": b"1", "out/deep/b": b"2" * 100_000, "out/run": b"3"}
        box.put(Archive.of(files, executable=["out/run"]))
        box.exec("mkdir out/empty; ln out/a out/same; echo x > alone")
        found = box.export(["/work/out", "alone", "/work/out/a"])
        assert set(found.files) == {f"work/{name}" for name in (*files, "out/same", "alone")}
        assert found.files["work/out/run"] == ArchivedFile(b"3", executable=True)
        assert found.read("work/out/same") == b"1"
        assert found.folders == {"work", "work/out", "work/out/deep", "work/out/empty"}
        for make, name in [
            ("ln -s /etc/passwd odd", "odd"),
            ("ln -s /etc odd", "odd/passwd"),
            ("mkfifo odd", "odd"),
            ("mkdir odd; ln -s / odd/root", "odd"),
            ("python3 -c \"import socket as s; s.socket(s.AF_UNIX).bind('odd')\"", "odd"),
            ("mkdir odd; python3 -c \"open(b'odd/\\xff', 'w')\"", "odd"),
        ]:
            box.exec(make)
            assert "odd" in str(raises(ArchiveError, lambda name=name: box.export([name]))), make
            box.exec("rm -r odd")
        assert "/work/absent" in str(raises(SandboxError, lambda: box.export(["absent"])))
        raises(InputError, lambda: box.export(["/work/../etc"]))
        box.exec(["mkdir", "-p", "/".join(["d"] * 151)])
        raises(ArchiveError, lambda: box.export(["d"]))
        box.exec("mkdir holes; for i in 1 2 3 4 5 6 7 8 9 10 11 12; do truncate -s 4M holes/$i; done")
        raises(SandboxLimitError, lambda: box.export(["holes"]))
        assert box.exec("echo alive").stdout == b"alive\n"


def exports_one_moment(open_box: Opener) -> None:
    with open_box(SandboxSpec()) as box:
        box.exec(f"touch a b; ({COUNTER}) >/dev/null 2>&1 &")
        seen: list[int] = []

        def goes_on() -> bool:
            found = box.export(["a", "b"])
            first, second = (last(found.read(f"work/{name}")) for name in "ab")
            assert first - second in (0, 1)
            seen.append(first)
            return len(seen) >= 8 and len(set(seen)) > 1

        eventually(goes_on, "what runs in the box goes on between exports")


def stands_still(open_box: Opener) -> None:
    with open_box(SandboxSpec()) as box:
        box.exec(f"touch a b /tmp/log; ({COUNTER}) >/dev/null 2>&1 &")
        box.exec("while :; do for i in 1 2 3; do (exec true); done; echo x >> /tmp/log; done >/dev/null 2>&1 &")
        process = box.start_process(["cat"])
        spinning = [box.exec("(while :; do :; done) >/dev/null 2>&1 & echo $!").text.strip() for _ in range(3)]
        time.sleep(0.1)
        assert not box.frozen
        box.freeze()
        box.freeze()
        states = [box.read_file(f"/proc/{pid}/stat").rpartition(b")")[2].split()[0] for pid in spinning]
        assert states == [b"T"] * 3, "when it is frozen, it stands"
        assert box.frozen
        first = [box.read_file(path) for path in ("/work/a", "/work/b", "/tmp/log")]
        time.sleep(0.3)
        assert [box.read_file(path) for path in ("/work/a", "/work/b", "/tmp/log")] == first
        assert box.export(["a"]).read("work/a") == first[0]
        for call in (
            lambda: box.exec("true"),
            lambda: box.write_file("x", b""),
            lambda: box.put({"x": b""}),
            lambda: box.start_process(["cat"]),
            lambda: box.ask_process(process, b"x"),
        ):
            assert "frozen" in str(raises(SandboxError, call))
        box.thaw()
        box.thaw()
        assert not box.frozen
        eventually(lambda: last(box.read_file("/work/a")) > last(first[0]), "it does not go on")
        assert box.exec("echo alive").stdout == b"alive\n"


def goes_on_with_what_it_stopped(open_box: Opener) -> None:
    with open_box(SandboxSpec()) as box:
        box.exec("setsid sleep 600 >/dev/null 2>&1 & echo $! > own; sleep 0.2; kill -STOP $!")
        box.exec("sleep 600 >/dev/null 2>&1 & echo $! > other")
        state = "cut -d' ' -f3 /proc/$(cat own)/stat"  # it stops when it gets to run
        eventually(lambda: box.exec(state).stdout == b"T\n", "it does not stop itself")
        waiting: list[bytes] = []

        def wait() -> None:
            with contextlib.suppress(SandboxError):  # "is frozen": it had not begun
                waiting.append(box.exec("sleep 0.5; echo whole").stdout)

        for head_start in (0.1, 1.0, 5.0, 20.0):
            call = threading.Thread(target=wait)
            call.start()
            time.sleep(head_start)
            box.freeze()  # one call at a time: it waits for the one that runs
            call.join()
            box.thaw()
            if waiting:
                break
        assert waiting == [b"whole\n"]
        states = "for p in own other; do cut -d' ' -f3 /proc/$(cat $p)/stat; done"
        eventually(lambda: box.exec(states).stdout == b"T\nS\n", "what had stopped itself stays stopped")


def forks(open_box: Opener) -> None:
    with open_box(SandboxSpec(folders=("/logs",), tmpfs_mb=8)) as box:
        box.put({"deep/a": "text", "big": bytes(3 * 2**20)})
        box.exec("ln -s deep/a link; ln big big2; mkfifo pipe; chmod 640 deep/a; chmod 500 deep; echo l > /logs/l")
        box.exec("touch -d '2001-02-03 04:05:06.5' deep/a; touch -d 1999-01-01 deep; echo t > /tmp/t")
        box.exec(f"touch a b; cd /tmp; ({COUNTER}) >/dev/null 2>&1 &")  # made here: it begins when it likes
        listing = (
            "find /work /tmp /logs ! -name a ! -name b -printf '%p %y %m %n %l %s %T@\\n' | grep -v '^/work d' | sort"
        )
        listing += "; find /work/deep/a -printf '%m %T@'; cat /logs/l /tmp/t; md5sum < big"
        with box.fork() as twin:
            assert (twin.tier, twin.spec, twin.frozen) == (box.tier, box.spec, False)
            assert twin.name != box.name
            there, here = twin.exec(listing).text, box.exec(listing).text
            assert there == here, f"{there}\n-- and in the box --\n{here}"
            assert twin.exec("cat /proc/[0-9]*/comm | grep -c sleep").stdout == b"0\n"
            first = twin.read_file("/work/a")
            eventually(lambda: last(box.read_file("/work/a")) > last(first), "the processes of the one go on")
            assert twin.read_file("/work/a") == first, "and are not in the other"
            twin.write_file("/work/only", b"here")
            raises(SandboxError, lambda: box.read_file("/work/only"))
        assert box.exec("echo alive").stdout == b"alive\n"


def forks_a_frozen_box(open_box: Opener) -> None:
    with open_box(SandboxSpec()) as box:
        box.write_file("f", b"1")
        box.freeze()
        twins: list[Sandbox] = [box.fork(), box.fork()]
        try:
            assert box.frozen
            raises(SandboxError, lambda: box.exec("true"))
            for index, twin in enumerate(twins):
                assert twin.exec(f"cat f; echo {index} > f; cat f").text == f"1{index}\n"
            assert box.read_file("f") == b"1"
        finally:
            for twin in twins:
                twin.close()
