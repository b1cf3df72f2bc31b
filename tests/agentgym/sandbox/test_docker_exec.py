"""Boxes of an image without Python: the same calls through `docker exec`, the same hardening, and what is refused."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from agentgym.errors import (
    ArchiveError,
    InputError,
    SandboxDiedError,
    SandboxError,
    SandboxLimitError,
    SandboxTimeoutError,
    UnavailableError,
)
from agentgym.sandbox import PythonInterpreter, SandboxSpec, open_sandbox
from agentgym.sandbox.docker.host import connect
from agentgym.sandbox.docker.images import build_image, remove_image
from agentgym.sandbox.spec import Sandbox

pytestmark = pytest.mark.docker

PROGRAMS = "cat cut grep head id ln ls mkdir mkfifo rm sh sha256sum sleep tar timeout true truncate wc"
SHELL_ONLY = "cat sh"
DOCKERFILE = """FROM agentgym/base:bookworm AS full
LABEL agentgym.test={mark}
RUN mkdir -p /out/bin && for p in {programs}; do cp -L $(command -v $p | grep / || echo /usr/bin/$p) /out/bin/; done; \\
    for f in /out/bin/*; do ldd $f | grep -o '/[^ ]*'; done | sort -u | while read l; do \\
    mkdir -p /out$(dirname $l); cp -L $l /out$l; done
FROM scratch
COPY --from=full /out /
"""


def an_image(folder: Path, programs: str) -> Iterator[str]:
    mark = f"stage-{os.getpid()}-{time.monotonic_ns()}"  # another run may build the same at the same daemon
    (folder / "Dockerfile").write_text(DOCKERFILE.format(programs=programs, mark=mark))
    tag = build_image(folder, shared=False)
    yield tag
    remove_image(tag)
    connect().quick.prune_images({"dangling": True, "label": f"agentgym.test={mark}"})


def until(holds: Callable[[], bool], what: str) -> None:
    """On a machine that may stand still for seconds."""
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    yield from an_image(tmp_path_factory.mktemp("programs"), PROGRAMS)


@pytest.fixture(scope="module")
def shell_image(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    yield from an_image(tmp_path_factory.mktemp("shell"), SHELL_ONLY)


@pytest.fixture(scope="module")
def box(image: str) -> Iterator[Sandbox]:
    with open_sandbox("docker", SandboxSpec(image=image, output_limit=4000, tmpfs_mb=4, pids=40)) as box:
        yield box


def test_how_it_works_is_visible(box: Sandbox) -> None:
    assert box.limits["worker"] == "docker exec"
    assert (box.tier, box.spec.image) == ("docker", box.spec.image)
    with open_sandbox("docker") as other:
        assert other.limits["worker"] == "resident"


def test_commands(box: Sandbox) -> None:
    result = box.exec("cat; echo $((6 * 7)); echo err >&2; exit 3", stdin=b"in \x00\xff\n")
    assert (result.exit_code, result.stdout, result.stderr) == (3, b"in \x00\xff\n42\n", b"err\n")
    assert (box.exec("pwd").text, box.exec("pwd", cwd="/bin").text) == ("/work\n", "/bin\n")
    assert box.exec(["sh", "-c", 'echo "$1"', "sh", "a b  $HOME"]).text == "a b  $HOME\n"
    assert box.exec("kill -TERM $$").exit_code == 128 + 15, "as a shell shows it"
    big = os.urandom(1_000_000)
    assert box.exec("sha256sum", stdin=big).stdout == box.exec("cat > f; sha256sum < f; rm f", stdin=big).stdout
    assert box.exec("exec true", stdin=big).exit_code == 0, "a command need not read its input"
    flood = box.exec("head -c 3000000 /dev/zero")
    assert (len(flood.stdout) < 4100, flood.dropped_bytes) == (True, 3_000_000 - 4000)
    for held in ("sleep 600", "(while :; do echo flood; done)"):
        result = box.exec(f"echo done; {held} &", timeout_s=300)
        assert result.stdout.startswith(b"done\n")
        assert result.seconds < 250, "a background process that holds the output is not waited for"
    with pytest.raises(SandboxTimeoutError):
        box.exec("sleep 60", timeout_s=0.1)  # which kills what floods


def test_bad_calls(box: Sandbox) -> None:
    missing = box.exec(["no-such-command"])
    assert (missing.exit_code, b"no-such-command" in missing.stderr) == (127, True)
    assert box.exec(["/tmp"]).exit_code == 126
    with pytest.raises(SandboxError, match=rf"sandbox {box.name}: the directory '/nowhere' cannot be entered"):
        box.exec("true", cwd="/nowhere")
    assert box.exec("exit 125", cwd="/bin").exit_code == 125, "a code of the command's own"
    for command in ([], [""], "a\0b"):
        with pytest.raises(InputError):
            box.exec(command)
    with pytest.raises(InputError, match="timeout_s must be > 0"):
        box.exec("true", timeout_s=0)


def test_files(box: Sandbox) -> None:
    data = os.urandom(2_000_000)
    box.write_file("/work/deep name", data)
    assert box.read_file("/work/deep name") == data
    box.write_file("/work/deep name", b"")
    assert box.read_file("deep name") == b""
    box.exec("mkfifo fifo; ln -s fifo link")
    for path, why in (("/work/absent", "no such file"), ("/work", "not a regular file"), ("link", "not a regular")):
        with pytest.raises(SandboxError, match=f"{box.name}: '{path}': .*{why}"):
            box.read_file(path)
    for path in ("/work/absent/x", "/bin/sh", "/work", "link"):
        with pytest.raises(SandboxError, match=f"{box.name}: '{path}'"):
            box.write_file(path, b"x")
    box.exec("rm -rf /work/*; truncate -s 5M /tmp/sparse 2>/dev/null || head -c 4194304 /dev/zero > /tmp/sparse")
    with pytest.raises(SandboxLimitError):
        box.write_file("/work/large", bytes(5 * 2**20))
    box.exec("head -c 3000000 /dev/zero > /work/filling")
    with pytest.raises(SandboxLimitError, match="No space left"):
        box.write_file("/work/more", bytes(3_000_000))
    box.exec("rm -f /work/* /tmp/*")


def test_a_file_that_arrived_in_part_is_an_error(image: str) -> None:
    with open_sandbox("docker", SandboxSpec(image=image)) as box:
        box.exec("(while :; do : > large; done) >/dev/null 2>&1 &")

        def write_often() -> None:
            deadline = time.monotonic() + 60
            while time.monotonic() < deadline:
                box.write_file("large", bytes(1_000_000))

        with pytest.raises(SandboxError, match="'large': only a part of it arrived, or something in the box cut it"):
            write_often()


def test_trees_freeze_and_fork(box: Sandbox) -> None:
    box.put({"in/a.txt": "a", "in/b": b"\x00"})
    assert box.exec("cat in/a.txt; ls in").text == "aa.txt\nb\n"
    box.exec(": > growing; (while :; do echo x >> /work/growing; done) >/dev/null 2>&1 &")
    until(lambda: box.read_file("growing") != b"", "the background has not begun")
    box.freeze()
    assert box.frozen
    archive = box.export(["/work/in", "growing"])
    assert archive.read("work/in/a.txt") == b"a"
    assert box.read_file("growing") == archive.read("work/growing") != b"", "nothing moves"
    for call in (lambda: box.exec("true"), lambda: box.write_file("x", b""), lambda: box.put({"x": b""})):
        with pytest.raises(SandboxError, match="is frozen"):
            call()
    with box.fork() as twin:
        assert twin.read_file("/work/growing") == archive.read("work/growing")
        assert twin.exec("echo new > in/a.txt; cat in/a.txt").text == "new\n"
        assert box.read_file("in/a.txt") == b"a"
    box.thaw()
    before = len(box.read_file("growing"))
    until(lambda: len(box.read_file("growing")) > before, "it does not go on")
    with pytest.raises(SandboxTimeoutError):
        box.exec("sleep 60", timeout_s=0.3)  # which kills what grows
    box.exec("ln -s /etc/passwd leak")
    with pytest.raises(ArchiveError, match="leak"):
        box.export(["/work"])
    with pytest.raises(SandboxError, match="absent"):
        box.export(["/work/absent"])
    box.exec("rm -rf /work/*")


def test_the_deadline_ends_everything_but_pid_1(box: Sandbox) -> None:
    box.exec("sleep 300 >/dev/null 2>&1 &")
    for command in ("sleep 600", "trap '' TERM INT HUP; while :; do :; done", "kill -STOP $$"):
        with pytest.raises(SandboxTimeoutError, match=f"sandbox {box.name}: .*passed its deadline of 0.4 s"):
            box.exec(command, timeout_s=0.4)
    cmdlines = "cat /proc/[0-9]*/cmdline"  # what was killed may take a while to be gone
    until(lambda: b"sleep\x00300" not in box.exec(cmdlines).stdout, "an earlier command is left")
    assert box.exec("echo alive").text == "alive\n"


def goes_on_or_is_dead(box: Sandbox) -> bool:
    try:
        return box.exec("echo alive", timeout_s=60).text == "alive\n"
    except SandboxDiedError:
        return True


def test_what_holds_every_process_there_is_ends_at_the_deadline(image: str) -> None:
    with open_sandbox("docker", SandboxSpec(image=image, pids=20)) as box:
        sleepers = "sleep 600 & " * 24
        with pytest.raises(SandboxTimeoutError):
            box.exec(f"({sleepers}); while :; do :; done", timeout_s=3)
        until(lambda: goes_on_or_is_dead(box), "what was to be killed still holds every process")


def test_a_fork_bomb_is_contained(image: str) -> None:
    """Its processes are killed, or, when not even a shell can be started any more to do it, the whole box is."""
    with open_sandbox("docker", SandboxSpec(image=image, pids=20)) as bombed:
        with contextlib.suppress(SandboxTimeoutError, SandboxDiedError):  # or its pid 1 has no place for its next beat
            bombed.exec("f() { f | f & f; }; f; sleep 60", timeout_s=1)
        # where the bomb's first shell ended before the deadline, the rest may hold every process for a while
        until(lambda: goes_on_or_is_dead(bombed), "neither goes on nor is dead")
        name = bombed.name
    assert gone_within(name, 60)


def test_nothing_in_the_box_reaches_pid_1(box: Sandbox) -> None:
    state = box.exec("cat /proc/1/status").text
    assert "\nUid:\t10003\t" in state
    assert "\nNoNewPrivs:\t1\n" in state
    assert "\nCapEff:\t0000000000000000\n" in state
    for entry in ("fd/0", "fd/1", "mem", "environ"):
        assert box.exec(f"cat /proc/1/{entry} || echo x > /proc/1/{entry}").exit_code != 0, entry
    for signal in ("KILL", "STOP", "TERM"):
        assert box.exec(f"kill -{signal} 1").exit_code != 0
    box.exec("kill -KILL -- -1")
    assert box.exec("echo alive").text == "alive\n"


def test_its_commands_are_as_hardened_as_any(box: Sandbox) -> None:
    result = box.exec("id -u; id -G; ulimit -n; ulimit -c; grep -E 'Seccomp:|NoNewPrivs|Cap' /proc/self/status")
    words = result.text.split()
    assert words[:4] == ["10001", "10001", "1024", "0"]
    status = dict(zip(words[4::2], words[5::2], strict=True))
    assert status.pop("NoNewPrivs:") == "1"
    assert status.pop("Seccomp:") == "2"
    assert len(status) == 5
    assert set(status.values()) == {"0" * 16}
    assert box.exec("echo x > /bin/x").exit_code != 0
    assert box.exec("cat /proc/net/dev | grep -c eth").text == "0\n"


def test_orphans_are_reaped(box: Sandbox) -> None:
    for _ in range(4):
        box.exec("for i in 1 2 3 4 5; do (true &) ; done")
    until(lambda: b"Z" not in box.exec("cut -d' ' -f3 /proc/[0-9]*/stat").stdout.split(), "zombies are left")


def test_what_needs_python_is_refused_by_name(box: Sandbox) -> None:
    for call in (lambda: box.start_process(["sh"]), lambda: PythonInterpreter(box).run("1")):
        with pytest.raises(UnavailableError, match=rf"{box.name} has no python3.*docker exec.*add python3"):
            call()


def test_close_ends_a_call_that_waits(image: str) -> None:
    box = open_sandbox("docker", SandboxSpec(image=image))
    caught: list[BaseException] = []

    def wait() -> None:
        try:
            box.exec("sleep 600", timeout_s=600)
        except SandboxDiedError as error:
            caught.append(error)

    waiting = threading.Thread(target=wait)
    waiting.start()
    time.sleep(0.5)
    box.close()
    waiting.join(60)
    assert caught
    with pytest.raises(SandboxDiedError, match="it was closed"):
        box.exec("true")
    box.close()


def gone_within(name: str, seconds: float) -> bool:
    until = time.monotonic() + seconds
    while connect().quick.containers(all=True, filters={"name": name}):
        if time.monotonic() > until:
            return False
        time.sleep(0.1)
    return True


def test_it_ends_with_its_lease_and_with_its_owner(image: str) -> None:
    from agentgym.sandbox.ownership.lease import owner

    def kept(lease_s: float) -> Sandbox | None:
        box = open_sandbox("docker", SandboxSpec(image=image, lease_s=lease_s))
        time.sleep(lease_s + 1)
        try:
            assert box.exec("echo kept").text == "kept\n"
        except SandboxDiedError:
            box.close()
            return None
        return box

    # a machine that stands still for seconds does not renew a lease of seconds
    unheard = kept(6) or kept(30)
    assert unheard is not None, "beats keep it"
    owner().forget(unheard.name)  # no beat comes any more
    assert gone_within(unheard.name, 120)
    with pytest.raises(SandboxDiedError, match=unheard.name):
        unheard.exec("true")
    unheard.close()
    left = open_sandbox("docker", SandboxSpec(image=image, lease_s=600))
    left._lifeline.shut()  # type: ignore[attr-defined]  # what the kernel does when the owner is killed
    assert gone_within(left.name, 60)
    left.close()


def test_a_shell_alone_does_most_of_it(shell_image: str) -> None:
    with open_sandbox("docker", SandboxSpec(image=shell_image)) as box:
        assert box.exec("echo $((6 * 7))").text == "42\n"
        box.write_file("/work/x", b"data")
        assert box.read_file("/work/x") == b"data"
        for call in (lambda: box.export(["/work/x"]), box.fork, lambda: box.put({"y": b""})):
            with pytest.raises(UnavailableError, match=r"needs tar in an image without python3; add tar or python3"):
                call()
        with pytest.raises(SandboxTimeoutError):
            box.exec("while :; do :; done", timeout_s=0.5)
        name = box.name
    assert gone_within(name, 30)


def test_a_python_that_cannot_be_the_worker_is_done_without(tmp_path: Path) -> None:
    script = r"#!/bin/sh\necho ImportError: too old >&2\n"
    make = f"printf '{script}' > /usr/local/bin/python3 && chmod +x /usr/local/bin/python3"
    (tmp_path / "Dockerfile").write_text(f"FROM agentgym/base:bookworm\nRUN {make}\n")
    image = build_image(tmp_path, shared=False)
    try:
        with open_sandbox("docker", SandboxSpec(image=image)) as box:
            assert box.limits["worker"] == "docker exec"
    finally:
        remove_image(image)
