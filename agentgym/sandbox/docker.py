"""The tiers behind a Docker daemon: `docker`, and `gvisor`, which is Docker with gVisor's runtime. Law: a box is known
by name before it exists, nothing of it stays, and every failure says which box, which daemon and why.

The worker is the container's pid 1 (no docker-init, which would hold the worker's streams open for anyone in the box to
read through /proc/1/fd) and reaps what init would reap. Its input ends with the attached connection: when the owner is
killed, the daemon closes it, the worker ends, and the container removes itself.
"""

from __future__ import annotations

import contextlib
import logging
import os
import struct
import time
from collections.abc import Callable
from typing import Any

import docker.errors

from agentgym.errors import InputError, SandboxDiedError, SandboxError, UnavailableError
from agentgym.sandbox.box import WorkerSandbox
from agentgym.sandbox.docker_host import FAILURES, OWN_SOCKET, Daemon, DockerHost, connect, hijacked, root_cause
from agentgym.sandbox.docker_settings import (
    GVISOR_RUNTIME,
    REGISTER_GVISOR,
    container_settings,
    enforced,
    gvisor_problem,
    owner_uid,
    rlimits,
    seccomp_problem,
    warn_of_relaxations,
)
from agentgym.sandbox.images import missing
from agentgym.sandbox.lease import owner
from agentgym.sandbox.socket_channel import SocketChannel
from agentgym.sandbox.spec import BASE_IMAGE, SandboxSpec
from agentgym.sandbox.worker_client import boot_command

logger = logging.getLogger(__name__)

REMOVED_S = 20.0
STREAM_FRAME = struct.Struct(">BxxxI")  # stream number, length: Docker's framing of an attached connection
TRIED: set[tuple[int, DockerHost]] = set()  # the daemons on which this process has seen a box of gVisor run


class DockerSandbox(WorkerSandbox):
    """One container. `DockerSandbox(SandboxSpec())` creates, attaches and starts it."""

    def __init__(self, spec: SandboxSpec, host: DockerHost | None = None, tier: str = "docker") -> None:
        self._daemon = connect(host)
        refuse_daemon(self._daemon, tier, spec)
        self._container = Container(self._daemon, tier, spec)
        try:
            self._container.create(boot_command("python3"), owner_uid(spec))
            channel = self._container.attach()
        except BaseException as error:
            raise self._container.failed(error) from error
        super().__init__(tier, self._container.name, spec, channel, enforced(tier, spec, "resident"))
        try:
            self._container.start()
            self._boot(rlimits(tier, spec))
        except BaseException as error:
            self._client.close()
            raise self._container.failed(error) from error
        self._container.keep(self.renew)
        warn_of_relaxations(spec)

    def _end(self) -> None:
        self._container.remove()


class Container:
    """A container of ours at a daemon: made, attached, started, removed. It does not know what runs in it."""

    def __init__(self, daemon: Daemon, tier: str, spec: SandboxSpec) -> None:
        self.daemon, self.tier, self.spec = daemon, tier, spec
        # written down before anything exists, so that it is removed whatever happens to this process
        self.name = owner().new_name(tier, spec, daemon.host.url or OWN_SOCKET, daemon.host.tls)
        self._exists = False

    def create(self, command: list[str], uid: int) -> None:
        try:
            image = self.daemon.api.inspect_image(self.spec.image)
        except docker.errors.ImageNotFound as error:
            raise UnavailableError(missing(self.spec.image, self.daemon)) from error
        volumes = sorted((image.get("Config") or {}).get("Volumes") or ())
        labels = owner().labels(self.name, self.spec)
        settings = container_settings(self.daemon, self.tier, self.spec, labels, volumes, uid)
        self._exists = True  # before the call: one that fails half-way may have made it
        created = self.daemon.api.create_container(name=self.name, entrypoint=command, command=[], **settings)
        for warning in created.get("Warnings") or ():
            logger.warning("docker says of %s: %s", self.name, warning)

    def attach(self) -> AttachedChannel:
        wanted = {"stdin": 1, "stdout": 1, "stderr": 1, "stream": 1}
        return AttachedChannel(self.daemon.api.attach_socket(self.name, wanted))

    def start(self) -> None:
        self.daemon.api.start(self.name)

    def keep(self, renew: Callable[[], None]) -> None:
        """It runs: from now on its lease is renewed as long as this process lives."""
        owner().keep(self.name, renew, self.spec.lease_s)

    def remove(self) -> None:
        """Returns when the daemon no longer knows the container; its anonymous volumes go with it."""
        until = time.monotonic() + REMOVED_S
        while self._exists and time.monotonic() < until:
            try:
                self.daemon.quick.remove_container(self.name, v=True, force=True)
            except docker.errors.NotFound:
                self._exists = False
            except docker.errors.APIError as error:
                if error.status_code != 409:  # 409: its own removal is under way
                    raise SandboxDiedError(f"container {self.name} cannot be removed: {error.explanation}") from error
                time.sleep(0.01)
            except FAILURES as error:
                raise SandboxDiedError(
                    f"container {self.name} cannot be removed: the Docker daemon at {self.daemon.host.shown} does not "
                    f"answer ({root_cause(error)}); it ends by its lease"
                ) from error
        if self._exists:
            raise SandboxDiedError(f"container {self.name} is still being removed after {REMOVED_S:g} s")
        owner().forget(self.name)

    def failed(self, error: BaseException) -> BaseException:
        """Removes what was made; the error to raise."""
        try:
            self.remove()
        except SandboxError as left:
            logger.warning("%s", left)
        return self._start_error(error) if isinstance(error, FAILURES) else error

    def _start_error(self, error: Exception) -> Exception:
        if isinstance(error, (SandboxError, InputError)):  # it is typed already, and an OSError too
            return error
        said = str(error)
        if isinstance(error, docker.errors.ImageNotFound):
            return UnavailableError(missing(self.spec.image, self.daemon))
        if "executable file not found" in said or "no such file or directory" in said:
            return NoPythonError(
                f"the image {self.spec.image} has no python3 in its PATH, which a box needs (3.9 or newer); add it to "
                "the image"
            )
        if self.tier == "gvisor" and (GVISOR_RUNTIME in said or "OCI runtime" in said):
            return UnavailableError(
                f"sandbox.tier=gvisor cannot be had here: the runtime {GVISOR_RUNTIME!r} at "
                f"{self.daemon.host.shown} does not start a box ({said:.300}); {REGISTER_GVISOR}"
            )
        if isinstance(error, docker.errors.APIError):
            return SandboxError(f"container {self.name} cannot be started: {error.explanation or error}")
        return SandboxDiedError(
            f"container {self.name} cannot be started: the Docker daemon at {self.daemon.host.shown} failed "
            f"({root_cause(error)})"
        )


class NoPythonError(UnavailableError):
    """The image holds no Python that can be the worker."""


class AttachedChannel:
    """The worker's streams over Docker's attached connection: its stdout is taken out of the frames, its stderr kept
    for the epitaph."""

    def __init__(self, connection: Any) -> None:
        self._connection = connection  # the client closes the connection when this is forgotten
        stream, early = hijacked(connection)
        self._socket = SocketChannel(stream, lambda: "")
        self._received = bytearray(early)
        self._complaint = b""

    def send(self, data: bytes, until: float) -> None:
        self._socket.send(data, until)

    def receive(self, until: float) -> bytes:
        while True:
            if len(self._received) >= STREAM_FRAME.size:
                stream, size = STREAM_FRAME.unpack_from(self._received)
                have = len(self._received) - STREAM_FRAME.size
                if have >= size:
                    payload = bytes(self._received[STREAM_FRAME.size : STREAM_FRAME.size + size])
                    del self._received[: STREAM_FRAME.size + size]
                    if stream == 1 and payload:
                        return payload
                    self._complaint = (self._complaint + payload)[-4096:]
                    continue
            data = self._socket.receive(until)
            if not data:
                return b""
            self._received += data

    def shut(self) -> None:
        self._socket.shut()

    def release(self) -> None:
        self._socket.release()
        with contextlib.suppress(OSError):
            self._connection.close()

    def epitaph(self) -> str:
        said = self._complaint.decode(errors="replace").strip()
        return f"its worker ended{': ' if said else ' (out of memory, or the container was stopped)'}{said}"


def refuse_daemon(daemon: Daemon, tier: str, spec: SandboxSpec) -> None:
    """UnavailableError where the daemon cannot keep what the tier promises."""
    try:
        problem = gvisor_problem(daemon, spec) if tier == "gvisor" else seccomp_problem(daemon)
    except FAILURES as error:
        raise SandboxDiedError(f"the Docker daemon at {daemon.host.shown} failed ({root_cause(error)})") from error
    if problem is not None:
        raise UnavailableError(f"sandbox.tier={tier} cannot be had here: {problem}")


def docker_problem(image: str = BASE_IMAGE, host: DockerHost | None = None, tier: str = "docker") -> str | None:
    """Why boxes of this tier and image cannot be had here, with the mend; None if they can. gVisor is believed when a
    box of it has run: where its platform does not work, the daemon knows nothing of it."""
    try:
        daemon = connect(host)
        spec = SandboxSpec(image=image)
        problem = gvisor_problem(daemon, spec) if tier == "gvisor" else seccomp_problem(daemon)
        if problem is None and not daemon.has_image(image):
            problem = missing(image, daemon)
        key = (os.getpid(), daemon.host)
        if problem is None and tier == "gvisor" and key not in TRIED:
            with DockerSandbox(spec, daemon.host, tier) as box:
                box.ping()
            TRIED.add(key)
    except (InputError, SandboxError) as error:
        return str(error)
    except FAILURES as error:
        return f"the Docker daemon failed: {root_cause(error)}"
    return problem
