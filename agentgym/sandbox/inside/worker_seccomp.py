"""The worker gives up system calls, for itself and for everything it will start. Law as in worker.py; which calls is
none of its business: it is given a finished program (seccomp.py's, gvisor_calls.py's)."""

import _ctypes
import posix

PR_SET_SECCOMP, FILTER = 22, 2
ADDRESS_BYTES = 8
INSTRUCTION_BYTES = 8


def apply(settings):
    """Loads {"program": classic BPF}; "filter", or "none: why"."""
    program = settings["program"]
    # struct sock_fprog: how many instructions, and where they lie; both bytes objects stay alive during the call
    head = (len(program) // INSTRUCTION_BYTES).to_bytes(ADDRESS_BYTES, "little")
    libc = _ctypes.dlopen(None, 0)  # pyright: ignore[reportArgumentType]
    described = head + address_of(program).to_bytes(ADDRESS_BYTES, "little")
    failed = _ctypes.call_function(_ctypes.dlsym(libc, "prctl"), (PR_SET_SECCOMP, FILTER, described, 0, 0))
    return f"none: {posix.strerror(_ctypes.get_errno())}" if failed else "filter"


def address_of(data):
    """Where the bytes of a bytes object begin: behind its header, in front of the zero that ends it."""
    return id(data) + bytes.__basicsize__ - 1
