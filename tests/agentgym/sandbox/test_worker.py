"""The worker in a box: what it believes, what it says when something goes wrong, and how long it stays."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentgym.errors import ArchiveError, SandboxDiedError, SandboxError, SandboxLimitError, SandboxTimeoutError
from agentgym.sandbox import PythonInterpreter, SandboxSpec, open_sandbox, worker_client
from agentgym.sandbox.box import WorkerSandbox
from agentgym.sandbox.inside.worker_frames import HOST, sealed, tag_of
from agentgym.sandbox.inside.worker_line import as_json
from agentgym.sandbox.namespace.tier import NamespaceSandbox
from agentgym.sandbox.ownership.lease import owner
from agentgym.sandbox.worker_client import worker_program
from agentgym.testing.sandbox_conformance.questions import eventually

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.dictionaries(st.text(), inner, max_size=4),
)


def open_worker(spec: SandboxSpec | None = None) -> WorkerSandbox:
    box = open_sandbox("namespace", spec)
    assert isinstance(box, WorkerSandbox)
    return box


@given(st.dictionaries(st.text(), JSON, max_size=4))
def test_what_the_worker_writes_is_json(value: dict[str, object]) -> None:
    encoded = as_json(value)
    assert encoded.isascii()
    assert json.loads(encoded) == value


def test_a_lone_surrogate_can_be_said() -> None:
    assert json.loads(as_json({"a": "\udcff"})) == {"a": "\udcff"}


@given(st.binary(max_size=80), st.binary(max_size=80), st.integers(0, 2**40), st.data())
def test_a_tag_is_for_one_frame_only(header: bytes, body: bytes, number: int, data: st.DataObject) -> None:
    frame = sealed(b"key", HOST, number, header, body)
    sizes, tag = frame[:8], frame[8:24]
    assert frame[24:] == header
    assert tag == tag_of(b"key", HOST, number, sizes, header, body)
    other = data.draw(
        st.sampled_from(
            [
                (b"yek", HOST, number, sizes, header, body),
                (b"key", b"box", number, sizes, header, body),
                (b"key", HOST, number + 1, sizes, header, body),
                (b"key", HOST, number, sizes, header, body + b"x"),
                (b"key", HOST, number, sizes, header + b"x", body),
                (b"key", HOST, number, bytes(8) if any(sizes) else b"\1" * 8, header, body),
            ]
        )
    )
    assert tag_of(*other) != tag


def test_the_program_is_made_once_and_holds_sources_and_code() -> None:
    program = worker_program()
    assert worker_program() is program
    assert int(program[:8]) == len(program) - 8
    assert b"posix_spawn" in program


class FromSources(NamespaceSandbox):
    """A box whose Python is not that of the host, as far as the program can tell."""

    def _boot(self, rlimits, *, compiled_for=None, modules=None):
        return super()._boot(rlimits, modules=modules)


class Misplaced(NamespaceSandbox):
    """A box that was started as somebody else than its spec says."""

    def _boot(self, rlimits, *, compiled_for=None, modules=None):
        self.spec = dataclasses.replace(self.spec, uid=4)
        return super()._boot(rlimits, compiled_for=compiled_for, modules=modules)


@pytest.mark.bubblewrap
def test_a_box_of_another_user_is_no_box() -> None:
    with pytest.raises(SandboxError, match="is not isolated: its worker is pid 1 of uid 10001, not pid 1 of uid 4"):
        Misplaced(SandboxSpec())


@pytest.mark.bubblewrap
def test_another_python_than_the_hosts_takes_the_sources(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "MAGIC_NUMBER", b"none")
    worker_client._program.cache_clear()
    try:
        with FromSources(SandboxSpec()) as box:
            assert box.exec("echo of sources").stdout == b"of sources\n"
    finally:
        worker_client._program.cache_clear()


# ------------------------------------------------------------------------------------------------------- impersonation


@pytest.mark.bubblewrap
@pytest.mark.parametrize("spoil", ["key", "number", "replay"])
def test_the_worker_ends_the_box_at_a_frame_that_its_host_did_not_write(spoil: str) -> None:
    with open_worker() as box:
        client = box._client
        sent: list[bytes] = []
        send = client._channel.send

        def record(data: bytes, until: float) -> None:
            sent.append(data)
            send(data, until)

        client._channel.send = record  # type: ignore[method-assign]
        box.ping()
        if spoil == "key":
            client._key = b"x" * 32
        elif spoil == "number":
            client._num_sent += 1
        else:
            client._channel.send = lambda data, until: send(sent[0], until)  # type: ignore[method-assign]
        with pytest.raises(SandboxDiedError):
            box.exec("echo believed > /work/f")


# --------------------------------------------------------------------------------------------------------------- leases


@pytest.mark.bubblewrap
def test_a_lease_is_renewed_by_every_frame_and_by_renewals_between_the_parts_of_a_call() -> None:
    try:
        lives_as_long_as_it_is_renewed(1.0)
    except SandboxDiedError:  # a machine that stood still for a second; twenty are another thing
        lives_as_long_as_it_is_renewed(20.0)


def lives_as_long_as_it_is_renewed(lease_s: float) -> None:
    with open_worker(SandboxSpec(lease_s=lease_s)) as box:
        owner().forget(box.name)
        for _ in range(3):  # calls renew
            time.sleep(0.4 * lease_s)
            box.ping()
        stop = threading.Event()

        def renew() -> None:
            while not stop.wait(0.1):
                box.renew()

        renewing = threading.Thread(target=renew)
        renewing.start()
        try:
            assert box.exec(f"sleep {1.5 * lease_s}; echo done", timeout_s=60).stdout == b"done\n"
            data = bytes(range(256)) * 40_000
            for _ in range(20):  # frames of renewal between the frames of a body
                box.write_file("big", data)
            assert box.read_file("big") == data
            time.sleep(1.5 * lease_s)
            box.ping()
        finally:
            stop.set()
            renewing.join()
        with pytest.raises(SandboxDiedError):
            box.exec("sleep 600", timeout_s=600)


@pytest.mark.bubblewrap
def test_bytes_that_are_no_frame_renew_nothing() -> None:
    with open_worker(SandboxSpec(lease_s=2.0)) as box:
        owner().forget(box.name)
        channel, until = box._client._channel, time.monotonic() + 60

        def trickle() -> None:
            channel.send(b"\0\0\x80\0\0\0\0\0", until)  # a header of 32,768 bytes, which never ends
            while time.monotonic() < until:
                time.sleep(0.1)
                channel.send(b"x", until)

        with pytest.raises(OSError, match=r"Broken pipe|reset"):
            trickle()


@pytest.mark.bubblewrap
def test_renewing_a_box_that_is_gone_says_nothing() -> None:
    box = open_worker()
    box.close()
    box.renew()
    with pytest.raises(SandboxDiedError, match="it was closed"):
        box.exec("true")


VFORKED = """
import os
os.mkfifo("gate")
opening = [(os.POSIX_SPAWN_OPEN, 0, "gate", os.O_RDONLY, 0)]  # the child waits here, before its exec
os.posix_spawn("/bin/sleep", ["sleep", "60"], {}, file_actions=opening)
open("passed", "w").close()
"""


@pytest.mark.bubblewrap
def test_who_waits_for_the_exec_of_a_stopped_child_stands_still() -> None:
    with open_worker() as box:
        box.write_file("vforked.py", VFORKED.encode())
        box.exec("python3 vforked.py >/dev/null 2>&1 &")
        states = "test -p gate && cut -d' ' -f3 /proc/[0-9]*/stat"  # before there is a gate, one may wait for a disk
        eventually(lambda: b"D" in box.exec(states).stdout, "it waits where no signal comes")
        box.freeze()
        box.thaw()
        box.exec("echo > gate")
        eventually(lambda: box.exec("test -e passed").exit_code == 0, "it does not go on")


# ------------------------------------------------------------------------------------------------------------ bad input


@pytest.mark.bubblewrap
def test_errors_name_the_box_and_the_cause() -> None:
    with open_worker(SandboxSpec(tmpfs_mb=4)) as box:
        box.write_file("other", b"x")
        for call, kind, said in [
            (lambda: box.read_file("/work/absent"), SandboxError, "No such file or directory: /work/absent"),
            (lambda: box.read_file("/work"), SandboxError, "'/work' is not a regular file"),
            (lambda: box.write_file("/nowhere/f", b""), SandboxError, "No such file or directory: /nowhere/f"),
            (lambda: box.exec("true", cwd="/nowhere"), SandboxError, "the directory '/nowhere' cannot be entered"),
            (
                lambda: box.exec("sleep 9", timeout_s=0.1),
                SandboxTimeoutError,
                "'/bin/sh -c sleep 9' passed its deadline",
            ),
            (lambda: box.write_file("f", bytes(4 * 2**20)), SandboxLimitError, "No space left on device"),
            (lambda: box.put({"f": bytes(4 * 2**20)}), SandboxLimitError, "No space left on device"),
            (lambda: box.start_process(["absent"]), SandboxError, "command not found: absent"),
            (lambda: box.ask_process(7, b""), SandboxError, "no process 7 in this box"),
        ]:
            with pytest.raises(kind, match=said) as caught:
                call()
            assert box.name in str(caught.value)
            assert "Traceback" not in str(caught.value)
        box.exec("rm -f f; python3 -c \"open(b'\\xff', 'w')\"; mkdir holder; chmod 0 holder")
        with pytest.raises(SandboxError, match="Permission denied: /work/holder"):
            box.export(["holder"])
        assert box.exec("echo alive").stdout == b"alive\n"


@pytest.mark.bubblewrap
def test_folders_that_are_too_deep_for_the_worker_are_refused() -> None:
    with open_worker() as box:
        box.exec("i=0; while [ $i -lt 120 ]; do mkdir d && cd d; i=$((i + 1)); done", timeout_s=200)
        with pytest.raises(ArchiveError, match="more than 100 folders deep"):
            box.fork()
        assert box.exec("echo alive").stdout == b"alive\n"


@pytest.mark.bubblewrap
def test_a_worker_that_fails_says_why_in_one_line() -> None:
    with (
        open_worker() as box,
        pytest.raises(SandboxDiedError, match="its worker failed: KeyError: 'no-such-operation'"),
    ):
        box._client.request("no-such-operation", {})


@pytest.mark.bubblewrap
def test_arguments_that_are_too_long_are_an_error_of_the_command() -> None:
    with open_worker() as box:
        with pytest.raises(SandboxError, match="Argument list too long"):
            box.exec(["echo", "x" * 3_000_000])
        assert box.exec("echo alive").stdout == b"alive\n"


@pytest.mark.bubblewrap
def test_a_box_without_memory_for_its_worker_refuses_and_goes_on() -> None:
    data = bytes(20 * 2**20)
    with open_worker(SandboxSpec(memory_mb=64, tmpfs_mb=64)) as box:
        for _ in range(3):
            box.write_file("/work/f", data)
            assert box.read_file("/work/f") == data, "files pass through in pieces"
        assert box.export(["f"]).num_bytes == len(data)
        assert len(box.exec(["cat"], stdin=bytes(1000)).stdout) == 1000


@pytest.mark.bubblewrap
def test_the_deadline_of_one_call_spares_what_others_started() -> None:
    with open_worker() as box:
        python = PythonInterpreter(box)
        python.run("import subprocess, threading, time, os", timeout_s=60)
        box.exec(": > /work/beats")
        python.run("def beat():\n  while True: subprocess.run(['sleep', '0.05'])")
        python.run("threading.Thread(target=beat, daemon=True).start()")
        box.exec("(while :; do sleep 0.05 || exit; echo beat >> /work/beats; done) >/dev/null 2>&1 &")
        for _ in range(3):
            with pytest.raises(SandboxTimeoutError):
                box.exec("setsid sleep 600 & sleep 600", timeout_s=0.3)
        assert python.run("1 + 1").text == "2"
        before = len(box.read_file("/work/beats"))
        eventually(lambda: len(box.read_file("/work/beats")) > before, "it does not go on")
        count = "pgrep -fc 'sleep 600' || true"  # 1: the shell that asks
        eventually(lambda: box.exec(count).stdout.strip() in (b"0", b"1"), "what was killed does not end")
