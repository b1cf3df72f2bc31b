"""What every sandbox tier must be, as checks that look from inside a running box. Law: a check asks the box what it can
do, never the host what was configured, so a new tier passes by being isolated and not by being written like ours.

A tier's tests parametrise over `CHECKS` and give each a way to open a box:
`@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)`, then `check(DockerSandbox)`.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

from agentgym.errors import InputError, SandboxDiedError, SandboxError, SandboxLimitError, SandboxTimeoutError
from agentgym.sandbox.spec import ExecResult, Sandbox, SandboxSpec

Opener = Callable[[SandboxSpec], Sandbox]
Check = Callable[[Opener], None]


def python(box: Sandbox, code: str, timeout_s: float = 30.0) -> ExecResult:
    """Runs a Python program in the box."""
    return box.exec(["python3", "-I", "-c", code], timeout_s=timeout_s)


def answer(box: Sandbox, code: str) -> object:
    """What a Python program in the box prints as JSON."""
    result = python(box, code)
    assert result.exit_code == 0, result.stderr.decode(errors="replace")
    return json.loads(result.stdout)


def raises(kind: type[Exception], call: Callable[[], object]) -> Exception:
    """The error, which must be exactly of this class."""
    raised: list[Exception] = []
    try:
        call()
    except kind as error:
        raised.append(error)
    assert [type(error) for error in raised] == [kind], f"{kind.__name__} was not raised, but {raised!r}"
    return raised[0]


# -------------------------------------------------------------------------------------------------------- the calls


def runs_commands(open_box: Opener) -> None:
    with open_box(SandboxSpec()) as box:
        result = box.exec("cat; echo $((6 * 7)); echo err >&2; exit 3", stdin=b"in \x00\xff\n")
        assert (result.exit_code, result.stdout, result.stderr) == (3, b"in \x00\xff\n42\n", b"err\n")
        assert (result.dropped_bytes, result.seconds > 0) == (0, True)
        assert box.exec(["printf", "%s|", "a b", "$HOME", ""]).stdout == b"a b|$HOME||"
        assert box.exec("pwd").stdout == b"/work\n"
        assert box.exec("pwd", cwd="/usr/bin").stdout == b"/usr/bin\n"
        assert box.exec("pwd").stdout == b"/work\n", "cwd must hold for one call only"
        assert box.exec("kill -TERM $$").exit_code == -15
        big = os.urandom(1_000_000)
        assert box.exec("sha256sum", stdin=big).stdout == box.exec("cat > f; sha256sum < f", stdin=big).stdout
        assert box.exec("exec true", stdin=big).exit_code == 0, "a command need not read its input"


def moves_files(open_box: Opener) -> None:
    with open_box(SandboxSpec(tmpfs_mb=4)) as box:
        data = bytes(range(256)) * 4096
        box.write_file("/work/deep name.bin", data)
        assert box.read_file("/work/deep name.bin") == data
        box.write_file("relative", b"short")
        assert box.exec(["cat", "/work/relative"]).stdout == b"short"
        box.write_file("relative", b"")
        assert box.read_file("relative") == b""
        raises(SandboxError, lambda: box.read_file("/work/absent"))
        raises(SandboxError, lambda: box.read_file("/work"))
        raises(SandboxError, lambda: box.write_file("/work/absent/file", b"x"))
        raises(SandboxError, lambda: box.write_file("/usr/bin/python3", b"x"))
        box.exec(["mkfifo", "/work/fifo"])
        raises(SandboxError, lambda: box.read_file("/work/fifo"))
        raises(SandboxError, lambda: box.write_file("/work/fifo", b"x"))
        raises(SandboxError, lambda: box.read_file("/dev/zero"))
        box.exec("truncate -s 4M hole; ln -s hole link")
        assert len(box.read_file("link")) == 4 * 2**20
        raises(SandboxLimitError, lambda: box.write_file("/work/large", bytes(5 * 2**20)))
        raises(SandboxLimitError, lambda: box.write_file("/work/large", bytes(4 * 2**20)))
        assert box.exec("echo alive").stdout == b"alive\n"


def tells_what_is_wrong(open_box: Opener) -> None:
    with open_box(SandboxSpec()) as box:
        missing = box.exec(["no-such-command", "x"])
        assert missing.exit_code == 127
        assert b"no-such-command" in missing.stderr
        assert box.exec("no-such-command").exit_code == 127
        box.write_file("/work/plain", b"echo no")
        assert box.exec(["/work/plain"]).exit_code == 126
        assert "/nowhere" in str(raises(SandboxError, lambda: box.exec("true", cwd="/nowhere")))
        for timeout_s in (0, -1, float("nan"), float("inf")):
            raises(InputError, lambda timeout_s=timeout_s: box.exec("true", timeout_s=timeout_s))
        for command in ([], [""], ["a\0b"], "a\0b", "\ud800"):
            raises(InputError, lambda command=command: box.exec(command))
        raises(InputError, lambda: box.read_file("a\0b"))
        assert box.exec("echo alive").stdout == b"alive\n"
    raises(InputError, lambda: open_box(SandboxSpec(environment={"A=B": "c"})))


def closes_for_good(open_box: Opener) -> None:
    box = open_box(SandboxSpec())
    caught: list[BaseException] = []

    def wait() -> None:
        try:
            box.exec("sleep 60", timeout_s=60)
        except SandboxDiedError as error:
            caught.append(error)

    waiting = threading.Thread(target=wait)
    waiting.start()
    time.sleep(0.3)
    started = time.monotonic()
    box.close()
    waiting.join(10)
    assert caught, "a call that waits must end when the box is closed"
    assert time.monotonic() - started < 10
    raises(SandboxDiedError, lambda: box.exec("true"))
    box.close()


def outlives_the_thread_that_opened_it(open_box: Opener) -> None:
    boxes: list[Sandbox] = []
    opening = threading.Thread(target=lambda: boxes.append(open_box(SandboxSpec())))
    opening.start()
    opening.join()
    time.sleep(0.2)
    with boxes[0] as box:
        outputs: list[bytes] = []
        calls = [
            threading.Thread(target=lambda i=i: outputs.append(box.exec(f"sleep 0.02; echo {i}").stdout))
            for i in range(6)
        ]
        for call in calls:
            call.start()
        for call in calls:
            call.join()
        assert sorted(outputs) == [b"%d\n" % i for i in range(6)]


# ------------------------------------------------------------------------------------------------------ the hardening


def is_nobody(open_box: Opener) -> None:
    with open_box(SandboxSpec()) as box:
        assert box.exec("id -u; id -g; id -G").stdout.split() == [b"10001", b"10001", b"10001"]
        for process in ("self", "1"):
            lines = box.exec(["cat", f"/proc/{process}/status"]).stdout.decode().splitlines()
            status = dict(line.split(":\t", 1) for line in lines if ":\t" in line)
            capabilities = {key: int(value, 16) for key, value in status.items() if key.startswith("Cap")}
            assert len(capabilities) == 5, capabilities
            assert not any(capabilities.values()), (process, capabilities)
            assert status["NoNewPrivs"] == "1"
            assert status["Uid"].split() == ["10001"] * 4


def cannot_gain_privileges(open_box: Opener) -> None:
    code = """
import ctypes, json, os
libc = ctypes.CDLL(None, use_errno=True)
def fails(result): return result == -1
attempts = {
    "user namespace": fails(libc.unshare(0x10000000)),
    "mount namespace": fails(libc.unshare(0x00020000)),
    "mount": fails(libc.mount(b"none", b"/work", b"tmpfs", 0, None)),
    "remount root": fails(libc.mount(None, b"/", None, 0x1020, None)),
    "hostname": fails(libc.sethostname(b"mine", 4)),
    "chroot": fails(libc.chroot(b"/work")),
    "setuid": fails(libc.setuid(0)),
    "device": fails(libc.mknod(b"/work/device", 0o60600, os.makedev(254, 0))),
    "trace pid 1": fails(libc.ptrace(16, 1, None, None)),
}
for path in ("/proc/sys/kernel/core_pattern", "/proc/sysrq-trigger", "/proc/sys/kernel/hostname"):
    try:
        with open(path, "w"): attempts[path] = False
    except OSError: attempts[path] = True
print(json.dumps([name for name, failed in attempts.items() if not failed]))
"""
    with open_box(SandboxSpec()) as box:
        assert answer(box, code) == [], "these must fail in a box"


def has_a_read_only_root(open_box: Opener) -> None:
    with open_box(SandboxSpec(tmpfs_mb=8)) as box:
        for folder in ("/", "/usr", "/usr/bin", "/usr/lib", "/etc", "/dev", "/proc", "/var", "/root", "/home"):
            assert box.exec(f"echo x > {folder}/agentgym-probe").exit_code != 0, folder
        for folder in ("/tmp", "/work"):
            script = f"cd {folder} && echo 'echo ran' > script && chmod +x script && ./script"
            assert box.exec(script).stdout == b"ran\n", folder
        mounts = {line.split()[1]: line.split() for line in box.exec("cat /proc/mounts").stdout.decode().splitlines()}
        assert mounts["/"][3].split(",")[0] == "ro"
        for folder in ("/tmp", "/work"):
            options = mounts[folder][3].split(",")
            assert mounts[folder][2] == "tmpfs"
            assert {"nosuid", "nodev"} <= set(options)
            assert "size=8192k" in options


def has_no_network(open_box: Opener) -> None:
    listener = socket.create_server(("127.0.0.1", 0))
    hidden = f"agentgym-{os.getpid()}-{time.monotonic_ns()}"
    abstract = socket.socket(socket.AF_UNIX)
    abstract.bind(f"\0{hidden}")
    abstract.listen()
    code = f"""
import json, socket
def reached(family, kind, address):
    with socket.socket(family, kind) as s:
        s.settimeout(3)
        try: s.connect(address); s.send(b"x"); return True
        except OSError: return False
targets = [("host", socket.AF_INET, 1, ("127.0.0.1", {listener.getsockname()[1]})),
    ("internet", socket.AF_INET, 1, ("1.1.1.1", 53)), ("udp", socket.AF_INET, 2, ("1.1.1.1", 53)),
    ("metadata", socket.AF_INET, 1, ("169.254.169.254", 80)), ("ipv6", socket.AF_INET6, 1, ("2606:4700::1111", 53)),
    ("abstract", socket.AF_UNIX, 1, "\\0{hidden}")]
try: socket.getaddrinfo("example.org", 80); names = True
except OSError: names = False
print(json.dumps([[n for n, *t in targets if reached(*t)], names, [name for _, name in socket.if_nameindex()]]))
"""
    with listener, abstract, open_box(SandboxSpec()) as box:
        reached, names, interfaces = answer(box, code)  # type: ignore[misc]
        assert reached == []
        assert names is False
        assert set(interfaces) - {"lo", "tunl0", "sit0", "ip6tnl0", "gre0", "erspan0", "gretap0"} == set(), interfaces


def sees_no_environment_of_the_host(open_box: Opener) -> None:
    os.environ["AGENTGYM_PROBE_SECRET"] = "hunter2"
    try:
        with open_box(SandboxSpec(environment={"ASKED": "for = this"})) as box:
            code = "import json, os; print(json.dumps(dict(os.environ)))"
            environment = answer(box, code)
            assert isinstance(environment, dict)
            assert environment.pop("ASKED") == "for = this"
            assert environment.pop("HOME") == "/work"
            assert set(environment) <= {"PATH", "LANG", "LC_CTYPE"}, environment
            assert b"hunter2" not in box.exec("cat /proc/*/environ 2>/dev/null").stdout
    finally:
        del os.environ["AGENTGYM_PROBE_SECRET"]


def sees_nothing_of_the_host(open_box: Opener) -> None:
    with tempfile.NamedTemporaryFile(prefix="agentgym-probe-") as probe, open_box(SandboxSpec()) as box:
        for path in (
            probe.name,
            str(Path.cwd()),
            str(Path.home() / ".ssh"),
            "/var/run/docker.sock",
            "/run/docker.sock",
        ):
            assert box.exec(["test", "-e", path]).exit_code != 0, path
        for folder in ("/root", "/home", "/mnt", "/media", "/srv"):
            assert box.exec(f"ls -A {folder} 2>/dev/null").stdout == b"", folder
        assert int(box.exec("ls -d /proc/[0-9]* | wc -l").stdout) < 6, "the processes of the host are visible"
        assert box.exec(["cat", "/proc/sys/kernel/hostname"]).stdout.decode().strip() != socket.gethostname()
        assert box.exec("ls /dev/sd* /dev/vd* /dev/nvme* /dev/mem /dev/kmsg /dev/fuse 2>/dev/null").stdout == b""
        assert box.exec("cat /etc/shadow 2>/dev/null").stdout == b""
        assert box.exec("ls /proc/self/fd | wc -l").stdout == b"4\n", "0, 1, 2 and the listing itself"


def limits_descriptors_cores_and_files(open_box: Opener) -> None:
    code = """
import json, resource as r
print(json.dumps([r.getrlimit(k) for k in (r.RLIMIT_NOFILE, r.RLIMIT_CORE, r.RLIMIT_FSIZE)]))
"""
    with open_box(SandboxSpec(tmpfs_mb=8)) as box:
        assert answer(box, code) == [[1024, 1024], [0, 0], [8 * 2**20, 8 * 2**20]]


# ---------------------------------------------------------------------------------------------------------- the abuse


def survives_a_fork_bomb(open_box: Opener) -> None:
    with open_box(SandboxSpec(pids=40)) as box:
        count = """
import os, time
children = 0
try:
    while children < 200:
        if os.fork() == 0: time.sleep(60)
        children += 1
except OSError: pass
print(children, flush=True)
os.killpg(0, 9)
"""
        # whatever is killed on the way: fewer processes than asked for, and the box goes on
        assert 20 < int(python(box, count).stdout) < 40
        bomb = "import os\nwhile True:\n try: os.fork()\n except OSError: pass"
        raises(SandboxTimeoutError, lambda: python(box, bomb, timeout_s=0.5))
        assert box.exec("echo alive; ls -d /proc/[0-9]* | wc -l").stdout.split()[0] == b"alive"
        with contextlib.suppress(SandboxTimeoutError):  # or its shell ends, because it cannot fork any more
            box.exec("f() { f | f & }; f; sleep 60", timeout_s=0.5)
        with contextlib.suppress(SandboxLimitError):  # what it left behind may hold every process there is
            assert box.exec("echo alive").exit_code in (0, 2)
        assert box.read_file("/proc/version").startswith(b"Linux"), "the worker goes on in any case"


def survives_a_memory_bomb(open_box: Opener) -> None:
    with open_box(SandboxSpec(memory_mb=64, tmpfs_mb=128)) as box:
        eat = "a = []\nwhile True: a.append(b'x' * 1_000_000)"
        result = python(box, eat)
        assert result.exit_code == -9 or b"MemoryError" in result.stderr, result
        assert box.exec("echo alive").stdout == b"alive\n"


def survives_a_full_disk(open_box: Opener) -> None:
    with open_box(SandboxSpec(tmpfs_mb=8)) as box:
        for folder in ("/work", "/tmp"):
            box.exec(f"for i in 1 2 3; do head -c 5000000 /dev/zero > {folder}/f$i; done")
            used = int(box.exec(f"cat {folder}/f* | wc -c").stdout)
            assert used <= 8 * 2**20, folder
        assert b"No space left" in box.exec("head -c 5000000 /dev/zero > /work/more").stderr
        raises(SandboxLimitError, lambda: box.write_file("/work/more", bytes(5_000_000)))
        assert box.exec("rm /work/f*; echo alive").stdout == b"alive\n"


def cuts_a_flood_of_output(open_box: Opener) -> None:
    with open_box(SandboxSpec(output_limit=1000)) as box:
        flood = "printf BEGIN; head -c 100000000 /dev/zero | tr '\\0' x; printf END"
        result = box.exec(f"{flood}; ({flood}) >&2", timeout_s=60)
        for stream in (result.stdout, result.stderr):
            assert stream.startswith(b"BEGINxxx")
            assert stream.endswith(b"xxxEND")
            assert b"99999008 bytes dropped" in stream
            assert len(stream) < 1000 + 64
        assert result.dropped_bytes == 2 * (100_000_008 - 1000)
        exact = box.exec("head -c 1000 /dev/zero")
        assert (len(exact.stdout), exact.dropped_bytes) == (1000, 0)


def keeps_bytes_as_they_are(open_box: Opener) -> None:
    with open_box(SandboxSpec()) as box:
        data = b"\xff\xfe\x00 \x1b[31m \xc3\x28 <|im_end|>\r\n\n"
        box.write_file("bytes", data)
        result = box.exec("cat bytes; cat bytes >&2")
        assert (result.stdout, result.stderr) == (data, data)
        assert box.exec(["printf", "%s", "\u00e9\u4e16"]).stdout == "\u00e9\u4e16".encode()


def kills_at_the_deadline(open_box: Opener) -> None:
    daemon = """
import os, time
for _ in range(3):
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            for fd in range(3): os.close(fd)
            while True: time.sleep(0.01)
        os._exit(0)
print("started", flush=True)
time.sleep(60)
"""
    with open_box(SandboxSpec()) as box:
        box.exec("sleep 60 >/dev/null 2>&1 & sleep 0.2")  # of an earlier call: it stays
        before = sorted(box.exec("cat /proc/[0-9]*/comm").stdout.split())
        started = time.monotonic()
        raises(SandboxTimeoutError, lambda: python(box, daemon, timeout_s=1.0))
        assert 0.9 < time.monotonic() - started < 8
        after = sorted(box.exec("cat /proc/[0-9]*/comm").stdout.split())
        assert after == before, (before, after)
        assert b"sleep" in before
        raises(SandboxTimeoutError, lambda: box.exec("trap '' TERM INT HUP; while :; do :; done", timeout_s=0.3))
        raises(SandboxTimeoutError, lambda: box.exec("kill -STOP $$", timeout_s=0.3))


def does_not_wait_for_background_processes(open_box: Opener) -> None:
    with open_box(SandboxSpec()) as box:
        result = box.exec("(while :; do echo flood; done) & echo first", timeout_s=20)
        assert (result.exit_code, result.seconds < 5) == (0, True)
        assert b"first" in result.stdout
        assert box.exec("sleep 60 & echo done", timeout_s=20).stdout == b"done\n"


def reaps_orphans(open_box: Opener) -> None:
    orphans = "import os\nfor _ in range(30):\n if os.fork() == 0:\n  if os.fork() == 0: os._exit(0)\n  os._exit(0)"
    with open_box(SandboxSpec(pids=64)) as box:
        for _ in range(4):
            python(box, orphans)
        box.exec("sleep 0.1")
        assert b"Z" not in box.exec("cut -d' ' -f3 /proc/[0-9]*/stat").stdout
        assert int(box.exec("ls -d /proc/[0-9]* | wc -l").stdout) < 6


def protects_its_worker(open_box: Opener) -> None:
    with open_box(SandboxSpec()) as box:
        box.exec("for s in KILL STOP INT TERM HUP SEGV ABRT USR1 CHLD ALRM PIPE; do kill -$s 1; done; sleep 0.1")
        box.exec("kill -KILL -1")
        assert box.exec("echo alive").stdout == b"alive\n"
        for entry in ("fd", "fd/0", "fd/1", "mem", "environ", "cwd/x", "root/x", "maps"):
            script = f"cat /proc/1/{entry} || ls /proc/1/{entry}/ || echo x > /proc/1/{entry}"
            assert box.exec(script).exit_code != 0, entry
        forged = b'\0\0\0\x1f\0\0\0\0{"id": 99, "exit_code": 0, ...}'
        result = box.exec(["cat"], stdin=forged)
        assert result.stdout == forged, "what a command prints is its output and never a frame"
        assert box.exec("echo alive").stdout == b"alive\n"


def survives_descriptor_and_inode_floods(open_box: Opener) -> None:
    with open_box(SandboxSpec(tmpfs_mb=4)) as box:
        opened = answer(box, "import os\nn = 0\ntry:\n while True: os.dup(1); n += 1\nexcept OSError: print(n)")
        assert isinstance(opened, int)
        assert opened < 1024
        code = "import os\ntry:\n for i in range(30_000): os.close(os.open(f'/work/{i}', 64))\nexcept OSError: pass"
        with contextlib.suppress(SandboxTimeoutError):
            python(box, code, timeout_s=5)
        assert box.exec("echo alive").stdout == b"alive\n"


# ------------------------------------------------------------------------------------------------- resident processes


def keeps_resident_processes(open_box: Opener) -> None:
    echo = """
import os, struct, sys
count = 0
while True:
    size = struct.unpack(">I", os.read(3, 4))[0]
    data = os.read(3, size)
    count += 1
    if data == b"die": os._exit(5)
    if data == b"hang":
        while True: pass
    if data == b"huge":
        os.write(4, struct.pack(">I", 1 << 31)); continue
    print("printed", count, flush=True)
    os.write(4, struct.pack(">I", size + 2) + data + b"%2d" % count)
"""
    with open_box(SandboxSpec()) as box:
        one, two = (box.start_process(["python3", "-I", "-c", echo]) for _ in range(2))
        first = box.ask_process(one, b"a")
        assert (first.state, first.data, first.output, first.exit_code) == ("answered", b"a 1", b"printed 1\n", None)
        assert box.ask_process(one, b"b").data == b"b 2"
        dead = box.ask_process(one, b"die")
        assert (dead.state, dead.exit_code, dead.data) == ("died", 5, b"")
        assert box.ask_process(two, b"c").data == b"c 1", "another resident process must not suffer"
        raises(SandboxError, lambda: box.ask_process(one, b"x"))
        assert box.ask_process(two, b"hang", timeout_s=0.5).state == "timeout"
        three = box.start_process(["python3", "-I", "-c", echo])
        assert box.ask_process(three, b"huge").state == "died"
        assert box.ask_process(box.start_process(["true"]), b"x").state == "died"
        raises(SandboxError, lambda: box.start_process(["no-such-command"]))
        four = box.start_process(["python3", "-I", "-c", echo])
        box.stop_process(four)
        raises(SandboxError, lambda: box.ask_process(four, b"x"))
        assert b"python3" not in box.exec("cat /proc/[02-9]*/comm /proc/1[0-9]*/comm").stdout


CHECKS: tuple[Check, ...] = (
    runs_commands,
    moves_files,
    tells_what_is_wrong,
    closes_for_good,
    outlives_the_thread_that_opened_it,
    is_nobody,
    cannot_gain_privileges,
    has_a_read_only_root,
    has_no_network,
    sees_no_environment_of_the_host,
    sees_nothing_of_the_host,
    limits_descriptors_cores_and_files,
    survives_a_fork_bomb,
    survives_a_memory_bomb,
    survives_a_full_disk,
    cuts_a_flood_of_output,
    keeps_bytes_as_they_are,
    kills_at_the_deadline,
    does_not_wait_for_background_processes,
    reaps_orphans,
    protects_its_worker,
    survives_descriptor_and_inode_floods,
    keeps_resident_processes,
)
