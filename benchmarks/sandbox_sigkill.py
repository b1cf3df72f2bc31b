"""`kill -9` of an owner with 16 boxes live and 4 being created, in each tier: what is left 30 seconds later. Beside it
the same with plain containers of the SDK, whose owner nobody watches."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

from benchmarks.leftovers import count, difference
from benchmarks.plain_docker import LABEL, available_tiers, plain_client

_LIVE, _BEING_CREATED = 16, 4
_AFTER_S = 30.0
_OWNER = """
import sys, threading
from agentgym.sandbox import SandboxSpec, open_sandbox
tier, live, more = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
boxes = [open_sandbox(tier, SandboxSpec()) for _ in range(live)]
for box in boxes:
    box.exec("sleep 600 >/dev/null 2>&1 &")
for _ in range(more):
    threading.Thread(target=lambda: boxes.append(open_sandbox(tier, SandboxSpec()))).start()
print("ready", flush=True)
threading.Event().wait()
"""
_PLAIN_OWNER = """
import sys, threading
import docker
from benchmarks.plain_docker import start_plain
client = docker.from_env(timeout=120)
for _ in range(int(sys.argv[2])):
    start_plain(client)
for _ in range(int(sys.argv[3])):
    threading.Thread(target=lambda: start_plain(client)).start()
print("ready", flush=True)
threading.Event().wait()
"""


def run(quick: bool) -> dict[str, object]:
    live, more = (2, 1) if quick else (_LIVE, _BEING_CREATED)
    left: dict[str, int] = {}
    with plain_client() as client:
        for tier in available_tiers():
            before = count(client, mark="none of this name")
            mark = f"agentgym-{_kill_owner(_OWNER, tier, live, more)}-"
            time.sleep(_AFTER_S)
            found = difference(before, count(client, mark))
            print(f"{tier}: {found}", file=sys.stderr)
            left[tier] = sum(max(0, number) for name, number in found.items() if name != "leaked_fds")
        _kill_owner(_PLAIN_OWNER, "plain", live, more)
        time.sleep(5.0)
        plain = len(client.api.containers(all=True, filters={"label": LABEL}))
    return {
        "boxes": live,
        "being_created": more,
        f"left_after_{_AFTER_S:.0f}s": sum(left.values()),
        "left_by_tier": [f"{tier} {number}" for tier, number in left.items()],
        "plain_docker_left": plain,
    }


def _kill_owner(source: str, tier: str, live: int, more: int) -> int:
    """Starts an owner, waits until its boxes live and others are under way, and kills it; its pid."""
    command = [sys.executable, "-c", source, tier, str(live), str(more)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        if owner.stdout.readline().strip() != "ready":
            raise RuntimeError(f"the owner of {tier} boxes ended with code {owner.wait()}")
        time.sleep(0.05)
        owner.send_signal(signal.SIGKILL)
    return owner.pid
