"""The first lines that a program sends to its proxy. Law: pure; written by hostile code, so what is not plainly one of
two requests is refused, and nothing of it is passed on but what was understood.

`CONNECT host:port HTTP/1.1` opens a tunnel. `GET http://host/path HTTP/1.1` is one request: it goes on as `GET /path`
with the Host that was checked, with its body of a known length, and the connection ends with its answer. A second
request, which would come with a Host of its own, is never passed on.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from agentgym.sandbox.network.allow_list import PORT, canonical

MAX_HEAD = 16_384
REQUEST_LINE = re.compile(rb"([A-Z]{1,20}) ([!-~]+) HTTP/1\.([01])")
FIELD = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+):[ \t]*([\t -~\x80-\xff]*)")
LENGTH = re.compile(rb"[0-9]{1,15}")
HOP = frozenset((b"connection", b"host", b"keep-alive", b"te", b"trailer", b"transfer-encoding", b"upgrade", b"expect"))


class BadRequest(Exception):
    """The answer to it: a status line and why."""

    def __init__(self, status: int, why: str) -> None:
        super().__init__(why)
        self.status, self.why = status, why


@dataclass(frozen=True, slots=True)
class Request:
    """What is asked for. Example: `Request("pypi.org", 443, None, 0)` is a tunnel."""

    host: str
    port: int
    head: bytes | None  # what is sent on; None: nothing, a tunnel begins
    body_bytes: int

    @property
    def is_tunnel(self) -> bool:
        return self.head is None


def parse(head: bytes) -> Request:
    """`head` ends with the empty line. BadRequest for everything else."""
    lines = head.removesuffix(b"\r\n\r\n").split(b"\r\n")
    first = REQUEST_LINE.fullmatch(lines[0])
    fields = [FIELD.fullmatch(line) for line in lines[1:]]
    if first is None or not all(fields):
        raise BadRequest(400, "this is no HTTP request to a proxy")
    named = [(match[1].lower(), match[1], match[2].strip()) for match in fields if match]
    method, target = first[1], first[2].decode("ascii")
    if method == b"CONNECT":
        host, port = _authority(target, None)
        return Request(host, port, None, 0)
    if not target.lower().startswith("http://"):
        raise BadRequest(400, "a proxy is asked by CONNECT host:port or with an address that begins with http://")
    authority, path = _split(target[len("http://") :])
    host, port = _authority(authority, 80)
    if any(name == b"transfer-encoding" for name, _, _ in named):
        raise BadRequest(411, "a request through this proxy says the length of its body")
    lengths = [value for name, _, value in named if name == b"content-length"]
    if len(lengths) > 1 or not all(LENGTH.fullmatch(value) for value in lengths):
        raise BadRequest(400, "the length of its body is not said once and as a number")
    shown = f"[{host}]" if ":" in host else host
    passed = [b"%s %s HTTP/1.1" % (method, path.encode()), f"Host: {shown}:{port}".encode()]
    if port == 80:
        passed[1] = f"Host: {shown}".encode()
    passed += [b"%s: %s" % (name, value) for low, name, value in named if low not in HOP and low[:6] != b"proxy-"]
    body_bytes = int(lengths[0]) if lengths else 0
    return Request(host, port, b"\r\n".join([*passed, b"Connection: close", b"", b""]), body_bytes)


def _split(rest: str) -> tuple[str, str]:
    """(authority, path and query) of what follows http://"""
    end = min((place for place in map(rest.find, "/?#") if place >= 0), default=len(rest))
    path = rest[end:].partition("#")[0]
    return rest[:end], path if path.startswith("/") else f"/{path}"


def _authority(text: str, port: int | None) -> tuple[str, int]:
    host, colon, digits = text.rpartition(":")
    if not colon or text.endswith("]"):
        host, digits = text, "" if port is None else str(port)
    name = canonical(host)
    if name is None or not PORT.fullmatch(digits) or int(digits) > 65_535 or (":" in name) != host.startswith("["):
        raise BadRequest(400, f"{text[:100]!r} is not host:port")
    return name, int(digits)
