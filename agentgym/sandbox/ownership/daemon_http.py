"""The few requests to a Docker daemon that taking away needs, with the standard library alone. Must never create
anything.

The reaper uses it, which has no site packages; boxes are made through docker.py.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import ssl
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode, urlsplit

from agentgym.errors import SandboxError, UnavailableError

CALL_S = 20.0  # a removal waits in a daemon that is busy
HTTP_PORT, TLS_PORT = 2375, 2376


class DaemonHttp:
    """One Docker daemon. `url`: unix://, tcp:// or ssh://; `tls`: the folder that holds ca.pem, cert.pem and key.pem.

    Example: `DaemonHttp("unix:///var/run/docker.sock").containers("agentgym.owner")`. Raises UnavailableError when it
    cannot be reached, SandboxError for what it refuses.
    """

    def __init__(self, url: str, tls: Path | None = None) -> None:
        self.url = url
        self._tls = tls

    @property
    def is_absent(self) -> bool:
        """Whether it would be on this machine and there is none, not even one that is down for a moment."""
        return self.url.startswith("unix://") and not Path(self.url.removeprefix("unix://")).exists()

    def containers(self, *labels: str) -> list[dict[str, Any]]:
        """All that carry these labels ("key" or "key=value"), running or not."""
        return self._get("/containers/json", all="1", filters=json.dumps({"label": labels}))

    def images(self, *labels: str) -> list[dict[str, Any]]:
        return self._get("/images/json", filters=json.dumps({"label": labels}))

    def volumes(self, *labels: str) -> list[dict[str, Any]]:
        """Those that no container uses."""
        filters = {"label": labels, "dangling": ["true"]}
        return self._get("/volumes", filters=json.dumps(filters)).get("Volumes") or []

    def remove_container(self, container_id: str) -> bool:
        """With its anonymous volumes. False if something else has removed it, or is about to."""
        return self._delete(f"/containers/{quote(container_id, safe='')}", v="1", force="1")

    def remove_image(self, image_id: str) -> bool:
        """False if it is gone already, or a container still needs it."""
        return self._delete(f"/images/{quote(image_id, safe='')}", force="1")

    def remove_volume(self, name: str) -> bool:
        return self._delete(f"/volumes/{quote(name, safe='')}")

    def _get(self, path: str, **query: str) -> Any:
        status, body = self._request("GET", path, query)
        if status != 200:
            raise SandboxError(f"the Docker daemon at {self.url} refused GET {path}: {_reason(status, body)}")
        try:
            return json.loads(body)
        except ValueError as error:
            raise SandboxError(f"what answers at {self.url} is no Docker daemon: {body[:100]!r}") from error

    def _delete(self, path: str, **query: str) -> bool:
        status, body = self._request("DELETE", path, query)
        if status in (404, 409):
            return False
        if status not in (200, 204):
            raise SandboxError(f"the Docker daemon at {self.url} refused DELETE {path}: {_reason(status, body)}")
        return True

    def _request(self, method: str, path: str, query: dict[str, str]) -> tuple[int, bytes]:
        try:
            with self._connection() as connection:
                connection.request(method, f"{path}?{urlencode(query)}", headers={"Host": "docker"})
                answer = connection.getresponse()
                return answer.status, answer.read()
        except (OSError, http.client.HTTPException) as error:
            raise UnavailableError(f"no Docker daemon answers at {self.url} ({error})") from error

    @contextlib.contextmanager
    def _connection(self) -> Iterator[http.client.HTTPConnection]:
        where = urlsplit(self.url)
        connection = http.client.HTTPConnection("docker", timeout=CALL_S)
        child = None
        try:
            if where.scheme == "unix":
                connection.sock = socket.socket(socket.AF_UNIX)
                connection.sock.settimeout(CALL_S)
                connection.sock.connect(where.path)
            elif where.scheme in ("tcp", "http", "https"):
                connection.sock = self._tcp(where.hostname or "localhost", where.port, where.scheme == "https")
            elif where.scheme == "ssh":
                connection.sock, theirs = socket.socketpair()
                connection.sock.settimeout(CALL_S)
                with theirs:
                    child = _start(ssh_command(self.url), theirs.fileno())
            else:
                raise UnavailableError(f"a Docker daemon's address begins with unix://, tcp:// or ssh://: {self.url}")
            yield connection
        finally:
            connection.close()
            if child is not None:
                child.kill()
                child.wait()

    def _tcp(self, host: str, port: int | None, is_https: bool) -> socket.socket:
        if self._tls is None and not is_https:
            return socket.create_connection((host, port or HTTP_PORT), CALL_S)
        plain = socket.create_connection((host, port or TLS_PORT), CALL_S)
        try:
            context = ssl.create_default_context(cafile=str(self._tls / "ca.pem") if self._tls else None)
            if self._tls is not None and (self._tls / "cert.pem").exists():
                context.load_cert_chain(self._tls / "cert.pem", self._tls / "key.pem")
            return context.wrap_socket(plain, server_hostname=host)
        except BaseException:
            plain.close()
            raise


def _start(command: list[str], streams: int) -> subprocess.Popen[bytes]:
    return subprocess.Popen(command, stdin=streams, stdout=streams, stderr=subprocess.DEVNULL)


def ssh_command(url: str) -> list[str]:
    """What the docker command runs for an ssh:// address; never asks anything."""
    where = urlsplit(url)
    options = ["-o", "BatchMode=yes", "-o", f"ConnectTimeout={CALL_S:.0f}", "-T"]
    options += ["-l", where.username] if where.username else []
    options += ["-p", str(where.port)] if where.port else []
    return ["ssh", *options, "--", where.hostname or "", "docker", "system", "dial-stdio"]


def _reason(status: int, body: bytes) -> str:
    with contextlib.suppress(ValueError, TypeError, KeyError):
        return str(json.loads(body)["message"])
    return f"{status} {body[:200]!r}"
