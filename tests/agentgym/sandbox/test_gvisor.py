"""Docker with gVisor's runtime: a kernel of its own, and the reasons when it cannot be had."""

from __future__ import annotations

import pytest

from agentgym.errors import UnavailableError
from agentgym.sandbox import SandboxSpec, choose_tier, docker_settings, open_sandbox

pytestmark = pytest.mark.docker


@pytest.fixture
def gvisor() -> None:
    import docker

    client = docker.from_env()
    try:
        if "runsc" not in client.info()["Runtimes"]:
            pytest.skip("the Docker daemon has no runtime runsc")
    finally:
        client.close()


def test_a_box_has_a_kernel_of_its_own(gvisor: None) -> None:
    assert choose_tier("gvisor") == "gvisor"
    with open_sandbox("gvisor", SandboxSpec(pids=30)) as box:
        assert box.tier == "gvisor"
        assert (
            box.exec("dmesg 2>/dev/null | head -1; cat /proc/version")
            .text.strip()
            .startswith(("[", "Linux version 4.4.0"))
        )
        assert box.limits["system calls"] == "gVisor"
        assert box.limits["pids"] == "rlimit"
        assert box.exec("ulimit -p 2>/dev/null || ulimit -u").text.strip() == "30"


def test_a_daemon_without_the_runtime_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(docker_settings, "GVISOR_RUNTIME", "runsc-not-there")
    for ask in (lambda: choose_tier("gvisor"), lambda: open_sandbox("gvisor")):
        with pytest.raises(
            UnavailableError, match=r"tier=gvisor cannot be had here.*no runtime 'runsc-not-there'.*daemon\.json"
        ):
            ask()


def test_a_network_that_the_runtime_does_not_give_is_refused(gvisor: None) -> None:
    import docker

    client = docker.from_env()
    arguments = client.info()["Runtimes"]["runsc"].get("runtimeArgs") or []
    client.close()
    if "--network=none" not in arguments:
        pytest.skip("runsc is registered with a network here")
    with pytest.raises(UnavailableError, match="registered with --network=none"):
        open_sandbox("gvisor", SandboxSpec(network="bridge"))
