"""The plain way that the sandbox benchmarks stand beside: Docker's SDK with its defaults, `docker exec` for each call.
None of the hardening, no worker, no pool, no lease."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from time import perf_counter
from typing import Any

from agentgym.errors import UnavailableError
from agentgym.sandbox import choose_tier
from agentgym.sandbox.spec import BASE_IMAGE, STRENGTH

LABEL = "agentgym.benchmark"


@contextlib.contextmanager
def plain_client() -> Iterator[Any]:
    """Docker's own client; what a benchmark left behind is removed at the end."""
    import docker

    client = docker.from_env(timeout=120)
    try:
        yield client
    finally:
        for container in client.containers.list(all=True, filters={"label": LABEL}):
            container.remove(force=True, v=True)
        client.close()


def start_plain(client: Any) -> Any:
    """`docker run -d IMAGE sleep infinity`, and the first command answered."""
    container = client.containers.run(BASE_IMAGE, ["sleep", "infinity"], detach=True, labels={LABEL: "1"})
    container.exec_run(["true"])
    return container


def milliseconds(call: Callable[[], object]) -> float:
    started = perf_counter()
    call()
    return (perf_counter() - started) * 1e3


def available_tiers() -> list[str]:
    """The tiers that can be had here. A machine without Docker has figures for the others."""
    tiers = []
    for tier in STRENGTH:
        with contextlib.suppress(UnavailableError):
            choose_tier(tier)
            tiers.append(tier)
    return tiers
