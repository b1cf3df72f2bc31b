"""Attacks that try to become more than nobody. Law: a call that fails is contained; one that a tier's own kernel grants
(gVisor lets a program make a user namespace) is contained only if nothing follows from it, which the attack tries."""

from __future__ import annotations

import contextlib
from pathlib import Path

from agentgym.errors import SandboxError
from agentgym.sandbox.spec import Sandbox
from agentgym.testing.sandbox_abuse.attack import OWN_KERNEL, Attack, Scene, attack, hostile, require, told

# The numbers of system calls that the C library has no name for: (x86-64, arm64).
PRELUDE = """
import ctypes, errno, json, os, platform
libc = ctypes.CDLL(None, use_errno=True)
ARM = platform.machine() == "aarch64"
def call(pair, *arguments):
    ctypes.set_errno(0)
    result = libc.syscall(ctypes.c_long(pair[ARM]), *[ctypes.c_long(a) if isinstance(a, int) else a for a in arguments])
    return result, errno.errorcode.get(ctypes.get_errno(), "0")
granted = []
def must_fail(name, outcome):
    if outcome is True or (isinstance(outcome, tuple) and outcome[0] != -1): granted.append(name)
"""
IDENTITY = ("Uid", "Gid", "CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb", "NoNewPrivs", "Seccomp")


def _granted(box: Sandbox, code: str) -> list[str]:
    return told(box, PRELUDE + code + "\nprint(json.dumps(granted))")


def _judged(scene: Scene, box: Sandbox, code: str, harmless: str) -> str:
    """Nothing may be granted but what `code` marks as "(own)": calls that the tier's own kernel grants in vain."""
    granted = _granted(box, code)
    require(not set(granted) - {"(own)"}, f"granted: {granted}")
    said = _seen_from_the_host(scene, box)
    if not granted:
        return f"all refused; {said}"
    require(box.tier in OWN_KERNEL, f"granted by the host's kernel: {harmless}")
    return f"refused, or answered by the tier's own kernel, where {harmless}; {said}"


def _seen_from_the_host(scene: Scene, box: Sandbox) -> str:
    """Who the processes of the box are to the host: nobody, without a capability."""
    for pid in scene.processes(box):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            lines = Path(f"/proc/{pid}/status").read_text().splitlines()
            status = dict(line.split(":\t", 1) for line in lines if ":\t" in line)
            require(0 not in map(int, status["Uid"].split()), f"process {pid} of the box is root on the host")
            capabilities = {key: status[key] for key in ("CapPrm", "CapEff", "CapAmb") if int(status[key], 16)}
            require(not capabilities, f"process {pid} of the box has {capabilities}")
    return scene.check_usable(box)


AFTER_A_NAMESPACE = """
def harm():
    "What a capability would be used for; only what goes beyond the box counts."
    done = []
    def tried(name, result):
        if result: done.append(name)
    tried("remount /", libc.mount(None, b"/", None, 0x1020, None) == 0 and os.access("/usr", os.W_OK))
    for path in ("/usr/bin/agentgym-abuse", "/etc/agentgym-abuse"):
        try: open(path, "w").close(); tried(path, True)
        except OSError: pass
    for path in ("/proc/1/mem", "/proc/sys/kernel/core_pattern", "/proc/sysrq-trigger"):
        try: open(path, "r+b", buffering=0).close(); tried(path, True)
        except OSError: pass
    tried("chroot", libc.chroot(b"/proc/1/root/..") == 0 and os.path.exists("/var/lib/docker"))
    if libc.mknod(b"/work/disk", 0o60666, os.makedev(254, 0)) == 0:
        try: tried("a disk of the host", bool(open("/work/disk", "rb").read(512)))
        except OSError: pass
    if libc.mount(b"proc", b"/tmp", b"proc", 0, None) == 0:
        tried("the host's processes", sum(n.isdigit() for n in os.listdir("/tmp")) > 20)
    return done
"""


@attack("unshare, setns and clone into new user, mount, network, pid, ipc, uts and cgroup namespaces")
def new_namespaces(scene: Scene) -> str:
    box = scene.box()
    code = f"""
{AFTER_A_NAMESPACE}
own = []
for name in ("user", "mnt", "pid", "net"):
    try: must_fail(f"setns {{name}} of pid 1", call((308, 268), os.open(f"/proc/1/ns/{{name}}", 0), 0))
    except OSError: pass
single = (0x20000, 0x2000000, 0x4000000, 0x8000000, 0x20000000, 0x40000000)
for flags in (*single, 0x10000000, 0x10000000 | 0x20000, 0x10000000 | 0x20000 | 0x20000000 | 0x40000000):
    read, write = os.pipe()
    if os.fork() == 0:
        if call((272, 97), flags)[0] == 0:
            try: open("/proc/self/setgroups", "w").write("deny")
            except OSError: pass
            for file, own_id in (("uid_map", os.getuid()), ("gid_map", os.getgid())):
                try: open(f"/proc/self/{{file}}", "w").write(f"0 {{own_id}} 1")
                except OSError: pass
            if os.fork() == 0: os.write(write, json.dumps(["granted", *harm()]).encode()); os._exit(0)
            os.wait()
        os._exit(0)
    os.close(write); os.wait()
    said = os.read(read, 10_000)
    if said:
        own.append(hex(flags))
        granted += json.loads(said)[1:]
if own: granted.append("(own)")
"""
    return _judged(scene, box, code, "namespaces can be made and lead nowhere")


@attack("mount, remount, pivot_root, chroot, the new mount calls, and mknod of the host's disk and memory")
def mount_and_mknod(scene: Scene) -> str:
    box = scene.box()
    code = """
must_fail("mount tmpfs", libc.mount(b"none", b"/work", b"tmpfs", 0, None) == 0)
must_fail("mount proc", libc.mount(b"proc", b"/work", b"proc", 0, None) == 0)
must_fail("bind", libc.mount(b"/", b"/work", None, 0x1000, None) == 0)
must_fail("remount / writable", libc.mount(None, b"/", None, 0x20, None) == 0)
must_fail("remount bind", libc.mount(None, b"/", None, 0x1020, None) == 0)
must_fail("umount", libc.umount2(b"/work", 2) == 0)
must_fail("umount proc", libc.umount2(b"/proc", 2) == 0)
must_fail("chroot", libc.chroot(b"/work") == 0)
must_fail("pivot_root", call((155, 41), b"/work", b"/work"))
must_fail("fsopen", call((430, 430), b"tmpfs", 0))
must_fail("open_tree", call((428, 428), -100, b"/", 1))
must_fail("move_mount", call((429, 429), -100, b"/work", -100, b"/tmp", 0))
must_fail("open_by_handle_at", call((304, 265), -100, b"\\x08\\0\\0\\0\\1\\0\\0\\0\\2\\0\\0\\0\\0\\0\\0\\0", 0))
made = []
for name, mode, major, minor in (("disk", 0o60666, 254, 0), ("disk8", 0o60666, 8, 0), ("mem", 0o20666, 1, 1),
    ("kmsg", 0o20666, 1, 11), ("null", 0o20666, 1, 3)):
    for folder in ("/work", "/tmp", "/dev/shm"):
        path = f"{folder}/{name}"
        if libc.mknod(path.encode(), mode, os.makedev(major, minor)) == 0 and name != "null":
            made.append(path)
            for flags in (os.O_RDONLY, os.O_WRONLY):
                try: os.open(path, flags | os.O_NONBLOCK); granted.append(f"open {path}")
                except OSError: pass
if made: granted.append("(own)")
try: open("/usr/agentgym-abuse", "w"); granted.append("write /usr")
except OSError: pass
"""
    return _judged(scene, box, code, "device files can be made and not be opened")


@attack("ptrace, process_vm_readv/writev and pidfd_getfd on the worker")
def trace_the_worker(scene: Scene) -> str:
    box = scene.box()
    code = """
for name, request in (("attach", 16), ("seize", 0x4206)):
    must_fail(f"ptrace {name}", libc.ptrace(request, 1, None, None) == 0)
buffer = ctypes.create_string_buffer(64)
class Vector(ctypes.Structure): _fields_ = [("base", ctypes.c_void_p), ("size", ctypes.c_size_t)]
ours = Vector(ctypes.addressof(buffer), 64)
for base in (0x400000, 0x10000, 0x555555554000, 0x7ffff7a00000):
    theirs = Vector(base, 64)
    for name, pair in (("read", (310, 270)), ("write", (311, 271))):
        result, why = call(pair, 1, ctypes.byref(ours), 1, ctypes.byref(theirs), 1, 0)
        if result > 0: granted.append(f"process_vm_{name}v")
pidfd = call((434, 434), 1, 0)[0]
if pidfd >= 0:
    for fd in range(32): must_fail(f"pidfd_getfd {fd}", call((438, 438), pidfd, fd, 0))
for flags in (os.O_RDONLY, os.O_WRONLY, os.O_RDWR):
    try: os.open("/proc/1/mem", flags); granted.append("/proc/1/mem")
    except OSError: pass
"""
    granted = _granted(box, code)
    require(not granted, f"granted: {granted}")
    return f"all refused; {_seen_from_the_host(scene, box)}"


@attack("setuid calls, every setuid program of the image, and a setuid file and file capabilities of its own")
def setuid(scene: Scene) -> str:
    box = scene.box()
    code = """
for uid in (0, 1, 1000, 10002):
    must_fail(f"setuid {uid}", libc.setuid(uid) == 0); must_fail(f"setresuid {uid}", libc.setresuid(uid, uid, uid) == 0)
    must_fail(f"setgid {uid}", libc.setgid(uid) == 0)
import array
must_fail("setgroups", libc.setgroups(1, array.array("i", [0]).tobytes()) == 0)
import shutil, subprocess
shutil.copy("/usr/bin/id", "/work/id"); os.chmod("/work/id", 0o6755)
for argv in (["/work/id", "-u"], ["newgrp", "root"]):
    try: done = subprocess.run(argv, capture_output=True, timeout=5, input=b"\\n").stdout.split()
    except (OSError, subprocess.SubprocessError): continue
    if done and done[0] == b"0": granted.append(argv[0])
for name in ("system.posix_acl_access", "security.capability", "trusted.x"):
    value = bytes.fromhex("0100000200000000ffffffff00000000ffffffff") if "cap" in name else b"x"
    try:
        os.setxattr("/work/id", name, value)
        if name == "security.capability": granted.append(name)
    except OSError: pass
"""
    granted = _granted(box, code)
    require(not granted, f"granted: {granted}")
    started = box.start_process(["su", "root", "-c", "sleep 60"])  # a setuid program, waiting for a password
    try:
        users = box.exec("sleep 0.2; grep -h ^Uid /proc/[0-9]*/status").text.split("\n")
        require(not any(line.split()[2:3] == ["0"] for line in users), f"a setuid program became root: {users}")
        return f"all refused; {_seen_from_the_host(scene, box)}"
    finally:
        box.stop_process(started)


@attack(
    "bpf, perf, keyctl, io_uring, userfaultfd, kernel modules, kexec, clocks, hostname, quotas, reboot, personality"
)
def kernel_interfaces(scene: Scene) -> str:
    box = scene.box()
    code = """
buffer = ctypes.create_string_buffer(512)
must_fail("bpf", call((321, 280), 0, buffer, 72)); must_fail("bpf program", call((321, 280), 5, buffer, 72))
must_fail("perf_event_open", call((298, 241), buffer, 0, -1, -1, 0))
must_fail("add_key", call((248, 217), b"user", b"agentgym", b"x", 1, -3))
must_fail("request_key", call((249, 218), b"user", b"agentgym", None, -3))
for name, command in (("session", 1), ("join", 1), ("describe", 6), ("get", 0)):
    must_fail(f"keyctl {name}", call((250, 219), command, -3, 1))
ring = ctypes.create_string_buffer(256)
if call((425, 425), 4, ring)[0] >= 0: granted.append("(own)")
for flags in (0, 1): must_fail("userfaultfd", call((323, 282), flags))
must_fail("init_module", call((175, 105), buffer, 512, b"")); must_fail("finit_module", call((313, 273), 0, b"", 0))
must_fail("delete_module", call((176, 106), b"loop", 0))
must_fail("kexec_load", call((246, 104), 0, 0, None, 0))
must_fail("reboot", call((169, 142), 0xfee1dead, 672274793, 0, 0))
must_fail("sethostname", libc.sethostname(b"mine", 4) == 0); must_fail("swapon", libc.swapon(b"/work/x", 0) == 0)
must_fail("clock_settime", call((227, 112), 0, buffer)); must_fail("settimeofday", call((164, 170), buffer, None))
must_fail("acct", call((163, 89), b"/work/id")); must_fail("quotactl", call((179, 60), 0, None, 0, None))
must_fail("syslog", call((103, 116), 2, buffer, 10)); must_fail("iopl", call((172, -1), 3) if not ARM else (-1, ""))
must_fail("fanotify", call((300, 262), 0, 0))
must_fail("no address randomness", call((135, 92), 0x0040000))
for path in ("/proc/sys/kernel/core_pattern", "/proc/sys/vm/drop_caches", "/proc/sysrq-trigger",
    "/proc/sys/kernel/modprobe",
    "/sys/kernel/uevent_helper", "/sys/fs/cgroup/release_agent", "/sys/fs/cgroup/memory/release_agent",
    "/sys/fs/cgroup/cgroup.procs", "/proc/1/oom_score_adj", "/dev/kvm"):
    try: open(path, "r+b", buffering=0).close(); granted.append(path)
    except OSError: pass
import fcntl
try:
    request = b"agentgym0".ljust(16, bytes(1)) + bytes([1]).ljust(24, bytes(1))
    fcntl.ioctl(os.open("/dev/net/tun", os.O_RDWR), 0x400454CA, request)
    granted.append("a network interface")
except OSError: pass
"""
    return _judged(scene, box, code, "io_uring is that kernel's and reaches nothing of the host")


@attack("types into the terminal of whoever started the box (TIOCSTI, TIOCLINUX), and takes it as its own")
def terminal_injection(scene: Scene) -> str:
    box = scene.box()
    code = """
import fcntl
for path in ("/dev/tty", "/dev/console", "/dev/pts/0", "/dev/ptmx", 0, 1, 2):
    try: fd = path if isinstance(path, int) else os.open(path, os.O_RDWR | os.O_NOCTTY)
    except OSError: continue
    for request in (0x5412, 0x541C, 0x540E):
        try: fcntl.ioctl(fd, request, b"x"); granted.append(f"ioctl {request:#x} on {path}")
        except OSError: pass
"""
    granted = [name for name in _granted(box, code) if "ptmx" not in name]  # a new pair of its own
    require(not granted, f"granted: {granted}")
    with contextlib.suppress(SandboxError):
        hostile(
            box, "import os, pty; pid, fd = pty.fork(); pid or os.execv('/bin/sh', ['sh', '-c', 'echo x > /dev/tty'])"
        )
    return f"all refused; {_seen_from_the_host(scene, box)}"


ATTACKS: tuple[Attack, ...] = (
    new_namespaces,
    mount_and_mknod,
    trace_the_worker,
    setuid,
    kernel_interfaces,
    terminal_injection,
)
