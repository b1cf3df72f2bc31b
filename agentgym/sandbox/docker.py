"""The Docker tier, and the only file that speaks to the daemon. Law: every box is hardened by what is written here and
not by what the daemon or the image prefers; what is not set is a hole.

The worker is the container's pid 1 (no docker-init, which would hold the worker's streams open for anyone in the box to
read through /proc/1/fd) and reaps what init would reap. Its input ends with the attached connection: when the owner is
killed, the daemon closes it, the worker ends, and the container removes itself.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import socket
import struct
import time
from collections.abc import Iterator, Mapping
from typing import Any

import docker
import docker.errors
import docker.types
import requests.exceptions

from agentgym.errors import SandboxDiedError, SandboxError, UnavailableError
from agentgym.sandbox.box import WorkerSandbox
from agentgym.sandbox.socket_channel import SocketChannel
from agentgym.sandbox.spec import BASE_IMAGE, BOX_UID, WORK_DIRECTORY, SandboxSpec
from agentgym.sandbox.worker_client import boot_command

logger = logging.getLogger(__name__)

PING_S = 3  # a daemon that does not answer within this is not there
CALL_S = 120  # many boxes started at once wait for each other inside the daemon
REMOVED_S = 20.0
SHM_MB = 16
BUILD = "python -m agentgym.sandbox.base_image"
STREAM_FRAME = struct.Struct(">BxxxI")  # stream number, length: Docker's framing of an attached connection
FAILURES = (docker.errors.DockerException, requests.exceptions.RequestException)


class DockerSandbox(WorkerSandbox):
    """One container. `DockerSandbox(SandboxSpec())` creates, attaches and starts it."""

    def __init__(self, spec: SandboxSpec) -> None:
        name = f"agentgym-{os.getpid()}-{secrets.token_hex(4)}"  # known before anything exists, so it can be removed
        self._api = connect(CALL_S).api
        self._exists = False
        limits = dict.fromkeys(("memory", "pids", "cpus"), "docker") | {"disk": "tmpfs size"}
        try:
            self._create(name, spec)
            connection = self._api.attach_socket(name, {"stdin": 1, "stdout": 1, "stderr": 1, "stream": 1})
            channel = AttachedChannel(connection)
        except FAILURES as error:
            self._remove(name)
            raise _start_error(name, spec, error) from error
        except BaseException:
            self._remove(name)
            raise
        super().__init__("docker", name, spec, channel, limits)
        try:
            self._api.start(name)
            self._boot({})
        except FAILURES as error:
            self.close()
            raise _start_error(name, spec, error) from error
        except BaseException:
            self.close()
            raise

    def _create(self, name: str, spec: SandboxSpec) -> None:
        self._exists = True  # before the call: one that fails half-way may have made it
        created = self._api.create_container(
            image=spec.image,
            name=name,
            entrypoint=boot_command("python3"),
            command=[],
            user=f"{BOX_UID}:{BOX_UID}",
            working_dir=WORK_DIRECTORY,
            hostname="box",
            stdin_open=True,
            environment={},
            use_config_proxy=False,  # the client's configuration may hold a proxy with its password
            healthcheck={"test": ["NONE"]},
            labels={"agentgym.owner": str(os.getpid()), "agentgym.host": socket.gethostname(), "agentgym.box": name},
            host_config=self._api.create_host_config(**_hardened(spec)),
        )
        for warning in created.get("Warnings") or ():
            logger.warning("docker says of %s: %s", name, warning)

    def _end(self) -> None:
        self._remove(self.name)
        self._api.close()

    def _remove(self, name: str) -> None:
        """Returns when the daemon no longer knows the container; its anonymous volumes go with it."""
        until = time.monotonic() + REMOVED_S
        while self._exists and time.monotonic() < until:
            try:
                self._api.remove_container(name, v=True, force=True)
            except docker.errors.NotFound:
                self._exists = False
            except docker.errors.APIError as error:
                if error.status_code != 409:  # 409: its own removal is under way
                    raise SandboxDiedError(f"container {name} cannot be removed: {error.explanation}") from error
                time.sleep(0.01)
            except FAILURES as error:
                raise SandboxDiedError(f"container {name} cannot be removed: no daemon ({error})") from error
        if self._exists:
            raise SandboxDiedError(f"container {name} is still being removed after {REMOVED_S:g} s")


class AttachedChannel:
    """The worker's streams over Docker's attached connection: its stdout is taken out of the frames, its stderr kept
    for the epitaph."""

    def __init__(self, connection: Any) -> None:
        self._connection = connection  # the client closes the connection when this is forgotten
        self._socket = SocketChannel(getattr(connection, "_sock", connection), lambda: "")
        self._received = bytearray()
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


def _hardened(spec: SandboxSpec) -> Mapping[str, Any]:
    memory = spec.memory_mb * 2**20
    disk = spec.tmpfs_mb * 2**20
    owned = f"rw,exec,nosuid,nodev,size={disk},uid={BOX_UID},gid={BOX_UID},mode=0755"
    return {
        "network_mode": "none",
        "mem_limit": memory,
        "memswap_limit": memory,
        "nano_cpus": int(spec.cpus * 1e9),
        "pids_limit": spec.pids,
        "cap_drop": ["ALL"],
        "security_opt": ["no-new-privileges"],
        "privileged": False,
        "read_only": True,
        "tmpfs": {"/tmp": owned, WORK_DIRECTORY: owned},
        "shm_size": SHM_MB * 2**20,
        "ipc_mode": "private",
        "init": False,
        "auto_remove": True,
        "binds": [],
        "log_config": docker.types.LogConfig(type="none"),  # a flood of output must not fill the daemon's disk
        "ulimits": [
            docker.types.Ulimit(name="core", soft=0, hard=0),
            docker.types.Ulimit(name="nofile", soft=1024, hard=1024),
            docker.types.Ulimit(name="fsize", soft=disk, hard=disk),
        ],
    }


def connect(timeout_s: int) -> docker.DockerClient:
    """A client of the daemon that DOCKER_HOST names; UnavailableError if none answers."""
    try:
        with contextlib.closing(docker.from_env(timeout=PING_S)) as probe:  # asks for the daemon's version
            return docker.from_env(timeout=timeout_s, version=probe.api.api_version)
    except (*FAILURES, ValueError) as error:
        cause = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UnavailableError(
            f"no Docker daemon answers at {os.environ.get('DOCKER_HOST') or 'the default socket'} ({cause:.300}); "
            "start it (systemctl start docker), point DOCKER_HOST at it, or use sandbox.tier=namespace"
        ) from error


def docker_problem(image: str = BASE_IMAGE) -> str | None:
    """Why Docker boxes of this image cannot be had here, with the mend; None if they can."""
    try:
        with contextlib.closing(connect(PING_S)) as client:
            return None if _has_image(client, image) else _missing(image)
    except UnavailableError as error:
        return str(error)
    except FAILURES as error:
        return f"the Docker daemon failed: {error}"


def has_image(image: str) -> bool:
    """Whether the daemon holds the image; UnavailableError without a daemon."""
    with contextlib.closing(connect(CALL_S)) as client:
        return _has_image(client, image)


def daemon_architecture() -> str:
    """What the daemon's machine is, in Docker's words: "amd64", "arm64"."""
    with contextlib.closing(connect(CALL_S)) as client:
        return str(client.version().get("Arch", ""))


def import_image(chunks: Iterator[bytes], image: str, labels: Mapping[str, str]) -> None:
    """Makes an image of a tar stream. The tag appears when all of it has arrived, or not at all."""
    repository, _, tag = image.rpartition(":")
    changes = [f"LABEL {key}={value}" for key, value in labels.items()]
    with contextlib.closing(connect(600)) as client:
        old = client.api.inspect_image(image)["Id"] if _has_image(client, image) else None
        try:
            answer = client.api.import_image_from_stream(chunks, repository, tag, changes)
        except FAILURES as error:
            raise SandboxError(f"the Docker daemon did not take the image {image}: {error}") from error
        if not _has_image(client, image):
            raise SandboxError(f"the Docker daemon did not make the image {image}: {answer!s:.500}")
        if old:
            with contextlib.suppress(docker.errors.APIError):  # it has another name, or a box still runs on it
                client.api.remove_image(old)


def _has_image(client: docker.DockerClient, image: str) -> bool:
    try:
        client.api.inspect_image(image)
    except docker.errors.ImageNotFound:
        return False
    return True


def _missing(image: str) -> str:
    if image == BASE_IMAGE:
        return f"the image {image} is not built yet; build it with: {BUILD}"
    return f"the image {image} is not on this machine; build or pull it (the base image is built with: {BUILD})"


def _start_error(name: str, spec: SandboxSpec, error: Exception) -> SandboxError | UnavailableError:
    if isinstance(error, docker.errors.ImageNotFound):
        return UnavailableError(_missing(spec.image))
    if "executable file not found" in str(error) or "no such file or directory" in str(error):
        return UnavailableError(
            f"the image {spec.image} has no python3 in its PATH, which a box needs (3.9 or newer); add it to the image"
        )
    if isinstance(error, docker.errors.APIError):
        return SandboxError(f"container {name} cannot be started: {error.explanation or error}")
    return SandboxDiedError(f"container {name} cannot be started: the Docker daemon failed ({error})")
