"""What a box may do, and what a call in it gave back. Must never know a message or a token."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

from agentgym.errors import InputError
from agentgym.sandbox.network.allow_list import AllowList
from agentgym.sandbox.network.report import NetworkReport

if TYPE_CHECKING:
    from agentgym.sandbox.archive import Archive

Tier = Literal["auto", "namespace", "docker", "gvisor"]
TIERS: tuple[str, ...] = ("auto", "namespace", "docker", "gvisor")
STRENGTH: tuple[str, ...] = TIERS[1:]  # the weakest isolation first; a task may name the least that it accepts
BASE_IMAGE = "agentgym/base:bookworm"  # the tag that the Dockerfiles name
BOX_UID = 10001  # who everything in a box is; no account of a usual host
VERIFIER_UID = 10002  # who everything in a box is that grades
WORK_DIRECTORY = "/work"
PING_S = 30.0  # on a machine that does much else


@dataclass(frozen=True, slots=True)
class SandboxSpec:
    """The limits of one box; the defaults are the hardened ones, relaxing one is explicit and shown.

    Example: `SandboxSpec(memory_mb=256, cpus=1.0, pids=64)`.
    """

    image: str = BASE_IMAGE  # docker and gvisor; the namespace tier shows the host's /usr read-only
    memory_mb: int = 512
    cpus: float = 1.0
    pids: int = 128
    tmpfs_mb: int = 64  # the writable disk: each writable folder has this much, and what is in them counts as memory
    folders: tuple[str, ...] = ()  # writable folders beside /tmp and /work, such as /logs
    output_limit: int = 65_536  # bytes kept of stdout and of stderr, half head and half tail
    environment: Mapping[str, str] = field(default_factory=dict)
    uid: int = BOX_UID
    lease_s: float = 60.0  # a box ends itself when nothing was heard from its owner for so long
    network_mb: int = 256  # what may go through the way out, both ways together
    # the relaxations; the namespace tier knows the first of them and refuses the others
    allow_network: tuple[str, ...] = ()  # "pypi.org:443", "*.pythonhosted.org:443": through a proxy on the host
    network: Literal["none", "bridge"] = "none"
    writable_root: bool = False
    run_as_root: bool = False  # root in the box, still without a capability

    def __post_init__(self) -> None:
        for name in ("memory_mb", "cpus", "pids", "tmpfs_mb", "output_limit", "lease_s", "network_mb"):
            value = getattr(self, name)
            if not (value > 0 and math.isfinite(value)):
                raise InputError(f"sandbox.{name} must be finite and > 0, got {value}")
        if self.network not in ("none", "bridge"):
            raise InputError(f"sandbox.network must be 'none' or 'bridge', got {self.network!r}")
        if isinstance(self.allow_network, str):
            raise InputError(f"sandbox.allow_network is a list of entries, got the text {self.allow_network!r:.200}")
        AllowList(self.allow_network)
        if self.allow_network and self.network != "none":
            raise InputError(
                f"sandbox.network={self.network} lets everything through, so sandbox.allow_network would hold nothing "
                "back; give one of the two"
            )
        if not 0 < self.uid < 2**31:
            raise InputError(f"sandbox.uid must be 1 to {2**31 - 1}, got {self.uid}")
        for folder in self.folders:
            parts = folder.split("/")
            if len(parts) < 2 or parts[0] or not all(parts[1:]) or {".", ".."} & set(parts) or "\0" in folder:
                raise InputError(f"sandbox.folders must be absolute paths without '.' and '..', got {folder!r}")
            if parts[1] in ("proc", "sys", "dev", "usr", "bin", "lib", "lib64", "sbin", "etc", "tmp", "work"):
                raise InputError(f"sandbox.folders cannot hold {folder!r}: /{parts[1]} is not a task's to mount over")

    @property
    def relaxations(self) -> tuple[str, ...]:
        """What was loosened, for whoever looks at the box: `("network=bridge",)`; () for a hardened one."""
        listed = {f"allow_network={' '.join(self.allow_network)}": bool(self.allow_network)}
        loosened = listed | {
            "network=bridge": self.network != "none",
            "writable_root": self.writable_root,
            "run_as_root": self.run_as_root,
        }
        return tuple(name for name, is_so in loosened.items() if is_so)

    @property
    def needs_container(self) -> tuple[str, ...]:
        """The relaxations that only a container can have."""
        return tuple(name for name in self.relaxations if not name.startswith("allow_network="))


@dataclass(frozen=True, slots=True)
class ExecResult:
    """What one call in a box gave back.

    Example: `ExecResult(exit_code=0, stdout=b"hi\\n", stderr=b"", dropped_bytes=0, seconds=0.01)`.
    """

    exit_code: int  # negative: killed by that signal
    stdout: bytes
    stderr: bytes
    dropped_bytes: int  # cut out of the middle of stdout and stderr
    seconds: float

    @property
    def text(self) -> str:
        """stdout as text; what is no UTF-8 is shown as U+FFFD."""
        return self.stdout.decode("utf-8", "replace")

    @property
    def error_text(self) -> str:
        """stderr as text."""
        return self.stderr.decode("utf-8", "replace")


@dataclass(frozen=True, slots=True)
class Answer:
    """What a resident process of a box answered to one message, and what it printed meanwhile.

    Example: `Answer(state="answered", data=b"42", output=b"hi\\n", dropped_bytes=0, exit_code=None, seconds=0.001)`.
    """

    state: Literal["answered", "timeout", "died"]  # after "timeout" and "died" the process is gone
    data: bytes
    output: bytes  # stdout and stderr in their order, cut like those of exec
    dropped_bytes: int
    exit_code: int | None  # None: it lives, or had to be killed; negative: that signal killed it
    seconds: float


class Sandbox(Protocol):
    """One box. Calls block, one at a time; the rollout runs them in threads. Usable as a context manager."""

    @property
    def tier(self) -> str: ...  # one of STRENGTH

    @property
    def name(self) -> str: ...

    @property
    def spec(self) -> SandboxSpec: ...

    @property
    def limits(self) -> Mapping[str, str]:
        """What enforces each limit of the spec here, e.g. `{"memory": "cgroup v2", "pids": "rlimit"}`."""
        ...

    @property
    def network(self) -> NetworkReport:
        """What went through its way out (`SandboxSpec.allow_network`)."""
        ...

    def ping(self, *, timeout_s: float = PING_S) -> None:
        """Returns when the box answers; SandboxDiedError if it is gone, or does not answer in time."""
        ...

    def exec(
        self, command: Sequence[str] | str, *, timeout_s: float = 10.0, stdin: bytes = b"", cwd: str | None = None
    ) -> ExecResult:
        """Runs argv, or a string through `sh -c`; a command that is not there gives exit code 127, like a shell.
        Raises SandboxTimeoutError after killing the whole process group and its daemons at the deadline,
        SandboxDiedError if the box is gone. A background process that the command leaves behind stays."""
        ...

    def read_file(self, path: str) -> bytes: ...

    def write_file(self, path: str, data: bytes) -> None: ...

    def put(self, source: Archive | Mapping[str, bytes | str] | Path, path: str = WORK_DIRECTORY) -> None:
        """Writes files and folders below the directory `path`: an archive, {relative path: content}, or a folder of
        this machine. Raises ArchiveError for an entry that is a link or leaves `path`, before anything is written."""
        ...

    def export(self, paths: Sequence[str]) -> Archive:
        """Reads files and folders, also of a frozen box. Entries are named relative to /, so that `put(archive, "/")`
        puts them where they were. Raises ArchiveError for links, special files and what is too much, SandboxError for
        a path that is not there."""
        ...

    @property
    def frozen(self) -> bool: ...

    def freeze(self) -> None:
        """Stops every process in the box, all at once; only read_file, export, fork and close then work."""
        ...

    def thaw(self) -> None:
        """Lets go on what `freeze` stopped."""
        ...

    def fork(self) -> Sandbox:
        """A new box of the same spec with a copy of the writable folders, taken at one moment. Processes are not
        copied; those of this box go on, unless it is frozen."""
        ...

    def start_process(self, command: Sequence[str], *, cwd: str | None = None) -> int:
        """Starts a resident process, which reads messages on its descriptor 3 and answers each on its descriptor 4
        (a big-endian uint32 length, then the bytes); its number."""
        ...

    def ask_process(self, process: int, message: bytes, *, timeout_s: float = 10.0) -> Answer:
        """One message and its answer. At the deadline the process and everything born after it are killed."""
        ...

    def stop_process(self, process: int) -> None: ...

    def __enter__(self) -> Sandbox: ...

    def __exit__(self, *_: object) -> None: ...

    def close(self) -> None:
        """Ends the box and everything in it; idempotent."""
        ...
