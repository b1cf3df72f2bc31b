"""Boxes in memory, and a source of them that a test scripts."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Mapping, Sequence

from agentgym.errors import SandboxDiedError
from agentgym.sandbox.spec import Answer, ExecResult, SandboxSpec
from agentgym.sandbox.warm.pool import SandboxPool

SPEC = SandboxSpec()


class MemoryBox:
    """A box that holds files in a dictionary and runs nothing."""

    tier, limits, frozen = "namespace", {}, False

    def __init__(self, name: str, spec: SandboxSpec, source: MemorySource) -> None:
        self.name, self.spec, self._source = name, spec, source
        self.files: dict[str, bytes] = {}
        self.alive = True
        self.pings = self.closes = 0

    def ping(self, *, timeout_s: float = 30.0) -> None:
        self.pings += 1
        if not self.alive:
            raise SandboxDiedError(f"sandbox {self.name} died")

    def exec(
        self, command: Sequence[str] | str, *, timeout_s: float = 10.0, stdin: bytes = b"", cwd: str | None = None
    ) -> ExecResult:
        self.ping()
        return ExecResult(0, stdin, b"", 0, 0.0)

    def read_file(self, path: str) -> bytes:
        self.ping()
        return self.files[path]

    def write_file(self, path: str, data: bytes) -> None:
        self.ping()
        self.files[path] = data

    def put(self, source: Mapping[str, bytes], path: str = "/work") -> None:
        self.files.update(source)

    def export(self, paths: Sequence[str]) -> Mapping[str, bytes]:
        return {path: self.files[path] for path in paths}

    def freeze(self) -> None: ...

    def thaw(self) -> None: ...

    def fork(self) -> MemoryBox:
        box = self._source.open(self.spec)
        box.files = dict(self.files)
        return box

    def start_process(self, command: Sequence[str], *, cwd: str | None = None) -> int:
        return 0

    def ask_process(self, process: int, message: bytes, *, timeout_s: float = 10.0) -> Answer:
        return Answer("answered", message, b"", 0, None, 0.0)

    def stop_process(self, process: int) -> None: ...

    def __enter__(self) -> MemoryBox:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._source.closing += 1
        self._source.may_close.wait(120)
        self.alive = False
        self.closes += 1


class MemorySource:
    """Opens boxes in memory; the test says when a start succeeds, fails or waits."""

    tier = "namespace"

    def __init__(self) -> None:
        self.boxes: list[MemoryBox] = []
        self.failures: list[BaseException] = []  # the next starts fail with these
        self.may_open, self.may_close = threading.Event(), threading.Event()
        self.may_open.set()
        self.may_close.set()
        self.opening = self.most_opening = self.closing = 0
        self.tries: list[float] = []
        self._lock = threading.Lock()
        self._names = itertools.count()

    def open(self, spec: SandboxSpec | None = None) -> MemoryBox:
        with self._lock:
            self.opening += 1
            self.most_opening = max(self.most_opening, self.opening)
            self.tries.append(time.monotonic())
        self.may_open.wait(120)
        with self._lock:
            self.opening -= 1
            if failures := self.failures:  # looked at once: a test may put others in their place
                raise failures.pop(0)
            box = MemoryBox(f"box-{next(self._names)}", spec or SPEC, self)
            self.boxes.append(box)
            return box

    def prefetch(self, spec: SandboxSpec) -> None: ...


def eventually(what: Callable[[], bool], seconds: float = 60.0) -> None:
    until = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < until, "it never became so"
        time.sleep(0.002)


def settle(pool: SandboxPool) -> None:
    """Waits until the background has done what there is to do: asks the pool for it, not the clock."""

    def quiet() -> bool:
        with pool._changed:
            nothing_to_start = pool._next_start() is None
            metrics = pool.metrics()
            return nothing_to_start and not metrics.starting and not metrics.ending

    eventually(quiet)
