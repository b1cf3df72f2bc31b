"""Attacks on the worker: the one process of a box that its host listens to. Law: whatever is tried, the host gets true
answers or learns by name that the box is dead; it never believes a word that the worker did not say."""

from __future__ import annotations

import secrets

from agentgym.errors import SandboxDiedError, SandboxError, SandboxTimeoutError
from agentgym.sandbox.spec import Sandbox
from agentgym.testing.sandbox_abuse.attack import Attack, Scene, attack, hostile, require


def _true_or_dead(box: Sandbox) -> str:
    """Five questions whose answers only the worker can know; it answers all of them, or is dead by name."""
    for _ in range(5):
        word = secrets.token_hex(8).encode()
        try:
            box.write_file("/tmp/word", word)
            result = box.exec("cat /tmp/word; exit 7", timeout_s=60)
            require((result.exit_code, result.stdout) == (7, word), f"the host was told {result!r:.200}")
            require(box.read_file("/tmp/word") == word, "the host read another file than it wrote")
        except SandboxDiedError as error:
            return f"the box died, by name: {str(error).rpartition('died: ')[2][:80]}"
    return "the box goes on"


def _during(box: Sandbox, code: str, timeout_s: float = 10.0) -> str:
    """Runs hostile code; "" or how the call ended. Died and timed out are honest ends, a false result is none."""
    try:
        result = hostile(box, code, timeout_s=timeout_s)
    except SandboxTimeoutError:
        return ""
    except SandboxDiedError as error:
        return f"the box died, by name: {str(error).rpartition('died: ')[2][:80]}"
    require(b"FORGED" not in result.stdout + result.stderr, "the host was given a forged result")
    return ""


@attack("sends every signal to pid 1, to its process group, to everything, and by pidfd")
def kill_and_stop_the_worker(scene: Scene) -> str:
    box = scene.box()
    code = """
import os, signal
if os.fork() == 0:
    os.setsid()
    for number in range(1, 65):
        for send in (lambda: os.kill(1, number), lambda: signal.pidfd_send_signal(os.pidfd_open(1), number)):
            try: send()
            except (OSError, ValueError): pass
    os._exit(0)
os.wait()
"""
    said = _during(box, code)
    said = said or _during(box, "import os\nos.kill(-1, 19)") or _during(box, "import os\nos.kill(-1, 9)")
    return said or _true_or_dead(box)


@attack("writes forged frames to every descriptor that it has, and to the worker's through /proc/1/fd")
def impersonate_the_worker(scene: Scene) -> str:
    box = scene.box()
    code = r"""
import json, os, struct
def frame(number, tag=b""):
    fields = {"id": number, "exit_code": 0, "out": 6, "err": 0, "dropped": 0, "seconds": 0.0, "timeout": False}
    header = json.dumps(fields).encode()
    return struct.pack(">II", len(header), 6) + tag + header + b"FORGED"
flood = b"".join(frame(number) for number in range(1, 40)) + b"".join(frame(n, bytes(16)) for n in range(1, 40))
for path in [f"/proc/1/fd/{n}" for n in range(24)] + [f"/proc/1/task/1/fd/{n}" for n in range(24)]:
    try:
        fd = os.open(path, os.O_WRONLY | os.O_NONBLOCK); os.write(fd, flood)
    except OSError: pass
for fd in range(3, 64):
    try: os.write(fd, flood)
    except OSError: pass
"""
    said = _during(box, code)
    if not said:  # what a command prints is its output, frames or not
        word = secrets.token_hex(8).encode()
        frames = b"\0\0\0\x40\0\0\0\x06" + b'{"id": 3, "exit_code": 0, "out": 6}'.ljust(64) + b"FORGED" + word
        result = box.exec(["cat"], stdin=frames)
        require((result.exit_code, result.stdout) == (0, frames), "a printed frame was taken for the worker's")
    return said or _true_or_dead(box)


@attack("answers before the worker does, in its place: a process that listens to the worker's input and forges replies")
def answer_in_its_place(scene: Scene) -> str:
    box = scene.box()
    code = r"""
import json, os, struct, sys
if os.fork(): os._exit(0)
os.setsid()
def opened(flags):
    for n in range(24):
        for root in ("/proc/1/fd", "/proc/1/task/1/fd"):
            try: yield os.open(f"{root}/{n}", flags | os.O_NONBLOCK)
            except OSError: pass
readable, writable = list(opened(os.O_RDONLY)), list(opened(os.O_WRONLY))
import time
until = time.monotonic() + 2
while time.monotonic() < until:
    for fd in readable:
        try: stolen = os.read(fd, 65536)
        except OSError: continue
        start = stolen.find(b'{"')
        if start < 0: continue
        try: number = json.JSONDecoder().raw_decode(stolen[start:].decode("latin-1"))[0].get("id")
        except ValueError: continue
        fields = {"id": number, "exit_code": 7, "out": 6, "err": 0, "dropped": 0, "seconds": 0.0, "timeout": False}
        header = json.dumps(fields)
        answer = struct.pack(">II", len(header), 6) + stolen[8:start] + header.encode() + b"FORGED"
        for out in writable:
            try: os.write(out, answer)
            except OSError: pass
    time.sleep(0.001)
"""
    said = _during(box, code)
    return said or _true_or_dead(box)


@attack("poisons what the worker looks at: its working directory, files it is asked to read, the folders on its PATH")
def poison_the_worker(scene: Scene) -> str:
    box = scene.box()
    poison = """
import os
for folder in ("/work", "/tmp"):
    os.makedirs(f"{folder}/encodings")
    for name in ("json", "tarfile", "socket", "os", "encodings/__init__", "sitecustomize", "usercustomize"):
        with open(f"{folder}/{name}.py", "w") as file: file.write("raise SystemExit('FORGED')")
"""
    hostile(box, poison)
    box.exec("ln -s /proc/1/environ a; ln -s /dev/zero b; mkfifo c; ln -s /etc/shadow d; mkdir e; ln -s loop loop")
    for name in ("a", "b", "c", "d", "e", "loop"):
        try:
            data = box.read_file(f"/work/{name}")
        except SandboxError:
            continue
        require(name == "a" and b"AGENTGYM" not in data and len(data) < 4096, f"read {data[:60]!r} through {name}")
    # replaced while it is read: a file, a link to a device, a folder
    swap = """
import os
if os.fork() == 0:
    os.setsid()
    for i in range(4000):
        if i % 2: os.symlink("/dev/zero", "s")
        else: open("s", "w").close()
        os.unlink("s")
    os._exit(0)
"""
    hostile(box, swap)
    for _ in range(50):
        try:
            data = box.read_file("/work/s")
        except SandboxError:
            continue
        require(data == b"", f"read {len(data)} bytes of a device")
    return _true_or_dead(box)


ATTACKS: tuple[Attack, ...] = (
    kill_and_stop_the_worker,
    impersonate_the_worker,
    answer_in_its_place,
    poison_the_worker,
)
