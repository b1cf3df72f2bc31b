"""The Docker tiers: every default that hardens a box, seen from outside and from inside; what a task may loosen and how
that shows; what happens when something is missing; and that nothing stays."""

from __future__ import annotations

import io
import logging
import os
import tarfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import docker
import pytest

from agentgym.errors import SandboxDiedError, SandboxError, UnavailableError
from agentgym.sandbox import BASE_IMAGE, SandboxSpec, open_sandbox
from agentgym.sandbox import box as box_module
from agentgym.sandbox.docker import settings as docker_settings
from agentgym.sandbox.docker.host import connect
from agentgym.sandbox.docker.images import has_image, import_image
from agentgym.sandbox.docker.tier import docker_problem
from agentgym.sandbox.ownership.lease import owner
from agentgym.sandbox.spec import VERIFIER_UID, Sandbox

pytestmark = pytest.mark.docker
SPEC = SandboxSpec(memory_mb=96, cpus=0.5, pids=33, tmpfs_mb=16, folders=("/logs",))


@pytest.fixture(scope="module")
def client() -> Iterator[docker.DockerClient]:
    client = docker.from_env()
    yield client
    client.close()


@pytest.fixture(scope="module", params=["docker", "gvisor"])
def running(request: pytest.FixtureRequest, client: docker.DockerClient) -> Iterator[tuple[Sandbox, dict[str, Any]]]:
    """A box and what the daemon says of it."""
    if request.param == "gvisor" and "runsc" not in client.info()["Runtimes"]:
        pytest.skip("the Docker daemon has no runtime runsc")
    with open_sandbox(request.param, SPEC) as box:
        yield box, client.api.inspect_container(box.name)


def ours(client: docker.DockerClient) -> set[str]:
    found = client.api.containers(all=True, filters={"label": f"agentgym.owner={owner().owner_id}"})
    return {container["Names"][0] for container in found}


@pytest.fixture
def nothing_stays(client: docker.DockerClient) -> Iterator[None]:
    before = ours(client)
    yield
    until = time.monotonic() + 60
    while ours(client) != before:  # a daemon's list may lag behind what it says of the one that was removed
        assert time.monotonic() < until, ours(client) ^ before
        time.sleep(0.05)


def a_tar(**files: bytes) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, data in (files or {"hello": b"hello"}).items():
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode = len(data), 0o755
            archive.addfile(entry, io.BytesIO(data))
    return buffer.getvalue()


# ------------------------------------------------------------------------------------------ the defaults, from outside


def test_limits_of_memory_processors_and_processes(running: tuple[Sandbox, dict[str, Any]]) -> None:
    box, seen = running
    host = seen["HostConfig"]
    assert host["Memory"] == 96 * 2**20
    assert host["MemorySwap"] == host["Memory"], "no swap beside it"
    assert host["NanoCpus"] == 500_000_000
    assert not host["OomKillDisable"]
    limits = {limit["Name"]: (limit["Soft"], limit["Hard"]) for limit in host["Ulimits"]}
    wanted = {"core": (0, 0), "nofile": (1024, 1024), "fsize": (16 * 2**20, 16 * 2**20)}
    if box.tier == "gvisor":  # its threads are no processes of the box, which are counted inside
        assert host["PidsLimit"] == docker_settings.GVISOR_THREADS + 33 * docker_settings.GVISOR_THREADS_PER_PROCESS
        assert limits == {**wanted, "nproc": (33, 33)}
    else:
        assert host["PidsLimit"] == 33
        assert limits == wanted


def test_no_network(running: tuple[Sandbox, dict[str, Any]]) -> None:
    _, seen = running
    assert seen["HostConfig"]["NetworkMode"] == "none"
    assert list(seen["NetworkSettings"]["Networks"]) == ["none"]
    assert not seen["NetworkSettings"]["Ports"]
    assert not seen["HostConfig"]["ExtraHosts"]
    assert not seen["HostConfig"]["Links"]


def test_no_privileges(running: tuple[Sandbox, dict[str, Any]]) -> None:
    box, seen = running
    host = seen["HostConfig"]
    assert host["CapDrop"] == ["ALL"]
    assert not host["CapAdd"]
    assert host["Privileged"] is False
    assert host["SecurityOpt"] == ["no-new-privileges"], "and no word that would switch the seccomp profile off"
    assert seen["Config"]["User"] == "10001:10001"
    assert not host["GroupAdd"]
    assert not host["Devices"]
    assert not host["DeviceRequests"]
    assert not host["DeviceCgroupRules"]
    assert host["Runtime"] == ("runsc" if box.tier == "gvisor" else "runc")


def test_the_system_calls_are_filtered(running: tuple[Sandbox, dict[str, Any]], client: docker.DockerClient) -> None:
    box, _ = running
    if box.tier == "gvisor":
        assert box.limits["system calls"] == "gVisor"
        assert "4.4.0" in box.exec(["cat", "/proc/version"]).text, "the kernel that answers is not the host's"
        return
    options = client.info()["SecurityOptions"]
    assert any(option.startswith("name=seccomp") and "unconfined" not in option for option in options), options
    assert box.limits["system calls"].startswith("docker's seccomp profile, and a filter")
    for process in ("1", "self"):
        assert box.exec(f"grep Seccomp: /proc/{process}/status").stdout.split() == [b"Seccomp:", b"2"]


def test_a_read_only_root_and_folders_of_a_size(running: tuple[Sandbox, dict[str, Any]]) -> None:
    _, seen = running
    host = seen["HostConfig"]
    assert host["ReadonlyRootfs"] is True
    assert set(host["Tmpfs"]) == {"/tmp", "/work", "/logs"}
    for options in host["Tmpfs"].values():
        words = options.split(",")
        assert {"nosuid", "nodev", "size=16777216", "uid=10001", "gid=10001", "mode=0755"} <= set(words)
    assert host["ShmSize"] == 16 * 2**20


def test_nothing_of_the_host_is_mounted(running: tuple[Sandbox, dict[str, Any]]) -> None:
    _, seen = running
    assert seen["Mounts"] == []
    assert not seen["HostConfig"]["Binds"]
    assert not seen["HostConfig"]["VolumesFrom"]
    assert not seen["Config"]["Volumes"]


def test_namespaces_of_its_own(running: tuple[Sandbox, dict[str, Any]]) -> None:
    box, seen = running
    host = seen["HostConfig"]
    assert host["IpcMode"] == "private"
    assert host["PidMode"] == ""
    assert host["UTSMode"] == ""
    assert host["CgroupnsMode"] == "private"
    assert seen["Config"]["Hostname"] == "box"
    assert box.exec(["cat", "/proc/self/cgroup"]).text.count("docker") == 0, "its place in the host's tree is hidden"


def test_what_its_daemon_does_for_it(running: tuple[Sandbox, dict[str, Any]]) -> None:
    box, seen = running
    host, config = seen["HostConfig"], seen["Config"]
    assert host["LogConfig"]["Type"] == "none", "a flood of output must not fill the daemon's disk"
    assert host["AutoRemove"] is True
    assert host["RestartPolicy"]["Name"] in ("", "no")
    assert host["Init"] is False, "the worker is pid 1 and nothing else holds its streams"
    assert config["StdinOnce"] is True, "when the owner is gone, the input ends"
    assert config["Healthcheck"] == {"Test": ["NONE"]}
    assert config["Env"] is None or [entry.partition("=")[0] for entry in config["Env"]] == ["PATH"]
    assert config["WorkingDir"] == "/work"
    assert not config["Tty"]
    labels = config["Labels"]
    assert (labels["agentgym.owner"], labels["agentgym.box"]) == (owner().owner_id, box.name)
    assert labels["agentgym.relaxed"] == ""


# ------------------------------------------------------------------------------------------- the defaults, from inside


def test_the_worker_is_pid_1_and_reaps(running: tuple[Sandbox, dict[str, Any]]) -> None:
    box, _ = running
    assert box.exec(["cat", "/proc/1/comm"]).text.startswith("python3")
    orphans = "import os\nfor _ in range(12):\n if os.fork() == 0:\n  if os.fork() == 0: os._exit(0)\n  os._exit(0)"
    for _ in range(4):
        assert box.exec(["python3", "-I", "-c", orphans], timeout_s=30).exit_code == 0
        until = time.monotonic() + 60
        look = "cut -d' ' -f3 /proc/[0-9]*/stat"
        while len(states := box.exec(look).stdout.split()) > 4 or b"Z" in states:  # the next ones need the room
            assert time.monotonic() < until, states


def test_its_disk_holds_no_more_files_than_bytes(client: docker.DockerClient) -> None:
    with open_sandbox("docker", SandboxSpec(tmpfs_mb=1)) as box:
        result = box.exec("i=0; while (: > f$i) 2>/dev/null; do i=$((i+1)); done; echo $i", timeout_s=300)
        assert 100 < int(result.text) < 256, "one for 4 KiB"


def test_what_the_image_prefers_is_not_done(client: docker.DockerClient) -> None:
    """But for its environment. A volume is a folder of the box: Docker would make one of the host's disk, without a
    limit."""
    name = f"agentgym/test-volume:{os.getpid()}"
    wishes = 'ENTRYPOINT ["false"]\nCMD ["never"]\nUSER root\nWORKDIR /etc\nHEALTHCHECK CMD false\nSTOPSIGNAL SIGINT\n'
    dockerfile = io.BytesIO(f"FROM {BASE_IMAGE}\nVOLUME /data\nENV GREETING=hello\n{wishes}".encode())
    list(client.api.build(fileobj=dockerfile, tag=name, rm=True, decode=True))
    try:
        with open_sandbox("docker", SandboxSpec(image=name, tmpfs_mb=4)) as box:
            seen = client.api.inspect_container(box.name)
            assert seen["Mounts"] == []
            assert seen["Config"]["Healthcheck"] == {"Test": ["NONE"]}
            assert box.exec("pwd; echo $GREETING").text == "/work\nhello\n"
            assert box.exec("id -u; head -c 5000000 /dev/zero > /data/f").stdout == b"10001\n"
            assert len(box.read_file("/data/f")) == 4 * 2**20
            box.write_file("/data/f", b"kept")
            with box.fork() as twin:
                assert twin.read_file("/data/f") == b"kept"
    finally:
        client.api.remove_image(name, force=True)


# ------------------------------------------------------------------------------------------------ one client for all


def test_threads_share_a_client_and_a_forked_child_has_its_own(nothing_stays: None) -> None:
    daemon = connect()
    with ThreadPoolExecutor(6) as threads:
        boxes = list(threads.map(lambda _: open_sandbox("docker"), range(6)))
        outputs = list(threads.map(lambda i: boxes[i].exec(["echo", str(i)]).text, range(6)))
        list(threads.map(lambda box: box.close(), boxes))
    assert outputs == [f"{i}\n" for i in range(6)]
    assert len({box.name for box in boxes}) == 6
    assert connect() is daemon
    child = os.fork()
    if not child:
        os._exit(0 if connect() is not daemon and connect().info()["SecurityOptions"] else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


# ----------------------------------------------------------------------------------------------------- what is loosened


def test_what_is_loosened_is_shown(client: docker.DockerClient, caplog: pytest.LogCaptureFixture) -> None:
    box_module.WARNED.clear()
    spec = SandboxSpec(network="bridge", writable_root=True, run_as_root=True)
    with caplog.at_level(logging.WARNING, "agentgym.sandbox"):
        for _ in range(2):
            with open_sandbox("docker", spec) as box:
                seen = client.api.inspect_container(box.name)
                assert seen["HostConfig"]["NetworkMode"] == "bridge"
                assert seen["HostConfig"]["ReadonlyRootfs"] is False
                assert seen["Config"]["User"] == "0:0"
                assert seen["HostConfig"]["CapDrop"] == ["ALL"], "root, but without a capability"
                assert seen["Config"]["Labels"]["agentgym.relaxed"] == "network=bridge,writable_root,run_as_root"
                assert {"network", "root", "user"} <= set(box.limits)
                assert all(box.limits[key].startswith("relaxed: ") for key in ("network", "root", "user"))
                result = box.exec(
                    "id -u; echo 1 > /etc/mine && cat /etc/mine; grep CapEff /proc/self/status; ls /sys/class/net"
                )
                assert result.text.split()[:5] == ["0", "1", "CapEff:", "0" * 16, "eth0"]
    warnings = [record.getMessage() for record in caplog.records if "not fully hardened" in record.getMessage()]
    assert len(warnings) == 1, "once for each combination"
    assert "network=bridge, writable_root, run_as_root" in warnings[0]


def test_a_verifier_has_its_own_uid_and_folders(client: docker.DockerClient) -> None:
    with open_sandbox("docker", SandboxSpec(uid=VERIFIER_UID, folders=("/logs/verifier",))) as box:
        assert client.api.inspect_container(box.name)["Config"]["User"] == "10002:10002"
        assert box.exec("id -u; echo ok > /logs/verifier/x; cat /logs/verifier/x").text == "10002\nok\n"
        assert box.exec("echo x > /logs/y").exit_code != 0


def test_a_writable_root_is_forked_too(client: docker.DockerClient) -> None:
    of_ours = {"label": f"agentgym.owner={owner().owner_id}"}
    with open_sandbox("docker", SandboxSpec(writable_root=True, run_as_root=True)) as box:
        box.exec("echo root > /etc/mine; echo work > /work/mine; (while :; do echo x >> /etc/growing; done) &")
        with box.fork() as twin:
            assert twin.exec("cat /etc/mine /work/mine").text == "root\nwork\n"
            assert not box.frozen, "the source goes on"
            image = client.api.inspect_container(twin.name)["Image"]
            assert client.api.inspect_image(image)["Config"]["Labels"]["agentgym.owner"] == owner().owner_id
            twin.exec("echo changed > /etc/mine")
            with twin.fork() as third:
                assert third.exec(["cat", "/etc/mine"]).text == "changed\n"
                twin.close()
                assert third.exec(["cat", "/etc/mine"]).text == "changed\n", "a fork outlives what it was made of"
        assert box.exec(["cat", "/etc/mine"]).text == "root\n"
    assert client.api.images(all=True, filters=of_ours) == [], "no image of a fork stays"


def test_gvisor_refuses_to_fork_a_writable_root(client: docker.DockerClient) -> None:
    if "runsc" not in client.info()["Runtimes"]:
        pytest.skip("the Docker daemon has no runtime runsc")
    with (
        open_sandbox("gvisor", SandboxSpec(writable_root=True)) as box,
        pytest.raises(SandboxError, match=r"gVisor keeps what is written.*sandbox\.tier=docker"),
    ):
        box.fork()


# ------------------------------------------------------------------------------------------------------ what is missing


def test_a_missing_image_names_the_build_command(client: docker.DockerClient, nothing_stays: None) -> None:
    missing = SandboxSpec(image="agentgym/not-there:1")
    with pytest.raises(UnavailableError, match=r"not-there.*python -m agentgym\.sandbox\.base_image"):
        open_sandbox("docker", missing)
    assert "not-there" in str(docker_problem(missing.image))
    assert docker_problem(BASE_IMAGE) is None


def test_an_image_with_neither_python_nor_a_shell_is_refused(client: docker.DockerClient, nothing_stays: None) -> None:
    name = f"agentgym/test-empty:{os.getpid()}"
    import_image(iter([a_tar()]), name, {"agentgym.test": "1"})
    try:
        with pytest.raises(
            UnavailableError, match=rf"the image {name} has neither python3 nor a shell \(sh\).*add one"
        ):
            open_sandbox("docker", SandboxSpec(image=name))
    finally:
        client.api.remove_image(name, force=True)


def test_a_stream_that_breaks_makes_no_image() -> None:
    name = f"agentgym/test-broken:{os.getpid()}"

    def broken() -> Iterator[bytes]:
        yield a_tar()[:700]
        raise SandboxError("tar failed")

    with pytest.raises(SandboxError, match="tar failed"):
        import_image(broken(), name, {})
    time.sleep(0.3)
    assert not has_image(name)


def test_a_container_removed_by_others_is_a_dead_box(client: docker.DockerClient, nothing_stays: None) -> None:
    with open_sandbox("docker", SandboxSpec()) as box:
        client.api.remove_container(box.name, force=True)
        with pytest.raises(SandboxDiedError, match=f"{box.name} died: it ended and was removed"):
            box.exec("true")
        with pytest.raises(SandboxDiedError, match=box.name):
            box.ping()


def test_no_daemon_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DOCKER_HOST", "unix:///nonexistent/docker.sock")
    with pytest.raises(
        UnavailableError, match=r"no Docker daemon answers at unix:///nonexistent.*sandbox\.tier=namespace"
    ):
        open_sandbox("docker", SandboxSpec())


def test_nothing_stays_of_a_box_that_could_not_start(client: docker.DockerClient, nothing_stays: None) -> None:
    with pytest.raises(SandboxError, match=r"container agentgym-.* cannot be started"):
        open_sandbox("docker", SandboxSpec(memory_mb=1))  # less than the daemon takes
    assert not list((owner().folder / "boxes").glob("*.begun"))
