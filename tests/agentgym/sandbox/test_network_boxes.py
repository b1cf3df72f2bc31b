"""The way out of real boxes; what every tier shows alike is in the conformance suite."""

from __future__ import annotations

import contextlib
import http.server
import shutil
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from agentgym.errors import SandboxDiedError, SandboxTimeoutError, UnavailableError
from agentgym.sandbox import SandboxSpec, open_sandbox
from agentgym.sandbox.grading.verify import VerifierPlan, judge_spec
from agentgym.sandbox.ownership.gc import list_boxes
from agentgym.sandbox.warm.pool import SandboxPool
from agentgym.testing.sandbox_conformance.network import HostServer

TIERS = [
    pytest.param("namespace", marks=pytest.mark.bubblewrap),
    pytest.param("docker", marks=pytest.mark.docker),
    # the conformance suite shows the way out there; this is the same once more
    pytest.param("gvisor", marks=[pytest.mark.docker, pytest.mark.slow]),
]
WAIT_S = 60.0
# as a program would, with the variables of its environment; only that this world is on a loopback
PLAINLY = ["env", "-u", "no_proxy", "-u", "NO_PROXY", "python3", "-I", "-c"]


def no_way_out_is_left() -> bool:
    until = time.monotonic() + WAIT_S
    names = {"agentgym-network", "agentgym-line"}
    while names & {thread.name for thread in threading.enumerate()}:
        if time.monotonic() > until:
            return False
        time.sleep(0.01)
    return True


@pytest.fixture
def certificate(tmp_path: Path) -> Path:
    assert shutil.which("openssl"), "apt-get install openssl"
    file = tmp_path / "server.pem"
    line = "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj /CN=127.0.0.1"
    names = ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", "server.pem", "-out", "certificate.pem"]
    subprocess.run(["openssl", *line.split(), *names], cwd=tmp_path, check=True, capture_output=True)
    file.write_text(file.read_text() + (tmp_path / "certificate.pem").read_text())
    return file


@pytest.mark.parametrize("tier", TIERS)
def test_https_through_the_variables_of_the_environment(tier: str, certificate: Path) -> None:
    server = HostServer()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    code = f"""
import ssl, urllib.request
context = ssl.create_default_context(cafile="/work/ca.pem")
print(urllib.request.urlopen("https://127.0.0.1:{server.port}/secret", context=context, timeout=60).read().decode())
"""
    with server.serving(), open_sandbox(tier, SandboxSpec(allow_network=(f"127.0.0.1:{server.port}",))) as box:
        box.put({"ca.pem": (certificate.parent / "certificate.pem").read_text()})
        result = box.exec([*PLAINLY, code], timeout_s=60)
        assert result.text == "/secret\n", result.error_text


class Slow(http.server.BaseHTTPRequestHandler):
    """Answers with a part at once and the rest when it is let go."""

    go_on: threading.Event
    ended: threading.Event

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "6")
        self.end_headers()
        self.wfile.write(b"one")
        self.go_on.wait(WAIT_S)
        with contextlib.suppress(OSError):
            self.wfile.write(b"two")
        self.ended.set()

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def slow() -> Iterator[tuple[int, type[Slow]]]:
    handler = type("SlowOnce", (Slow,), {"go_on": threading.Event(), "ended": threading.Event()})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    yield server.server_address[1], handler
    handler.go_on.set()
    server.shutdown()
    server.server_close()
    thread.join()


def load(port: int) -> str:
    return f"import urllib.request as u; print(u.urlopen('http://127.0.0.1:{port}/', timeout=60).read().decode())"


@pytest.mark.parametrize("tier", TIERS)
def test_it_goes_on_beside_calls_and_between_them(tier: str, slow: tuple[int, type[Slow]]) -> None:
    port, server = slow
    with open_sandbox(tier, SandboxSpec(allow_network=(f"127.0.0.1:{port}",))) as box:
        box.write_file("/work/load.py", load(port).encode())
        box.exec("env -u no_proxy -u NO_PROXY python3 load.py > got 2>&1 &")
        until = time.monotonic() + WAIT_S
        while box.network.received_bytes == 0 and time.monotonic() < until:
            time.sleep(0.01)  # no call is under way, and yet it moves
        assert box.network.received_bytes > 0
        box.put({"tree/file": b"x" * 3_000_000})
        assert box.export(["/work/tree"]).to_tar().count(b"x" * 1000) >= 1
        server.go_on.set()
        assert box.exec("while [ ! -s got ]; do sleep 0.05; done; cat got", timeout_s=60).text == "onetwo\n"


@pytest.mark.bubblewrap
def test_a_deadline_ends_the_connection_and_not_the_box(slow: tuple[int, type[Slow]]) -> None:
    port, server = slow
    with open_sandbox("namespace", SandboxSpec(allow_network=(f"127.0.0.1:{port}",))) as box:
        with pytest.raises(SandboxTimeoutError):
            box.exec([*PLAINLY, load(port)], timeout_s=0.5)
        assert box.exec("echo on").text == "on\n"
        server.go_on.set()
        assert box.exec([*PLAINLY, load(port)], timeout_s=60).text == "onetwo\n"


@pytest.mark.bubblewrap
def test_closing_the_box_ends_what_it_had_open(slow: tuple[int, type[Slow]]) -> None:
    port, _ = slow
    box = open_sandbox("namespace", SandboxSpec(allow_network=(f"127.0.0.1:{port}",)))
    process = box.start_process([*PLAINLY, load(port)])
    until = time.monotonic() + WAIT_S
    while box.network.received_bytes == 0 and time.monotonic() < until:
        time.sleep(0.01)
    box.close()
    assert no_way_out_is_left()
    assert [(one.port, one.decision) for one in box.network.recent] == [(port, "allowed")]
    with pytest.raises(SandboxDiedError, match="it was closed"):
        box.stop_process(process)


@pytest.mark.bubblewrap
def test_a_box_that_dies_leaves_no_thread() -> None:
    with open_sandbox("namespace", SandboxSpec(allow_network=("127.0.0.1:9",), lease_s=0.5)) as box:
        from agentgym.sandbox.ownership.lease import owner

        owner().forget(box.name)
        assert no_way_out_is_left()
        with pytest.raises(SandboxDiedError):
            box.exec("true")


@pytest.mark.bubblewrap
def test_a_box_that_lies_is_dead() -> None:
    """As one whose worker was replaced: a frame of a connection that was never opened."""
    with open_sandbox("namespace", SandboxSpec(allow_network=("127.0.0.1:9",))) as box:
        box._way_out.gateway.take({"net": 7, "event": "data"}, b"x")  # type: ignore[attr-defined]
        assert no_way_out_is_left()
        with pytest.raises(SandboxDiedError, match="its worker sent a frame of a connection that is not open"):
            box.exec("true")


@pytest.mark.bubblewrap
def test_servers_in_the_box_are_asked_directly() -> None:
    code = """
import http.server, threading, urllib.request
server = http.server.HTTPServer(("127.0.0.1", 0), http.server.SimpleHTTPRequestHandler)
threading.Thread(target=server.serve_forever, daemon=True).start()
print(urllib.request.urlopen(f"http://127.0.0.1:{server.server_port}/", timeout=60).status)
"""
    with open_sandbox("namespace", SandboxSpec(allow_network=("127.0.0.1:9",))) as box:
        assert box.exec(["python3", "-c", code], timeout_s=60).text == "200\n"
        assert box.network.connections == 0


@pytest.mark.bubblewrap
def test_forks_and_pools_have_it_too() -> None:
    with HostServer().serving() as server, SandboxPool("namespace", warm=1) as pool:
        spec = SandboxSpec(allow_network=(f"127.0.0.1:{server.port}",))
        with pool.open(spec) as box, box.fork() as twin:
            for one in (box, twin):
                assert one.exec([*PLAINLY, load(server.port)], timeout_s=60).text == "/\n"
                until = time.monotonic() + WAIT_S
                while not one.network.connections and time.monotonic() < until:
                    time.sleep(0.01)
                assert (one.network.connections, one.network.refused) == (1, 0)
    assert no_way_out_is_left()


@pytest.mark.bubblewrap
def test_the_environment_of_the_spec_comes_first() -> None:
    spec = SandboxSpec(allow_network=("127.0.0.1:9",), environment={"https_proxy": "", "no_proxy": "mine"})
    with open_sandbox("namespace", spec) as box:
        assert box.exec('echo "[$https_proxy] $no_proxy $http_proxy"').text == "[] mine http://127.0.0.1:3128\n"


@pytest.mark.docker
def test_an_image_without_python_has_none() -> None:
    from agentgym.sandbox.docker.exec_tier import DockerExecSandbox

    with pytest.raises(UnavailableError, match=r"sandbox\.allow_network goes through the worker"):
        DockerExecSandbox(SandboxSpec(allow_network=("127.0.0.1:9",)))


@pytest.mark.parametrize("mode", ["apart", "together"])
def test_who_grades_has_none(mode: str) -> None:
    agent = SandboxSpec(allow_network=("pypi.org:443",))
    plan = VerifierPlan(tests={"judge.py": ""}, artifacts=("/work/a",), mode=mode)  # type: ignore[arg-type]
    assert judge_spec(plan, agent).relaxations == ()
    asked = replace(plan, judge=agent)
    assert judge_spec(asked, SandboxSpec()).relaxations == (() if mode == "apart" else agent.relaxations)


@pytest.mark.parametrize("tier", TIERS[:2])
def test_the_list_of_boxes_shows_it(tier: str) -> None:
    spec = SandboxSpec(allow_network=("pypi.org:443", "*.pythonhosted.org:443"))
    with open_sandbox(tier, spec) as box:
        (row,) = [row for row in list_boxes()[0] if row.name == box.name]
    assert row.relaxed == ("allow_network=pypi.org:443 *.pythonhosted.org:443",)


@pytest.mark.bubblewrap
def test_a_way_out_needs_no_container(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DOCKER_HOST", "unix:///nonexistent/docker.sock")
    with open_sandbox("auto", SandboxSpec(allow_network=("127.0.0.1:9",))) as box:
        assert box.tier == "namespace"
