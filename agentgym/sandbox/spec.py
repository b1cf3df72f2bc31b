"""What a box may do, and what a call in it gave back. Must never know a message or a token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from agentgym.errors import InputError

Tier = Literal["auto", "docker", "namespace"]
BASE_IMAGE = "agentgym/base:bookworm"  # the tag that the Dockerfiles name


@dataclass(frozen=True, slots=True)
class SandboxSpec:
    """The limits of one box; the defaults are the hardened ones, relaxing one is explicit.

    Example: `SandboxSpec(memory_mb=256, cpus=1.0, pids=64)`.
    """

    image: str = BASE_IMAGE  # docker tier only; the namespace tier shows the host's /usr read-only
    memory_mb: int = 512
    cpus: float = 1.0
    pids: int = 128
    tmpfs_mb: int = 64  # the writable disk: /tmp and /work have this much each, and what is in them counts as memory
    output_limit: int = 65_536  # bytes kept of stdout and of stderr, half head and half tail
    environment: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("memory_mb", "cpus", "pids", "tmpfs_mb", "output_limit"):
            if getattr(self, name) <= 0:
                raise InputError(f"sandbox.{name} must be > 0, got {getattr(self, name)}")


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
    def tier(self) -> str: ...  # "docker" or "namespace"

    @property
    def name(self) -> str: ...

    @property
    def spec(self) -> SandboxSpec: ...

    @property
    def limits(self) -> Mapping[str, str]:
        """What enforces each limit of the spec here, e.g. `{"memory": "cgroup v2", "pids": "rlimit"}`."""
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
