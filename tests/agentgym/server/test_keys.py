"""Whom a bearer means."""

from __future__ import annotations

import pytest

from agentgym.server.keys import ACTOR, TRAINER, Keyring, Keys, Principal, bearer_of, bearers_of

LOCKED = Keys("the-trainers-key", "the-actors-key")
OPEN = Keys("the-trainers-key", None)


def test_each_key_means_one_principal() -> None:
    ring = Keyring(LOCKED)
    assert ring.identify("the-trainers-key") == TRAINER
    assert ring.identify("the-actors-key") == ACTOR
    for nobody in (None, "", "the-actors-ke", "the-actors-key ", "é", "ags-unknown"):
        assert ring.identify(nobody) is None


def test_without_a_key_everyone_is_an_actor_but_the_trainer_and_sessions() -> None:
    ring = Keyring(OPEN)
    assert ring.identify(None) == ring.identify("none") == ACTOR
    assert ring.identify("the-trainers-key") == TRAINER


@pytest.mark.parametrize("keys", [LOCKED, OPEN])
def test_a_sessions_bearer_means_it_until_it_is_revoked(keys: Keys) -> None:
    ring = Keyring(keys)
    first, second = ring.admit("ses-1"), ring.admit("ses-2")
    assert ring.identify(first) == Principal("session", "ses-1")
    assert ring.identify(second) == Principal("session", "ses-2")
    replaced = ring.admit("ses-1")
    assert ring.identify(first) is None
    assert ring.identify(replaced) == Principal("session", "ses-1")
    ring.revoke("ses-1")
    ring.revoke("ses-1")
    assert ring.identify(replaced) is None  # also where no key is asked for: nothing goes on unrecorded
    assert ring.identify(second) == Principal("session", "ses-2")


@pytest.mark.parametrize(
    ("header", "bearer"),
    [
        (b"Bearer abc", "abc"),
        (b"bearer  abc ", "abc"),
        (b"", None),
        (b"Bearer ", None),
        (b"Basic abc", None),
        (b"abc", None),
        (b"Bearer \xff", "\ufffd"),
    ],
)
def test_the_bearer_of_a_header(header: bytes, bearer: str | None) -> None:
    assert bearer_of(header) == bearer


@pytest.mark.parametrize(
    ("authorization", "api_key", "bearers"),
    [
        (b"Bearer abc", b"", ("abc", None)),
        (b"", b" abc ", ("abc", None)),
        (b"Bearer abc", b"abc", ("abc", None)),
        (b"Bearer abc", b"def", ("abc", "def")),
        (b"Basic abc", b"def", ("def", None)),
        (b"", b"", (None, None)),
    ],
)
def test_a_bearer_may_come_by_another_header(
    authorization: bytes, api_key: bytes, bearers: tuple[str | None, str | None]
) -> None:
    headers = {b"authorization": authorization, b"x-api-key": api_key}
    assert bearers_of(headers, with_api_key=True) == bearers
    assert bearers_of(headers, with_api_key=False) == (bearer_of(authorization), None)
