"""Owners that are not root: an ordinary user, one who may not make user namespaces, and the root of a user namespace
(as in a rootless container). Played by a root's test, which becomes nobody with a copy of the package."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import agentgym

pytestmark = [
    pytest.mark.bubblewrap,
    pytest.mark.skipif(os.geteuid() != 0, reason="becomes other users; as one of those, the other tests say it all"),
]
PYTHON = "/usr/bin/python3"
NOBODY = 65534
OWNER = """
import json, os, sys
sys.path.insert(0, sys.argv[1])
from agentgym.errors import AgentGymError
from agentgym.sandbox import SandboxSpec, open_sandbox
from agentgym.sandbox.namespace.tier import namespace_problem
said = {"uid": os.geteuid(), "problem": namespace_problem()}
try:
    with open_sandbox("namespace", SandboxSpec(uid=10002, folders=("/logs",))) as box:
        said["limits"] = dict(box.limits)
        said["ids"] = box.exec("id -u; id -g; id -G").text.split()
        said["status"] = box.exec(["cat", "/proc/self/status"]).text
        said["bomb"] = box.exec(["python3", "-c", "x = bytearray(2**32)"]).error_text
        said["root"] = box.exec("touch /logs/file && touch /file").exit_code
except AgentGymError as error:
    said["error"] = [type(error).__name__, str(error)]
print(json.dumps(said))
"""
LIMITS = {
    "memory": "rlimit (of each process)",
    "pids": "rlimit",
    "cpus": "none: no cgroup can be made here; only the deadline of a call ends what spins",
    "disk": "tmpfs size (of bytes; nothing counts the files)",
    "seccomp": "filter",
}


@pytest.fixture(scope="module")
def place() -> Iterator[Path]:
    """A folder that nobody can read, with the package in it, and a runtime folder of nobody's own."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        compiled = shutil.ignore_patterns("__pycache__")  # files come and go there, while others run
        shutil.copytree(Path(agentgym.__file__).parent, folder / "agentgym", ignore=compiled)
        subprocess.run(["chmod", "-R", "a+rX", name], check=True)
        (folder / "runtime").mkdir(mode=0o700)
        os.chown(folder / "runtime", NOBODY, NOBODY)
        yield folder


def owner_says(place: Path, *within: str) -> dict:
    if not os.access(PYTHON, os.X_OK):
        pytest.skip(f"no {PYTHON}, the only Python that nobody can start")
    became = ["setpriv", "--reuid", str(NOBODY), "--regid", str(NOBODY), "--clear-groups", "--"]
    environment = {"PATH": "/usr/bin:/bin", "XDG_RUNTIME_DIR": str(place / "runtime")}
    done = subprocess.run(
        [*became, *within, PYTHON, "-c", OWNER, str(place)],
        capture_output=True,
        text=True,
        timeout=240,
        env=environment,
        cwd="/",
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def is_hardened(said: dict) -> None:
    assert "error" not in said, said["error"]
    assert said["problem"] is None
    landlock = said["limits"].pop("landlock")
    assert landlock.startswith(("ABI ", "none: "))
    assert said["limits"] == LIMITS
    assert said["ids"] == ["10002"] * 3
    assert "\nSeccomp:\t2\n" in said["status"]
    assert "\nNoNewPrivs:\t1\n" in said["status"]
    assert "\nCapBnd:\t0000000000000000\n" in said["status"]
    assert "MemoryError" in said["bomb"]
    assert said["root"] == 1, "writable in its folders, nowhere else"


def test_an_ordinary_user(place: Path) -> None:
    said = owner_says(place)
    assert said["uid"] == NOBODY
    is_hardened(said)


def test_the_root_of_a_user_namespace(place: Path) -> None:
    """It has one user only, so the box's cannot be another one outside."""
    said = owner_says(place, "unshare", "--user", "--map-root-user")
    assert said["uid"] == 0
    is_hardened(said)


def test_one_who_may_not_make_user_namespaces(place: Path) -> None:
    """The kernel's own refusal: of a user namespace with none to spare."""
    forbid = 'echo 0 > /proc/sys/user/max_user_namespaces; exec "$@"'
    said = owner_says(place, "unshare", "--user", "--map-root-user", "sh", "-c", forbid, "sh")
    kind, message = said["error"]
    assert kind == "UnavailableError"
    for text in (said["problem"], message):
        assert "bwrap: Creating new namespace failed" in text
        assert "sysctl user.max_user_namespaces > 0" in text
        assert "sandbox.tier=docker" in text
