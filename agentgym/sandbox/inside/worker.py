"""The process inside the box: pid 1, answers one request at a time on its standard streams. Law: standard library only,
and of it only modules written in C, because these sources are what is sent into the box, and every import would be paid
by each start; it trusts its host and nothing else.

Being pid 1 is the design: nothing in the box can kill, stop or trace it, orphans fall to it and are reaped, and when it
ends (its input ends as soon as the owner is gone, `kill -9` included; a silent owner's lease ends) the kernel ends
everything else in the box. It makes itself undumpable, so that no process in the box can open its streams through
/proc/1/fd; where the kernel does not keep that promise (gVisor), the tags of the frames do (worker_frames.py).
"""

import _ctypes
import errno
import fcntl
import posix
import sys

from agentgym.sandbox.inside.worker_files import Files
from agentgym.sandbox.inside.worker_line import Body, Line, Refused
from agentgym.sandbox.inside.worker_processes import Processes

PR_SET_DUMPABLE, PR_SET_CHILD_SUBREAPER = 4, 36
RESERVE = 1 << 18  # given back when memory runs out, so that this can be said
MOVING = ("exec", "write", "put", "restore", "spawn", "ask", "stop")  # not in a frozen box


class Worker:
    def __init__(self, line):
        self.line = line
        self.operations = {"start": self.do_start, "ping": self.do_ping}
        self.is_frozen = lambda: False
        self.reserve = bytearray(RESERVE)

    def serve(self):
        while True:
            request, first = self.line.frame()
            body = Body(self.line, first, request["size"])
            try:
                answer, data = self.answer(request, body)
                body.skip()
            except MemoryError:
                self.reserve = None
                answer, data = {"error": "limit", "message": "out of memory in the box"}, b""
                body.skip()
            self.line.reply(request["id"], answer, data)
            self.reserve = self.reserve or bytearray(RESERVE)

    def answer(self, request, body):
        op = request["op"]
        try:
            if op in MOVING and self.is_frozen():
                raise Refused("frozen", f"it is frozen, and {op!r} would move it; thaw it first")
            return self.operations[op](request, body)
        except Refused as error:
            return {"error": error.kind, "message": error.message}, b""
        except OSError as error:
            return {"error": kind_of(error), "message": f"{error.strerror}: {error.filename or ''}"}, b""

    def do_start(self, request, _):
        self.line.key, self.line.num_taken, self.line.num_sent = request["key"], 0, 0
        self.line.lease_s = request["lease_s"]
        ours = ("HOSTNAME", "HOME", "LC_CTYPE", "PWD", "OLDPWD")  # set by the starter and not by the image
        inherited = {name.decode("utf-8", "surrogateescape"): value for name, value in posix.environ.items()}
        inherited = {name: value for name, value in inherited.items() if name not in ours}
        defaults = {"PATH": "/usr/local/bin:/usr/bin:/bin", "LANG": "C.UTF-8", "HOME": posix.getcwd()}
        environment = {**defaults, **inherited, **request["environment"]}
        if isinstance(environment["PATH"], bytes):
            environment["PATH"] = environment["PATH"].decode("utf-8", "surrogateescape")
        processes = Processes(self.line, request, environment)
        files = Files(self.line, request, processes)
        self.is_frozen = lambda: processes.frozen is not None
        for owner in (processes, files):
            names = [name for name in dir(owner) if name.startswith("do_")]
            self.operations.update({name[3:]: getattr(owner, name) for name in names})
        limit_resources(request["rlimits"])
        if request["network"]:
            network = sys.modules["agentgym.sandbox.inside.worker_network"]
            self.line.network = network.Network(self.line, request["network"]["at_once"])
        applied = {}
        for name, settings in request["modules"].items():
            applied[name] = sys.modules["agentgym.sandbox.inside." + name].apply(settings)
        return {"pid": posix.getpid(), "uid": posix.getuid(), "executable": sys.executable, "applied": applied}, b""

    def do_ping(self, request, body):
        return {}, bytes(body.whole())


def limit_resources(rlimits):
    import resource

    for name, value in rlimits.items():
        limit = getattr(resource, "RLIMIT_" + name)
        hard = resource.getrlimit(limit)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(limit, (value, value))


def kind_of(error):
    if error.errno in (errno.ENOENT, errno.ENOTDIR):
        return "missing"
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EAGAIN, errno.ENOMEM, errno.EMFILE, errno.EFBIG):
        return "limit"
    return "failed"


def prctl(option, value):
    """libc's; the module ctypes would take longer to import than the rest of the worker to start."""
    libc = _ctypes.dlopen(None, 0)  # pyright: ignore[reportArgumentType]
    _ctypes.call_function(_ctypes.dlsym(libc, "prctl"), (option, value, 0, 0, 0))


def main():
    try:
        if not hasattr(posix, "waitstatus_to_exitcode"):
            raise ImportError(f"the worker needs Python 3.9 or newer, and this is {sys.version.split()[0]}")
        Worker(Line(*prepare())).serve()
    except BaseException as error:  # noqa: BLE001 one line for the host instead of a traceback, then the box ends
        posix.write(2, f"its worker failed: {type(error).__name__}: {error}\n".encode("utf-8", "replace")[:1000])
        posix._exit(1)


def prepare():
    """Makes this process what a worker is; the descriptors of the frames."""
    if posix.getpid() != 1:
        raise SystemExit("not process 1 of a box")  # it kills "all the others": never outside a box
    posix.closerange(3, 1024)  # whatever the starter left open would be inherited by every command
    prctl(PR_SET_DUMPABLE, 0)
    prctl(PR_SET_CHILD_SUBREAPER, 1)
    # the frames move to descriptors that no child inherits; standard error stays, for the worker's own last words
    input_fd = fcntl.fcntl(0, fcntl.F_DUPFD_CLOEXEC, 10)
    output_fd = fcntl.fcntl(1, fcntl.F_DUPFD_CLOEXEC, 10)
    null = posix.open("/dev/null", posix.O_RDWR)
    for fd in (0, 1):
        posix.dup2(null, fd)
    posix.close(null)
    return input_fd, output_fd
