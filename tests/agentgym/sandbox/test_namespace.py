"""The bubblewrap tier: its limits, what it shows of the host, and machines that lack what it needs."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import platform
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from agentgym.errors import InputError, SandboxDiedError, SandboxError, UnavailableError
from agentgym.sandbox import SandboxSpec, open_sandbox
from agentgym.sandbox.namespace import bubblewrap, cgroup
from agentgym.sandbox.namespace import tier as namespace
from agentgym.sandbox.namespace.tier import namespace_problem
from agentgym.sandbox.ownership.leftovers import cgroup_folders
from agentgym.sandbox.spec import BOX_UID, VERIFIER_UID

pytestmark = pytest.mark.bubblewrap


def cgroups_of_this_process() -> list[Path]:
    """Found beside others' that come and go."""
    return list(cgroup_folders(f"agentgym-{os.getpid()}-"))


def test_a_box_says_what_enforces_its_limits_and_leaves_no_cgroup() -> None:
    with open_sandbox("namespace", SandboxSpec(pids=33)) as box:
        assert set(box.limits) == {"memory", "pids", "cpus", "disk", "seccomp", "landlock"}
        if "cgroup" in box.limits["pids"]:
            limits = [file.read_text() for folder in cgroups_of_this_process() for file in folder.glob("pids.max")]
            assert limits == ["34\n" if box.limits["pids"] == "cgroup v1" else "33\n"]
    assert cgroups_of_this_process() == []


def test_without_cgroups_rlimits_hold_what_they_can_and_the_rest_is_said(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(cgroup, "ROOT", tmp_path)
    with open_sandbox("namespace", SandboxSpec(memory_mb=200, pids=40)) as box:
        assert box.limits["memory"] == "rlimit (of each process)"
        assert box.limits["pids"] == "rlimit"
        assert box.limits["cpus"].startswith("none: "), "RLIMIT_CPU is no rate"
        assert box.limits["disk"] == "tmpfs size (of bytes; nothing counts the files)"
        assert box.exec("ulimit -v; ulimit -p").stdout == b"204800\n40\n"


def test_folders_of_the_spec_are_writable_and_limited() -> None:
    spec = SandboxSpec(folders=("/logs/verifier", "/logs", "/tests"), tmpfs_mb=4)
    with open_sandbox("namespace", spec) as box:
        for folder in spec.folders:
            assert box.exec(f"echo x > {folder}/file && cat {folder}/file").stdout == b"x\n", folder
            assert b"No space left" in box.exec(f"head -c 5000000 /dev/zero > {folder}/large").stderr, folder
        assert box.exec("touch /file").exit_code != 0
        box.exec("rm -r /logs/*")
        assert box.exec("ls /").text.split() >= ["bin", "dev", "etc"]


def test_the_verifier_is_another_user() -> None:
    with open_sandbox("namespace", SandboxSpec(uid=VERIFIER_UID)) as box:
        assert box.exec("id -u; id -g").stdout.split() == [b"10002", b"10002"]
        assert box.exec("touch /work/file; stat -c %u /work/file").stdout == b"10002\n"
        if os.geteuid() == 0:
            process = box.start_process(["sleep", f"6{os.getpid()}"])
            until = time.monotonic() + 60
            while len(found := pids_named(f"sleep\x006{os.getpid()}\x00".encode())) != 1:
                assert time.monotonic() < until, "its arguments can be read a moment after it was started"
            (pid,) = found
            assert os.stat(f"/proc/{pid}").st_uid == VERIFIER_UID, "on the host, too"
            box.stop_process(process)


def pids_named(command: bytes) -> list[str]:
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                if (folder / "cmdline").read_bytes() == command:
                    found.append(folder.name)
            except OSError:
                continue
    return found


@pytest.mark.parametrize(
    ("relaxed", "name"),
    [
        (SandboxSpec(network="bridge"), "network=bridge"),
        (SandboxSpec(writable_root=True), "writable_root"),
        (SandboxSpec(run_as_root=True), "run_as_root"),
    ],
)
def test_what_is_relaxed_is_refused(relaxed: SandboxSpec, name: str) -> None:
    with pytest.raises(UnavailableError, match=rf"sandbox\.tier=namespace cannot give {name}.*sandbox\.tier=docker"):
        namespace.NamespaceSandbox(relaxed)


def test_a_bad_environment_is_an_input_error_and_leaves_nothing() -> None:
    with pytest.raises(InputError):
        open_sandbox("namespace", SandboxSpec(environment={"A=B": "c"}))
    assert cgroups_of_this_process() == []


def test_programs_find_out_who_they_are_and_what_localhost_is() -> None:
    lookups = """
import getpass, grp, os, socket
print(getpass.getuser(), grp.getgrgid(os.getgid()).gr_name, socket.gethostbyname(socket.gethostname()))
with socket.create_server(("localhost", 0)) as server: socket.create_connection(("localhost", server.getsockname()[1]))
try: socket.getaddrinfo("example.org", 80)
except socket.gaierror as error: print(error)
"""
    for uid, name in ((BOX_UID, "agent"), (VERIFIER_UID, "verifier"), (4321, "user")):
        with open_sandbox("namespace", SandboxSpec(uid=uid)) as box:
            result = box.exec(["python3", "-I", "-c", lookups])
            assert result.text == f"{name} {name} 127.0.0.1\n[Errno -2] Name or service not known\n", result.error_text
            assert box.exec("whoami; echo x >> /etc/passwd").stdout == f"{name}\n".encode()


# ---------------------------------------------------------------------------------------- what a box sees of the host

LOOK = """
import json, os
def read(path):
    try:
        with open(path, "rb") as file: return file.read(1 << 16).decode("latin-1")
    except OSError as error: return f"errno {error.errno}"
secret = ("kcore", "kallsyms", "keys", "interrupts", "timer_list", "slabinfo", "vmallocinfo", "kmsg", "kpageflags",
          "sched_debug", "latency_stats", "sysrq-trigger")
writable = []
for root, folders, files in os.walk("/proc/sys"):
    for name in files:
        if os.access(os.path.join(root, name), os.W_OK): writable.append(os.path.join(root, name))
print(json.dumps({
    "secret": {name: read(f"/proc/{name}") for name in secret if os.path.exists(f"/proc/{name}")},
    "writable": writable,
    "iomem": read("/proc/iomem"),
    "sys": os.path.exists("/sys"),
    "root": sorted(os.listdir("/")),
    "etc": sorted(os.listdir("/etc")),
    "accounts": read("/etc/passwd"),
    "processes": sum(name.isdigit() for name in os.listdir("/proc")),
    "mounts": read("/proc/self/mountinfo"),
    "interfaces": [line.split(":")[0].strip() for line in read("/proc/net/dev").splitlines()[2:]],
    "cgroup": read("/proc/self/cgroup"),
}))
"""


def test_proc_tells_little_of_the_host() -> None:
    with open_sandbox("namespace", SandboxSpec()) as box:
        result = box.exec(["python3", "-I", "-c", LOOK])
        assert result.exit_code == 0, result.error_text
        seen = json.loads(result.stdout)
    for name, content in seen["secret"].items():
        assert content.startswith("errno "), (name, content[:200])
    assert seen["writable"] == []
    assert all(set(line.split(":")[0].strip()) <= set("0-") for line in seen["iomem"].splitlines()), "no addresses"
    assert seen["sys"] is False
    assert set(seen["root"]) <= {
        *("bin", "dev", "etc", "lib", "lib32", "lib64", "libx32", "proc", "sbin", "tmp", "usr", "work", "nix")
    }
    assert set(seen["etc"]) <= {"ld.so.cache", "alternatives", "passwd", "group", "hosts", "nsswitch.conf"}
    assert "root:" not in seen["accounts"].replace("root:x:0:0::/work:/bin/sh", ""), "the host's accounts"
    assert seen["processes"] == 2
    assert seen["interfaces"] == ["lo"]
    assert "agentgym" not in seen["cgroup"]
    writable = {line.split()[4] for line in seen["mounts"].splitlines() if "rw" in line.split()[5].split(",")}
    assert writable - {"/proc"} <= {
        *("/tmp", "/work", "/dev/shm", "/dev/pts"),
        *(f"/dev/{name}" for name in ("null", "zero", "full", "random", "urandom", "tty")),
    }


# -------------------------------------------------------------------------------------------- owners that go away


OWNER = """
import sys
from agentgym.sandbox import SandboxSpec, open_sandbox
box = open_sandbox("namespace", SandboxSpec(lease_s=float(sys.argv[1])))
box.exec(f"sleep {sys.argv[2]} &")
print(box.name, flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_box_ends_with_its_owner_and_with_its_lease(number: int) -> None:
    """Killed, the owner takes its boxes with it at once; stopped, it does not renew their lease."""
    seconds = f"6{os.getpid()}.{int(number)}"
    lease_s = "600" if number == signal.SIGKILL else "12"
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER, lease_s, seconds], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert owner.stdout is not None
        name = owner.stdout.readline().strip()
        marked = f"sleep\0{seconds}\0".encode()
        if number == signal.SIGSTOP:
            time.sleep(13)  # longer than the lease, which the owner renews
        until = time.monotonic() + 60
        while len(pids_named(marked)) != 1:
            assert time.monotonic() < until, "it has ended, or never begun"
        owner.send_signal(number)
        until = time.monotonic() + 120
        while pids_named(marked) and time.monotonic() < until:
            time.sleep(0.02)
        assert pids_named(marked) == []
    finally:
        owner.kill()
        owner.communicate()
    until = time.monotonic() + 120
    while list(cgroup_folders(name)) and time.monotonic() < until:
        time.sleep(0.1)
    assert list(cgroup_folders(name)) == [], "the reaper takes the cgroups"


# ------------------------------------------------------------------------------------- machines that lack something


@pytest.fixture
def play_bubblewrap(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Puts another bwrap on the path: a shell script. It lies where a root owner's other user can read it."""
    import tempfile

    def play(script: str) -> None:
        file = Path(folder) / "bwrap"
        file.write_text(f"#!/bin/sh\n{script}\n")
        file.chmod(0o755)
        monkeypatch.setenv("PATH", folder)

    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield play


OLD = """
case "$1" in --help) {bwrap} --help | /usr/bin/grep -v {patterns}; exit;; esac
for option in "$@"; do
  case "$option" in {names}) echo "bwrap: Unknown option $option" >&2; exit 1;; esac
done
exec {bwrap} "$@"
"""


def can_limit_memory() -> bool:
    made = cgroup.Cgroup.create(f"agentgym-{os.getpid()}-trial", SandboxSpec())
    if made is None:
        return False
    made.remove()
    return "memory" in made.limits


def old(*options: str) -> str:
    bwrap = bubblewrap.find_bubblewrap()
    return OLD.format(bwrap=bwrap, patterns=" ".join(f"-e '{option} '" for option in options), names="|".join(options))


def test_bubblewrap_of_debian_11(play_bubblewrap) -> None:
    """0.4.1 cannot size a tmpfs; then the memory of the cgroup is what ends."""
    play_bubblewrap(old("--size", "--perms", "--chmod", "--clearenv", "--disable-userns", "--add-seccomp-fd"))
    if not can_limit_memory():
        with pytest.raises(UnavailableError, match="knows no --size"):
            open_sandbox("namespace")
        return
    with open_sandbox("namespace", SandboxSpec(tmpfs_mb=8, memory_mb=64)) as box:
        assert box.limits["disk"] == f"{box.limits['memory']} (with the memory; each file by rlimit)"
        assert box.limits["seccomp"] == "filter"
        assert box.exec("head -c 20000000 /dev/zero > large").exit_code != 0
        assert box.exec("stat -c %s large").stdout == b"%d\n" % (8 * 2**20)
        assert box.exec("env").text.count("=") <= 6


def test_nothing_limits_the_disk(play_bubblewrap, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    play_bubblewrap(old("--size"))
    monkeypatch.setattr(cgroup, "ROOT", tmp_path)
    assert "knows no --size" in str(namespace_problem())
    with pytest.raises(UnavailableError, match=r"tmpfs_mb=64.*--size.*install bubblewrap 0\.7"):
        open_sandbox("namespace")


def test_bubblewrap_without_seccomp(play_bubblewrap) -> None:
    play_bubblewrap(old("--seccomp"))
    with open_sandbox("namespace") as box:
        assert box.limits["seccomp"] == f"none: {os.environ['PATH']}/bwrap knows no --seccomp"
        assert b"Seccomp:\t0" in box.exec(["cat", "/proc/self/status"]).stdout
        assert box.limits["landlock"].startswith(("ABI", "none"))


def test_a_machine_without_a_table_of_system_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    with open_sandbox("namespace") as box:
        assert box.limits["seccomp"] == "none: no table of system calls for riscv64"
        assert b"Seccomp:\t0" in box.exec(["cat", "/proc/self/status"]).stdout


def test_a_machine_without_setpriv(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python changes the user then, and the box is moved into its cgroups while it starts."""
    monkeypatch.setattr(bubblewrap, "SYSTEM_PATH", "/nowhere")
    bubblewrap.setpriv.cache_clear()
    try:
        with open_sandbox("namespace") as box:
            assert box.exec("id -u").stdout == b"10001\n"
            for folder in cgroups_of_this_process():
                assert (folder / "cgroup.procs").read_text().count("\n") == 1, "the worker"
    finally:
        bubblewrap.setpriv.cache_clear()
    assert cgroups_of_this_process() == []


def test_cgroups_that_cannot_be_entered(monkeypatch: pytest.MonkeyPatch) -> None:
    made = cgroup.Cgroup([], {"memory": "cgroup v1", "pids": "cgroup v1"}, joined_by_itself=True)
    monkeypatch.setattr(cgroup.Cgroup, "create", lambda *_: made)
    monkeypatch.setattr(cgroup.Cgroup, "entrances", ["/proc/version"])
    with pytest.raises(UnavailableError, match=r"cannot go into its cgroups \(.*echo.*\).*chrt"):
        open_sandbox("namespace")
    assert cgroups_of_this_process() == []


def test_a_machine_without_bubblewrap(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UnavailableError, match=r"bwrap.*apt-get install bubblewrap"):
        open_sandbox("namespace")


def test_a_machine_that_forbids_namespaces(play_bubblewrap) -> None:
    play_bubblewrap("echo 'bwrap: No permissions to create new namespace' >&2\nexit 1")
    assert "No permissions" in str(namespace_problem())
    with pytest.raises(UnavailableError, match=r"No permissions.*sandbox\.tier=docker"):
        open_sandbox("namespace")
    assert cgroups_of_this_process() == []


def test_what_bubblewrap_says_is_heard_although_it_ends_late(play_bubblewrap) -> None:
    """Its streams end, and a busy machine lets it say why and end a while later."""
    play_bubblewrap("exec 0<&- 1>&-; /bin/sleep 1; echo 'bwrap: No permissions to create new namespace' >&2; exit 1")
    with pytest.raises(UnavailableError, match=r"No permissions.*sandbox\.tier=docker"):
        open_sandbox("namespace")


def test_a_program_that_is_no_bubblewrap(play_bubblewrap) -> None:
    play_bubblewrap("exit 0")
    with pytest.raises((UnavailableError, SandboxDiedError), match=r"knows no --size|bubblewrap ended with code 0"):
        open_sandbox("namespace")
    assert cgroups_of_this_process() == []


def own_descriptors() -> dict[int, str]:
    """The open descriptors of this process, and what each is."""
    gc.collect()
    found: dict[int, str] = {}
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # the listing's own
            found[int(name)] = os.readlink(f"/proc/self/fd/{name}")
    return found


def test_an_owner_without_descriptors_left() -> None:
    """Wherever they run out: a typed error, and nothing is left behind."""
    open_sandbox("namespace").close()  # what is made once a process is made
    before = own_descriptors()
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    taken: list[int] = []
    messages: list[str] = []
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(before) + 20, limits[1]))
        with contextlib.suppress(OSError):
            while True:
                taken.append(os.dup(2))
        for _ in range(15):  # one more to spare each time
            try:
                open_sandbox("namespace").close()
            except SandboxError as error:
                messages.append(str(error))
            os.close(taken.pop())
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        for descriptor in taken:
            os.close(descriptor)
    assert 2 < len(messages) < 15
    assert all("Too many open files" in message for message in messages), messages
    until = time.monotonic() + 60
    while new := dict(own_descriptors().items() - before.items()):
        assert time.monotonic() < until, f"{new} is more than what a thread of ours holds for a moment"
    assert not new  # fewer there may be: what tests before this one left to others is closed whenever it pleases them
    assert cgroups_of_this_process() == []
    with open_sandbox("namespace") as box:
        assert box.exec("echo alive").stdout == b"alive\n"
