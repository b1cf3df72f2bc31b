"""A scripted source of boxes and pools over it; a scripted world and the gateways of boxes that reach it."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from memory_boxes import MemorySource
from network_world import Box, World

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


@pytest.fixture
def world() -> Iterator[Callable[..., World]]:
    made: list[World] = []

    def make(serve: Callable[[socket.socket, World], None]) -> World:
        made.append(World(serve))
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.fixture
def boxes() -> Iterator[Callable[..., Box]]:
    made: list[Box] = []

    def make(*allow: str, **options: Any) -> Box:
        made.append(Box(*allow, **options))
        return made[-1]

    yield make
    for box in made:
        box.gateway.close()
