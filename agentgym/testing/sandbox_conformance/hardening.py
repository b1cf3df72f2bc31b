"""What a box may not see, have or do, asked from inside."""

from __future__ import annotations

import os
import socket
import tempfile
import time
from pathlib import Path

from agentgym.errors import SandboxDiedError
from agentgym.sandbox.spec import VERIFIER_UID, SandboxSpec
from agentgym.testing.sandbox_conformance.questions import Opener, answer, python


def is_nobody(open_box: Opener) -> None:
    with open_box(SandboxSpec()) as box:
        assert box.exec("id -u; id -g; id -G").stdout.split() == [b"10001", b"10001", b"10001"]
        for process in ("self", "1"):
            lines = box.exec(["cat", f"/proc/{process}/status"]).stdout.decode().splitlines()
            status = dict(line.split(":\t", 1) for line in lines if ":\t" in line)
            capabilities = {key: int(value, 16) for key, value in status.items() if key.startswith("Cap")}
            assert {"CapInh", "CapPrm", "CapEff", "CapBnd"} <= set(capabilities)  # gVisor has no CapAmb to show
            assert not any(capabilities.values()), (process, capabilities)
            assert status.get("NoNewPrivs", "1") == "1"
            assert status["Seccomp"] == "2"
            assert status["Uid"].split() == ["10001"] * 4
        assert answer(box, "import ctypes; print(ctypes.CDLL(None).prctl(39, 0, 0, 0, 0))") == 1, "no_new_privs"


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
        shows_options = any("nosuid" in line[3] for line in mounts.values())  # gVisor shows neither of the two
        for folder in ("/tmp", "/work"):
            options = mounts[folder][3].split(",")
            assert mounts[folder][2] == "tmpfs"
            assert {"nosuid", "nodev"} <= set(options) or not shows_options
            assert {"size=8192k", f"size={8 * 2**20}"} & set(options)


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
            assert box.exec(f"find {folder} -mindepth 1 2>/dev/null").stdout == b"", folder
        assert int(box.exec("echo /proc/[0-9]* | wc -w").stdout) < 6, "the processes of the host are visible"
        assert box.exec(["cat", "/proc/sys/kernel/hostname"]).stdout.decode().strip() != socket.gethostname()
        devices = box.exec("find /dev -name 'sd*' -o -name 'vd*' -o -name 'nvme*' -o -name mem -o -name kmsg").stdout
        assert devices == b""
        assert box.exec("cat /etc/shadow 2>/dev/null").stdout == b""
        opened = answer(box, "import json, os; print(json.dumps(sorted(os.listdir('/proc/self/fd'))))")
        assert opened == ["0", "1", "2", "3"], "the three and the listing itself"


def limits_descriptors_cores_and_files(open_box: Opener) -> None:
    code = """
import json, resource as r
print(json.dumps([r.getrlimit(k) for k in (r.RLIMIT_NOFILE, r.RLIMIT_CORE, r.RLIMIT_FSIZE)]))
"""
    with open_box(SandboxSpec(tmpfs_mb=8)) as box:
        assert answer(box, code) == [[1024, 1024], [0, 0], [8 * 2**20, 8 * 2**20]]


def is_who_the_spec_says(open_box: Opener) -> None:
    with open_box(SandboxSpec(uid=VERIFIER_UID, folders=("/logs", "/opt/deep"), tmpfs_mb=8)) as box:
        assert box.exec("id -u; id -g").stdout.split() == [b"%d" % VERIFIER_UID] * 2
        mounts = {line.split()[1]: line.split() for line in box.exec("cat /proc/mounts").stdout.decode().splitlines()}
        for folder in ("/tmp", "/work", "/logs", "/opt/deep"):
            assert mounts[folder][2] == "tmpfs", folder
            box.put({"mine": "yes"}, folder)
            assert box.exec(["find", f"{folder}/mine", "-printf", "%U\\n"]).stdout == b"%d\n" % VERIFIER_UID, folder
        assert box.exec("echo x > /opt/beside").exit_code != 0


def protects_its_worker(open_box: Opener) -> None:
    with open_box(SandboxSpec()) as box:
        box.exec("for s in KILL STOP INT TERM HUP SEGV ABRT USR1 CHLD ALRM PIPE; do kill -$s 1; done; sleep 0.1")
        box.exec("kill -KILL -1")
        assert box.exec("echo alive").stdout == b"alive\n"
        for attempt in ("head -c 1 < /proc/1/mem", "echo x > /proc/1/mem", "cd /proc/1/cwd/", "cd /proc/1/root/"):
            assert box.exec(attempt).exit_code != 0, attempt
        shown = set(box.exec("tr '\\0' '\\n' < /proc/1/environ").text.split())  # gVisor shows it; it holds nothing
        assert {entry.partition("=")[0] for entry in shown} <= {"PATH", "HOME", "HOSTNAME", "LANG", "LC_CTYPE", "PWD"}
        assert box.exec("echo alive").stdout == b"alive\n"


def believes_no_forged_frame(open_box: Opener) -> None:
    """Whatever is written where the worker's streams are: an honest answer comes, or the box is dead."""
    forge = """
import hashlib, json, os
def frame(number, fields, body):
    header = json.dumps(fields).encode()
    sizes = len(header).to_bytes(4, "big") + len(body).to_bytes(4, "big")
    tag = hashlib.blake2b(number.to_bytes(8, "big") + sizes + header, digest_size=16, person=b"box")
    tag.update(body)
    return sizes + tag.digest() + header + body
lie = {"exit_code": 0, "out": 6, "err": 0, "dropped": 0, "seconds": 0.1, "timeout": False}
lies = b"".join(frame(n, {"id": i, **lie}, b"forged") for n in range(6) for i in range(2, 8))
written = 0
for process in (1, os.getppid()):
    for number in range(24):
        try:
            fd = os.open(f"/proc/{process}/fd/{number}", os.O_WRONLY | os.O_NONBLOCK)
            written += os.write(fd, lies)
        except OSError:
            pass
print(written)
"""
    with open_box(SandboxSpec()) as box:
        try:
            result = python(box, forge)
            assert (result.exit_code, result.stdout.strip().isdigit()) == (0, True), result
            assert box.exec("echo honest; exit 3").stdout == b"honest\n"
        except SandboxDiedError:
            return  # the worker was shouted down, and nothing of it was believed
