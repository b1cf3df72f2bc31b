"""A box out of a pool: the box itself, but closing it gives it back to be thrown away. Must never do anything else."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from agentgym.errors import SandboxDiedError
from agentgym.sandbox.network.report import NetworkReport
from agentgym.sandbox.spec import PING_S, WORK_DIRECTORY, Answer, ExecResult, Sandbox, SandboxSpec

if TYPE_CHECKING:
    from agentgym.sandbox.archive import Archive


class PooledBox:
    """Implements Sandbox over `box`. After `close` it gives SandboxDiedError at once, although the box itself ends a
    little later. `give_back` is called once; `adopt` makes the pool's of a fork."""

    def __init__(
        self,
        box: Sandbox,
        give_back: Callable[[PooledBox, Sandbox], None],
        adopt: Callable[[Sandbox], PooledBox],
    ) -> None:
        self._box = box
        self._give_back = give_back
        self._adopt = adopt
        self._closing = threading.Lock()
        self._closed = False

    @property
    def tier(self) -> str:
        return self._box.tier

    @property
    def name(self) -> str:
        return self._box.name

    @property
    def spec(self) -> SandboxSpec:
        return self._box.spec

    @property
    def limits(self) -> Mapping[str, str]:
        return self._box.limits

    @property
    def frozen(self) -> bool:
        return self._box.frozen

    @property
    def network(self) -> NetworkReport:
        return self._box.network

    def ping(self, *, timeout_s: float = PING_S) -> None:
        self._open_box().ping(timeout_s=timeout_s)

    def exec(
        self, command: Sequence[str] | str, *, timeout_s: float = 10.0, stdin: bytes = b"", cwd: str | None = None
    ) -> ExecResult:
        return self._open_box().exec(command, timeout_s=timeout_s, stdin=stdin, cwd=cwd)

    def read_file(self, path: str) -> bytes:
        return self._open_box().read_file(path)

    def write_file(self, path: str, data: bytes) -> None:
        self._open_box().write_file(path, data)

    def put(self, source: Archive | Mapping[str, bytes | str] | Path, path: str = WORK_DIRECTORY) -> None:
        self._open_box().put(source, path)

    def export(self, paths: Sequence[str]) -> Archive:
        return self._open_box().export(paths)

    def freeze(self) -> None:
        self._open_box().freeze()

    def thaw(self) -> None:
        self._open_box().thaw()

    def fork(self) -> Sandbox:
        return self._adopt(self._open_box().fork())

    def start_process(self, command: Sequence[str], *, cwd: str | None = None) -> int:
        return self._open_box().start_process(command, cwd=cwd)

    def ask_process(self, process: int, message: bytes, *, timeout_s: float = 10.0) -> Answer:
        return self._open_box().ask_process(process, message, timeout_s=timeout_s)

    def stop_process(self, process: int) -> None:
        self._open_box().stop_process(process)

    def __enter__(self) -> PooledBox:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        with self._closing:  # until it was given back: who closes it a second time may rely upon that
            was_open, self._closed = not self._closed, True
            if was_open:
                self._give_back(self, self._box)

    def _open_box(self) -> Sandbox:
        if self._closed:
            raise SandboxDiedError(f"sandbox {self.name} is gone: it was closed")
        return self._box
