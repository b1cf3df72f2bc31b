"""The worker gives up, for itself and for everything it will start, what the file system of its box should not allow
anyway. Law as in worker.py: standard library only, and of that what loads at once; this source is sent into the box.

A second wall behind bubblewrap's mounts: reading and executing below the system's folders, writing in the writable ones
and to the devices there, no device files, no change of what is mounted where, no signal and no abstract socket to
anyone outside. TCP stays: the box has a network of its own, in which there is nobody else.
"""

import _ctypes
import errno
import posix

SYSCALL_CREATE, SYSCALL_ADD, SYSCALL_RESTRICT = 444, 445, 446  # on every machine
ASK_VERSION, BENEATH_A_PATH = 1, 1
EXECUTE, WRITE_FILE, READ_FILE, READ_DIR = 1, 1 << 1, 1 << 2, 1 << 3
MAKE_DEVICES = 1 << 6 | 1 << 11
ALL_OF_ABI_1, REFER, TRUNCATE, IOCTL_DEVICE = (1 << 13) - 1, 1 << 13, 1 << 14, 1 << 15
ON_FILES = EXECUTE | WRITE_FILE | READ_FILE | TRUNCATE | IOCTL_DEVICE  # what makes sense for what is no folder
SCOPED = 1 | 1 << 1  # abstract sockets, signals
UNLOGGED = 1 | 1 << 2  # a box must not be able to fill the host's audit log
RIGHTS = {
    "list": READ_DIR,
    "read": READ_DIR | READ_FILE | EXECUTE,
    "device": READ_DIR | READ_FILE | WRITE_FILE | TRUNCATE | IOCTL_DEVICE,
    "write": ~MAKE_DEVICES,
}


class Long(_ctypes._SimpleCData):
    _type_ = "l"


class Function(_ctypes.CFuncPtr):
    _flags_ = _ctypes.FUNCFLAG_CDECL | _ctypes.FUNCFLAG_USE_ERRNO
    _restype_ = Long


def apply(folders):
    """Holds this thread to `folders` ({path: one of RIGHTS}; one that is not there is left out) for ever. What does it:
    "ABI 7", or "none: why"."""
    syscall = Function(_ctypes.dlsym(_ctypes.dlopen(None, 0), "syscall"))  # pyright: ignore[reportArgumentType]

    def call(number, *arguments):
        _ctypes.set_errno(0)
        result = syscall(Long(number), *(Long(a) if isinstance(a, int) else a for a in arguments))
        if result == -1:
            raise OSError(_ctypes.get_errno(), f"landlock: {posix.strerror(_ctypes.get_errno())}")
        return result

    try:
        abi = call(SYSCALL_CREATE, 0, 0, ASK_VERSION)
    except OSError as error:
        if error.errno == errno.ENOSYS:
            return "none: this kernel has no Landlock"
        if error.errno == errno.EOPNOTSUPP:
            return "none: Landlock is off in this kernel (lsm= of its command line)"
        return f"none: Landlock is refused here ({posix.strerror(error.errno or 0)})"
    attributes = ruleset_attributes(abi)
    handled = int.from_bytes(attributes[:8], "little")
    ruleset = call(SYSCALL_CREATE, attributes, len(attributes), 0)
    for path, kind in folders.items():
        try:
            fd = posix.open(path, posix.O_PATH | posix.O_CLOEXEC)
        except FileNotFoundError:
            continue
        rights = RIGHTS[kind] & handled & (-1 if posix.fstat(fd).st_mode & 0o170000 == 0o040000 else ON_FILES)
        # struct landlock_path_beneath_attr, packed
        call(SYSCALL_ADD, ruleset, BENEATH_A_PATH, rights.to_bytes(8, "little") + fd.to_bytes(4, "little"), 0)
        posix.close(fd)
    call(SYSCALL_RESTRICT, ruleset, UNLOGGED if abi >= 7 else 0)
    posix.close(ruleset)
    return f"ABI {abi}"


def ruleset_attributes(abi):
    """struct landlock_ruleset_attr: files, network, scopes. A kernel refuses a right that it does not know; one from
    before a field has a shorter structure."""
    files = ALL_OF_ABI_1
    for since, right in ((2, REFER), (3, TRUNCATE), (5, IOCTL_DEVICE)):
        files |= right if abi >= since else 0
    fields = (files, 0, SCOPED)[: 1 if abi < 4 else 2 if abi < 6 else 3]
    return b"".join(field.to_bytes(8, "little") for field in fields)
