"""The filter of system calls inside a box on gVisor. Law: gVisor's kernel is the wall, and this mends what it does not
do for a box, whose every process has the same user: keep signals from process 1, refuse namespaces and device files."""

from __future__ import annotations

import errno
import functools
import stat
from collections.abc import Mapping
from typing import Any

from agentgym.sandbox.seccomp import (
    ALLOW,
    AND,
    ARCHITECTURE_AT,
    AUDIT_ARCHITECTURE,
    EQUAL,
    KILL,
    LOAD,
    NEW_NAMESPACES,
    NUMBER_AT,
    RETURN,
    Step,
    argument_at,
    assemble,
    at,
    refusal,
)
from agentgym.sandbox.syscall_numbers import NUMBERS

REFUSED = ("unshare", "setns")
UNKNOWN = ("clone3",)  # its flags lie in memory, where no filter can look; the C library takes clone
# where the process that is signalled stands in the arguments; a descriptor of process 1 would do as well
SIGNALS = ("kill", "tkill", "tgkill", "rt_sigqueueinfo", "rt_tgsigqueueinfo", "pidfd_open")
WITH_MODE = {"mknod": 1, "mknodat": 2}
WORKER = 1


def modules(info: Mapping[str, Any]) -> dict[str, dict[str, bytes]]:
    """What the worker of a box is sent along, on the machine of the daemon that says this of itself."""
    filter_program = program(str(info.get("Architecture")))
    return {"worker_seccomp": {"program": filter_program}} if filter_program else {}


@functools.cache
def program(machine: str) -> bytes | None:
    """The filter for a machine as `uname -m` calls it; None where there is no table for it."""
    numbers = NUMBERS.get(machine, {})
    if not numbers:
        return None
    targets = dict.fromkeys(REFUSED, "refuse") | dict.fromkeys(UNKNOWN, "unknown") | {"clone": "clone"}
    targets |= dict.fromkeys(SIGNALS, "signal") | {name: name for name in WITH_MODE}
    jumps = [Step(EQUAL, numbers[name], target) for name, target in targets.items() if name in numbers]
    modes = [
        step
        for name, index in WITH_MODE.items()
        for step in (
            at(name),
            Step(LOAD, argument_at(index)),
            Step(AND, 0o170000),
            Step(EQUAL, stat.S_IFCHR, "refuse"),
            Step(EQUAL, stat.S_IFBLK, "refuse"),
            Step(RETURN, ALLOW),
        )
    ]
    return assemble(
        [
            Step(LOAD, ARCHITECTURE_AT),
            Step(EQUAL, AUDIT_ARCHITECTURE[machine], "native"),
            Step(RETURN, KILL),
            at("native"),
            Step(LOAD, NUMBER_AT),
            *jumps,
            Step(RETURN, ALLOW),
            at("clone"),
            Step(LOAD, argument_at(0)),
            Step(AND, NEW_NAMESPACES),
            Step(EQUAL, 0, "allow"),
            refusal(errno.EPERM),
            at("signal"),
            Step(LOAD, argument_at(0)),
            Step(EQUAL, WORKER, "refuse"),
            Step(RETURN, ALLOW),
            *modes,
            at("allow"),
            Step(RETURN, ALLOW),
            at("refuse"),
            refusal(errno.EPERM),
            at("unknown"),
            refusal(errno.ENOSYS),
        ]
    )
