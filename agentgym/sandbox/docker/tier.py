"""The tiers behind a Docker daemon: `docker`, and `gvisor`, which is Docker with gVisor's runtime. Law: what the tier
promises is checked against the daemon before a box is made there, and a box that works in the lesser way says so.

The worker is the container's pid 1 (no docker-init, which would hold the worker's streams open for anyone in the box to
read through /proc/1/fd) and reaps what init would reap. Its input ends with the attached connection: when the owner is
killed, the daemon closes it, the worker ends, and the container removes itself.
"""

from __future__ import annotations

import contextlib
import logging
import re

from agentgym.errors import InputError, SandboxDiedError, SandboxError
from agentgym.sandbox import seccomp
from agentgym.sandbox.box import WorkerSandbox, warn_of_relaxations
from agentgym.sandbox.docker import gvisor_calls
from agentgym.sandbox.docker.container import Container, NoPythonError
from agentgym.sandbox.docker.host import FAILURES, DockerHost, connect, root_cause
from agentgym.sandbox.docker.images import missing
from agentgym.sandbox.docker.promises import check_promises
from agentgym.sandbox.docker.settings import enforced, owner_uid
from agentgym.sandbox.spec import BASE_IMAGE, Sandbox, SandboxSpec
from agentgym.sandbox.worker_client import boot_command

logger = logging.getLogger(__name__)

UNFIT_PYTHON = re.compile(r"\b(\w*ImportError|ModuleNotFoundError|SyntaxError|AttributeError): .*")


def open_docker(spec: SandboxSpec, host: DockerHost | None = None, tier: str = "docker") -> Sandbox:
    """A running box at the daemon: with a resident worker, or through `docker exec` where the image has no Python."""
    try:
        return DockerSandbox(spec, host, tier)
    except NoPythonError as error:
        from agentgym.sandbox.docker.exec_tier import DockerExecSandbox  # few images need it

        logger.debug("%s; working through docker exec", error)
        return DockerExecSandbox(spec, host, tier)


class DockerSandbox(WorkerSandbox):
    """One container with a resident worker. `DockerSandbox(SandboxSpec())` creates, attaches and starts it.

    `image`: of which it is made in place of the spec's, such as a fork's; it is removed with the box.
    """

    def __init__(
        self, spec: SandboxSpec, host: DockerHost | None = None, tier: str = "docker", image: str | None = None
    ) -> None:
        daemon = connect(host)
        check_promises(daemon, tier, spec)
        self._container = container = Container(daemon, tier, spec, image)
        try:
            container.look_up_image()
            if container.image_id in daemon.without_python:
                raise NoPythonError(f"the image {spec.image} has no python3 that can be the worker")
            container.create(boot_command("python3"), owner_uid(spec))
            channel = container.attach()
        except BaseException as error:
            raise container.failed(error) from error
        super().__init__(tier, container.name, spec, channel, enforced(tier, spec, "resident"))
        try:
            container.start()
            modules = (gvisor_calls if tier == "gvisor" else seccomp).modules(daemon.info())
            self._boot({}, modules=modules)
        except BaseException as error:
            self._close_line()
            failure = container.failed(_without_python(spec, error))
            if isinstance(failure, NoPythonError):
                daemon.without_python.add(container.image_id)
            raise failure from error
        if modules and tier == "docker":
            self.limits = {**self.limits, "system calls": "docker's seccomp profile, and a filter of the worker's"}
        daemon.gvisor_ran = daemon.gvisor_ran or tier == "gvisor"
        container.keep(self.renew)
        warn_of_relaxations(spec)

    @property
    def folders(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys((*super().folders, *self._container.volumes)))

    def fork(self) -> WorkerSandbox:
        """As of every box; a writable root goes along, in an image that is removed with the fork."""
        if not self.spec.writable_root:
            return super().fork()
        if self.tier == "gvisor":
            raise SandboxError(
                f"sandbox {self.name} cannot be forked: gVisor keeps what is written to a writable root to itself; use "
                "sandbox.tier=docker for it, or keep the work in the writable folders"
            )
        thaw = not self.frozen
        if thaw:
            self.freeze()  # folders and root are taken at one moment
        try:
            return super().fork()
        finally:
            if thaw:
                self.thaw()

    def _open_like(self) -> WorkerSandbox:
        image = None
        if self.spec.writable_root:
            try:
                image = self._container.commit()
            except FAILURES as error:
                raise SandboxError(f"sandbox {self.name} cannot be forked: {root_cause(error)}") from error
        return DockerSandbox(self.spec, self._container.daemon.host, self.tier, image)

    def _end(self) -> None:
        self._container.remove()


def _without_python(spec: SandboxSpec, error: BaseException) -> BaseException:
    """A worker that ended over its own imports ran on a Python that cannot be one; anything else is as it was."""
    found = UNFIT_PYTHON.search(str(error)) if isinstance(error, SandboxDiedError) else None
    if found is None:
        return error
    return NoPythonError(
        f"the python3 of the image {spec.image} cannot be the worker ({found[0]:.200}); 3.9 or newer can"
    )


def docker_problem(image: str = BASE_IMAGE, host: DockerHost | None = None, tier: str = "docker") -> str | None:
    """Why boxes of this tier and image cannot be had here, with the mend; None if they can. gVisor is believed when a
    box of it has run: where its platform does not work, the daemon knows nothing of it."""
    try:
        daemon = connect(host)
        spec = SandboxSpec(image=image)
        check_promises(daemon, tier, spec)
        if not daemon.has_image(image):
            return missing(image, daemon)
        if tier == "gvisor" and not daemon.gvisor_ran:
            with contextlib.closing(open_docker(spec, daemon.host, tier)) as box:
                box.exec("true")
            daemon.gvisor_ran = True  # also by an image without Python
    except (InputError, SandboxError) as error:
        return str(error)
    except FAILURES as error:
        return f"the Docker daemon failed: {root_cause(error)}"
    return None
