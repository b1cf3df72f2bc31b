"""One bubblewrap process: how it is found, started, heard and ended. Must never know what the box may see.

The starter is small whatever the owner's size: a plain vfork and exec of `setpriv`, where the owner is root and the
box must not be, and of a shell that puts itself into the box's cgroups. Python's own way to another uid copies the
owner's page tables first, 20 ms for 500 MB.

The thread that starts bubblewrap lives as long as the box: `--die-with-parent` follows the starting *thread*, and the
rollout's threads come and go.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import select
import shlex
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Sequence

from agentgym.errors import SandboxError, UnavailableError
from agentgym.sandbox.worker_client import START_S

MEND = "install it (apt-get install bubblewrap) or use sandbox.tier=docker"
SHELL_NAME = "agentgym-start"
ENDING_S = 30.0  # how long it may take to end, and to say why
ASKED_S = 60.0  # for what a program says of itself at once, on a machine that may stand still
STARTERS = ("bwrap: ", "setpriv: ", f"{SHELL_NAME}: ")  # who may complain before the worker runs
SYSTEM_PATH = "/usr/bin:/bin:/usr/sbin:/sbin"


class BubblewrapProcess:
    """One bubblewrap, its keeper thread and its complaints.

    `command`: bwrap with its options; bytes among them become the number of a descriptor that they are read from.
    `uid`: as whom it runs, None: as we do. `entrances`: the cgroup files through which it goes in. `tell_pid`:
    `worker_pid` will be asked.
    """

    def __init__(
        self,
        command: Sequence[str | bytes],
        *,
        uid: int | None = None,
        entrances: Sequence[str] = (),
        tell_pid: bool = False,
    ) -> None:
        self._command = command
        self._starter, self._user = identity(uid)
        self._starter = [*enter(entrances), *self._starter]
        self._tell_pid = tell_pid
        self._info_read = -1
        self._started = threading.Event()
        self._failure: OSError | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._complaint = b""
        self._thread: threading.Thread | None = None

    def start(self) -> socket.socket:
        """Returns when bubblewrap was started; our end of the box's standard input and output. OSError, or RuntimeError
        for a thread too many: something ran out."""
        with contextlib.ExitStack() as undo, contextlib.ExitStack() as theirs:
            ours, streams = socket.socketpair()
            undo.callback(ours.close)
            theirs.callback(streams.close)
            command = [*self._starter]
            given: list[int] = []
            for word in self._command:
                if isinstance(word, bytes):
                    given.append(readable(word))
                    theirs.callback(os.close, given[-1])
                command.append(str(given[-1]) if isinstance(word, bytes) else word)
            if self._tell_pid:
                self._info_read, write = os.pipe()
                given.append(write)
                theirs.callback(os.close, write)
                command[len(self._starter) + 1 : len(self._starter) + 1] = ["--info-fd", str(write)]
            thread = threading.Thread(
                target=self._keep, args=(command, streams, given), name="agentgym-box", daemon=True
            )
            thread.start()
            self._thread = thread
            self._started.wait()
            if self._failure:
                raise self._failure
            undo.pop_all()
            return ours

    def _keep(self, command: list[str], streams: socket.socket, given: list[int]) -> None:
        try:
            process = subprocess.Popen(
                command,
                stdin=streams.fileno(),
                stdout=streams.fileno(),
                stderr=subprocess.PIPE,
                pass_fds=given,
                env={},
                cwd="/",
                start_new_session=True,
                user=self._user,
                group=self._user,
                extra_groups=None if self._user is None else (),
            )
        except OSError as error:
            self._failure = error
            self._started.set()
            return
        self._process = process
        self._started.set()
        assert process.stderr is not None
        with process.stderr as stderr:
            for chunk in iter(functools.partial(os.read, stderr.fileno(), 4096), b""):
                self._complaint = (self._complaint + chunk)[-4096:]
        process.wait()

    def worker_pid(self) -> int:
        """The box's first process, as the host counts it (with `tell_pid`)."""
        text, until = b"", time.monotonic() + START_S
        while not text.rstrip().endswith(b"}"):
            if not select.select([self._info_read], [], [], max(0.0, until - time.monotonic()))[0]:
                raise SandboxError(f"bubblewrap did not start within {START_S:g} s")
            chunk = os.read(self._info_read, 4096)
            if not chunk:
                raise start_error(self.epitaph())
            text += chunk
        return int(json.loads(text)["child-pid"])

    def epitaph(self) -> str:
        """How it ended, with what bubblewrap said; asked when its streams have ended, and it with them."""
        if self._thread:
            self._thread.join(ENDING_S)
        code = self._process.poll() if self._process else None
        said = self._complaint.decode(errors="replace").strip()
        ended = "bubblewrap still runs" if code is None else f"bubblewrap ended with code {code}"
        return f"{ended}{': ' if said else ''}{said}"

    def refused(self) -> bool:
        """Whether it ended because no box can be made."""
        said = self.epitaph()
        return any(starter in said for starter in STARTERS)

    def end(self) -> None:
        """Kills it and with it everything in the box; returns when it is gone."""
        if self._process and self._thread:
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(signal.SIGKILL)
            self._thread.join(ENDING_S)
        if self._info_read >= 0:
            os.close(self._info_read)
            self._info_read = -1


def readable(data: bytes) -> int:
    """A descriptor from which these few bytes are read."""
    read, write = os.pipe()
    os.write(write, data)
    os.close(write)
    return read


def enter(entrances: Sequence[str]) -> list[str]:
    """The start of a command that first puts itself into cgroups."""
    if not entrances:
        return []
    script = "; ".join(["set -e", *(f"echo 0 > {shlex.quote(file)}" for file in entrances), 'exec "$@"'])
    return ["/bin/sh", "-c", script, SHELL_NAME]


def identity(uid: int | None) -> tuple[list[str], int | None]:
    """What makes a command run as `uid`: (the start of the command, Popen's `user`); one of them does."""
    found = setpriv() if uid is not None else None
    if found is None:
        return [], uid
    return [found, "--reuid", str(uid), "--regid", str(uid), "--clear-groups", "--"], None


@functools.cache
def setpriv() -> str | None:
    """util-linux's (busybox has a lesser one)."""
    found = shutil.which("setpriv", path=SYSTEM_PATH)
    if found is None:
        return None
    told = subprocess.run([found, "--help"], capture_output=True, text=True, timeout=ASKED_S, check=False).stdout
    return found if "--reuid" in told and "--clear-groups" in told else None


def start_error(said: str) -> UnavailableError:
    """No box can be made on this machine."""
    if f"{SHELL_NAME}: " in said:
        return UnavailableError(
            f"a namespace box cannot go into its cgroups ({said}); the kernel refuses that to an owner with a real-"
            "time policy (chrt) and to all where a cgroup above is full; mend that or use sandbox.tier=docker"
        )
    return UnavailableError(
        f"bubblewrap cannot make a box here ({said}); allow user namespaces (sysctl user.max_user_namespaces > 0, "
        "kernel.unprivileged_userns_clone=1, kernel.apparmor_restrict_unprivileged_userns=0; in a container they need "
        "its permission) or use sandbox.tier=docker"
    )


def find_bubblewrap() -> str:
    """The path of bwrap."""
    found = shutil.which("bwrap")
    if found is None:
        raise UnavailableError(f"bubblewrap (bwrap) is not on this machine; {MEND}")
    return found


@functools.cache
def abilities(bwrap: str) -> frozenset[str]:
    """The options that this version knows (asked once; a version does not change under us)."""
    told = subprocess.run([bwrap, "--help"], capture_output=True, text=True, timeout=ASKED_S, check=False).stdout
    return frozenset(line.split()[0] for line in told.splitlines() if line.strip().startswith("--"))
