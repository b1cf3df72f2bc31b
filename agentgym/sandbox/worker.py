"""The process inside the box: pid 1, answers one request at a time on its standard streams. Law: standard library
only (and worker_streams), because these two sources are what is sent into the box; it trusts its host and nothing else.

Being pid 1 is the design: nothing in the box can kill, stop or trace it, orphans fall to it and are reaped, and when
it ends (its input ends as soon as the owner is gone, `kill -9` included) the kernel ends everything else in the box.
It makes itself undumpable, so that no process in the box can open its streams through /proc/1/fd and forge frames.

A frame is two big-endian uint32 (length of the header, length of the body), a JSON header, raw bytes.
"""

import contextlib
import ctypes
import errno
import fcntl
import json
import os
import resource
import select
import signal
import stat
import struct
import sys
import time

from agentgym.sandbox.worker_streams import CHUNK, Capture, Pipes, drain, feed, read_some

FRAME = struct.Struct(">II")
LINGER_S = 0.1  # how long the output of a finished command is still read while a background child holds it open
PR_SET_DUMPABLE, PR_SET_CHILD_SUBREAPER = 4, 36


class Refused(Exception):
    """Becomes an error reply. kind: "missing", "limit" or "failed"."""

    def __init__(self, kind, message):
        super().__init__(message)
        self.kind, self.message = kind, message


class Resident:
    """A process that stays: it reads framed messages on its descriptor 3 and answers on its descriptor 4."""

    def __init__(self, pid, to_fd, from_fd, output_fd, before):
        self.pid, self.to_fd, self.from_fd, self.output_fd, self.before = pid, to_fd, from_fd, output_fd, before


class Worker:
    def __init__(self, input_fd, output_fd):
        self.input_fd, self.output_fd = input_fd, output_fd
        self.received = bytearray()
        self.statuses = {}  # pid -> exit code, of the processes that are waited for
        self.residents = {}
        self.next_resident = 1
        self.environment = {}
        self.output_limit = self.file_limit = CHUNK
        wake_read, wake_write = os.pipe()
        os.set_blocking(wake_read, False)
        os.set_blocking(wake_write, False)
        self.wake_fd = wake_read
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # pid 1 is deaf to what has no handler
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)

    # ------------------------------------------------------------------------------------------ frames and waiting

    def wait(self, until, fds):
        """Waits for one of `fds` ({fd: poll events}), a child's end or `until`; the ready fds. Ends with its input."""
        poll = select.poll()
        poll.register(self.input_fd, select.POLLIN)
        poll.register(self.wake_fd, select.POLLIN)
        for fd, events in fds.items():
            poll.register(fd, events)
        timeout = None if until is None else max(0.0, (until - time.monotonic()) * 1000)
        ready = dict(poll.poll(timeout))
        if ready.pop(self.input_fd, None):
            data = os.read(self.input_fd, 1 << 20)
            if not data:
                os._exit(0)  # the owner is gone: everything in the box ends with pid 1
            self.received += data
        if ready.pop(self.wake_fd, None):
            os.read(self.wake_fd, 4096)
        self.reap()
        return ready

    def reap(self):
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if not pid:
                return
            if pid in self.statuses:
                self.statuses[pid] = os.waitstatus_to_exitcode(status)

    def receive(self, size):
        while len(self.received) < size:
            self.wait(None, {})
        data = bytes(self.received[:size])
        del self.received[:size]
        return data

    def reply(self, header, body=b""):
        encoded = json.dumps(header).encode()
        view = memoryview(FRAME.pack(len(encoded), len(body)) + encoded + body)
        while view:
            view = view[os.write(self.output_fd, view) :]

    def serve(self):
        operations = {
            name: getattr(self, "do_" + name)
            for name in ("start", "ping", "exec", "read", "write", "spawn", "ask", "stop")
        }
        while True:
            header_size, body_size = FRAME.unpack(self.receive(FRAME.size))
            header = json.loads(self.receive(header_size))
            body = self.receive(body_size)
            try:
                answer, data = operations[header["op"]](header, body)
            except Refused as error:
                answer, data = {"error": error.kind, "message": error.message}, b""
            except OSError as error:
                answer, data = {"error": kind_of(error), "message": f"{error.strerror}: {error.filename or ''}"}, b""
            except MemoryError:
                answer, data = {"error": "limit", "message": "out of memory in the box"}, b""
            self.reply({"id": header["id"], **answer}, data)

    # ---------------------------------------------------------------------------------------------------- processes

    def spawn(self, argv, cwd, environment, streams):
        """Starts argv in a session of its own; `streams` maps the child's descriptors to ours."""
        home = os.getcwd()
        try:
            os.chdir(cwd or home)
        except OSError as error:
            raise Refused("missing", f"the directory {cwd!r} cannot be entered: {error.strerror}") from None
        try:
            path = find_program(argv[0], environment.get("PATH", os.defpath))
            actions = [(os.POSIX_SPAWN_DUP2, source, target) for target, source in streams.items()]
            restored = [signal.SIGPIPE, signal.SIGXFSZ, signal.SIGCHLD, signal.SIGINT]
            pid = os.posix_spawn(path, argv, environment, file_actions=actions, setsid=True, setsigdef=restored)
        finally:
            os.chdir(home)
        self.statuses[pid] = None
        try:  # when memory runs out, the kernel should take a command and not the worker
            with open(f"/proc/{pid}/oom_score_adj", "w") as file:
                file.write("900")
        except OSError:
            pass  # it has ended already
        return pid

    def processes(self):
        """{(pid, start time)} of everything alive in the box but the worker; the pair tells reused pids apart."""
        found = set()
        for name in os.listdir("/proc"):
            if not name.isdigit() or name == "1":
                continue
            try:
                with open(f"/proc/{name}/stat", "rb") as file:
                    fields = file.read().rpartition(b")")[2].split()
            except OSError:
                continue
            if fields[0] not in (b"Z", b"X"):
                found.add((int(name), int(fields[19])))
        return found

    def kill(self, pid, spared):
        """Kills the process group of `pid` and whatever was born since `spared` was taken, daemons included."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(pid, signal.SIGKILL)
        if os.getpid() != 1:
            return  # in a test, outside a box: other processes are none of ours
        for attempt in range(30):
            if spared:
                for other, _ in self.processes() - spared:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(other, signal.SIGKILL)
            else:
                self.kill_all()
            self.reap()
            if not self.processes() - spared:
                return
            time.sleep(0.001 * attempt)
        self.kill_all()  # something forks faster than it can be found

    def kill_all(self):
        with contextlib.suppress(ProcessLookupError):
            os.kill(-1, signal.SIGKILL)  # from pid 1: all the others, atomically

    # --------------------------------------------------------------------------------------------------- operations

    def do_start(self, header, _):
        ours = ("HOSTNAME", "HOME", "LC_CTYPE", "PWD", "OLDPWD")  # set by the starter and not by the image
        inherited = {name: value for name, value in os.environ.items() if name not in ours}
        defaults = {"PATH": "/usr/local/bin:/usr/bin:/bin", "LANG": "C.UTF-8", "HOME": os.getcwd()}
        self.environment = {**defaults, **inherited, **header["environment"]}
        self.output_limit, self.file_limit = header["output_limit"], header["file_limit"]
        for name, value in header["rlimits"].items():
            limit = getattr(resource, "RLIMIT_" + name)
            hard = resource.getrlimit(limit)[1]
            value = value if hard == resource.RLIM_INFINITY else min(value, hard)
            resource.setrlimit(limit, (value, value))
        return {"pid": os.getpid(), "uid": os.getuid(), "executable": sys.executable}, b""

    def do_ping(self, header, body):
        return {}, body

    def do_exec(self, header, stdin):
        started = time.monotonic()
        before = self.processes()
        with Pipes() as pipes:
            in_read, in_write = pipes.open(1)
            out_read, out_write = pipes.open(0)
            err_read, err_write = pipes.open(0)
            try:
                streams = {0: in_read, 1: out_write, 2: err_write}
                pid = self.spawn(header["argv"], header["cwd"], self.environment, streams)
            except OSError as error:
                code = {errno.ENOENT: 127, errno.EACCES: 126, errno.ENOEXEC: 126}.get(error.errno or 0)
                if code is None:
                    raise
                text = f"{header['argv'][0]}: {error.strerror}\n".encode()
                return outcome(code, b"", text, 0, time.monotonic() - started)
            pipes.close(in_read, out_write, err_write)
            captures = {out_read: Capture(self.output_limit), err_read: Capture(self.output_limit)}
            timeout = self.follow(pid, pipes, captures, (in_write, stdin), started + header["timeout_s"])
            if timeout:
                self.kill(pid, before)
            for fd, capture in captures.items():
                if fd in pipes:
                    drain(fd, capture, 64)
        code = self.statuses.pop(pid)
        (out, dropped_out), (err, dropped_err) = (capture.result() for capture in captures.values())
        answer, data = outcome(code, out, err, dropped_out + dropped_err, time.monotonic() - started)
        return {**answer, "timeout": timeout}, data

    def follow(self, pid, pipes, captures, feeding, until):
        """Moves bytes until the process has ended and its output too; whether `until` came first."""
        in_write, rest = feeding[0], memoryview(feeding[1])
        while True:
            ended = self.statuses[pid] is not None
            if ended or not rest:
                pipes.close(in_write)
            fds = {fd: select.POLLIN for fd in captures if fd in pipes}
            if ended and not fds:
                return False
            if ended:
                until = min(until, time.monotonic() + LINGER_S)  # a background child still holds the output
            if in_write in pipes:
                fds[in_write] = select.POLLOUT
            ready = self.wait(until, fds)
            if in_write in ready:
                rest = feed(in_write, rest)
            for fd, capture in captures.items():
                if fd in ready and not drain(fd, capture, 16):
                    pipes.close(fd)
            if time.monotonic() >= until:
                return self.statuses[pid] is None

    def do_read(self, header, _):
        fd = os.open(header["path"], os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(fd, "rb", buffering=0) as file:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise Refused("failed", f"{header['path']!r} is not a regular file")
            data = bytearray()
            while len(data) <= self.file_limit:
                chunk = file.read(1 << 20)
                if not chunk:
                    return {}, bytes(data)
                data += chunk
        raise Refused("limit", f"{header['path']!r} is larger than {self.file_limit} bytes")

    def do_write(self, header, data):
        flags = os.O_WRONLY | os.O_CREAT | os.O_NONBLOCK | os.O_CLOEXEC
        try:
            fd = os.open(header["path"], flags, 0o644)
        except OSError as error:
            if error.errno == errno.ENXIO:  # a pipe or a socket that nobody reads
                raise Refused("failed", f"{header['path']!r} is not a regular file") from None
            raise
        with open(fd, "wb", buffering=0) as file:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise Refused("failed", f"{header['path']!r} is not a regular file")
            file.truncate(0)
            view = memoryview(data)
            while view:
                view = view[file.write(view) :]
        return {}, b""

    def do_spawn(self, header, _):
        before = self.processes()
        with Pipes() as pipes:
            to_read, to_write = pipes.open(1)
            from_read, from_write = pipes.open(0)
            output_read, output_write = pipes.open(0)
            null = pipes.adopt(os.open("/dev/null", os.O_RDONLY))
            streams = {0: null, 1: output_write, 2: output_write, 3: to_read, 4: from_write}
            pid = self.spawn(header["argv"], header["cwd"], self.environment, streams)
            pipes.keep(to_write, from_read, output_read)
        number, self.next_resident = self.next_resident, self.next_resident + 1
        self.residents[number] = Resident(pid, to_write, from_read, output_read, before)
        return {"process": number}, b""

    def do_ask(self, header, message):
        started = time.monotonic()
        resident = self.residents.get(header["process"])
        if resident is None:
            raise Refused("missing", f"no process {header['process']} in this box")
        output = Capture(self.output_limit)
        framed = struct.pack(">I", len(message)) + message
        state, answer = self.converse(resident, framed, output, started + header["timeout_s"])
        if resident.output_fd is not None:
            drain(resident.output_fd, output, 64)
        code = None
        if state != "answered":
            code = self.end_resident(header["process"], 0.2 if state == "died" else 0.0)
        kept, dropped = output.result()
        result = {"state": state, "exit_code": code, "output": len(kept), "dropped": dropped}
        return {**result, "seconds": time.monotonic() - started}, kept + answer

    def converse(self, resident, framed, output, until):
        """Sends one message and reads one answer: ("answered" | "timeout" | "died", the answer)."""
        rest, answer = memoryview(framed), bytearray()
        while True:
            fds = {resident.from_fd: select.POLLIN}
            if resident.output_fd is not None:
                fds[resident.output_fd] = select.POLLIN
            if rest:
                fds[resident.to_fd] = select.POLLOUT
            gone = self.statuses[resident.pid] is not None
            ready = self.wait(time.monotonic() if gone else until, fds)
            if resident.to_fd in ready:
                rest = feed(resident.to_fd, rest)
            if resident.output_fd in ready and not drain(resident.output_fd, output, 16):
                os.close(resident.output_fd)
                resident.output_fd = None
            if resident.from_fd in ready:
                data = read_some(resident.from_fd)
                if data == b"":
                    return "died", b""
                answer += data or b""
            elif gone:
                return "died", b""
            if len(answer) >= 4:
                size = struct.unpack_from(">I", answer)[0]
                if size > self.output_limit + 4096 or len(answer) > 4 + size:
                    return "died", b""  # nonsense in place of an answer
                if len(answer) == 4 + size:
                    return "answered", bytes(answer[4:])
            if time.monotonic() >= until:
                return "timeout", b""

    def do_stop(self, header, _):
        if header["process"] in self.residents:
            self.end_resident(header["process"])
        return {}, b""

    def end_resident(self, number, patience_s=0.0):
        """Its state is lost, so everything born after it goes with it. Its exit code; None if it had to be killed."""
        resident = self.residents.pop(number)
        code = self.status_within(resident.pid, patience_s)
        others = {other.pid for other in self.residents.values()}
        self.kill(resident.pid, resident.before | {entry for entry in self.processes() if entry[0] in others})
        self.status_within(resident.pid, 1.0)
        del self.statuses[resident.pid]
        for fd in (resident.to_fd, resident.from_fd, resident.output_fd):
            if fd is not None:
                os.close(fd)
        return code

    def status_within(self, pid, patience_s):
        """The exit code of a child that is ending, None if it does not end."""
        until = time.monotonic() + patience_s
        while True:
            self.reap()
            if self.statuses[pid] is not None or time.monotonic() >= until:
                return self.statuses[pid]
            time.sleep(0.002)


def outcome(code, out, err, dropped, seconds):
    header = {"exit_code": code, "out": len(out), "err": len(err), "dropped": dropped, "seconds": seconds}
    return {**header, "timeout": False}, out + err


def kind_of(error):
    if error.errno in (errno.ENOENT, errno.ENOTDIR):
        return "missing"
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EAGAIN, errno.ENOMEM, errno.EMFILE, errno.EFBIG):
        return "limit"
    return "failed"


def find_program(name, path):
    if "/" in name:
        return name
    refused = None
    for folder in path.split(":"):
        candidate = os.path.join(folder or ".", name)
        if os.path.isfile(candidate):
            if os.access(candidate, os.X_OK):
                return candidate
            refused = PermissionError(errno.EACCES, os.strerror(errno.EACCES), name)
    raise refused or FileNotFoundError(errno.ENOENT, "command not found", name)


def main():
    os.closerange(3, 1024)  # whatever the starter left open would be inherited by every command
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)
    libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    # the frames move to descriptors that no child inherits; standard error stays, for the worker's own last words
    input_fd = fcntl.fcntl(0, fcntl.F_DUPFD_CLOEXEC, 10)
    output_fd = fcntl.fcntl(1, fcntl.F_DUPFD_CLOEXEC, 10)
    null = os.open("/dev/null", os.O_RDWR)
    for fd in (0, 1):
        os.dup2(null, fd)
    os.close(null)
    Worker(input_fd, output_fd).serve()


if __name__ == "__main__":
    main()
