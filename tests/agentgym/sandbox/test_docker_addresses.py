"""The addresses of daemons: those that are refused before anything is sent, and what the environment means."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from agentgym.errors import InputError, UnavailableError
from agentgym.sandbox.docker.host import DockerHost, connect, ssh_command


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("nonsense", "must be unix:///path, ssh://host or tcp://host:port, got 'nonsense'"),
        ("http://localhost:1", "must be unix"),
        ("unix://relative", "absolute path"),
        ("tcp://10.0.0.1:2375", "not protected: whoever reaches it is root there.*DOCKER_TLS_VERIFY.*ssh://"),
        ("tcp://gpu1.example:2375", "not protected"),
        ("tcp://localhost", "needs its port"),
        ("tcp://localhost:port", "needs its port"),
        ("ssh://", "must name a machine"),
        ("ssh://-oProxyCommand=x", "must name a machine"),
        ("ssh://me:secret@gpu1", r"no password, got 'ssh://\*\*\*@gpu1'"),
        ("ssh://gpu1/run/docker.sock", "takes no path"),
    ],
)
def test_an_address_that_cannot_be_used_is_refused(url: str, why: str) -> None:
    with pytest.raises(InputError, match=why):
        DockerHost(url)


def test_certificates_must_be_complete_and_for_tcp(tmp_path: Path) -> None:
    (tmp_path / "ca.pem").write_text("")
    with pytest.raises(InputError, match=r"incomplete: .* has no cert\.pem"):
        DockerHost("tcp://10.0.0.1:2376", tmp_path)
    with pytest.raises(InputError, match="TLS goes with tcp://"):
        DockerHost("ssh://gpu1", tmp_path)


def test_the_environment_is_read_like_by_the_docker_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("DOCKER_HOST", "DOCKER_TLS_VERIFY", "DOCKER_TLS", "DOCKER_CERT_PATH"):
        monkeypatch.delenv(name, raising=False)
    assert DockerHost.of_environment() == DockerHost()
    monkeypatch.setenv("DOCKER_HOST", "ssh://me@gpu1:2222")
    command = " ".join(ssh_command(DockerHost.of_environment()))
    assert command.endswith("-l me -p 2222 -- gpu1 docker system dial-stdio")
    assert "BatchMode=yes" in command, "nobody is there to type a password"
    for name in ("ca.pem", "cert.pem", "key.pem"):
        (tmp_path / name).write_text("")
    monkeypatch.setenv("DOCKER_HOST", "tcp://10.0.0.1:2376")
    with pytest.raises(InputError, match="not protected"):
        DockerHost.of_environment()
    monkeypatch.setenv("DOCKER_CERT_PATH", str(tmp_path))
    monkeypatch.setenv("DOCKER_TLS_VERIFY", "1")
    assert DockerHost.of_environment() == DockerHost("tcp://10.0.0.1:2376", tmp_path)


def test_who_must_not_speak_to_the_daemon_is_told(tmp_path: Path) -> None:
    closed = tmp_path / "docker.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(closed))
        listener.listen()
        closed.chmod(0)
        script = f"from agentgym.sandbox.docker.host import *; connect(DockerHost('unix://{closed}'))"
        if os.geteuid() == 0:
            tmp_path.chmod(0o755)
            for parent in (tmp_path.parent, tmp_path.parent.parent):
                parent.chmod(0o755)
            script = (
                f"import os; from agentgym.sandbox.docker.host import *; os.setuid(65534); {script.split('; ', 1)[1]}"
            )
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert "Permission denied" in done.stderr
    assert "usermod -aG docker USER" in done.stderr


def test_no_ssh_on_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(UnavailableError, match="No such file or directory: 'ssh'"):
        connect(DockerHost("ssh://gpu2"))
