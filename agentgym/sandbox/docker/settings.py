"""What the daemon is told about a box. Law: everything is hardened by what is written here and not by what the daemon
or the image prefers; what is not set is a hole, and what a task loosens is shown where the box is looked at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import docker.types

from agentgym.sandbox.box import network_limit
from agentgym.sandbox.docker.host import Daemon
from agentgym.sandbox.spec import WORK_DIRECTORY, SandboxSpec

GVISOR_RUNTIME = "runsc"
REGISTER_GVISOR = (
    "install gVisor (apt-get install runsc) and register it in the daemon's /etc/docker/daemon.json: "
    '{"runtimes": {"runsc": {"path": "/usr/bin/runsc"}}}, with "runtimeArgs": ["--platform=ptrace"] in a virtual '
    "machine without nested virtualization; then restart the daemon"
)
SHM_MB = 16
# gVisor's kernel and its ptrace platform hold about 40 threads and 12 to 20 for each process of the box; the processes
# themselves are counted inside, by RLIMIT_NPROC
GVISOR_THREADS, GVISOR_THREADS_PER_PROCESS = 512, 24
BYTES_PER_INODE = 4096


def container_settings(
    daemon: Daemon, tier: str, spec: SandboxSpec, labels: Mapping[str, str], volumes: Sequence[str], uid: int
) -> dict[str, Any]:
    """The arguments of create_container, but for name and command. `volumes`: those that the image declares; Docker
    would make folders of the host's disk for them, without a limit, so they become folders in memory like the rest."""
    host_config = daemon.api.create_host_config(**_host_config(daemon, tier, spec, volumes))
    if daemon.has_api(1, 41):
        host_config["CgroupnsMode"] = "private"  # 1.41 is Docker 20.10; an older engine cannot
    return {
        "image": spec.image,
        "user": f"{uid}:{uid}",
        "working_dir": WORK_DIRECTORY,
        "hostname": "box",
        "stdin_open": True,
        "environment": {},
        "use_config_proxy": False,  # the client's configuration may hold a proxy with its password
        "healthcheck": {"test": ["NONE"]},
        "labels": dict(labels),
        "host_config": host_config,
    }


def _host_config(daemon: Daemon, tier: str, spec: SandboxSpec, volumes: Sequence[str]) -> dict[str, Any]:
    memory = spec.memory_mb * 2**20
    disk = spec.tmpfs_mb * 2**20
    owned = owner_uid(spec)
    limits = {"core": 0, "nofile": 1024, "fsize": disk}
    if tier == "gvisor":
        limits["nproc"] = spec.pids  # of the box alone: its kernel counts nobody else's
    options = f"rw,exec,nosuid,nodev,size={disk},uid={owned},gid={owned},mode=0755"
    if tier != "gvisor":  # gVisor counts an inode as memory of the box
        options += f",nr_inodes={disk // BYTES_PER_INODE}"
    return {
        "runtime": GVISOR_RUNTIME if tier == "gvisor" else None,
        "network_mode": spec.network,
        "mem_limit": memory,
        "memswap_limit": memory,
        "nano_cpus": int(spec.cpus * 1e9),
        "pids_limit": spec.pids if tier != "gvisor" else GVISOR_THREADS + GVISOR_THREADS_PER_PROCESS * spec.pids,
        "cap_drop": ["ALL"],
        "security_opt": ["no-new-privileges"],  # the daemon's own seccomp profile stays; `seccomp_problem` sees to it
        "privileged": False,
        "read_only": not spec.writable_root,
        "tmpfs": dict.fromkeys(("/tmp", WORK_DIRECTORY, *spec.folders, *volumes), options),
        "shm_size": SHM_MB * 2**20,
        "ipc_mode": "private",
        "init": False,
        "auto_remove": True,
        "binds": [],
        "log_config": docker.types.LogConfig(type="none"),  # a flood of output must not fill the daemon's disk
        "ulimits": [docker.types.Ulimit(name=name, soft=value, hard=value) for name, value in limits.items()],
    }


def owner_uid(spec: SandboxSpec) -> int:
    """Who the commands of the box are, and whose its writable folders."""
    return 0 if spec.run_as_root else spec.uid


def enforced(tier: str, spec: SandboxSpec, worker: str) -> dict[str, str]:
    """`Sandbox.limits`: what enforces each limit, how the box is worked, and what was loosened."""
    limits = dict.fromkeys(("memory", "pids", "cpus"), "docker") | {"disk": "tmpfs size", "worker": worker}
    limits |= {"system calls": "docker's seccomp profile", **network_limit(spec)}
    if tier == "gvisor":
        # its kernel lives in the same control group and shows the box no signal to die by
        limits |= {"memory": "docker, and the whole box ends", "pids": "rlimit", "system calls": "gVisor"}
    if spec.network != "none":
        limits["network"] = f"relaxed: {spec.network}, the box reaches what the host of the daemon reaches"
    if spec.writable_root:
        limits["root"] = "relaxed: writable, and its size is not limited"
    if spec.run_as_root:
        limits["user"] = "relaxed: root, without a capability"
    return limits
