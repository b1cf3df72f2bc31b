"""Every tier passes the one public suite."""

from __future__ import annotations

import pytest

from agentgym.sandbox import SandboxSpec, open_sandbox
from agentgym.testing.sandbox_conformance import CHECKS, Check, floods

TIERS = [
    pytest.param("docker", marks=pytest.mark.docker),
    pytest.param("namespace", marks=pytest.mark.bubblewrap),
    pytest.param("gvisor", marks=pytest.mark.docker),
]


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_conformance(check: Check, tier: str) -> None:
    check(lambda spec: open_sandbox(tier, spec))


@pytest.mark.bubblewrap
def test_the_abuse_checks_hold_without_cgroups_too(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    from agentgym.sandbox.namespace import cgroup

    monkeypatch.setattr(cgroup, "ROOT", tmp_path)  # a machine on which no cgroup can be made
    with open_sandbox("namespace", SandboxSpec()) as box:
        assert box.limits["memory"].startswith("rlimit")
    floods.survives_a_memory_bomb(lambda spec: open_sandbox("namespace", spec))
    floods.survives_a_fork_bomb(lambda spec: open_sandbox("namespace", spec))
