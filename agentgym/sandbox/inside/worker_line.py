"""The worker's end of the line: frames from and to its host, and every wait. Law as in worker.py: standard library
only, C modules only; it ends the box as soon as the host is gone, silent for longer than the lease, or not itself."""

import _signal  # pyright: ignore[reportMissingImports]
import marshal
import posix
import select
import time

from agentgym.sandbox.inside.worker_frames import BOX, HOST, PART, SIZES, TAG, sealed, tag_of
from agentgym.sandbox.inside.worker_streams import read_some

LOOK_S = 1.0
MAX_FRAME = 64 << 20
START_LEASE_S = 60.0  # until the start request names the real one


class Refused(Exception):
    """Becomes an error reply. kind: "missing", "limit", "archive", "frozen" or "failed"."""

    def __init__(self, kind, message):
        super().__init__(message)
        self.kind, self.message = kind, message


class Line:
    def __init__(self, input_fd, output_fd):
        self.input_fd, self.output_fd = input_fd, output_fd
        posix.set_blocking(output_fd, False)
        self.received = bytearray()
        self.frames = []
        self.key = b""
        self.num_taken = self.num_sent = 0
        self.lease_s, self.heard = START_LEASE_S, time.monotonic()
        self.statuses = {}  # pid -> exit code, of the processes that are waited for
        self.network = None  # a way out, in a box that has one
        self.is_sending = False
        self.wake_fd, wake_write = posix.pipe()
        for fd in (self.wake_fd, wake_write):
            posix.set_blocking(fd, False)
        _signal.signal(_signal.SIGINT, _signal.SIG_DFL)  # pid 1 is deaf to what has no handler
        _signal.signal(_signal.SIGCHLD, lambda *_: None)
        _signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)

    def wait(self, until, fds):
        """Waits for one of `fds` ({fd: poll events}), a child's end or `until`; the ready fds."""
        poll = select.poll()
        poll.register(self.input_fd, select.POLLIN)
        poll.register(self.wake_fd, select.POLLIN)
        network = None if self.is_sending else self.network  # between two frames only
        beside = network.fds() if network else {}
        for fd, events in (*fds.items(), *beside.items()):
            poll.register(fd, events)
        end = self.lease_end()
        # a wake-up may be stolen (on gVisor, through /proc/1/fd), so what is waited for is looked after anyway
        wake = end if until is None else min(end, until, time.monotonic() + LOOK_S)
        ready = dict(poll.poll(max(0.0, (wake - time.monotonic()) * 1000)))
        if ready.pop(self.input_fd, None):
            self.hear()
        if time.monotonic() >= self.lease_end():
            posix._exit(0)  # the lease is over: everything in the box ends with pid 1
        if ready.pop(self.wake_fd, None):
            read_some(self.wake_fd)
        self.reap()
        if network:
            network.serve({fd: ready.pop(fd) for fd in beside if fd in ready})
        return ready

    def lease_end(self):
        return self.heard + self.lease_s

    def hear(self):
        try:
            data = read_some(self.input_fd, 1 << 18)
        except OSError:
            data = b""
        if data == b"":
            posix._exit(0)  # the owner is gone
        self.received += data or b""
        while self.understand():
            pass

    def understand(self):
        """Takes the next frame out of what was received; whether there was a whole one. Only a frame that the host
        wrote renews the lease."""
        if len(self.received) < SIZES + TAG:
            return False
        sizes, tag = bytes(self.received[:SIZES]), bytes(self.received[SIZES : SIZES + TAG])
        middle = SIZES + TAG + int.from_bytes(sizes[:4], "big")
        end = middle + int.from_bytes(sizes[4:], "big")
        if end > MAX_FRAME:
            raise SystemExit("a frame that its host did not write")
        if len(self.received) < end:
            return False
        header, body = bytes(self.received[SIZES + TAG : middle]), bytes(self.received[middle:end])
        if tag_of(self.key, HOST, self.num_taken, sizes, header, body) != tag:
            raise SystemExit("a frame that its host did not write")
        del self.received[:end]
        self.num_taken += 1
        self.heard = time.monotonic()
        fields = marshal.loads(header)  # only from the host, which proved that it is
        if fields["op"] == "net" and self.network:
            self.network.take(fields, body)
        elif fields["op"] != "renew":
            self.frames.append((fields, body))
        return True

    def reap(self):
        while True:
            try:
                pid, status = posix.waitpid(-1, posix.WNOHANG)
            except ChildProcessError:
                return
            if not pid:
                return
            if pid in self.statuses:
                self.statuses[pid] = posix.waitstatus_to_exitcode(status)

    # ------------------------------------------------------------------------------------------------------- frames

    def frame(self):
        """The next frame that is more than a renewal of the lease: (header, body)."""
        while not self.frames:
            self.wait(None, {})
        return self.frames.pop(0)

    def send(self, fields, body):
        header = as_json(fields).encode()
        head = sealed(self.key, BOX, self.num_sent, header, body)
        self.num_sent += 1
        self.is_sending = True
        for view in (memoryview(head), memoryview(body)):
            while view:
                try:
                    view = view[posix.write(self.output_fd, view) :]
                except BlockingIOError:
                    self.wait(None, {self.output_fd: select.POLLOUT})
                except OSError:
                    posix._exit(0)  # nobody is there to read
        self.is_sending = False

    def reply(self, number, fields, body=b""):
        view = memoryview(body)
        while len(view) > PART:
            self.part(number, view[:PART])
            view = view[PART:]
        self.send({"id": number, **fields}, view)

    def part(self, number, data):
        """Bytes of a reply whose end is not known yet."""
        self.send({"id": number, "part": True}, data)


class Body:
    """What came with a request; it may be larger than the worker's memory, so it is read piece by piece."""

    def __init__(self, line, first, size):
        self.line, self.ready, self.left = line, first, size - len(first)

    def chunk(self):
        """The next bytes, b"" at the end."""
        if not self.ready and self.left > 0:
            self.ready = self.line.frame()[1]
            self.left -= len(self.ready)
        data, self.ready = self.ready, b""
        return data

    def whole(self):
        data = bytearray()
        for chunk in iter(self.chunk, b""):
            data += chunk
        return data

    def skip(self):
        while self.chunk():
            pass


def as_json(value):
    """The host reads nothing but JSON from a box; the modules json and _json take a millisecond and more to import."""
    if isinstance(value, dict):
        return "{" + ",".join(f"{as_json(key)}:{as_json(item)}" for key, item in value.items()) + "}"
    if isinstance(value, str):
        return '"' + "".join(c if " " <= c <= "~" and c not in '"\\' else escaped(ord(c)) for c in value) + '"'
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return repr(value)


def escaped(code):
    if code < 0x10000:
        return f"\\u{code:04x}"
    return f"\\u{0xD7C0 + (code >> 10):04x}\\u{0xDC00 + (code & 0x3FF):04x}"
