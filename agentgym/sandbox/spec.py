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
    tmpfs_mb: int = 64  # the writable disk: /tmp and the work directory
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


class Sandbox(Protocol):
    """One box. Calls block; the rollout runs them in threads. Usable as a context manager."""

    tier: str  # "docker" or "namespace"
    name: str

    def exec(
        self, command: Sequence[str] | str, *, timeout_s: float = 10.0, stdin: bytes = b"", cwd: str | None = None
    ) -> ExecResult:
        """Runs argv, or a string through `sh -c`. Raises SandboxTimeoutError after killing the whole process group at
        the deadline, SandboxDiedError if the box is gone."""
        ...

    def read_file(self, path: str) -> bytes: ...

    def write_file(self, path: str, data: bytes) -> None: ...

    def close(self) -> None:
        """Ends the box and everything in it; idempotent."""
        ...
