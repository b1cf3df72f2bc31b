"""Every tier passes the one public suite."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from agentgym.sandbox import SandboxSpec, open_sandbox
from agentgym.sandbox.spec import Sandbox
from agentgym.sandbox.warm.shelf import spec_key
from agentgym.testing.sandbox_conformance import CHECKS, Check, calls, floods, hardening

TIERS = [
    pytest.param("docker", marks=pytest.mark.docker),
    pytest.param("namespace", marks=pytest.mark.bubblewrap),
    pytest.param("gvisor", marks=pytest.mark.docker),
]
# These look, and leave nothing behind that another of them sees: one box of a tier and spec does for all of them.
LOOKING = (
    calls.tells_what_is_wrong,
    calls.keeps_bytes_as_they_are,
    hardening.is_nobody,
    hardening.cannot_gain_privileges,
    hardening.has_a_read_only_root,
    hardening.has_no_network,
    hardening.sees_nothing_of_the_host,
    hardening.limits_descriptors_cores_and_files,
)


class Kept:
    """A box that is still open after a check has closed it."""

    def __init__(self, box: Sandbox) -> None:
        self._box = box

    def __getattr__(self, name: str) -> Any:
        return getattr(self._box, name)

    def __enter__(self) -> Kept:
        return self

    def __exit__(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def kept() -> Iterator[dict[object, Sandbox]]:
    boxes: dict[object, Sandbox] = {}
    yield boxes
    for box in boxes.values():
        box.close()


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_conformance(check: Check, tier: str, kept: dict[object, Sandbox]) -> None:
    def open_box(spec: SandboxSpec) -> Any:
        if check not in LOOKING:
            return open_sandbox(tier, spec)
        key = (tier, spec_key(spec))
        if key not in kept:
            kept[key] = open_sandbox(tier, spec)
        return Kept(kept[key])

    check(open_box)


@pytest.mark.bubblewrap
def test_the_abuse_checks_hold_without_cgroups_too(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    from agentgym.sandbox.namespace import cgroup

    monkeypatch.setattr(cgroup, "ROOT", tmp_path)  # a machine on which no cgroup can be made
    with open_sandbox("namespace", SandboxSpec()) as box:
        assert box.limits["memory"].startswith("rlimit")
    floods.survives_a_memory_bomb(lambda spec: open_sandbox("namespace", spec))
    floods.survives_a_fork_bomb(lambda spec: open_sandbox("namespace", spec))
