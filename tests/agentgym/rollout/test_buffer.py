"""The group buffer: nothing lost, nothing twice, nothing too old, and next to nothing discarded."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from agentgym.errors import EnvError, InputError
from agentgym.messages import Message
from agentgym.policy import Completion
from agentgym.rewards import Score
from agentgym.rollout.buffer import Discard, DiscardReason, GroupBuffer
from agentgym.trajectory import EpisodeStatus, Trajectory, Turn


def episode(group: str, versions: list[int], kind: str = "good", name: str = "t") -> Trajectory:
    """An episode with one sampled token per entry of `versions`; `kind` is good, invalid or failed."""
    n = len(versions)
    completion = Completion((7,) * n, (-0.5,) * n, tuple(versions), tuple(versions), "stop")
    turns = (Turn((1,), completion, Message("assistant", ""), (), 0.0),) if n else ()
    failed = kind == "failed"
    score = None if failed else Score.invalid("grader died") if kind == "invalid" else Score.of({"r": 1.0})
    status = EpisodeStatus.FAILED if failed else EpisodeStatus.TERMINATED
    error = "SandboxDiedError: gone" if failed else None
    return Trajectory(name, group, "my/Env-v0", "task", 0, (), turns, status, score, {}, error)


def filled(buffer: GroupBuffer, group: str, version: int, now: int | None = None) -> Discard | None:
    """Starts `group` under `version` and completes it while `now` is served."""
    buffer.start(group, version)
    discard = None
    for _ in range(buffer.group_size):
        discard = buffer.put(episode(group, [version]), version if now is None else now)
    return discard


def test_a_group_is_delivered_once_it_is_complete() -> None:
    buffer = GroupBuffer(group_size=3, groups_per_step=1, max_staleness=0)
    buffer.start("g", 0)
    members = [episode("g", [0], name=f"t{i}") for i in range(3)]
    for member in members[:2]:
        assert buffer.put(member, 0) is None
    assert buffer.take(1, 0).groups is None
    buffer.put(members[2], 0)
    (group,) = buffer.take(1, 0).groups or ()
    assert group.members == tuple(members)
    assert buffer.take(1, 0).groups is None


def test_failed_members_are_left_out_and_invalid_ones_go_along() -> None:
    buffer = GroupBuffer(group_size=4, groups_per_step=1, max_staleness=0)
    buffer.start("g", 0)
    for kind in ("good", "failed", "invalid", "good"):
        buffer.put(episode("g", [0], kind), 0)
    (group,) = buffer.take(1, 0).groups or ()
    assert [m.score.valid for m in group.members if m.score] == [True, False, True]


def test_a_group_without_two_valid_members_is_discarded_and_says_why() -> None:
    buffer = GroupBuffer(group_size=3, groups_per_step=1, max_staleness=0)
    buffer.start("g", 0)
    outcomes = [buffer.put(episode("g", [0], kind), 0) for kind in ("good", "failed", "invalid")]
    assert outcomes[:2] == [None, None]
    assert outcomes[2] is not None
    assert (outcomes[2].group_id, outcomes[2].reason) == ("g", DiscardReason.TOO_FEW_VALID)
    assert "SandboxDiedError: gone" in outcomes[2].detail
    assert "grader died" in outcomes[2].detail
    assert buffer.may_start


@pytest.mark.parametrize(("now", "admitted"), [(2, True), (3, False)])
def test_staleness_at_admission_is_that_of_the_oldest_token(now: int, admitted: bool) -> None:
    buffer = GroupBuffer(group_size=2, groups_per_step=1, max_staleness=2)
    buffer.start("g", 0)
    buffer.put(episode("g", [1, 0, now]), now)
    discard = buffer.put(episode("g", [now]), now)
    assert (discard is None) is admitted
    if discard is not None:
        assert discard.reason is DiscardReason.STALE_AT_ADMISSION


@pytest.mark.parametrize(("trainer", "delivered"), [(2, True), (3, False)])
def test_staleness_at_consumption(trainer: int, delivered: bool) -> None:
    buffer = GroupBuffer(group_size=2, groups_per_step=1, max_staleness=2)
    filled(buffer, "g", 0)
    taken = buffer.take(1, trainer)
    assert (taken.groups is not None) is delivered
    assert [d.reason for d in taken.discarded] == ([] if delivered else [DiscardReason.STALE_AT_CONSUMPTION])
    assert buffer.num_ready == 0


def test_a_failed_members_old_tokens_do_not_make_its_group_old() -> None:
    buffer = GroupBuffer(group_size=3, groups_per_step=1, max_staleness=0)
    buffer.start("g", 0)
    buffer.put(episode("g", [0], "failed"), 1)
    buffer.put(episode("g", [1]), 1)
    assert buffer.put(episode("g", [1]), 1) is None
    assert buffer.take(1, 1).groups is not None


def test_the_oldest_groups_leave_first_whatever_the_order_of_their_ends() -> None:
    buffer = GroupBuffer(group_size=2, groups_per_step=2, max_staleness=3)
    for group, version in (("a", 0), ("b", 0), ("c", 1)):
        buffer.start(group, version)
    for group, version in (("c", 1), ("b", 0), ("a", 0)):
        for _ in range(2):
            buffer.put(episode(group, [version]), 1)
    assert [group.group_id for group in buffer.take(2, 1).groups or ()] == ["a", "b"]


def test_a_slow_group_on_its_last_version_is_waited_for() -> None:
    buffer = GroupBuffer(group_size=2, groups_per_step=1, max_staleness=1)
    buffer.start("slow", 0)
    filled(buffer, "fast", 0)
    assert [g.group_id for g in buffer.take(1, 0).groups or ()] == ["fast"]
    buffer.publish()
    filled(buffer, "young", 1)
    assert buffer.take(1, 1).groups is None  # "young" can wait for the next version, "slow" cannot
    for _ in range(2):
        buffer.put(episode("slow", [0]), 1)
    assert [g.group_id for g in buffer.take(1, 1).groups or ()] == ["slow"]


def test_the_look_ahead_counts_every_version_until_the_bound() -> None:
    """Two slow groups of version 0 need the batches of versions 1 and 2: at version 1 one of them must leave."""
    buffer = GroupBuffer(group_size=2, groups_per_step=1, max_staleness=2)
    buffer.start("slow", 0)
    buffer.start("slower", 0)
    filled(buffer, "fast", 0)
    assert buffer.take(1, 0).groups is not None
    buffer.publish()
    filled(buffer, "young", 1)
    assert buffer.take(1, 1).groups is None
    for _ in range(2):
        buffer.put(episode("slow", [0]), 1)
    assert [g.group_id for g in buffer.take(1, 1).groups or ()] == ["slow"]


def test_no_more_groups_start_than_can_be_consumed_in_time() -> None:
    buffer = GroupBuffer(group_size=2, groups_per_step=2, max_staleness=1)
    for index in range(4):
        assert buffer.may_start
        filled(buffer, f"g{index}", 0)
    assert not buffer.may_start
    with pytest.raises(InputError, match="4 groups"):
        buffer.start("one too many", 0)
    buffer.take(2, 0)
    assert not buffer.may_start  # what is in training is not consumed before its update is published
    buffer.publish()
    assert buffer.may_start


def test_asking_again_without_a_publication_does_not_starve() -> None:
    buffer = GroupBuffer(group_size=2, groups_per_step=1, max_staleness=0)
    filled(buffer, "a", 0)
    assert buffer.take(1, 0).groups is not None
    assert buffer.take(1, 0).groups is None
    assert buffer.may_start


def test_live_versions_are_those_of_waiting_tokens() -> None:
    buffer = GroupBuffer(group_size=2, groups_per_step=1, max_staleness=5)
    buffer.start("a", 1)
    buffer.put(episode("a", [1, 3]), 3)
    assert buffer.live_versions() == {1, 3}
    buffer.put(episode("a", [2]), 3)
    assert buffer.live_versions() == {1, 2, 3}
    buffer.take(1, 3)
    assert buffer.live_versions() == set()


def test_bad_use_is_refused() -> None:
    with pytest.raises(InputError, match="group_size >= 2"):
        GroupBuffer(1, 1, 0)
    buffer = GroupBuffer(2, 2, 0)
    buffer.start("a", 0)
    with pytest.raises(InputError, match="started already"):
        buffer.start("a", 0)
    with pytest.raises(EnvError, match="no open group"):
        buffer.put(episode("b", [0]), 0)


class BufferMachine(RuleBasedStateMachine):
    """A trainer that takes a batch per version, and episodes that end in any order, some badly.

    Whatever the interleaving: each group ends exactly once, no batch holds an old token, and no group is ever lost to
    staleness, which is what the admission bound and the look-ahead are for.
    """

    @initialize(size=st.integers(2, 3), step=st.integers(1, 3), staleness=st.integers(0, 3))
    def begin(self, size: int, step: int, staleness: int) -> None:
        self.step, self.staleness = step, staleness
        self.buffer = GroupBuffer(size, step, staleness)
        self.version = 0
        self.training = False
        self.open: dict[str, list[int]] = {}  # group -> the version that each unfinished member started under
        self.started = 0
        self.put_count: dict[str, int] = {}
        self.delivered: list[str] = []
        self.discarded: list[str] = []

    @precondition(lambda self: self.buffer.may_start)
    @rule()
    def start(self) -> None:
        name = f"g{self.started}"
        self.started += 1
        self.buffer.start(name, self.version)
        self.open[name] = [self.version] * self.buffer.group_size

    @precondition(lambda self: self.open)
    @rule(data=st.data(), kind=st.sampled_from(["good"] * 6 + ["invalid", "failed"]))
    def end_episode(self, data: st.DataObject, kind: str) -> None:
        name = data.draw(st.sampled_from(sorted(self.open)))
        start = self.open[name].pop()
        versions = list(range(start, self.version + 1))
        discard = self.buffer.put(episode(name, versions, kind), self.version)
        if not self.open[name]:
            del self.open[name]
        if discard is not None:
            assert name not in self.open
            assert discard.reason is DiscardReason.TOO_FEW_VALID
            self.discarded.append(discard.group_id)

    @precondition(lambda self: not self.training)
    @rule()
    def take(self) -> None:
        ready = self.buffer.num_ready
        taken = self.buffer.take(self.step, self.version)
        assert taken.discarded == ()
        if taken.groups is None:
            assert ready < self.step or self.open  # it waits only for something that can still happen
            return
        assert len(taken.groups) == self.step
        oldest = [group.oldest_version for group in taken.groups]
        assert oldest == sorted(oldest)
        for group in taken.groups:
            versions = [v for m in group.members for turn in m.turns for v in turn.completion.policy_versions]
            assert min(versions) == group.oldest_version
            assert self.version - min(versions) <= self.staleness
            assert sum(m.score is not None and m.score.valid for m in group.members) >= 2
        self.delivered += [group.group_id for group in taken.groups]
        self.training = True

    @precondition(lambda self: self.training)
    @rule()
    def publish(self) -> None:
        self.version += 1
        self.training = False
        self.buffer.publish()

    @invariant()
    def every_group_is_in_one_place(self) -> None:
        if not hasattr(self, "buffer"):
            return
        ended = self.delivered + self.discarded
        assert len(ended) == len(set(ended))
        assert len(ended) + len(self.open) + self.buffer.num_ready == self.started
        assert self.buffer.num_unconsumed <= (self.staleness + 1) * self.step

    @invariant()
    def versions_that_may_be_delivered_are_live(self) -> None:
        if hasattr(self, "buffer"):
            assert all(v <= self.version for v in self.buffer.live_versions())


TestBufferMachine = BufferMachine.TestCase
TestBufferMachine.settings = settings(max_examples=150, stateful_step_count=60, deadline=None)
