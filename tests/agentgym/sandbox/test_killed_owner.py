"""`kill -9` of the owner leaves nothing: no container, no process, in either tier."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest

TIERS = [pytest.param("docker", marks=pytest.mark.docker), pytest.param("namespace", marks=pytest.mark.bubblewrap)]
OWNER = """
import sys, threading
from agentgym.sandbox import open_sandbox
box = open_sandbox(sys.argv[1])
box.exec(f"sleep 600 {sys.argv[2]} 2>/dev/null || sh -c 'while :; do sleep 1; done' {sys.argv[2]} >/dev/null 2>&1 &")
threading.Thread(target=lambda: box.exec("trap '' TERM HUP INT; while :; do :; done", timeout_s=600)).start()
print(box.name, flush=True)
"""


def running(mark: str) -> list[int]:
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                if mark.encode() in (folder / "cmdline").read_bytes():
                    found.append(int(folder.name))
            except OSError:
                continue
    return found


def containers(name: str) -> list[str]:
    import docker

    client = docker.from_env()
    try:
        return [entry["Id"] for entry in client.api.containers(all=True, filters={"name": name})]
    finally:
        client.close()


@pytest.mark.parametrize("tier", TIERS)
def test_a_killed_owner_leaves_nothing(tier: str) -> None:
    mark = f"mark-{uuid.uuid4().hex}"
    owner = subprocess.Popen([sys.executable, "-c", OWNER, tier, mark], stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None
    with owner.stdout:
        name = owner.stdout.readline().strip()
    inside = [pid for pid in running(mark) if pid != owner.pid]
    assert name.startswith("agentgym-")
    assert inside, "the box should be running something"
    owner.send_signal(signal.SIGKILL)
    owner.wait()
    until = time.monotonic() + 15
    while time.monotonic() < until and (running(mark) or (tier == "docker" and containers(name))):
        time.sleep(0.1)
    assert running(mark) == []
    assert tier != "docker" or containers(name) == []
