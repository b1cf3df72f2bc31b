"""Which tier is taken, and what is said about it."""

from __future__ import annotations

import logging

import pytest

from agentgym.errors import InputError, UnavailableError, UnknownNameError
from agentgym.sandbox import SandboxSpec, choose_tier, open_sandbox


@pytest.fixture
def no_docker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DOCKER_HOST", "unix:///nonexistent/docker.sock")


@pytest.mark.docker
def test_auto_takes_docker_when_it_can(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "agentgym.sandbox"):
        assert choose_tier("auto") == "docker"
    assert "docker, because its daemon answers" in caplog.text
    with open_sandbox() as box:
        assert box.tier == "docker"


@pytest.mark.bubblewrap
def test_auto_says_why_it_took_the_namespace_tier(no_docker: None, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "agentgym.sandbox"):
        assert choose_tier("auto") == "namespace"
    assert "namespace (bubblewrap), because no Docker daemon answers at unix:///nonexistent" in caplog.text
    with open_sandbox("auto", SandboxSpec()) as box:
        assert box.tier == "namespace"


@pytest.mark.docker
@pytest.mark.bubblewrap
def test_auto_falls_back_for_an_image_that_is_not_there(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "agentgym.sandbox"):
        assert choose_tier("auto", "agentgym/not-there:1") == "namespace"
    assert "not-there" in caplog.text


def test_docker_asked_for_is_docker_or_an_error(no_docker: None) -> None:
    with pytest.raises(UnavailableError, match=r"sandbox.tier=docker.*systemctl start docker"):
        choose_tier("docker")


def test_neither_names_both(no_docker: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(
        UnavailableError, match=r"no Docker daemon answers.*bubblewrap \(bwrap\) is not on this machine"
    ):
        choose_tier("auto")


def test_an_unknown_tier_is_named() -> None:
    for call in (choose_tier, open_sandbox):
        with pytest.raises(UnknownNameError, match="did you mean 'docker'"):
            call("dockr")
    for call in (choose_tier, open_sandbox):
        with pytest.raises(UnknownNameError, match="did you mean 'gvisor'"):
            call("auto", at_least="gvisr")


@pytest.mark.parametrize(("tier", "at_least"), [("namespace", "docker"), ("namespace", "gvisor"), ("docker", "gvisor")])
def test_a_task_is_refused_below_the_isolation_that_it_declares(tier: str, at_least: str) -> None:
    for call in (choose_tier, open_sandbox):
        with pytest.raises(
            InputError, match=rf"declares sandbox tier '{at_least}'.*tier={tier} isolates less.*tier={at_least}"
        ):
            call(tier, at_least=at_least)


@pytest.mark.bubblewrap
def test_auto_never_takes_less_than_the_task_declares(no_docker: None) -> None:
    assert choose_tier("auto", at_least="namespace") == "namespace"
    for at_least in ("docker", "gvisor"):
        with pytest.raises(UnavailableError, match=f"with at least the isolation of '{at_least}'") as caught:
            choose_tier("auto", at_least=at_least)
        assert "Bubblewrap" not in str(caught.value)


@pytest.mark.bubblewrap
def test_a_relaxed_box_is_no_namespace_box(no_docker: None) -> None:
    with pytest.raises(UnavailableError, match=r"at least the isolation of 'docker'.*no Docker daemon"):
        open_sandbox("auto", SandboxSpec(network="bridge"))


@pytest.mark.docker
def test_auto_takes_gvisor_when_nothing_less_will_do(caplog: pytest.LogCaptureFixture) -> None:
    import docker

    client = docker.from_env()
    runtimes = client.info()["Runtimes"]
    client.close()
    if "runsc" not in runtimes:
        pytest.skip("the Docker daemon has no runtime runsc")
    with caplog.at_level(logging.INFO, "agentgym.sandbox"):
        assert choose_tier("auto", at_least="gvisor") == "gvisor"
    assert "sandbox tier: gvisor" in caplog.text
    assert choose_tier("docker", at_least="docker") == "docker"
