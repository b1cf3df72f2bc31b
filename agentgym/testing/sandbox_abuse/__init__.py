"""Every attack that a sandbox tier must contain, on real boxes. Law: an attack is judged from outside and from the
host, and a tier passes by containing it, not by being written like ours.

A tier's tests parametrise over `ATTACKS` and give each a way to open a box:
`@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.name)`, then
`outcome = attack.run(open_box)` and `assert outcome.contained, outcome.what_happened`.
`python -m agentgym.testing.sandbox_abuse --out docs/sandbox-abuse.md` runs all of them in all tiers and writes the
table.
"""

from agentgym.testing.sandbox_abuse import exports, forging, privileges, reach, resources, tokens, way_out, worker
from agentgym.testing.sandbox_abuse.attack import Attack, OpenBox, Outcome

MACHINE: tuple[Attack, ...] = (
    *resources.ATTACKS,
    *reach.ATTACKS,
    *way_out.ATTACKS,
    *privileges.ATTACKS,
)  # against the host
TRUST: tuple[Attack, ...] = (*worker.ATTACKS, *exports.ATTACKS, *tokens.ATTACKS)  # against who believes the box
FORGERIES: tuple[Attack, ...] = forging.ATTACKS  # against the reward
ATTACKS: tuple[Attack, ...] = (*MACHINE, *TRUST, *FORGERIES)

__all__ = ["ATTACKS", "FORGERIES", "MACHINE", "TRUST", "Attack", "OpenBox", "Outcome"]
