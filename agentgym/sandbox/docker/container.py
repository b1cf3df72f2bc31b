"""A container of ours at a daemon, from before it exists until nothing of it is left. Law: it is known by name before
it is made, and its failures say which container, which daemon and why. Must never know what runs in it.
"""

from __future__ import annotations

import contextlib
import logging
import struct
import threading
import time
from collections.abc import Callable
from typing import Any

import docker.errors
import requests.exceptions

from agentgym.errors import InputError, SandboxDiedError, SandboxError, UnavailableError
from agentgym.sandbox.docker.host import FAILURES, OWN_SOCKET, Daemon, hijacked, root_cause
from agentgym.sandbox.docker.images import missing
from agentgym.sandbox.docker.settings import GVISOR_RUNTIME, REGISTER_GVISOR, container_settings
from agentgym.sandbox.ownership.lease import owner
from agentgym.sandbox.socket_channel import SocketChannel
from agentgym.sandbox.spec import SandboxSpec

logger = logging.getLogger(__name__)

REMOVED_S = 60.0  # a busy daemon may give a kill up, and the next try finds it done
LET_END_S = 15.0
TOLD_S = 10.0  # how long a daemon may take to know of an end that it has told already by closing the connection
LAST_WORDS_S = 2.0  # for what a worker said before its connection broke
KILLED = 128 + 9
STREAM_FRAME = struct.Struct(">BxxxI")  # stream number, length: Docker's framing of an attached connection


class Container:
    """Made, attached, started, removed. `image`: what it is made of, if not of the spec's image; goes with it."""

    def __init__(self, daemon: Daemon, tier: str, spec: SandboxSpec, image: str | None = None) -> None:
        self.daemon, self.tier, self.spec = daemon, tier, spec
        self.own_image = image
        self.image_id = ""
        self.volumes: tuple[str, ...] = ()
        # written down before anything exists, so that it is removed whatever happens to this process
        self.name = owner().new_name(tier, spec, daemon.host.url or OWN_SOCKET, daemon.host.tls)
        self._exists = self._started = False

    def look_up_image(self) -> None:
        """What the image is and which volumes it declares."""
        image = self.daemon.api.inspect_image(self.own_image or self.spec.image)
        self.image_id = str(image["Id"])
        self.volumes = tuple(sorted((image.get("Config") or {}).get("Volumes") or ()))

    def create(self, command: list[str], uid: int) -> None:
        labels = owner().labels(self.name, self.spec)
        settings = container_settings(self.daemon, self.tier, self.spec, labels, self.volumes, uid)
        settings["image"] = self.image_id  # a tag may have moved since
        self._exists = True  # before the call: one that fails half-way may have made it
        created = self.daemon.api.create_container(name=self.name, entrypoint=command, command=[], **settings)
        for warning in created.get("Warnings") or ():
            logger.warning("docker says of %s: %s", self.name, warning)

    def attach(self) -> AttachedChannel:
        wanted = {"stdin": 1, "stdout": 1, "stderr": 1, "stream": 1}
        return AttachedChannel(self.daemon.api.attach_socket(self.name, wanted), self.why_gone)

    def start(self) -> None:
        self._started = True
        # a platform of gVisor that does not work here hangs; one that was seen to work may wait for other starts
        untried = self.tier == "gvisor" and not self.daemon.gvisor_ran
        (self.daemon.quick if untried else self.daemon.api).start(self.name)

    def keep(self, renew: Callable[[], None]) -> None:
        """It runs: from now on its lease is renewed as long as this process lives."""
        owner().keep(self.name, renew, self.spec.lease_s)

    def remove(self) -> None:
        """Returns when the daemon no longer knows the container; its anonymous volumes go with it."""
        if self.tier == "gvisor":
            self._let_end()
        client = self.daemon.api if self.tier == "gvisor" else self.daemon.quick
        until = time.monotonic() + REMOVED_S
        while self._exists:
            try:
                client.remove_container(self.name, v=True, force=True)
            except docker.errors.NotFound:
                self._exists = False
            except docker.errors.APIError as error:
                # 409: its own removal is under way; 500: it did not die within the daemon's patience
                if error.status_code not in (409, 500) or time.monotonic() >= until:
                    raise SandboxDiedError(f"container {self.name} cannot be removed: {error.explanation}") from error
                time.sleep(0.01)
            except FAILURES as error:
                if isinstance(error, requests.exceptions.ReadTimeout) and time.monotonic() < until:
                    continue  # it goes on with the removal
                raise SandboxDiedError(
                    f"container {self.name} cannot be removed: the Docker daemon at {self.daemon.host.shown} does not "
                    f"answer ({root_cause(error)}); it ends by its lease"
                ) from error
        owner().forget(self.name)

        if self.own_image is not None:
            with contextlib.suppress(*FAILURES):  # a fork of this fork still stands on it; then it goes with that one
                self.daemon.quick.remove_image(self.own_image)

    def _let_end(self) -> None:
        """gVisor that is told to kill a box while its pid 1 ends by itself, stands still for 20 s or more in one
        case of four; left alone it is gone in a third of a second."""
        until = time.monotonic() + LET_END_S
        with contextlib.suppress(*FAILURES):  # then the removal says what is wrong
            while self._started and time.monotonic() < until:
                try:
                    self.daemon.quick.inspect_container(self.name)
                except docker.errors.NotFound:
                    self._exists = self._started = False
                time.sleep(0.01)

    def commit(self) -> str:
        """An image of its root as it is now, labelled as this owner's; its id."""
        changes = [f"LABEL {name}={value}" for name, value in owner().image_labels().items()]
        return str(self.daemon.api.commit(self.name, changes=changes)["Id"])

    def is_running(self) -> bool:
        """Whether the daemon says so."""
        return bool(self.daemon.quick.inspect_container(self.name)["State"].get("Running"))

    def why_gone(self, told_s: float = 0.0) -> str:
        """What the daemon knows of a container that does not answer any more. `told_s`: how long one that still runs
        is looked at again, because its streams have ended and its own end may be on its way."""
        until = time.monotonic() + told_s
        while True:
            try:
                state = self.daemon.probe.inspect_container(self.name)["State"]
            except docker.errors.NotFound:
                return "it ended and was removed (out of memory, or the container was stopped)"
            except FAILURES as error:
                return f"the connection to the Docker daemon at {self.daemon.host.shown} was lost ({root_cause(error)})"
            if not state.get("Running"):
                break
            if time.monotonic() >= until:
                return f"the connection to it through the Docker daemon at {self.daemon.host.shown} was lost"
            time.sleep(0.05)
        code = state.get("ExitCode")
        if state.get("OOMKilled"):
            return f"it ended with code {code}, out of memory"
        killed = " (killed: out of memory, or the container was stopped)" if code == KILLED else ""
        return f"it ended with code {code}{killed}"

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
                f"the image {self.spec.image} lacks a program that the box is started with, python3 (3.9 or newer) or "
                f"else a shell (sh); add one of them to the image ({said:.300})"
            )
        hung = isinstance(error, requests.exceptions.Timeout) and self._started
        if self.tier == "gvisor" and (hung or GVISOR_RUNTIME in said or "OCI runtime" in said):
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
    """The streams of pid 1 over Docker's attached connection: its stdout is taken out of the frames, its stderr kept
    for the epitaph."""

    def __init__(self, connection: Any, why_gone: Callable[[float], str]) -> None:
        self._why_gone = why_gone
        self._connection = connection  # the client closes the connection when this is forgotten
        stream, early = hijacked(connection)
        self._socket = SocketChannel(stream, lambda: "")
        self._received = bytearray(early)
        self._reading = threading.Lock()
        self._complaint = b""

    def send(self, data: bytes, until: float) -> None:
        self._socket.send(data, until)

    def receive(self, until: float) -> bytes:
        with self._reading:
            return self._receive(until)

    def _receive(self, until: float) -> bytes:
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
                    if time.monotonic() >= until:  # complaints alone could go on for ever
                        raise TimeoutError("the deadline has passed")
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
        """A send that failed learns of the end before anybody has read what was said last, so that is read here."""
        until = time.monotonic() + LAST_WORDS_S
        if self._reading.acquire(timeout=LAST_WORDS_S):  # who holds it reads to the end by itself
            try:
                with contextlib.suppress(OSError):
                    while self._receive(until) and time.monotonic() < until:
                        pass
            finally:
                self._reading.release()
        said = self._complaint.decode(errors="replace").strip()
        return f"its worker ended: {said}" if said else self._why_gone(TOLD_S)
