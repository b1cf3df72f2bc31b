"""Who a request comes from: bearers in, principals out. Must never know HTTP or what a principal may do.

Law: a bearer is compared in constant time, kept in memory only, and means one principal or none; a session's bearer
that is no longer known means nobody, also where no key is asked for, so that an ended session's requests are refused
instead of going on unrecorded.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

SESSION_PREFIX = "ags-"  # what a session's bearer begins with
Role = Literal["trainer", "actor", "session"]


@dataclass(frozen=True, slots=True)
class Keys:
    """The keys of a service. Example: `Keys(trainer="k7...", openai=None)`; None: the OpenAI surface asks for none."""

    trainer: str
    openai: str | None


@dataclass(frozen=True, slots=True)
class Principal:
    """Who asks: the trainer (administration), an actor (the OpenAI surface, opens sessions), or one session's agent.

    Example: `Principal("session", "ses-000004")`.
    """

    role: Role
    session_id: str | None = None


ACTOR = Principal("actor")
TRAINER = Principal("trainer")


class Keyring:
    """Maps bearers to principals. A session's bearer is made by `admit` and forgotten by `revoke`.

    Example: `Keyring(Keys("k7...", None)).identify(None)` is the actor: on a loopback address no key is asked for.
    """

    def __init__(self, keys: Keys) -> None:
        self.keys = keys
        self._sessions: dict[bytes, Principal] = {}  # by the bearer's digest, so that a look-up's time tells nothing
        self._bearers: dict[str, bytes] = {}

    def admit(self, session_id: str) -> str:
        """A new bearer that means this session; it replaces an older one."""
        self.revoke(session_id)
        bearer = SESSION_PREFIX + secrets.token_urlsafe(32)
        digest = _digest(bearer)
        self._sessions[digest] = Principal("session", session_id)
        self._bearers[session_id] = digest
        return bearer

    def revoke(self, session_id: str) -> None:
        """Forgets a session's bearer, if it has one."""
        digest = self._bearers.pop(session_id, None)
        if digest is not None:
            del self._sessions[digest]

    def identify(self, bearer: str | None) -> Principal | None:
        """Whom a bearer means; None: nobody, and the request is to be refused."""
        if bearer is not None:
            if bearer.startswith(SESSION_PREFIX):
                return self._sessions.get(_digest(bearer))
            if _same(bearer, self.keys.trainer):
                return TRAINER
        if self.keys.openai is None or (bearer is not None and _same(bearer, self.keys.openai)):
            return ACTOR
        return None


def bearer_of(header: bytes) -> str | None:
    """The bearer of an Authorization header; None if it holds none."""
    scheme, _, given = header.partition(b" ")
    if scheme.lower() != b"bearer" or not given.strip():
        return None
    return given.strip().decode("utf-8", "replace")


def bearers_of(headers: Mapping[bytes, bytes], *, with_api_key: bool) -> tuple[str | None, str | None]:
    """The bearer of a request, and another one if it names two; `with_api_key`: also by the header `x-api-key`, as
    Anthropic's clients send it.

    >>> bearers_of({b"x-api-key": b"k"}, with_api_key=True)
    ('k', None)
    """
    bearer = bearer_of(headers.get(b"authorization", b""))
    key = headers.get(b"x-api-key", b"").strip().decode("utf-8", "replace") if with_api_key else ""
    if not key or bearer == key:
        return bearer, None
    return (key, None) if bearer is None else (bearer, key)


def _same(given: str, key: str) -> bool:
    return secrets.compare_digest(given.encode(), key.encode())


def _digest(bearer: str) -> bytes:
    return hashlib.sha256(bearer.encode()).digest()
