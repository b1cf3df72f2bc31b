"""What every sandbox tier must be, as checks that look from inside a running box. Law: a check asks the box what it can
do, never the host what was configured, so a new tier passes by being isolated and not by being written like ours.

A tier's tests parametrise over `CHECKS` and give each a way to open a box:
`@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)`, then `check(DockerSandbox)`.
"""

from agentgym.testing.sandbox_conformance import calls, floods, hardening, life, network, sessions, trees
from agentgym.testing.sandbox_conformance.questions import Check, Opener

CHECKS: tuple[Check, ...] = (
    calls.runs_commands,
    calls.moves_files,
    calls.tells_what_is_wrong,
    calls.keeps_bytes_as_they_are,
    calls.cuts_a_flood_of_output,
    calls.kills_at_the_deadline,
    calls.does_not_wait_for_background_processes,
    calls.reaps_orphans,
    life.closes_for_good,
    life.outlives_the_thread_that_opened_it,
    life.ends_with_its_lease,
    life.is_renewed_while_a_call_waits,
    hardening.is_nobody,
    hardening.is_who_the_spec_says,
    hardening.cannot_gain_privileges,
    hardening.has_a_read_only_root,
    hardening.has_no_network,
    network.reaches_what_is_listed_and_nothing_else,
    hardening.sees_no_environment_of_the_host,
    hardening.sees_nothing_of_the_host,
    hardening.limits_descriptors_cores_and_files,
    hardening.protects_its_worker,
    hardening.believes_no_forged_frame,
    floods.survives_a_fork_bomb,
    floods.survives_a_memory_bomb,
    floods.survives_a_full_disk,
    floods.survives_descriptor_and_inode_floods,
    trees.puts_trees,
    trees.puts_through_no_link,
    trees.exports_files_and_folders_only,
    trees.exports_one_moment,
    trees.stands_still,
    trees.goes_on_with_what_it_stopped,
    trees.forks,
    trees.forks_a_frozen_box,
    sessions.keeps_resident_processes,
    sessions.keeps_a_shell,
    sessions.keeps_a_python,
)

__all__ = ["CHECKS", "Check", "Opener"]
