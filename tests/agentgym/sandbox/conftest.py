"""A scripted source of boxes, and pools over it."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from memory_boxes import MemorySource

from agentgym.sandbox.warm.pool import SandboxPool


@pytest.fixture
def source() -> MemorySource:
    return MemorySource()


@pytest.fixture
def make(source: MemorySource) -> Iterator[Callable[..., SandboxPool]]:
    pools: list[SandboxPool] = []

    def make(**kwargs: object) -> SandboxPool:
        pools.append(SandboxPool(source, **kwargs))
        return pools[-1]

    yield make
    source.may_open.set()
    source.may_close.set()
    for pool in pools:
        pool.close()
