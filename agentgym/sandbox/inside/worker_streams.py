"""Bytes between the worker and the processes it started. Law as in worker.py."""

import fcntl
import posix

CHUNK = 1 << 16


class Capture:
    """One stream of output: the first and the last bytes are kept, what lies between is counted."""

    def __init__(self, limit):
        self.head, self.tail, self.total = bytearray(), bytearray(), 0
        self.head_limit, self.tail_limit = limit - limit // 2, limit // 2

    def add(self, data):
        self.total += len(data)
        room = self.head_limit - len(self.head)
        if room > 0:
            self.head += data[:room]
            data = data[room:]
        self.tail += data
        if len(self.tail) > self.tail_limit + 4 * CHUNK:
            del self.tail[: len(self.tail) - self.tail_limit]

    def result(self):
        """(what was kept, with a line that says how much was cut; the number of bytes cut)"""
        tail = self.tail[max(0, len(self.tail) - self.tail_limit) :]
        dropped = self.total - len(self.head) - len(tail)
        mark = b"\n[... %d bytes dropped ...]\n" % dropped if dropped else b""
        return bytes(self.head) + mark + bytes(tail), dropped


class Pipes:
    """Open descriptors, closed together; all above those that a child is given, none inherited."""

    def __init__(self):
        self.fds = set()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close(*list(self.fds))

    def __contains__(self, fd):
        return fd in self.fds

    def adopt(self, fd):
        high = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 10)
        posix.close(fd)
        self.fds.add(high)
        return high

    def open(self, ours):
        """A pipe (read end, write end); the end number `ours` does not block."""
        pair = [self.adopt(fd) for fd in posix.pipe()]
        posix.set_blocking(pair[ours], False)
        return pair

    def keep(self, *fds):
        self.fds -= set(fds)

    def close(self, *fds):
        for fd in self.fds.intersection(fds):
            self.fds.discard(fd)
            posix.close(fd)


def read_some(fd, most=CHUNK):
    """Bytes, b"" at the end of the stream, None when there is nothing now."""
    try:
        return posix.read(fd, most)
    except BlockingIOError:
        return None


def drain(fd, capture, rounds):
    """Reads what is there, at most `rounds` chunks; False at the end of the stream."""
    for _ in range(rounds):
        data = read_some(fd)
        if data is None:
            return True
        if not data:
            return False
        capture.add(data)
    return True


def feed(fd, rest):
    """Writes what fits; what is left."""
    try:
        return rest[posix.write(fd, rest[:CHUNK]) :]
    except BlockingIOError:
        return rest
    except BrokenPipeError:
        return rest[:0]
