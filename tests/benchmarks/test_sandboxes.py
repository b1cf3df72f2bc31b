"""The sandbox benchmarks, as smoke runs: they measure what they say, and leave nothing."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.__main__ import measure
from benchmarks.leftovers import difference

pytestmark = [pytest.mark.docker, pytest.mark.bubblewrap]


def figures(name: str) -> dict[str, Any]:
    value = measure(name, quick=True)["figures"]
    assert isinstance(value, dict)
    return value


def test_a_call() -> None:
    found = figures("sandbox_call")
    assert 0 < found["worker_p50_ms"] <= found["worker_p99_ms"]
    assert found["docker_exec_p50_ms"] / found["worker_p50_ms"] == pytest.approx(found["ratio"], rel=0.1, abs=0.06)
    assert found["namespace_p50_ms"] > 0


def test_a_start() -> None:
    found = figures("sandbox_start")
    assert found["pool_hit_rate"] == 1.0, "a hand-out that was not warm is no hand-out of the pool"
    for name in ("pool_acquire", "docker_cold", "namespace_cold", "plain_docker_cold"):
        assert found[f"{name}_p50_ms"] > 0


def test_capacity() -> None:
    found = figures("sandbox_capacity")
    assert (found["docker_live"], found["namespace_live"]) == (3, 3)


@pytest.mark.slow  # the machine is counted, and what was killed is waited for
def test_cycles_leave_nothing() -> None:
    found = figures("sandbox_cycles")
    assert {name: value for name, value in found.items() if name.startswith("leaked") and value > 0} == {}
    assert (found["docker_cycles"], found["namespace_cycles"]) == (4, 4)


@pytest.mark.slow
def test_a_killed_owner_leaves_nothing_but_a_plain_one_does() -> None:
    found = figures("sandbox_sigkill")
    assert found["left_after_30s"] == 0, found
    assert found["plain_docker_left"] >= found["boxes"], "the comparison must be able to find something"


def test_a_difference_is_after_minus_before() -> None:
    assert difference({"fds": 5, "folders": 0}, {"fds": 7, "folders": 0}) == {"leaked_fds": 2, "leaked_folders": 0}
