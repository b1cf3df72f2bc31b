"""What a box may reach. Law: what is not listed is refused, by name before it is looked up and by address after; pure
but for the resolver, which is an argument.

An entry is `host:port`: a name, `*.name` (every name below it, not itself), or an address. A name leads to public
addresses only, whatever its owner writes into the DNS: loopback, private networks, link-local ones and the metadata
services of clouds are reached only where that very address is listed with its port.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Sequence
from dataclasses import dataclass

from agentgym.errors import InputError

Address = ipaddress.IPv4Address | ipaddress.IPv6Address

LABEL = r"[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?"
# the last label has a letter: 127.1, 0x7f.1 and 2130706433 are addresses to a resolver, and no names to us
NAME = re.compile(rf"(?=.{{1,253}}$)(?:{LABEL}\.)*(?=[a-z0-9_-]*[a-z])(?!0x){LABEL}")
PORT = re.compile(r"[1-9][0-9]{0,4}")
METADATA = frozenset({ipaddress.ip_address("168.63.129.16")})  # Azure's, at an address that looks public
TRANSLATED = ipaddress.IPv6Network("64:ff9b::/96")  # NAT64: an IPv4 address in its last 32 bits


@dataclass(frozen=True, slots=True)
class Rule:
    """One entry. Example: `Rule.parsed("*.pythonhosted.org:443")`."""

    host: str  # a name in lower case, or an address as `ipaddress` writes it
    port: int
    below: bool = False  # the names below it

    @classmethod
    def parsed(cls, entry: str) -> Rule:
        """InputError for what is no entry."""
        host, colon, port = entry.rpartition(":") if isinstance(entry, str) else ("", "", "")
        host = host.lower()
        below = host.startswith("*.")
        name = canonical(host.removeprefix("*."))
        bracketed = host.startswith("[")
        is_good = name is not None and (":" in name) == bracketed and (not below or NAME.fullmatch(name) is not None)
        if name is None or not is_good or not colon or not PORT.fullmatch(port) or int(port) > 65_535:
            raise InputError(
                "sandbox.allow_network takes entries such as 'pypi.org:443', '*.pythonhosted.org:443' or "
                f"'10.0.0.5:8080', got {entry!r:.200}"
            )
        return cls(name, int(port), below)

    def covers(self, host: str, port: int) -> bool:
        if self.port != port:
            return False
        return host.endswith(f".{self.host}") if self.below else host == self.host


class AllowList:
    """Example: `AllowList(("pypi.org:443",)).refusal("pypi.org", 443) is None`."""

    def __init__(self, entries: Sequence[str]) -> None:
        self.rules = tuple(Rule.parsed(entry) for entry in entries)

    def refusal(self, host: str, port: int) -> str | None:
        """Why a host, as `canonical` writes it, is not asked for; None if it is listed."""
        if any(rule.covers(host, port) for rule in self.rules):
            return None
        return "not in sandbox.allow_network"

    def address_refusal(self, address: Address, port: int) -> str | None:
        """Why no connection is made to an address that a listed name led to, or that was listed itself."""
        if any(rule.covers(str(address), port) for rule in self.rules):
            return None
        return None if is_public(address) else f"{address} is not public and not listed itself"


def canonical(host: str) -> str | None:
    """A host as the rules write it; None for what is neither a name nor an address."""
    bare = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    try:
        return str(ipaddress.IPv6Address(bare) if ":" in bare and "%" not in bare else ipaddress.IPv4Address(bare))
    except ValueError:
        name = host.lower().removesuffix(".")
        return name if NAME.fullmatch(name) else None


def is_public(address: Address) -> bool:
    """Whether it belongs to the Internet, and so does every address that it stands for."""
    if isinstance(address, ipaddress.IPv6Address):
        embedded = [address.ipv4_mapped, address.sixtofour, *(address.teredo or ())]
        if address in TRANSLATED:
            embedded.append(ipaddress.IPv4Address(int(address) & 0xFFFFFFFF))
        inner = [one for one in embedded if one is not None]
        if inner:
            return all(is_public(one) for one in inner)
    return address.is_global and not address.is_multicast and not address.is_reserved and address not in METADATA
