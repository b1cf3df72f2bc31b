"""What an attack is and how its outcome is judged. Law: the host looks for itself wherever it can; what hostile code
says of its own success counts for nothing, and after every attack the box must work or be dead by name, and nothing of
it may be left on the machine."""

from __future__ import annotations

import contextlib
import glob
import json
import os
import secrets
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from agentgym.errors import SandboxDiedError, SandboxError, SandboxLimitError, SandboxTimeoutError
from agentgym.sandbox.spec import ExecResult, Sandbox, SandboxSpec

OpenBox = Callable[[SandboxSpec], Sandbox]
OWN_KERNEL = ("gvisor",)  # tiers in which a program's system calls are answered by a kernel that is not the host's
GONE_S = 60.0  # how long the kernel and a daemon may take to clear away a closed box


class Escaped(Exception):
    """The attack reached something that it must not reach."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """How one attack ended, judged from outside.

    Example: `Outcome(contained=True, what_happened="killed at the deadline; no process was left")`.
    """

    contained: bool
    what_happened: str


@dataclass(frozen=True, slots=True)
class Attack:
    """One attack; `run` opens real boxes, attacks them and closes them.

    Example: `Attack("fork bomb", "forks until it cannot", run)`, then `run(open_box).contained`.
    """

    name: str
    what: str
    run: Callable[[OpenBox], Outcome]


def attack(what: str) -> Callable[[Callable[[Scene], str]], Attack]:
    """Makes an attack of a function that says what happened or raises Escaped; its name is the function's."""

    def made(function: Callable[[Scene], str]) -> Attack:
        def run(open_box: OpenBox) -> Outcome:
            scene = Scene(open_box)
            with scene.pinned:
                try:
                    with scene:
                        said = function(scene)
                    scene.check_nothing_is_left()
                except Escaped as error:
                    return Outcome(False, str(error))
                return Outcome(True, said)

        return Attack(function.__name__.replace("_", " "), what, run)

    return made


def require(holds: object, otherwise: str) -> None:
    """An assertion of the suite that `python -O` does not remove."""
    if not holds:
        raise Escaped(otherwise)


class Scene:
    """The boxes of one attack, and the host's view of them."""

    def __init__(self, open_box: OpenBox) -> None:
        self._open_box = open_box
        self._boxes: list[Sandbox] = []
        self._namespaces: dict[str, str | None] = {}
        self.pinned = contextlib.ExitStack()  # a namespace that is held open gives its number to no other
        self.nonce = secrets.token_hex(8)  # in the environment of every command, so that the host finds its processes

    def __enter__(self) -> Scene:
        return self

    def __exit__(self, *_: object) -> None:
        for box in self._boxes:
            box.close()

    def box(self, **changes: Any) -> Sandbox:
        """A box that is closed and looked for afterwards."""
        environment = {"AGENTGYM_ABUSE": self.nonce, **changes.pop("environment", {})}
        box = self._open_box(SandboxSpec(environment=environment, **changes))
        self._boxes.append(box)
        self._namespaces[box.name] = self._namespace_of(box)
        return box

    def open(self, spec: SandboxSpec) -> Sandbox:
        """Like `box`, for what opens boxes by itself, such as a verification."""
        box = self._open_box(spec)
        self._boxes.append(box)
        self._namespaces[box.name] = None
        return box

    def processes(self, box: Sandbox) -> list[int]:
        """The host's numbers of the processes in the box, the worker among them; [] where they cannot be seen from
        here (a daemon elsewhere, a kernel of its own)."""
        namespace = self._namespaces[box.name]
        return [] if namespace is None else [pid for pid in _pids() if _link(pid, "ns/pid") == namespace]

    def sees(self, box: Sandbox) -> bool:
        return self._namespaces[box.name] is not None

    def check_usable(self, box: Sandbox) -> str:
        """The box works, or is dead by name; anything between is an escape of a kind."""
        word = secrets.token_hex(4)
        try:
            result = box.exec(["echo", word], timeout_s=60)
        except SandboxDiedError:
            return "the box died, by name"
        except SandboxLimitError:
            return "the box says that its limits are used up"
        require(result.stdout == f"{word}\n".encode(), f"the box answers {result.stdout[:80]!r} to `echo {word}`")
        return "the box goes on"

    def check_nothing_is_left(self) -> None:
        """No process, cgroup or container of the closed boxes, and the host still starts processes."""
        until = time.monotonic() + GONE_S
        while (left := self._left()) and time.monotonic() < until:
            time.sleep(0.05)
        require(not left, f"left on the host: {left}")
        try:
            subprocess.run(["true"], check=True, timeout=30)
        except subprocess.TimeoutExpired:
            raise Escaped("the host takes half a minute to start a process") from None

    def _left(self) -> list[str]:
        namespaces = {namespace for namespace in self._namespaces.values() if namespace}
        marked = f"AGENTGYM_ABUSE={self.nonce}".encode()
        left = [
            f"process {pid} ({_read(pid, 'cmdline')[:60]!r})"
            for pid in _pids()
            if (_link(pid, "ns/pid") in namespaces or marked in _read(pid, "environ")) and not _is_dead(pid)
        ]
        for box in self._boxes:
            for depth in ("*/", "*/*/", "*/*/*/", ""):
                left += glob.glob(f"/sys/fs/cgroup/{depth}{glob.escape(box.name)}*")
            left += _containers(box) if box.tier != "namespace" else []
        return left

    def _namespace_of(self, box: Sandbox) -> str | None:
        process = box.start_process(["sleep", "3600"])  # found by the nonce in its environment, then its namespace
        marked = f"AGENTGYM_ABUSE={self.nonce}".encode()
        known = set(self._namespaces.values())
        try:
            for pid in _pids():
                if marked not in _read(pid, "environ"):
                    continue
                namespace = _link(pid, "ns/pid")
                if namespace and namespace not in known:  # none: of an earlier box, and gone by now
                    with contextlib.suppress(OSError):
                        pin = os.open(f"/proc/{pid}/ns/pid", os.O_RDONLY | os.O_CLOEXEC)
                        self.pinned.callback(os.close, pin)
                    return namespace
            return None
        finally:
            box.stop_process(process)


def hostile(box: Sandbox, code: str, *, timeout_s: float = 90.0) -> ExecResult:
    """Runs a Python program in the box."""
    return box.exec(["python3", "-I", "-c", code], timeout_s=timeout_s)


def told(box: Sandbox, code: str, *, timeout_s: float = 90.0) -> Any:
    """What our own probe in the box prints as JSON."""
    result = hostile(box, code, timeout_s=timeout_s)
    try:
        return json.loads(result.stdout)
    except ValueError as error:
        raise SandboxError(f"a probe in {box.name} did not report: {result.error_text[-500:]}") from error


@contextlib.contextmanager
def stopped_at_the_deadline(what: str) -> Iterator[None]:
    """The call within must run into its deadline."""
    try:
        yield
    except SandboxTimeoutError:
        return
    raise Escaped(f"{what} was not stopped at its deadline")


def within(holds: Callable[[], object], seconds: float = GONE_S) -> bool:
    """Whether it becomes so, on a machine that may stand still for seconds."""
    until = time.monotonic() + seconds
    while not holds():
        if time.monotonic() >= until:
            return False
        time.sleep(0.05)
    return True


def available_mb() -> int:
    """What the kernel says it could still give."""
    with open("/proc/meminfo") as file:
        return next(int(line.split()[1]) // 1024 for line in file if line.startswith("MemAvailable"))


def _pids() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def _link(pid: int, name: str) -> str:
    try:
        return os.readlink(f"/proc/{pid}/{name}")
    except OSError:  # it has ended, or is another user's and we are not root
        return ""


def _is_dead(pid: int) -> bool:
    """Dead and waiting for the machine's init to notice, which is none of our doing."""
    return _read(pid, "stat").rpartition(b") ")[2][:1] in (b"Z", b"X", b"")


def _read(pid: int, name: str) -> bytes:
    try:
        with open(f"/proc/{pid}/{name}", "rb") as file:
            return file.read(65_536)
    except OSError:
        return b""


def _containers(box: Sandbox) -> list[str]:
    """What the daemon still knows of it; [] without Docker's own client, which alone is outside of our code."""
    client = shutil.which("docker")
    if client is None:
        return []
    command = [client, "ps", "--all", "--filter", f"name=^{box.name}$", "--format", "container {{.Names}} {{.Status}}"]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout.splitlines()
