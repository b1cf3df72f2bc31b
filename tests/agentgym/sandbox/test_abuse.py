"""Every attack on the machine, and on whoever believes a box, is contained in every tier; and the suite notices when
one is not, which is shown with boxes that are loosened on purpose."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from agentgym.errors import UnavailableError
from agentgym.sandbox import SandboxSpec, open_sandbox
from agentgym.sandbox.network.allow_list import AllowList
from agentgym.sandbox.spec import Sandbox
from agentgym.testing.sandbox_abuse import ATTACKS, MACHINE, TRUST, Attack, Outcome
from agentgym.testing.sandbox_abuse import __main__ as command
from agentgym.testing.sandbox_abuse import attack as judging
from agentgym.testing.sandbox_abuse.forging import replaced_programs
from agentgym.testing.sandbox_abuse.privileges import mount_and_mknod
from agentgym.testing.sandbox_abuse.reach import network_exfiltration, other_boxes
from agentgym.testing.sandbox_abuse.resources import disk_fill, fork_bomb, zombie_flood
from agentgym.testing.sandbox_abuse.way_out import exfiltration_through_an_allow_list

TIERS = [
    pytest.param("namespace", marks=pytest.mark.bubblewrap),
    pytest.param("docker", marks=pytest.mark.docker),
    pytest.param("gvisor", marks=pytest.mark.docker),
]


@functools.cache
def refusal(tier: str) -> str | None:
    """Why boxes of the tier cannot be had here."""
    try:
        open_sandbox(tier, SandboxSpec()).close()
    except UnavailableError as error:
        return str(error)
    return None


def opener(tier: str, **changes: Any) -> Callable[[SandboxSpec], Sandbox]:
    """Opens boxes of the tier, loosened by `changes`; skips where the tier cannot be had."""
    if (why := refusal(tier)) is not None:
        pytest.skip(f"{tier}: {why}")
    return lambda spec: open_sandbox(tier, replace(spec, **changes))


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("attack", [*MACHINE, *TRUST], ids=lambda attack: attack.name)
def test_attack_is_contained(attack: Attack, tier: str) -> None:
    outcome = attack.run(opener(tier))

    assert outcome.contained, outcome.what_happened


def test_every_attack_has_a_name_of_its_own() -> None:
    assert len({attack.name for attack in ATTACKS}) == len(ATTACKS)
    assert all(attack.what for attack in ATTACKS)


# ----------------------------------------------------------------------------------- what is loosened is noticed


@pytest.mark.bubblewrap
@pytest.mark.parametrize(
    ("attack", "changes", "said"),
    [
        (fork_bomb, {"pids": 90}, "children were born in a box with pids=40"),
        (disk_fill, {"tmpfs_mb": 32}, "wrote"),
    ],
    ids=lambda value: value.name if isinstance(value, Attack) else "",
)
def test_a_limit_that_does_not_hold_is_noticed(attack: Attack, changes: dict[str, Any], said: str) -> None:
    outcome = attack.run(opener("namespace", **changes))

    assert not outcome.contained
    assert said in outcome.what_happened


@pytest.mark.docker
@pytest.mark.parametrize(
    ("attack", "changes", "said"),
    [
        (network_exfiltration, {"network": "bridge"}, "the host heard it"),
        (mount_and_mknod, {"run_as_root": True}, "is root on the host"),
        (replaced_programs, {"run_as_root": True, "writable_root": True}, "REPLACED"),
    ],
    ids=lambda value: value.name if isinstance(value, Attack) else "",
)
def test_a_relaxation_is_noticed(attack: Attack, changes: dict[str, Any], said: str) -> None:
    outcome = attack.run(opener("docker", **changes))

    assert not outcome.contained
    assert said in outcome.what_happened


@pytest.mark.bubblewrap
def test_a_proxy_that_lets_other_ports_through_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(AllowList, "refusal", lambda _, host, __: None if host == "127.0.0.1" else "far away")
    monkeypatch.setattr(AllowList, "address_refusal", lambda *_: None)

    outcome = exfiltration_through_an_allow_list.run(opener("namespace"))

    assert not outcome.contained
    assert "the host heard it" in outcome.what_happened


class StaysOpen:
    """A box whose `close` does not close it."""

    def __init__(self, box: Sandbox) -> None:
        self._box = box

    def __getattr__(self, name: str) -> Any:
        return getattr(self._box, name)

    def close(self) -> None:
        pass


@pytest.mark.bubblewrap
def test_a_box_that_is_left_behind_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judging, "GONE_S", 0.2)
    opened: list[Sandbox] = []

    def open_box(spec: SandboxSpec) -> Any:
        opened.append(opener("namespace")(spec))
        return StaysOpen(opened[-1])

    try:
        outcome = zombie_flood.run(open_box)
    finally:
        for box in opened:
            box.close()

    assert not outcome.contained
    assert "left on the host" in outcome.what_happened


@pytest.mark.bubblewrap
def test_two_boxes_that_are_one_are_noticed() -> None:
    with opener("namespace")(SandboxSpec()) as box:
        outcome = other_boxes.run(lambda spec: StaysOpen(box))  # type: ignore[arg-type,return-value]

    assert not outcome.contained
    assert "secret of another box" in outcome.what_happened


# --------------------------------------------------------------------------------------------------- the command


def test_the_table_shows_what_a_run_saw() -> None:
    seen = {attack.name: Outcome(True, "refused") for attack in ATTACKS}
    seen["setuid"] = Outcome(False, "it became root | \x1b[2J\nand more")

    text = command.page({"namespace": seen, "gvisor": "the daemon has no runtime 'runsc'"}, {"namespace": 3.2})

    rows = [line for line in text.splitlines() if line.startswith("| **")]
    assert len(rows) == len(ATTACKS)
    assert all(row.replace("\\|", "").count("|") == 3 for row in rows), "a cell must not end its row"
    assert "* `gvisor`: refused on this machine. the daemon has no runtime 'runsc'" in text
    assert f"* `namespace`: {len(ATTACKS) - 1} of {len(ATTACKS)} contained, 3 s." in text
    assert "**not contained**: it became root \\| \ufffd[2J and more" in text


@pytest.mark.bubblewrap
def test_the_command_runs_one_attack(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--tier", "namespace", "--attack", "hostile bytes"]) == 0

    assert "namespace: hostile bytes: contained:" in capsys.readouterr().err


def test_the_table_in_docs_is_of_this_suite() -> None:
    text = (Path(__file__).parents[3] / "docs" / "sandbox-abuse.md").read_text()

    rows = [line.split("**")[1] for line in text.splitlines() if line.startswith("| **")]
    assert rows == [attack.name for attack in ATTACKS], "run python -m agentgym.testing.sandbox_abuse --out docs/..."
    assert "not contained" not in text
