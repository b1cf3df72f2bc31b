"""The filter of system calls: the program, run by an interpreter of classic BPF, and a box that runs under it."""

from __future__ import annotations

import errno
import json
import platform
import shutil
import struct
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentgym.sandbox import SandboxSpec, open_sandbox, seccomp
from agentgym.sandbox.syscall_numbers import NUMBERS

MACHINES = sorted(NUMBERS)
ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7, "i386": 0x40000003, "arm": 0x40000028}
EPERM, ENOSYS = f"errno {errno.EPERM}", f"errno {errno.ENOSYS}"
NO_FAMILY, NO_PROTOCOL = f"errno {errno.EAFNOSUPPORT}", f"errno {errno.EPROTONOSUPPORT}"
# what nothing in a box may do whatever the policy's own lists say
NEVER = """
    mount umount2 pivot_root move_mount open_tree open_tree_attr fsopen fsconfig fsmount fspick mount_setattr unshare
    setns chroot ptrace process_vm_readv process_vm_writev process_madvise pidfd_getfd kcmp bpf perf_event_open keyctl
    add_key request_key userfaultfd io_uring_setup io_uring_enter io_uring_register kexec_load kexec_file_load
    init_module finit_module delete_module reboot swapon swapoff open_by_handle_at quotactl quotactl_fd acct
    settimeofday clock_settime clock_adjtime adjtimex sethostname setdomainname syslog fanotify_init memfd_secret
    lookup_dcookie vhangup
"""


def decide(program: bytes, number: int, arguments: Sequence[int] = (), architecture: int = 0) -> str:
    """Runs the program as the kernel does: "allow", "kill" or "errno N"."""
    padded = [*arguments, 0, 0, 0, 0, 0, 0][:6]
    data = struct.pack("<IIQ6Q", number, architecture, 0, *padded)
    instructions = list(struct.iter_unpack("<HBBI", program))
    accumulator, position = 0, 0
    for _ in instructions:  # it goes forward only, so this many steps must do
        code, if_true, if_false, value = instructions[position]
        position += 1
        if code == 0x20:
            assert value % 4 == 0
            (accumulator,) = struct.unpack_from("<I", data, value)
        elif code == 0x54:
            accumulator &= value
        elif code == 0x05:
            position += value
        elif code == 0x15:
            position += if_true if accumulator == value else if_false
        elif code == 0x35:
            position += if_true if accumulator >= value else if_false
        else:
            assert code == 0x06, f"an instruction that is not used here: {code:#x}"
            action, number = value & 0xFFFF0000, value & 0xFFFF
            return {0x7FFF0000: "allow", 0x80000000: "kill", 0x00050000: f"errno {number}"}[action]
    raise AssertionError("the program does not end")


def ask(machine: str, name: str, *arguments: int) -> str:
    program = seccomp.program(machine)
    assert program is not None
    return decide(program, NUMBERS[machine][name], arguments, ARCHITECTURES[machine])


def test_the_tables_count_as_the_kernel_does() -> None:
    """One name left out would shift all behind it: the last of each stretch, from the kernel's headers."""
    last = {
        "x86_64": {"read": 0, "ioctl": 16, "clone": 56, "ptrace": 101, "seccomp": 317, "rseq": 334, "uretprobe": 335},
        "aarch64": {"io_setup": 0, "ioctl": 29, "clone": 220, "ptrace": 117, "recvmmsg": 243, "kexec_file_load": 294},
    }
    for machine, numbers in last.items():
        both = {"pidfd_send_signal": 424, "clone3": 435, "futex_waitv": 449, "mseal": 462, "open_tree_attr": 467}
        for name, number in (numbers | both).items():
            assert NUMBERS[machine][name] == number, (machine, name)
        assert len(set(NUMBERS[machine].values())) == len(NUMBERS[machine]), "no number twice"


def test_the_policy_names_only_calls_that_there_are() -> None:
    known = set().union(*NUMBERS.values())
    assert known >= seccomp.ALLOWED | seccomp.CONDITIONAL | seccomp.UNKNOWN
    assert not seccomp.ALLOWED & (seccomp.CONDITIONAL | seccomp.UNKNOWN)
    assert not seccomp.ALLOWED & set(NEVER.split())
    assert known >= set(NEVER.split())


@pytest.mark.parametrize("machine", MACHINES)
def test_every_call_gets_what_the_policy_says(machine: str) -> None:
    assert ask(machine, "clone3") == ENOSYS
    for name in NEVER.split():
        if name in NUMBERS[machine]:
            assert ask(machine, name) == EPERM, name
    for name in NUMBERS[machine]:
        if name in seccomp.ALLOWED:
            assert ask(machine, name) == "allow", name
        elif name not in seccomp.CONDITIONAL | seccomp.UNKNOWN:
            assert ask(machine, name) == EPERM, name


@pytest.mark.parametrize("machine", MACHINES)
def test_numbers_that_the_tables_do_not_know_are_as_if_the_kernel_did_not_know_them(machine: str) -> None:
    program = seccomp.program(machine)
    assert program is not None
    known = set(NUMBERS[machine].values())
    for number in set(range(1200)) - known:
        assert decide(program, number, (), ARCHITECTURES[machine]) == ENOSYS, number
    assert decide(program, 0xFFFFFFFF, (), ARCHITECTURES[machine]) == ENOSYS


@pytest.mark.parametrize("machine", MACHINES)
@given(number=st.integers(0, 2**32 - 1), architecture=st.integers(0, 2**32 - 1))
def test_another_architecture_is_killed(machine: str, number: int, architecture: int) -> None:
    program = seccomp.program(machine)
    assert program is not None
    for other in {*ARCHITECTURES.values(), architecture} - {ARCHITECTURES[machine]}:
        assert decide(program, number, (), other) == "kill"


@given(st.integers(0, 2**30 - 1))
def test_x32_is_killed(number: int) -> None:
    program = seccomp.program("x86_64")
    assert program is not None
    assert decide(program, 0x40000000 | number, (), ARCHITECTURES["x86_64"]) == "kill"


@pytest.mark.parametrize("machine", MACHINES)
@given(flags=st.integers(0, 2**32 - 1), above=st.integers(0, 2**32 - 1))
def test_clone_makes_processes_and_threads_but_no_namespaces(machine: str, flags: int, above: int) -> None:
    namespaces = 0x00020000 | 0x02000000 | 0x04000000 | 0x08000000 | 0x10000000 | 0x20000000 | 0x40000000
    expected = EPERM if flags & namespaces else "allow"
    assert ask(machine, "clone", above << 32 | flags) == expected
    assert ask(machine, "clone", 0x3D0F00) == "allow", "a thread of the C library"
    assert ask(machine, "clone", 0x01200011) == "allow", "fork"
    assert ask(machine, "clone", 0x00004111) == "allow", "posix_spawn"


@pytest.mark.parametrize("machine", MACHINES)
@given(above=st.integers(0, 2**32 - 1), request_number=st.integers(0, 2**32 - 1))
def test_nothing_types_into_a_terminal(machine: str, above: int, request_number: int) -> None:
    for refused in (0x5412, 0x541C):
        assert ask(machine, "ioctl", 0, above << 32 | refused) == EPERM
    expected = EPERM if request_number in (0x5412, 0x541C) else "allow"
    assert ask(machine, "ioctl", 0, above << 32 | request_number) == expected


@pytest.mark.parametrize("machine", MACHINES)
def test_sockets(machine: str) -> None:
    stream, datagram, raw, flags = 1, 2, 3, 0o2004000  # SOCK_NONBLOCK | SOCK_CLOEXEC
    for family in range(64):
        answers = {ask(machine, "socket", family, kind | flags, 0) for kind in (stream, datagram)}
        assert answers == ({"allow"} if family in (1, 2, 10, 16) else {NO_FAMILY}), family
        assert ask(machine, "socketpair", family, stream) == ("allow" if family == 1 else NO_FAMILY)
    for family in (2, 10):
        assert ask(machine, "socket", family, raw | flags, 6) == EPERM
        allowed = {number for number in range(300) if ask(machine, "socket", family, stream, number) == "allow"}
        assert allowed == {0, 1, 6, 17, 58}
        assert ask(machine, "socket", family, stream, 262) == NO_PROTOCOL, "MPTCP; programs then take TCP"
    assert [number for number in range(32) if ask(machine, "socket", 16, raw, number) == "allow"] == [0]


@pytest.mark.parametrize("machine", MACHINES)
def test_personality(machine: str) -> None:
    values = (0, 8, 0x20000, 0x20008, 0xFFFFFFFF, 0x40000, 0x400000, 0x0500000, 1)
    assert [ask(machine, "personality", value) for value in values] == ["allow"] * 5 + [EPERM] * 4


def test_a_machine_without_a_table_has_no_filter() -> None:
    assert seccomp.program("ppc64le") is None


def test_jumps_beyond_255_instructions() -> None:
    """The policy is too small to need one; a larger one must not be assembled wrongly."""
    fillers = [seccomp.Step(seccomp.EQUAL, 1000 + i, "end") for i in range(400)]
    steps = [
        seccomp.Step(seccomp.LOAD, 0),
        seccomp.Step(seccomp.EQUAL, 7, "middle"),
        seccomp.Step(seccomp.EQUAL, 8, "end"),
        *fillers,
        seccomp.refusal(1),
        seccomp.at("middle"),
        seccomp.refusal(2),
        seccomp.at("end"),
        seccomp.refusal(3),
    ]
    program = seccomp.assemble(steps)
    answers = [decide(program, number) for number in (7, 8, 9, 1000, 1100, 1200, 1399, 1400)]
    assert answers == ["errno 2", "errno 3", "errno 1", "errno 3", "errno 3", "errno 3", "errno 3", "errno 1"]


# ---------------------------------------------------------------------------------------------------- a running box

CALLS = """
import ctypes, json, sys
libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long
found = {}
for name, *arguments in json.load(sys.stdin):
    ctypes.set_errno(0)
    result = libc.syscall(*(ctypes.c_long(argument) for argument in arguments))
    found[name] = ctypes.get_errno() if result == -1 else 0
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def box():
    with open_sandbox("namespace", SandboxSpec()) as opened:
        if not opened.limits["seccomp"].startswith("filter"):
            pytest.skip(f"no filter here: {opened.limits['seccomp']}")
        yield opened


@pytest.mark.bubblewrap
def test_a_box_runs_under_the_filter(box) -> None:
    for process in ("1", "self"):
        status = box.exec(["cat", f"/proc/{process}/status"]).text
        assert "\nSeccomp:\t2\n" in status, process
        assert "\nSeccomp_filters:\t1\n" in status, process


@pytest.mark.bubblewrap
def test_what_is_refused_fails_in_a_box(box) -> None:
    numbers = NUMBERS[platform.machine()]
    refused = {name for name in numbers if seccomp.ruling(name) == "refuse"}
    expected = dict.fromkeys(refused, errno.EPERM)
    calls = [[name, numbers[name], 0, 0, 0, 0, 0] for name in sorted(refused)]
    for name, code, *call in (
        ("clone3", errno.ENOSYS, numbers["clone3"], 0, 0),
        ("a call of tomorrow", errno.ENOSYS, 999),
        ("clone into a new user namespace", errno.EPERM, numbers["clone"], 0x10000011, 0, 0, 0, 0),
        ("TIOCSTI", errno.EPERM, numbers["ioctl"], 0, 0x5412, 0),
        ("TIOCSTI in disguise", errno.EPERM, numbers["ioctl"], 0, 0x7FFFFFFF00005412, 0),
        ("packet socket", errno.EAFNOSUPPORT, numbers["socket"], 17, 3, 0),
        ("vsock", errno.EAFNOSUPPORT, numbers["socket"], 40, 1, 0),
        ("crypto socket", errno.EAFNOSUPPORT, numbers["socket"], 38, 5, 0),
        ("netfilter", errno.EPROTONOSUPPORT, numbers["socket"], 16, 3, 12),
        ("SCTP", errno.EPROTONOSUPPORT, numbers["socket"], 2, 1, 132),
        ("raw socket", errno.EPERM, numbers["socket"], 2, 3, 1),
        ("no address randomisation", errno.EPERM, numbers["personality"], 0x40000),
    ):
        calls.append([name, *call])
        expected[name] = code
    result = box.exec(["python3", "-I", "-c", CALLS], stdin=json.dumps(calls).encode())
    assert result.exit_code == 0, result.error_text
    assert json.loads(result.stdout) == expected


@pytest.mark.bubblewrap
@pytest.mark.skipif(platform.machine() != "x86_64", reason="x86-64 has two more sets of system calls")
def test_calls_by_another_architecture_kill_their_process(box) -> None:
    x32 = "import ctypes; ctypes.CDLL(None).syscall(ctypes.c_long(0x40000000 + 39))"
    # mov eax, 20 (getpid of i386); int 0x80; ret
    i386 = (
        "import ctypes, mmap\n"
        "page = mmap.mmap(-1, 4096, prot=7); page.write(bytes.fromhex('b814000000cd80c3'))\n"
        "ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(page)))()"
    )
    for code in (x32, i386):
        assert box.exec(["python3", "-I", "-c", code]).exit_code == -31, "SIGSYS"
    assert box.exec("echo alive").stdout == b"alive\n"


PROGRAMS = {
    "python": """python3 -I - <<'END'
import asyncio, concurrent.futures, ctypes, multiprocessing, os, socket, sqlite3, subprocess, tempfile, threading
def double(x): return 2 * x
with concurrent.futures.ThreadPoolExecutor(2) as pool: assert list(pool.map(double, range(3))) == [0, 2, 4]
context = multiprocessing.get_context("fork")
with context.Pool(2) as pool: assert pool.map(double, range(3)) == [0, 2, 4]
base = sqlite3.connect("file.db"); base.execute("pragma journal_mode=wal"); base.execute("create table t (x)")
base.executemany("insert into t values (?)", [(1,), (2,)]); base.commit()
assert base.execute("select sum(x) from t").fetchone() == (3,)
assert subprocess.run(["echo", "hi"], capture_output=True).stdout == b"hi\\n"
server = socket.create_server(("127.0.0.1", 0)); client = socket.create_connection(server.getsockname())
server.accept()[0].sendall(b"x"); assert client.recv(1) == b"x"
left, right = socket.socketpair(); left.send(b"y"); assert right.recv(1) == b"y"
assert asyncio.run(asyncio.sleep(0, "done")) == "done"
assert socket.if_nameindex()[0][1] == "lo" and socket.getaddrinfo("127.0.0.1", 80)
with tempfile.NamedTemporaryFile() as file: os.fsync(file.fileno())
master, slave = os.openpty(); assert os.isatty(slave) and not os.isatty(os.open("/dev/null", 0))
os.mkfifo("fifo"); os.link("file.db", "hard"); os.symlink("file.db", "soft"); os.rename("hard", "harder")
END""",
    "bash": "bash -c 'set -e; (sleep 0.01; exit 3) & wait $! || test $? = 3; cat <(echo a) | sort | tee x | wc -l; "
    'ulimit -n; trap "echo bye" EXIT; read -t 0.01 < /dev/zero || true\'',
    "git": "export HOME=/tmp; git init -q repo && cd repo && git config user.email a@b && git config user.name c && "
    "echo x > f && git add f && git commit -qm one && git gc -q && git clone -q . ../copy && git log --oneline | wc -l",
    "gcc": "echo 'int main(void) { return 42; }' > a.c && gcc -O1 -o a a.c && { ./a || test $? = 42; }",
    "sqlite3": "sqlite3 x.db 'create table t (a); insert into t values (1); select count(*) from t;'",
    "make": "printf 'all: a b\\n\\ttrue\\na b:\\n\\ttouch $@\\n' > Makefile && make -s -j2",
    "tar": "mkdir -p d/e && echo x > d/e/f && tar cz d | tar tz && find d -type f | xargs -n1 -P2 sha256sum",
    "perl": "perl -e 'use Socket; socketpair(A, B, AF_UNIX, SOCK_STREAM, 0) or die; fork // die; wait; print 1'",
}


HERE = [name for name in PROGRAMS if shutil.which(name, path="/usr/bin:/bin") or name == "python"]


@pytest.mark.bubblewrap
@pytest.mark.parametrize("program", HERE)
def test_ordinary_programs_go_on(box, program: str) -> None:
    """Those that this machine's /usr holds, for that is what a box sees."""
    result = box.exec(f"mkdir {program} && cd {program} && {PROGRAMS[program]}", timeout_s=60)
    assert result.exit_code == 0, result.error_text
