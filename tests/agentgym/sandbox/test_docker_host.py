"""Daemons elsewhere: TLS and ssh with real boxes behind them, and daemons that hang, die or lack what a tier promises.
Every failure is typed, names the daemon and comes quickly."""

from __future__ import annotations

import contextlib
import hashlib
import http.server
import json
import os
import shutil
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from agentgym.errors import SandboxDiedError, SandboxError, UnavailableError
from agentgym.sandbox import SandboxSpec, choose_tier, open_sandbox
from agentgym.sandbox.docker.command import LULL_S
from agentgym.sandbox.docker.container import STREAM_FRAME
from agentgym.sandbox.docker.exec_tier import DockerExecSandbox
from agentgym.sandbox.docker.host import DockerHost, connect, disconnect
from agentgym.sandbox.spec import Sandbox

OWN = "/var/run/docker.sock"
Wrap = Callable[[socket.socket], socket.socket]


class Relay:
    """A listener that passes every connection on to the real daemon, until it is cut or made to hang."""

    def __init__(self, listener: socket.socket, wrap: Wrap = lambda connection: connection) -> None:
        self._listener, self._wrap = listener, wrap
        self._pairs: list[socket.socket] = []
        self._flows = threading.Event()
        self._flows.set()
        self._left: int | None = None  # pieces that go to the daemon before it hangs
        # asked with all that came from the daemon on a connection: how many of these bytes pass before it is cut
        self.passes: Callable[[bytearray], int] = len
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        try:
            near = self._wrap(connection)
        except OSError:  # the other side did not like our certificate, or we theirs
            connection.close()
            return
        far = socket.socket(socket.AF_UNIX)
        far.connect(OWN)
        self._pairs += [near, far]
        lock = threading.Lock()
        threading.Thread(target=self._pump, args=(far, near, lock, True), daemon=True).start()
        self._pump(near, far, lock)

    def _pump(self, source: socket.socket, target: socket.socket, lock: threading.Lock, back: bool = False) -> None:
        """OpenSSL cannot read and write at the same time, so a TLS end is never left waiting inside a read."""
        secure = isinstance(source, ssl.SSLSocket)
        source.settimeout(0.02 if secure else None)
        came, passed = bytearray(), 0
        with contextlib.suppress(OSError, ValueError):
            while True:
                try:
                    with lock if secure else contextlib.nullcontext():
                        data = source.recv(1 << 16)
                except TimeoutError:
                    time.sleep(0.001)
                    continue
                self._flows.wait()
                if not data:
                    break
                came += data
                may_pass = self.passes(came) if back else len(came)
                data = bytes(came[passed:may_pass])
                passed = len(came)
                with lock if isinstance(target, ssl.SSLSocket) else contextlib.nullcontext():
                    target.settimeout(None)
                    target.sendall(data)
                    target.settimeout(0.02 if isinstance(target, ssl.SSLSocket) else None)
                if may_pass < passed:
                    break
                if not back and self._left is not None:
                    self.hang(max(0, self._left - 1))
        for end in (source, target):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR) if secure or end is source else end.shutdown(socket.SHUT_WR)

    def hang(self, after: int = 0) -> None:
        """Nothing passes any more, once so many pieces have gone to the daemon."""
        self._left = after
        if not after:
            self._flows.clear()

    def cut(self) -> None:
        """The daemon is gone: nobody listens, and every connection ends."""
        for end in (self._listener, *self._pairs):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)  # wakes whoever waits in it, which closing would not
        self._listener.close()

    def close(self) -> None:
        self._flows.set()
        self.cut()


@pytest.fixture
def relay(tmp_path: Path) -> Iterator[tuple[DockerHost, Relay]]:
    listener = socket.socket(socket.AF_UNIX)
    path = f"/tmp/agentgym-relay-{os.getpid()}-{time.monotonic_ns()}.sock"
    listener.bind(path)
    listener.listen(64)
    made = Relay(listener)
    yield DockerHost(f"unix://{path}"), made
    made.close()
    os.unlink(path)


def left_over(name: str, wait_s: float = 15.0) -> bool:
    """Whether the real daemon still holds the container after a while."""
    until = time.monotonic() + wait_s
    api = connect(DockerHost()).quick
    while api.containers(all=True, filters={"name": name}):
        if time.monotonic() > until:
            return True
        time.sleep(0.1)
    return False


def moves_a_megabyte(box: Sandbox) -> None:
    data = os.urandom(1_000_000)
    assert box.exec("sha256sum", stdin=data, timeout_s=60).text.split()[0] == hashlib.sha256(data).hexdigest()
    box.write_file("/work/large", data)
    assert box.read_file("/work/large") == data
    result = box.exec("cat large; cat >&2", stdin=b"in", timeout_s=60)
    assert (result.stdout, result.error_text, result.dropped_bytes) == (data, "in", 0)


def both_ways(spec: SandboxSpec, host: DockerHost) -> Iterator[Sandbox]:
    """A box with a resident worker, then one that works through `docker exec`."""
    yield open_sandbox("docker", spec, host=host)
    yield DockerExecSandbox(spec, host)


# ------------------------------------------------------------------------------------------------- what a daemon lacks


@contextlib.contextmanager
def a_daemon_that_says(info: dict[str, object]) -> Iterator[DockerHost]:
    """A daemon that speaks the first words of the protocol and can nothing."""

    class Answers(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            path = self.path.rpartition("/")[2]
            answers: dict[str, object] = {"version": {"ApiVersion": "1.41", "Arch": "arm64"}, "info": info}
            body = b"OK" if path == "_ping" else json.dumps(answers.get(path, {})).encode()
            self.send_response(200 if path in ("_ping", *answers) else 404)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answers) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield DockerHost(f"tcp://127.0.0.1:{server.server_address[1]}")
        finally:
            server.shutdown()


@pytest.mark.parametrize(
    ("tier", "info", "why"),
    [
        ("docker", {"SecurityOptions": ["name=apparmor"]}, r"filters no system calls.*sandbox\.tier=gvisor"),
        ("docker", {}, "filters no system calls"),
        ("docker", {"SecurityOptions": ["name=seccomp,profile=unconfined"]}, r"unconfined.*daemon\.json"),
        ("gvisor", {"Runtimes": {"runc": {}}}, r"no runtime 'runsc'.*apt-get install runsc.*daemon\.json"),
    ],
)
def test_a_daemon_that_cannot_keep_the_promise_is_refused(tier: str, info: dict[str, object], why: str) -> None:
    with a_daemon_that_says(info) as host:
        assert connect(host).architecture == "arm64"
        for ask in (lambda: choose_tier(tier, host=host), lambda: open_sandbox(tier, host=host)):
            with pytest.raises(UnavailableError, match=rf"sandbox\.tier={tier} cannot be had here: .*{why}"):
                ask()


def test_a_network_that_the_runtime_does_not_give_is_refused() -> None:
    runtimes = {"runsc": {"path": "/usr/bin/runsc", "runtimeArgs": ["--network=none"]}}
    with (
        a_daemon_that_says({"Runtimes": runtimes}) as host,
        pytest.raises(UnavailableError, match=r"registered with --network=none.*network='bridge'.*tier=docker"),
    ):
        open_sandbox("gvisor", SandboxSpec(network="bridge"), host=host)


# ----------------------------------------------------------------------------------------------------- hangs and deaths


@pytest.mark.docker
def test_output_that_comes_long_after_the_end_of_its_command_is_waited_for(relay: tuple[DockerHost, Relay]) -> None:
    host, between = relay
    held = threading.Event()

    def hold_once(came: bytearray) -> int:
        """A busy line: what comes after the first 10 kB of an answer comes late."""
        if len(came) > 10_000 and not held.is_set():
            held.set()
            time.sleep(LULL_S + 1.0)
        return len(came)

    data = os.urandom(200_000)
    with DockerExecSandbox(SandboxSpec(output_limit=4_000_000), host) as box:
        box.write_file("large", data)
        assert box.exec("cat large").stdout == data
        between.passes = hold_once
        assert box.exec("cat large").stdout == data
        assert held.is_set()
        held.clear()
        assert box.read_file("large") == data
        assert held.is_set()


def after_two_frames(came: bytearray) -> int:
    """Where the second frame of an attached connection's output ends; all of what is none."""
    head = came.find(b"\r\n\r\n") + 4
    if b"101 UPGRADED" not in came[:head]:
        return len(came)
    end = head
    for _ in range(2):
        if len(came) < end + STREAM_FRAME.size:
            return len(came)
        end += STREAM_FRAME.size + STREAM_FRAME.unpack_from(came, end)[1]
    return min(end, len(came))


@pytest.mark.docker
@pytest.mark.parametrize("beyond", [0, 100], ids=["between frames", "within a frame"])
@pytest.mark.parametrize(
    "ask",
    [lambda box: box.read_file("large"), lambda box: box.exec("cat large"), lambda box: box.export(["/work"])],
    ids=["file", "output", "tree"],
)
def test_what_lost_its_end_on_the_way_is_not_something_shorter(
    relay: tuple[DockerHost, Relay], ask: Callable[[Sandbox], object], beyond: int
) -> None:
    host, between = relay
    with DockerExecSandbox(SandboxSpec(output_limit=1_000_000), host) as box:
        box.write_file("large", bytes(400_000))
        box.exec("python3 -c 'import socket; socket.socket(socket.AF_UNIX).bind(\"/work/socket\")'")  # tar warns of it
        between.passes = lambda came: min(after_two_frames(came) + beyond, len(came))
        with pytest.raises(SandboxDiedError, match=rf"{box.name} died: .*\blost"):
            ask(box)


def test_a_daemon_that_never_answers_is_not_waited_for() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        host = DockerHost(f"tcp://127.0.0.1:{silent.getsockname()[1]}")
        started = time.monotonic()
        with pytest.raises(UnavailableError, match=r"no Docker daemon answers at tcp://127.*timed out.*tier=namespace"):
            open_sandbox("docker", host=host)
        assert time.monotonic() - started < 60


@pytest.mark.docker
def test_a_daemon_that_stops_answering_is_noticed_by_the_next_box(relay: tuple[DockerHost, Relay]) -> None:
    host, between = relay
    connect(host)
    between.hang()
    started = time.monotonic()
    with pytest.raises(UnavailableError, match="no Docker daemon answers at unix:///tmp/agentgym-relay"):
        open_sandbox("docker", host=host)
    assert time.monotonic() - started < 60


@pytest.mark.docker
@pytest.mark.parametrize("way", [0, 1], ids=["resident", "docker exec"])
def test_a_daemon_that_dies_in_mid_call_is_a_dead_box(relay: tuple[DockerHost, Relay], way: int) -> None:
    host, between = relay
    spec = SandboxSpec(lease_s=20)  # so that it does not end by itself before
    box = DockerExecSandbox(spec, host) if way else open_sandbox("docker", spec, host=host)
    threading.Timer(0.5, between.cut).start()
    with pytest.raises(
        SandboxDiedError, match=rf"{box.name} died: .*Docker daemon at unix:///tmp/agentgym-relay.* lost"
    ):
        box.exec("sleep 600", timeout_s=600)
    with pytest.raises(SandboxDiedError, match=r"cannot be removed: the Docker daemon at .* does not answer"):
        box.close()
    assert not left_over(box.name, 120), "the box ends with its input or its lease, daemon or not"


@pytest.mark.docker
def test_a_daemon_that_hangs_in_mid_call_is_a_dead_box(relay: tuple[DockerHost, Relay]) -> None:
    host, between = relay
    box = open_sandbox("docker", SandboxSpec(lease_s=10), host=host)
    between.hang(after=1)
    with pytest.raises(SandboxDiedError, match=f"{box.name} died: it did not answer 'exec' within"):
        box.exec("sleep 0.5", timeout_s=1)
    assert not left_over(box.name, 120), "no beat came through for the lease"
    between.cut()
    with pytest.raises(SandboxError, match="cannot be removed"):
        box.close()


# ---------------------------------------------------------------------------------------------------------- TLS and ssh


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two authorities; the first signed a server for 127.0.0.1 and a client, the second another client."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not on this machine")
    folder = tmp_path_factory.mktemp("certificates")
    key = "-newkey rsa:2048 -nodes -days 1"

    def openssl(line: str) -> None:
        subprocess.run(["openssl", *line.split()], cwd=folder, check=True, capture_output=True)

    for authority in ("good", "other"):
        (folder / authority).mkdir()
        openssl(f"req -x509 {key} -subj /CN={authority} -keyout {authority}/ca-key.pem -out {authority}/ca.pem")
        openssl(f"req {key} -subj /CN=client -keyout {authority}/key.pem -out {authority}/cert.csr")
        signed = f"-CA {authority}/ca.pem -CAkey {authority}/ca-key.pem -CAcreateserial -days 1"
        openssl(f"x509 -req -in {authority}/cert.csr {signed} -out {authority}/cert.pem")
    (folder / "names").write_text("subjectAltName=IP:127.0.0.1\n")
    openssl(f"req {key} -subj /CN=server -keyout server-key.pem -out server.csr")
    signed = "-CA good/ca.pem -CAkey good/ca-key.pem -CAcreateserial -days 1 -extfile names"
    openssl(f"x509 -req -in server.csr {signed} -out server.pem")
    (folder / "mixed").mkdir()  # trusts the server, but is signed by the other authority
    shutil.copy(folder / "good/ca.pem", folder / "mixed")
    for name in ("cert.pem", "key.pem"):
        shutil.copy(folder / "other" / name, folder / "mixed")
    return folder


@pytest.fixture
def tls_port(certificates: Path) -> Iterator[int]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificates / "server.pem", certificates / "server-key.pem")
    context.load_verify_locations(certificates / "good/ca.pem")
    context.verify_mode = ssl.CERT_REQUIRED
    listener = socket.create_server(("127.0.0.1", 0), backlog=64)
    made = Relay(listener, lambda connection: context.wrap_socket(connection, server_side=True))
    yield listener.getsockname()[1]
    made.close()


@pytest.mark.docker
def test_a_box_behind_tls(certificates: Path, tls_port: int) -> None:
    host = DockerHost(f"tcp://127.0.0.1:{tls_port}", certificates / "good")
    for box in both_ways(SandboxSpec(output_limit=4_000_000), host):
        with box:
            moves_a_megabyte(box)
        assert not left_over(box.name, 1.0)


@pytest.mark.docker
@pytest.mark.parametrize(
    ("folder", "why"),
    [
        ("other", "certificate verify failed"),
        ("mixed", "unknown ca|decrypt error|EOF occurred|reset|closed connection|Broken pipe"),
    ],
)
def test_certificates_of_another_authority_are_refused(
    certificates: Path, tls_port: int, folder: str, why: str
) -> None:
    host = DockerHost(f"tcp://127.0.0.1:{tls_port}", certificates / folder)
    started = time.monotonic()
    with pytest.raises(UnavailableError, match=rf"(?i)no Docker daemon answers at tcp://127.*({why}).*same authority"):
        open_sandbox("docker", host=host)
    assert time.monotonic() - started < 60


SSH = """#!/bin/sh
echo "$@" >> "$SSH_LOG"
case "$*" in *" nobody -- "*) echo "nobody@gpu1: Permission denied (publickey)." >&2; exit 255;; esac
while [ "$1" != -- ]; do shift; done
shift 2
exec "$@"
"""


@pytest.fixture
def ssh_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A program `ssh` that goes nowhere and runs what it was told to here."""
    if shutil.which("docker") is None:
        pytest.skip("the docker command is not on this machine")
    program = tmp_path / "bin" / "ssh"
    program.parent.mkdir()
    program.write_text(SSH)
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("SSH_LOG", str(tmp_path / "log"))
    return tmp_path / "log"


def ssh_children() -> Iterator[psutil.Process]:
    """Children of this process, zombies too, that are an ssh or what it became; other children come and go."""
    for process in psutil.Process().children():
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.name() in ("ssh", "docker"):
                yield process


@pytest.mark.docker
def test_a_box_behind_ssh(ssh_log: Path) -> None:
    host = DockerHost("ssh://me@gpu1:2222")
    before = set(ssh_children())
    for box in both_ways(SandboxSpec(output_limit=4_000_000), host):
        with box:
            moves_a_megabyte(box)
            if box.limits["worker"] == "resident":
                assert len(ssh_log.read_text().splitlines()) < 12, "connections are kept and used again"
        assert not left_over(box.name, 1.0)
    lines = ssh_log.read_text().splitlines()
    assert all(line.endswith("-l me -p 2222 -- gpu1 docker system dial-stdio") for line in lines)
    assert set(ssh_children()) - before
    disconnect(host)
    assert not set(ssh_children()) - before, "every ssh has ended and was waited for"


@pytest.mark.docker
def test_an_ssh_that_is_not_let_in_says_so(ssh_log: Path) -> None:
    started = time.monotonic()
    with pytest.raises(
        UnavailableError, match=r"ssh://nobody@gpu1 \(nobody@gpu1: Permission denied.*`ssh nobody@gpu1 docker"
    ):
        open_sandbox("docker", host=DockerHost("ssh://nobody@gpu1"))
    assert time.monotonic() - started < 60
