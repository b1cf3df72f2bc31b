"""What a tier promises and a daemon has to keep. Law: a daemon that would break a promise is refused with the reason,
before a box of it exists.
"""

from __future__ import annotations

from agentgym.errors import SandboxDiedError, UnavailableError
from agentgym.sandbox.docker.host import FAILURES, Daemon, root_cause
from agentgym.sandbox.docker.settings import GVISOR_RUNTIME, REGISTER_GVISOR
from agentgym.sandbox.spec import SandboxSpec


def check_promises(daemon: Daemon, tier: str, spec: SandboxSpec) -> None:
    """UnavailableError where the daemon cannot keep what the tier promises."""
    if (tier, spec.network) in daemon.fit:
        return
    try:
        problem = gvisor_problem(daemon, spec) if tier == "gvisor" else seccomp_problem(daemon)
    except FAILURES as error:
        raise SandboxDiedError(f"the Docker daemon at {daemon.host.shown} failed ({root_cause(error)})") from error
    if problem is not None:
        raise UnavailableError(f"sandbox.tier={tier} cannot be had here: {problem}")
    daemon.fit.add((tier, spec.network))


def seccomp_problem(daemon: Daemon) -> str | None:
    """Why the daemon does not filter system calls, with the mend; None if it does."""
    options = [str(option) for option in daemon.info().get("SecurityOptions") or ()]
    found = next((option for option in options if option.startswith("name=seccomp")), None)
    if found is None:
        return (
            f"the Docker daemon at {daemon.host.shown} filters no system calls (it reports no seccomp); use one with "
            "seccomp, or sandbox.tier=gvisor"
        )
    if "profile=unconfined" in found:
        return (
            f"the Docker daemon at {daemon.host.shown} lets every system call through (seccomp-profile is unconfined); "
            "remove that line from its daemon.json, or use sandbox.tier=gvisor"
        )
    return None


def gvisor_problem(daemon: Daemon, spec: SandboxSpec) -> str | None:
    """Why the daemon cannot start a box under gVisor, as far as it knows itself; None if it may."""
    runtime = (daemon.info().get("Runtimes") or {}).get(GVISOR_RUNTIME)
    if runtime is None:
        return f"the Docker daemon at {daemon.host.shown} has no runtime {GVISOR_RUNTIME!r}; {REGISTER_GVISOR}"
    if spec.network != "none" and "--network=none" in (runtime.get("runtimeArgs") or ()):
        return (
            f"the runtime {GVISOR_RUNTIME!r} at {daemon.host.shown} is registered with --network=none, and the spec "
            f"asks for sandbox.network={spec.network!r}; take that argument out of daemon.json, or use "
            "sandbox.tier=docker"
        )
    return None
