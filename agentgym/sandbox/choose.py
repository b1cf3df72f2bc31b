"""Which tier a box gets. Law: what was asked for by name is what is given, or an error with its mend; only `auto`
chooses, it says what it took and why, and never takes less isolation than the task declares."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from agentgym.errors import InputError, UnavailableError, UnknownNameError
from agentgym.sandbox.namespace.tier import NamespaceSandbox, namespace_problem
from agentgym.sandbox.spec import BASE_IMAGE, STRENGTH, TIERS, Sandbox, SandboxSpec

if TYPE_CHECKING:
    from agentgym.sandbox.docker.host import DockerHost

logger = logging.getLogger(__name__)

PREFERENCE = ("docker", "namespace", "gvisor")  # what `auto` tries, of those that are strong enough
NAMES = {"docker": "Docker", "namespace": "Bubblewrap", "gvisor": "gVisor"}


def choose_tier(
    tier: str = "auto", image: str = BASE_IMAGE, *, at_least: str = "namespace", host: DockerHost | None = None
) -> str:
    """The tier to use here, one of STRENGTH; takes some milliseconds, so callers that open many boxes keep the answer.
    `at_least` is the weakest isolation that the task accepts; `host` the Docker daemon (default: the environment's)."""
    _check_strength(tier, at_least)
    if tier != "auto":
        problem = _problem(tier, image, host)
        if problem is not None:
            raise UnavailableError(_refusal(tier, problem))
        return tier
    problems: dict[str, str] = {}
    for candidate in _candidates(at_least):
        problem = _problem(candidate, image, host)
        if problem is None:
            why = "; ".join(problems.values()) or f"its daemon answers and holds {image}"
            logger.info("sandbox tier: %s, because %s", _described(candidate), why)
            return candidate
        problems[candidate] = problem
    least = "" if at_least == "namespace" else f" with at least the isolation of {at_least!r}"
    said = ". ".join(f"{NAMES[name]}: {problem}" for name, problem in problems.items())
    raise UnavailableError(f"no sandbox{least} can be made here. {said}")


def open_sandbox(
    tier: str = "auto",
    spec: SandboxSpec | None = None,
    *,
    at_least: str = "namespace",
    host: DockerHost | None = None,
) -> Sandbox:
    """A running box. `with open_sandbox("auto", SandboxSpec(memory_mb=256)) as box: box.exec("echo hi")`."""
    spec = spec or SandboxSpec()
    if tier == "auto" and spec.needs_container and at_least == "namespace":
        at_least = "docker"  # the namespace tier has no such relaxation
    _check_strength(tier, at_least)
    chosen = choose_tier("auto", spec.image, at_least=at_least, host=host) if tier == "auto" else tier
    if chosen == "namespace":
        return NamespaceSandbox(spec)
    from agentgym.sandbox.docker.tier import open_docker  # the client is loaded by those who use it

    return open_docker(spec, host, chosen)


def _check_strength(tier: str, at_least: str) -> None:
    if tier not in TIERS:
        raise UnknownNameError.of("sandbox tier", tier, TIERS)
    if at_least not in STRENGTH:
        raise UnknownNameError.of("sandbox tier", at_least, STRENGTH)
    if tier != "auto" and STRENGTH.index(tier) < STRENGTH.index(at_least):
        raise InputError(
            f"the task declares sandbox tier {at_least!r} as the least, and sandbox.tier={tier} isolates less; use "
            f"sandbox.tier={at_least} or auto"
        )


def _candidates(at_least: str) -> list[str]:
    strong = STRENGTH[STRENGTH.index(at_least) :]
    if at_least != "gvisor":
        strong = tuple(name for name in strong if name != "gvisor")  # it needs the same daemon, and is slower
    return [name for name in PREFERENCE if name in strong]


def _problem(tier: str, image: str, host: DockerHost | None) -> str | None:
    if tier == "namespace":
        return namespace_problem()
    from agentgym.sandbox.docker.tier import docker_problem

    return docker_problem(image, host, tier)


def _refusal(tier: str, problem: str) -> str:
    opening = f"sandbox.tier={tier} cannot be had here: "
    return problem if problem.startswith(opening) else opening + problem


def _described(tier: str) -> str:
    return "namespace (bubblewrap)" if tier == "namespace" else tier
