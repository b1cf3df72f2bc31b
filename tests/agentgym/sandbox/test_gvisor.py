"""Docker with gVisor's runtime: a kernel of its own, whose processes are counted inside. The reasons why it cannot be
had are in test_docker_host, what both Docker tiers share in test_docker."""

from __future__ import annotations

import time

import pytest

from agentgym.errors import SandboxTimeoutError
from agentgym.sandbox import SandboxSpec, choose_tier, open_sandbox
from agentgym.sandbox.docker.exec_tier import DockerExecSandbox
from agentgym.sandbox.docker.host import connect

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


def test_it_runs_as_many_processes_as_the_spec_says(gvisor: None) -> None:
    """Each holds a dozen threads of the host, which must not run out first."""
    with open_sandbox("gvisor", SandboxSpec(pids=60)) as box:
        result = box.exec("for i in $(seq 50); do sleep 600 & done; sleep 0.2; echo started", timeout_s=60)
        assert (result.exit_code, result.text) == (0, "started\n"), result.error_text
        assert b"fork" in box.exec("for i in $(seq 20); do sleep 600 & done", timeout_s=60).stderr
        box.ping()
        began = int(time.time())
        box.close()
        told = connect().quick.events(
            since=began, until=int(time.time()) + 1, decode=True, filters={"container": box.name, "event": "kill"}
        )
        assert list(told) == [], "gVisor is not told to kill what ends by itself"


def test_without_python_its_boxes_work_too(gvisor: None) -> None:
    with DockerExecSandbox(SandboxSpec(pids=20), tier="gvisor") as box:  # of an image that happens to have it
        assert box.exec("cat; ulimit -p 2>/dev/null || ulimit -u", stdin=b"in\n").text == "in\n20\n"
        assert box.exec("cat /proc/1/fd/0 /proc/1/environ").exit_code != 0
        assert box.exec("kill -KILL 1").exit_code != 0
        with pytest.raises(SandboxTimeoutError):
            box.exec("sleep 60", timeout_s=0.5)
        box.write_file("x", b"1")
        with box.fork() as twin:
            assert twin.read_file("x") == b"1"


def test_a_choice_is_tried_once(gvisor: None, monkeypatch: pytest.MonkeyPatch) -> None:
    daemon = connect()
    monkeypatch.setattr(daemon, "gvisor_ran", False)
    assert choose_tier("gvisor") == "gvisor"
    assert daemon.gvisor_ran, "a box of it has run"
    assert choose_tier("gvisor") == "gvisor"
