"""What went through the way out of a box, and how much may. Must never know how it went."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Decision = Literal["allowed", "refused", "failed", "limited"]


@dataclass(frozen=True, slots=True)
class NetworkLimits:
    """What one box may take of its host. Who runs a mirror in front of slow disks raises the times; nobody else needs
    to."""

    bytes: int  # both ways together, of all its connections
    at_once: int = 32  # connections
    connections: int = 4096  # in the life of the box
    head_s: float = 10.0  # until a request is whole
    connect_s: float = 10.0  # to look a name up and to connect
    idle_s: float = 60.0  # without a byte in either direction
    total_s: float = 900.0  # of one connection


@dataclass(frozen=True, slots=True)
class Connection:
    """One connection that ended, or was refused.

    Example: `Connection("pypi.org", 443, "allowed", "", 517, 5120, 0.2)`.
    """

    host: str  # "" where the request was none
    port: int
    decision: Decision
    why: str
    sent_bytes: int  # out of the box
    received_bytes: int
    seconds: float


@dataclass(frozen=True, slots=True)
class NetworkReport:
    """What a box did with its way out, until now.

    Example: `NetworkReport(connections=3, refused=1, sent_bytes=900, received_bytes=51200)`.
    """

    connections: int = 0  # that ended, the refused ones included
    refused: int = 0  # by the list or a limit
    sent_bytes: int = 0
    received_bytes: int = 0
    recent: tuple[Connection, ...] = ()  # the last of them, the newest last
