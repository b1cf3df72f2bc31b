"""The Docker tier: what the daemon was told, what happens when something is missing, and that nothing stays."""

from __future__ import annotations

import io
import os
import socket
import tarfile
import time
from collections.abc import Iterator

import docker
import pytest

from agentgym.errors import SandboxError, UnavailableError
from agentgym.sandbox import BASE_IMAGE, SandboxSpec, open_sandbox
from agentgym.sandbox.docker import DockerSandbox, docker_problem
from agentgym.sandbox.images import has_image, import_image
from agentgym.sandbox.lease import owner

pytestmark = pytest.mark.docker


@pytest.fixture(scope="module")
def client() -> Iterator[docker.DockerClient]:
    client = docker.from_env()
    yield client
    client.close()


def ours(client: docker.DockerClient) -> list[str]:
    found = client.api.containers(all=True, filters={"label": f"agentgym.owner={owner().owner_id}"})
    return [container["Names"][0] for container in found]


@pytest.fixture
def image_without_python(client: docker.DockerClient) -> Iterator[str]:
    name = f"agentgym/test-empty:{os.getpid()}"
    import_image(iter([a_tar()]), name, {"agentgym.test": "1"})
    yield name
    client.api.remove_image(name, force=True)


def a_tar() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        entry = tarfile.TarInfo("hello")
        entry.size = 5
        archive.addfile(entry, io.BytesIO(b"hello"))
    return buffer.getvalue()


def test_the_daemon_is_told_every_limit(client: docker.DockerClient) -> None:
    spec = SandboxSpec(memory_mb=96, cpus=0.5, pids=33, tmpfs_mb=16)
    with DockerSandbox(spec) as box:
        seen = client.api.inspect_container(box.name)
        host, config = seen["HostConfig"], seen["Config"]
        assert (host["Memory"], host["MemorySwap"]) == (96 * 2**20, 96 * 2**20)
        assert (host["NanoCpus"], host["PidsLimit"]) == (500_000_000, 33)
        assert host["NetworkMode"] == "none"
        assert host["CapDrop"] == ["ALL"]
        assert not host["CapAdd"]
        assert not host["Privileged"]
        assert host["ReadonlyRootfs"]
        assert host["SecurityOpt"] == ["no-new-privileges"]
        assert host["IpcMode"] == "private"
        assert not host["PidMode"]
        assert not host["Binds"]
        assert not host["Devices"]
        assert seen["Mounts"] == []
        assert host["LogConfig"]["Type"] == "none"
        assert host["AutoRemove"]
        assert host["Init"] is False
        assert config["User"] == "10001:10001"
        assert config["StdinOnce"]
        assert config["Labels"]["agentgym.owner"] == owner().owner_id
        assert config["Labels"]["agentgym.box"] == box.name
        assert box.exec("grep Seccomp: /proc/self/status").stdout.split() == [b"Seccomp:", b"2"]
        assert ours(client) == [f"/{box.name}"]
    assert ours(client) == []


def test_a_missing_image_names_the_build_command(client: docker.DockerClient) -> None:
    missing = SandboxSpec(image="agentgym/not-there:1")
    with pytest.raises(UnavailableError, match=r"not-there.*python -m agentgym\.sandbox\.base_image"):
        open_sandbox("docker", missing)
    assert "not-there" in str(docker_problem(missing.image))
    assert docker_problem(BASE_IMAGE) is None
    assert ours(client) == []


def test_an_image_without_python_is_refused(client: docker.DockerClient, image_without_python: str) -> None:
    with pytest.raises(UnavailableError, match=f"{image_without_python} has no python3"):
        open_sandbox("docker", SandboxSpec(image=image_without_python))
    assert ours(client) == []


def test_a_stream_that_breaks_makes_no_image() -> None:
    name = f"agentgym/test-broken:{os.getpid()}"

    def broken() -> Iterator[bytes]:
        yield a_tar()[:700]
        raise SandboxError("tar failed")

    with pytest.raises(SandboxError):
        import_image(broken(), name, {})
    time.sleep(0.3)
    assert not has_image(name)


def test_a_container_removed_by_others_is_a_dead_box(client: docker.DockerClient) -> None:
    from agentgym.errors import SandboxDiedError

    with DockerSandbox(SandboxSpec()) as box:
        client.api.remove_container(box.name, force=True)
        with pytest.raises(SandboxDiedError, match=box.name):
            box.exec("true")
    assert ours(client) == []


def test_no_daemon_is_said_quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    silent = socket.create_server(("127.0.0.1", 0))  # accepts and never answers
    with silent:
        for address in ("unix:///nonexistent/docker.sock", f"tcp://127.0.0.1:{silent.getsockname()[1]}"):
            monkeypatch.setenv("DOCKER_HOST", address)
            started = time.monotonic()
            with pytest.raises(UnavailableError, match=r"no Docker daemon answers.*sandbox\.tier=namespace"):
                open_sandbox("docker", SandboxSpec())
            assert time.monotonic() - started < 10
