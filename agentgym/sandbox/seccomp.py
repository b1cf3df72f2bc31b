"""Which system calls a box may make: a filter in classic BPF, which bubblewrap loads (`--seccomp FD`) before the first
instruction of the box. Law: what is not allowed by name fails. Pure: names and numbers in, a program out.

The allowed ones are what programs, shells, compilers and databases need, after the default profile of Docker; the
kernel's history of holes is in the others. What differs from that profile: no ptrace, no reading of another process, no
POSIX clock setting, no fanotify, no secret memory, no descriptor tables, and sockets only of the families, types and
protocols that an ordinary program uses, because the rest makes the kernel load modules.

A call that is refused fails with EPERM. clone3 (its flags lie in memory, where no filter can look) and every number
that is newer than the tables fail with ENOSYS, so that libraries take the older way. Another architecture than the
machine's, or x32, has other numbers for everything: whoever calls by it is killed.
"""

from __future__ import annotations

import errno
import functools
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from agentgym.sandbox.syscall_numbers import NUMBERS

# ------------------------------------------------------------------------------------------------------- the policy

_ALLOWED = """
    accept accept4 access alarm arch_prctl bind brk cachestat capget capset chdir chmod chown clock_getres clock_gettime
    clock_nanosleep close close_range connect copy_file_range creat dup dup2 dup3 epoll_create epoll_create1 epoll_ctl
    epoll_pwait epoll_pwait2 epoll_wait eventfd eventfd2 execve execveat exit exit_group faccessat faccessat2 fadvise64
    fallocate fchdir fchmod fchmodat fchmodat2 fchown fchownat fcntl fdatasync fgetxattr flistxattr flock fork
    fremovexattr fsetxattr fstat fstatfs fsync ftruncate futex futex_requeue futex_wait futex_waitv futex_wake futimesat
    getcpu getcwd getdents getdents64 getegid geteuid getgid getgroups getitimer getpeername getpgid getpgrp getpid
    getppid getpriority getrandom getresgid getresuid getrlimit get_robust_list getrusage getsid getsockname getsockopt
    get_thread_area gettid gettimeofday getuid getxattr getxattrat inotify_add_watch inotify_init inotify_init1
    inotify_rm_watch io_cancel io_destroy io_getevents io_pgetevents ioprio_get ioprio_set io_setup io_submit kill
    landlock_add_rule landlock_create_ruleset landlock_restrict_self lchown lgetxattr link linkat listen listmount
    listxattr listxattrat llistxattr lremovexattr lseek lsetxattr lstat madvise map_shadow_stack membarrier memfd_create
    mincore mkdir mkdirat mknod mknodat mlock mlock2 mlockall mmap mprotect mq_getsetattr mq_notify mq_open
    mq_timedreceive mq_timedsend mq_unlink mremap mseal msgctl msgget msgrcv msgsnd msync munlock munlockall munmap
    name_to_handle_at nanosleep newfstatat open openat openat2 pause pidfd_open pidfd_send_signal pipe pipe2 pkey_alloc
    pkey_free pkey_mprotect poll ppoll prctl pread64 preadv preadv2 prlimit64 process_mrelease pselect6 pwrite64 pwritev
    pwritev2 read readahead readlink readlinkat readv recvfrom recvmmsg recvmsg remap_file_pages removexattr
    removexattrat rename renameat renameat2 restart_syscall rmdir rseq rt_sigaction rt_sigpending rt_sigprocmask
    rt_sigqueueinfo rt_sigreturn rt_sigsuspend rt_sigtimedwait rt_tgsigqueueinfo sched_getaffinity sched_getattr
    sched_getparam sched_get_priority_max sched_get_priority_min sched_getscheduler sched_rr_get_interval
    sched_setaffinity sched_setattr sched_setparam sched_setscheduler sched_yield seccomp select semctl semget semop
    semtimedop sendfile sendmmsg sendmsg sendto setfsgid setfsuid setgid setgroups setitimer setpgid setpriority
    setregid setresgid setresuid setreuid setrlimit set_robust_list setsid setsockopt set_thread_area set_tid_address
    setuid setxattr setxattrat shmat shmctl shmdt shmget shutdown sigaltstack signalfd signalfd4 splice stat statfs
    statmount statx symlink symlinkat sync sync_file_range syncfs sysinfo tee tgkill time timer_create timer_delete
    timer_getoverrun timer_gettime timer_settime timerfd_create timerfd_gettime timerfd_settime times tkill truncate
    umask uname unlink unlinkat uretprobe utime utimensat utimes vfork vmsplice wait4 waitid write writev
"""
ALLOWED = frozenset(_ALLOWED.split())
# these depend on their arguments; below, each has its own part of the program
CONDITIONAL = frozenset({"clone", "ioctl", "personality", "socket", "socketpair"})
UNKNOWN = frozenset({"clone3"})  # ENOSYS, see above

# CLONE_NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET; NEWTIME is only known to clone3 and unshare
NEW_NAMESPACES = 0x7E020000
TERMINAL_INJECTIONS = (0x5412, 0x541C)  # TIOCSTI, TIOCLINUX: type into the terminal of whoever started the box
PERSONALITIES = (0, 0x8, 0x20000, 0x20008, 0xFFFFFFFF)  # Linux, 32 bits, old version numbers, both, "which is it?"
AF_UNIX, AF_INET, AF_INET6, AF_NETLINK = 1, 2, 10, 16
SOCKET_TYPES = (1, 2)  # stream and datagram; the upper bits are flags
PROTOCOLS = (0, 1, 6, 17, 58)  # any, ICMP, TCP, UDP, ICMPv6: not SCTP, DCCP, MPTCP, UDP-Lite
NETLINK_ROUTE = 0  # the names of the interfaces, which the C library asks for

# --------------------------------------------------------------------------------------- classic BPF, and its assembler

LOAD, AND, JUMP, EQUAL, AT_LEAST, RETURN = 0x20, 0x54, 0x05, 0x15, 0x35, 0x06
NUMBER_AT, ARCHITECTURE_AT = 0, 4  # struct seccomp_data
ALLOW, KILL, FAIL = 0x7FFF0000, 0x80000000, 0x00050000
AUDIT_ARCHITECTURE = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
X32_BIT = 0x40000000


def argument_at(index: int) -> int:
    """Where the lower half of an argument lies (both machines are little-endian). The kernel takes these as 32 bits
    itself, so what a caller puts into the upper half must not matter here either."""
    return 16 + 8 * index


@dataclass(frozen=True, slots=True)
class Step:
    """One instruction, or a place in the program. A jump goes to the label `target` when its test holds (JUMP: always)
    and falls through otherwise; all jumps go forward.

    Example: `Step(EQUAL, 0xC000003E, "native")`.
    """

    code: int
    value: int = 0
    target: str = ""
    label: str = ""  # the name of this place; the step is no instruction then


def at(label: str) -> Step:
    return Step(0, label=label)


def assemble(steps: list[Step]) -> bytes:
    """The program. A conditional jump reaches 255 instructions; one that has to go further becomes a test that jumps
    over a long jump, which moves everything behind it, so this repeats until nothing changes."""
    far: set[int] = set()
    while True:
        places: dict[str, int] = {}
        position = 0
        for i, step in enumerate(steps):
            if step.label:
                places[step.label] = position
            else:
                position += 2 if i in far else 1
        program = bytearray()
        grown = False
        for i, step in enumerate(steps):
            if step.label:
                continue
            distance = places[step.target] - len(program) // 8 - 1 if step.target else 0
            if step.code == JUMP:
                program += instruction(JUMP, value=distance)
            elif i in far:  # true: to the long jump; false: over it
                program += instruction(step.code, 0, 1, step.value) + instruction(JUMP, value=distance - 1)
            elif distance <= 255:
                program += instruction(step.code, distance, 0, step.value)
            else:
                far.add(i)
                grown = True
        if not grown:
            return bytes(program)


def instruction(code: int, if_true: int = 0, if_false: int = 0, value: int = 0) -> bytes:
    """struct sock_filter."""
    return struct.pack("<HBBI", code, if_true, if_false, value)


# ------------------------------------------------------------------------------------------------------ the program


def refusal(number: int) -> Step:
    return Step(RETURN, FAIL | number)


def one_of(values: tuple[int, ...], label: str) -> list[Step]:
    return [Step(EQUAL, value, label) for value in values]


def conditions() -> list[Step]:
    """What is decided by arguments; each part is jumped to with nothing loaded."""
    return [
        at("clone"),
        Step(LOAD, argument_at(0)),
        Step(AND, NEW_NAMESPACES),
        Step(EQUAL, 0, "allow"),
        refusal(errno.EPERM),
        at("ioctl"),
        Step(LOAD, argument_at(1)),
        *one_of(TERMINAL_INJECTIONS, "refuse"),
        Step(RETURN, ALLOW),
        at("personality"),
        Step(LOAD, argument_at(0)),
        *one_of(PERSONALITIES, "allow"),
        refusal(errno.EPERM),
        at("socketpair"),
        Step(LOAD, argument_at(0)),
        Step(EQUAL, AF_UNIX, "allow"),
        refusal(errno.EAFNOSUPPORT),
        at("socket"),
        Step(LOAD, argument_at(0)),
        Step(EQUAL, AF_UNIX, "allow"),
        *one_of((AF_INET, AF_INET6), "internet"),
        Step(EQUAL, AF_NETLINK, "netlink"),
        refusal(errno.EAFNOSUPPORT),
        at("internet"),
        Step(LOAD, argument_at(1)),
        Step(AND, 0xF),
        *one_of(SOCKET_TYPES, "internet of a type"),
        refusal(errno.EPERM),
        at("internet of a type"),
        Step(LOAD, argument_at(2)),
        *one_of(PROTOCOLS, "allow"),
        refusal(errno.EPROTONOSUPPORT),
        at("netlink"),
        Step(LOAD, argument_at(2)),
        Step(EQUAL, NETLINK_ROUTE, "allow"),
        refusal(errno.EPROTONOSUPPORT),
    ]


def search(ranges: list[tuple[int, str]]) -> list[Step]:
    """Finds the range of the loaded number by halving. ranges: (its first number, the label to go to), ascending."""
    if len(ranges) == 1:
        return [Step(JUMP, target=ranges[0][1])]
    middle = len(ranges) // 2
    upper = f"from {ranges[middle][0]}"
    return [Step(AT_LEAST, ranges[middle][0], upper), *search(ranges[:middle]), at(upper), *search(ranges[middle:])]


def ruling(name: str) -> str:
    """The label that decides about a call."""
    if name in CONDITIONAL:
        return name
    return "allow" if name in ALLOWED else "unknown" if name in UNKNOWN else "refuse"


def modules(info: Mapping[str, Any]) -> dict[str, dict[str, bytes]]:
    """What the worker of a container is sent along, on the machine of the daemon that says this of itself: the profile
    of an older Docker daemon lets io_uring through, which no filter sees into."""
    filter_program = program(str(info.get("Architecture")))
    return {"worker_seccomp": {"program": filter_program}} if filter_program else {}


@functools.cache
def program(machine: str) -> bytes | None:
    """The filter for `platform.machine()`; None where there is no table for it."""
    if machine not in NUMBERS:
        return None
    rulings = {number: ruling(name) for name, number in NUMBERS[machine].items()}
    ranges: list[tuple[int, str]] = []
    for number in range(max(rulings) + 2):
        label = rulings.get(number, "unknown")
        if not ranges or ranges[-1][1] != label:
            ranges.append((number, label))
    x32 = [Step(EQUAL, 0xFFFFFFFF, "unknown"), Step(AT_LEAST, X32_BIT, "kill")] if machine == "x86_64" else []
    return assemble(
        [
            Step(LOAD, ARCHITECTURE_AT),
            Step(EQUAL, AUDIT_ARCHITECTURE[machine], "native"),
            Step(RETURN, KILL),
            at("native"),
            Step(LOAD, NUMBER_AT),
            *x32,
            *search(ranges),
            *conditions(),
            at("allow"),
            Step(RETURN, ALLOW),
            at("refuse"),
            refusal(errno.EPERM),
            at("unknown"),
            refusal(errno.ENOSYS),
            at("kill"),
            Step(RETURN, KILL),
        ]
    )
