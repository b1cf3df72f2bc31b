"""Where a Docker daemon answers, and the one client that this process has of it. Law: whoever can speak to a daemon is
root on its machine, so an address that strangers could speak to or answer for is refused; and no call waits for ever.

`DockerHost()` is this machine's own socket, `DockerHost.of_environment()` what DOCKER_HOST, DOCKER_TLS_VERIFY and
DOCKER_CERT_PATH say. Several hosts are several values of this type.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import socket
import ssl
import subprocess
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, urlsplit

import docker
import docker.errors
import docker.tls
import requests.adapters
import requests.exceptions
from docker.transport import UnixHTTPAdapter
from docker.transport.unixconn import UnixHTTPConnection, UnixHTTPConnectionPool

from agentgym.errors import InputError, UnavailableError

OWN_SOCKET = "unix:///var/run/docker.sock"
PING_S = 10  # a daemon that does not answer within this is not there; on a busy machine one over TLS has taken 3 s
SSH_PING_S = 15  # ssh logs in first
SSH_END_S = 2.0
QUICK_S = 40  # for what a daemon does at once when it is not busy, such as the removal of a box
CALL_S = 120  # many boxes started at once wait for each other inside the daemon
BUILD_S = 1800  # between two lines of a build
CONNECTIONS = 64  # kept open by a client; more are made when needed
OLDEST_API = "1.24"
FAILURES = (docker.errors.DockerException, requests.exceptions.RequestException, OSError)


@dataclass(frozen=True, slots=True)
class DockerHost:
    """The address of a daemon.

    Example: `DockerHost("ssh://me@gpu1")`, `DockerHost("tcp://10.0.0.2:2376", tls=Path("certificates"))`, where the
    folder holds ca.pem, cert.pem and key.pem.
    """

    url: str | None = None  # unix:///path, ssh://[user@]host[:port], tcp://host:port; None: this machine's own socket
    tls: Path | None = None  # the folder with the certificates; None: no TLS

    def __post_init__(self) -> None:
        parts = self.parts
        if parts.scheme not in ("unix", "ssh", "tcp"):
            raise InputError(f"a Docker host must be unix:///path, ssh://host or tcp://host:port, got {self.url!r}")
        if parts.scheme == "unix" and not parts.path.startswith("/"):
            raise InputError(f"a Docker host of the form unix:///path needs an absolute path, got {self.url!r}")
        if parts.scheme != "unix" and (not parts.hostname or parts.hostname.startswith("-") or parts.password):
            raise InputError(f"a Docker host must name a machine and no password, got {self.shown!r}")
        if parts.scheme == "ssh" and parts.path.strip("/"):
            raise InputError(f"a Docker host of the form ssh://host takes no path, got {self.url!r}")
        if parts.scheme == "tcp" and not self._port():
            raise InputError(f"a Docker host of the form tcp://host:port needs its port, got {self.url!r}")
        if self.tls is not None and parts.scheme != "tcp":
            raise InputError(f"TLS goes with tcp://host:port only, got {self.url!r} with certificates in {self.tls}")
        if parts.scheme == "tcp" and self.tls is None and not _is_loopback(str(parts.hostname)):
            raise InputError(
                f"the Docker host {self.url} is not protected: whoever reaches it is root there. Give it TLS "
                "(DOCKER_TLS_VERIFY=1 and DOCKER_CERT_PATH with ca.pem, cert.pem, key.pem) or use ssh://"
            )
        if self.tls is not None:
            missing = [name for name in ("ca.pem", "cert.pem", "key.pem") if not (self.tls / name).is_file()]
            if missing:
                raise InputError(f"the certificates for {self.url} are incomplete: {self.tls} has no {missing[0]}")

    @property
    def parts(self) -> SplitResult:
        """The address, taken apart."""
        return urlsplit(self.url or OWN_SOCKET)

    @property
    def shown(self) -> str:
        """The address for messages, without a password that does not belong there."""
        parts = self.parts
        return self.url or OWN_SOCKET if not parts.password else f"{parts.scheme}://***@{parts.hostname}"

    def _port(self) -> int | None:
        try:
            return self.parts.port
        except ValueError:
            return None

    @classmethod
    def of_environment(cls) -> DockerHost:
        """What the variables of the docker command say; certificates are always verified."""
        url = os.environ.get("DOCKER_HOST") or None
        folder = os.environ.get("DOCKER_CERT_PATH")
        wanted = bool(os.environ.get("DOCKER_TLS_VERIFY") or os.environ.get("DOCKER_TLS"))
        if url is None or not url.startswith("tcp://") or not (wanted or folder):
            return cls(url)
        return cls(url, Path(folder or Path.home() / ".docker"))


class Daemon:
    """A daemon that answers, clients of it that any thread may use, and what was learnt about it."""

    def __init__(self, host: DockerHost) -> None:
        self.host = host
        patience = SSH_PING_S if host.parts.scheme == "ssh" else PING_S
        self.probe = _client(host, patience, OLDEST_API)
        try:
            version = self.probe.version(api_version=False)
            self.api_version = str(version["ApiVersion"])
            self.architecture = str(version.get("Arch", ""))  # in Docker's words: "amd64", "arm64"
        except (*FAILURES, KeyError, TypeError, ValueError) as error:
            raise no_daemon(host, error, _said(self.probe)) from error
        self.quick = _client(host, QUICK_S, self.api_version)
        self.api = _client(host, CALL_S, self.api_version)
        self.builder = _client(host, BUILD_S, self.api_version)
        self.fit: set[tuple[str, str]] = set()  # (tier, network) whose demands it was seen to meet
        self.without_python: set[str] = set()  # images, by id, that cannot hold the worker
        self.gvisor_ran = False

    def check(self) -> None:
        """Returns when the daemon has answered just now; UnavailableError if it does not."""
        try:
            if not self.probe.ping():
                raise OSError("it answered something else than OK")
        except FAILURES as error:
            raise no_daemon(self.host, error, _said(self.probe)) from error

    def close(self) -> None:
        """Ends every connection that waits to be used again."""
        for client in (self.probe, self.quick, self.api, self.builder):
            client.close()

    def info(self) -> dict[str, Any]:
        """What the daemon says of itself."""
        return self.quick.info()

    def has_api(self, major: int, minor: int) -> bool:
        """Whether it speaks at least this version."""
        own = tuple(int(part) for part in self.api_version.split(".")[:2])
        return own >= (major, minor)

    def has_image(self, image: str) -> bool:
        """Whether it holds the image."""
        try:
            self.quick.inspect_image(image)
        except docker.errors.ImageNotFound:
            return False
        return True


_daemons: dict[DockerHost, Daemon] = {}
_lock = threading.Lock()


def connect(host: DockerHost | None = None) -> Daemon:
    """The daemon at `host` (default: the environment's), which has answered just now; UnavailableError otherwise."""
    host = host or DockerHost.of_environment()
    with _lock:
        daemon = _daemons.get(host)
    if daemon is not None:
        daemon.check()
        return daemon
    daemon = Daemon(host)
    with _lock:
        return _daemons.setdefault(host, daemon)


def disconnect(host: DockerHost) -> None:
    """Ends what `connect` keeps for later: connections, and where they go through ssh a process each. Boxes that are
    open keep theirs."""
    with _lock:
        daemon = _daemons.pop(host, None)
    if daemon is not None:
        daemon.close()


def _forked() -> None:
    """In a forked child: the lock may have been held, and the sockets are the parent's."""
    global _lock
    _lock = threading.Lock()
    _daemons.clear()


os.register_at_fork(after_in_child=_forked)


def no_daemon(host: DockerHost, error: Exception, said: str = "") -> UnavailableError:
    """The error for a daemon that does not answer, with the cause under all the wrapping and the mend."""
    cause = root_cause(error)
    mend = "start it (systemctl start docker), point DOCKER_HOST at it"
    if isinstance(cause, PermissionError):
        mend = "let this user speak to it (usermod -aG docker USER), use rootless Docker"
    elif host.tls is not None and not isinstance(cause, (ConnectionRefusedError, TimeoutError, socket.gaierror)):
        mend = "give both sides certificates of the same authority (ca.pem, cert.pem, key.pem in DOCKER_CERT_PATH)"
    elif host.parts.scheme == "ssh":
        mend = f"see that `ssh {host.parts.netloc} docker version` works without asking anything"
    text = said or str(cause) or type(cause).__name__
    return UnavailableError(
        f"no Docker daemon answers at {host.shown} ({' '.join(text.split()):.300}); {mend}, or use "
        "sandbox.tier=namespace"
    )


def root_cause(error: BaseException) -> BaseException:
    """What was raised first; the client and its libraries wrap it several times."""
    seen = {id(error)}
    while (inner := error.__cause__ or error.__context__) is not None and id(inner) not in seen:
        seen.add(id(inner))
        error = inner
    return error


def _client(host: DockerHost, timeout_s: int, version: str) -> docker.APIClient:
    tls = False
    url = host.url or OWN_SOCKET
    if host.tls is not None:
        certificate = (str(host.tls / "cert.pem"), str(host.tls / "key.pem"))
        tls = docker.tls.TLSConfig(client_cert=certificate, ca_cert=str(host.tls / "ca.pem"), verify=True)
    if host.parts.scheme == "ssh":
        url = OWN_SOCKET  # its adapter is replaced by one that goes through ssh
    client = docker.APIClient(url, version=version, timeout=timeout_s, tls=tls, max_pool_size=CONNECTIONS)
    client.trust_env = False  # no proxy and no netrc of this machine between us and the daemon
    if host.parts.scheme == "ssh":
        client.mount("http+docker://", SshAdapter(host, timeout_s))
    elif host.parts.scheme == "tcp":
        client.mount(client.base_url, requests.adapters.HTTPAdapter(pool_maxsize=CONNECTIONS))
    return client


def _said(client: docker.APIClient) -> str:
    adapter = client.adapters.get("http+docker://")
    return adapter.said() if isinstance(adapter, SshAdapter) else ""


def _is_loopback(name: str) -> bool:
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(name).is_loopback
    return name == "localhost"


# -------------------------------------------------------------------------------------------------------------- ssh


class SshAdapter(UnixHTTPAdapter):
    """HTTP through `ssh HOST docker system dial-stdio`, one ssh for each connection. The ssh of the docker package
    needs a second implementation of ssh and reads without a deadline; here ssh holds one end of a socket pair and the
    other end is a socket like any."""

    def __init__(self, host: DockerHost, timeout_s: int) -> None:
        super().__init__(OWN_SOCKET, timeout_s, max_pool_size=CONNECTIONS)
        self._command = ssh_command(host)
        self._complaints = tempfile.TemporaryFile()  # noqa: SIM115 (it lives as long as the client)
        self._running: list[subprocess.Popen[bytes]] = []
        self._lock = threading.Lock()

    def get_connection(self, url: Any, proxies: Any = None) -> UnixHTTPConnectionPool:
        with self.pools.lock:
            pool = self.pools.get(url)
            if pool is None:
                pool = self.pools[url] = _SshPool(self, url, self.timeout)
            return pool

    def dial(self) -> socket.socket:
        """A new connection to the daemon."""
        ours, theirs = socket.socketpair()
        with theirs, self._lock:
            self._running = [process for process in self._running if process.poll() is None]  # reaps those that ended
            try:
                process = subprocess.Popen(
                    self._command,
                    stdin=theirs.fileno(),
                    stdout=theirs.fileno(),
                    stderr=self._complaints,
                    start_new_session=True,
                )
            except OSError:
                ours.close()
                raise
            self._running.append(process)
        return ours

    def close(self) -> None:
        """An ssh whose connection is closed ends by itself, and is waited for: it would stay as a zombie."""
        super().close()
        with self._lock:
            for process in self._running:
                try:
                    process.wait(SSH_END_S)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
            self._running.clear()

    def said(self) -> str:
        """The last line that ssh complained with."""
        with self._lock:
            size = self._complaints.seek(0, os.SEEK_END)
            self._complaints.seek(max(0, size - 2000))
            lines = self._complaints.read().decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else ""


class _SshPool(UnixHTTPConnectionPool):
    def __init__(self, adapter: SshAdapter, url: str, timeout_s: int) -> None:
        super().__init__(url, "", timeout_s, maxsize=CONNECTIONS)
        self._adapter, self._timeout_s = adapter, timeout_s

    def _new_conn(self) -> Any:
        return _SshConnection(self._adapter, self.base_url, self._timeout_s)


class _SshConnection(UnixHTTPConnection):
    def __init__(self, adapter: SshAdapter, url: str, timeout_s: int) -> None:
        super().__init__(url, "", timeout_s)
        self._adapter, self._timeout_s = adapter, timeout_s

    def connect(self) -> None:
        self.sock = self._adapter.dial()
        self.sock.settimeout(self._timeout_s)


def ssh_command(host: DockerHost) -> list[str]:
    """The ssh that leads to the daemon. It may never ask anything: nobody is there to answer."""
    parts = host.parts
    options = ["-T", "-o", "BatchMode=yes", "-o", f"ConnectTimeout={SSH_PING_S - 5}"]
    if parts.username:
        options += ["-l", parts.username]
    if parts.port:
        options += ["-p", str(parts.port)]
    return ["ssh", *options, "--", str(parts.hostname), "docker", "system", "dial-stdio"]


# ------------------------------------------------------------------------------------------- the attached connection


def hijacked(connection: Any) -> tuple[socket.socket, bytes]:
    """The socket under an attached connection of the docker package, and what was read of it already: the daemon's
    first bytes may have come together with the header of its answer."""
    attached: Any = connection  # an SSL socket, or a reader of a plain one
    stream: socket.socket = attached if isinstance(attached, ssl.SSLSocket) else attached._sock
    buffered = connection._response.raw._fp.fp
    stream.settimeout(0)
    early = b""
    with contextlib.suppress(BlockingIOError, ssl.SSLWantReadError):
        early = buffered.peek()
    if early:
        buffered.read(len(early))
    return stream, early
