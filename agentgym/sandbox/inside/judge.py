"""What a judge's program imports as `agentgym_judge`: the program under judgement, which lives in another box, and the
verdict. Law: standard library only, because this source is sent into the judge box; bytes of the subject are data here.

    from agentgym_judge import subject, verdict

    result = subject.run(["python3", "/work/solution.py"], stdin=b"b\\na\\n")
    verdict(correct=result.ok and result.stdout == b"a\\nb\\n")

The host is on descriptors 3 and 4, in the frames of a resident process: a big-endian uint32 length, then the message,
which is a JSON line and raw bytes. No child inherits the two, so a judge may start programs of its own.

A program that is judged must not be able to turn a zero into "nobody knows" by making its judge stumble. So what it
gives back is bytes (`text` decodes what is no UTF-8, too), what it did not give raises SubjectError, and whatever reads
its output stands in `with subject.blame():`. A SubjectError that nobody catches is the verdict that the subject failed.
"""

import contextlib
import json
import os
import struct
import sys

TO_JUDGE, FROM_JUDGE = 3, 4


class SubjectError(Exception):
    """The program under judgement did something that is its own fault."""


class Result:
    """What one run of the subject gave: exit_code (negative: killed), stdout, stderr, dropped_bytes, and `why` it did
    not end by itself: "" (it did), "timeout", "died", "refused", "budget" (all its time or output is used up)."""

    def __init__(self, header, body):
        self.exit_code, self.why = header["exit_code"], header["why"]
        self.dropped_bytes, self.seconds = header["dropped"], header["seconds"]
        self.stdout, self.stderr = body[: header["out"]], body[header["out"] :]

    @property
    def ok(self):
        return self.exit_code == 0 and not self.why

    @property
    def text(self):
        return self.stdout.decode("utf-8", "replace")

    @property
    def error_text(self):
        return self.stderr.decode("utf-8", "replace")

    def __repr__(self):
        return f"Result(exit_code={self.exit_code!r}, why={self.why!r}, stdout={self.stdout[:200]!r})"


class Subject:
    """The artifacts, in a box of their own that holds nothing else of this task."""

    def run(self, argv, stdin=b"", timeout_s=None, cwd=None):
        """Runs argv, or a string through `sh -c`; never raises for what the subject does. Files that it writes and
        processes that it leaves behind are there in the next run."""
        stdin = stdin.encode() if isinstance(stdin, str) else bytes(stdin)
        command = argv if isinstance(argv, str) else [os.fspath(part) for part in argv]
        return Result(*_ask({"do": "run", "command": command, "timeout_s": timeout_s, "cwd": cwd}, stdin))

    def read(self, path):
        """The bytes of a regular file in the subject's box; SubjectError if there is none."""
        header, body = _ask({"do": "read", "path": os.fspath(path)})
        if header["why"]:
            raise SubjectError(header["why"])
        return body

    def write(self, path, data):
        """Writes an input file into the subject's box; SubjectError where it cannot be written."""
        data = data.encode() if isinstance(data, str) else bytes(data)
        header, _ = _ask({"do": "write", "path": os.fspath(path)}, data)
        if header["why"]:
            raise SubjectError(header["why"])

    def fresh(self):
        """What runs after this runs in a new box that holds the artifacts alone."""
        _ask({"do": "fresh"})

    @contextlib.contextmanager
    def blame(self):
        """Whatever fails in here is the subject's doing: `with subject.blame(): value = json.loads(result.text)`."""
        try:
            yield
        except SubjectError:
            raise
        except Exception as error:
            raise SubjectError(f"{type(error).__name__}: {error}") from error


def verdict(**components):
    """The named components of the score, and the end of this program; there is no second verdict."""
    _end({"do": "verdict", "components": {name: float(value) for name, value in components.items()}})


def _end(message):
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    _begin()
    _send(message)
    os._exit(0)


def _ask(request, body=b""):
    _begin()
    _send(request, body)
    header, _, rest = _read_message().partition(b"\n")
    return json.loads(header), rest


_begun = []


def _begin():
    """The host speaks first, and then only when it was asked; it says how much it takes in one message."""
    if not _begun:
        _begun.append(json.loads(_read_message().partition(b"\n")[0]))


def _read_message():
    (size,) = struct.unpack(">I", _read(4))
    return _read(size)


def _read(size):
    data = bytearray()
    while len(data) < size:
        more = os.read(TO_JUDGE, min(size - len(data), 1 << 20))
        if not more:
            os._exit(0)  # the host has ended it
        data += more
    return bytes(data)


def _send(header, body=b""):
    message = json.dumps(header).encode() + b"\n" + body
    if len(message) > _begun[0]["max_bytes"]:
        raise ValueError(f"{len(message)} bytes are too much for one run; at most {_begun[0]['max_bytes']} are taken")
    view = memoryview(struct.pack(">I", len(message)) + message)
    while view:
        view = view[os.write(FROM_JUDGE, view) :]


def _uncaught(kind, error, trace):
    sys.__excepthook__(kind, error, trace)
    if issubclass(kind, SubjectError):
        _end({"do": "blame", "why": str(error)[:2000]})


subject = Subject()
os.set_inheritable(TO_JUDGE, False)
os.set_inheritable(FROM_JUDGE, False)
sys.excepthook = _uncaught
