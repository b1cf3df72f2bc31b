"""Which tier a box gets. Law: what was asked for by name is what is given, or an error with its mend; only `auto`
chooses, and it says what it took and why."""

from __future__ import annotations

import logging
from typing import Literal

from agentgym.errors import UnavailableError, UnknownNameError
from agentgym.sandbox.namespace import NamespaceSandbox, namespace_problem
from agentgym.sandbox.spec import BASE_IMAGE, Sandbox, SandboxSpec

logger = logging.getLogger(__name__)

TIERS = ("auto", "docker", "namespace")


def choose_tier(tier: str = "auto", image: str = BASE_IMAGE) -> Literal["docker", "namespace"]:
    """The tier to use here; takes some milliseconds, so callers that open many boxes keep the answer."""
    if tier == "docker":
        _refuse("docker", _docker_problem(image))
        return "docker"
    if tier == "namespace":
        _refuse("namespace", namespace_problem())
        return "namespace"
    if tier != "auto":
        raise UnknownNameError.of("sandbox tier", tier, TIERS)
    no_docker = _docker_problem(image)
    if no_docker is None:
        logger.info("sandbox tier: docker, because its daemon answers and holds %s", image)
        return "docker"
    no_namespace = namespace_problem()
    if no_namespace is None:
        logger.info("sandbox tier: namespace (bubblewrap), because %s", no_docker)
        return "namespace"
    raise UnavailableError(f"no sandbox can be made here. Docker: {no_docker}. Bubblewrap: {no_namespace}")


def open_sandbox(tier: str = "auto", spec: SandboxSpec | None = None) -> Sandbox:
    """A running box. `with open_sandbox("auto", SandboxSpec(memory_mb=256)) as box: box.exec("echo hi")`."""
    spec = spec or SandboxSpec()
    if tier not in TIERS:
        raise UnknownNameError.of("sandbox tier", tier, TIERS)
    chosen = choose_tier("auto", spec.image) if tier == "auto" else tier
    if chosen == "namespace":
        return NamespaceSandbox(spec)
    from agentgym.sandbox.docker import DockerSandbox  # the client is loaded by those who use it

    return DockerSandbox(spec)


def _docker_problem(image: str) -> str | None:
    from agentgym.sandbox.docker import docker_problem

    return docker_problem(image)


def _refuse(tier: str, problem: str | None) -> None:
    if problem is not None:
        raise UnavailableError(f"sandbox.tier={tier} cannot be had here: {problem}")
