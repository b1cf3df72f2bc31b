"""The pool's bookkeeping over a scripted source of boxes."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import hypothesis
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from memory_boxes import SPEC, MemorySource, eventually, settle

from agentgym.errors import SandboxDiedError
from agentgym.sandbox.spec import SandboxSpec
from agentgym.sandbox.warm.pool import BACKLOG, KEPT_SPECS, SandboxPool, spec_key
from agentgym.sandbox.warm.pooled_box import PooledBox

# ------------------------------------------------------------------------------------------------------- accounting


class PoolMachine(RuleBasedStateMachine):
    """Whatever is asked of a pool and whatever dies under it: no box is given twice, none is lost, none stays."""

    specs = (SPEC, SandboxSpec(memory_mb=64), SandboxSpec(environment={"A": "1"}))

    def __init__(self) -> None:
        super().__init__()
        self.source = MemorySource()
        self.pool = SandboxPool(self.source, warm=2, starters=2)
        self.held: list[PooledBox] = []
        self.given: set[str] = set()
        self.asked = 0

    @rule(spec=st.sampled_from(specs))
    def prefetch(self, spec: SandboxSpec) -> None:
        self.pool.prefetch(spec)

    @rule(spec=st.sampled_from(specs), settled=st.booleans())
    def open(self, spec: SandboxSpec, settled: bool) -> None:
        if settled:
            settle(self.pool)
        box = self.pool.open(spec)
        assert spec_key(box.spec) == spec_key(spec)
        assert box.name not in self.given, "a box was handed out twice"
        box.ping()
        self.asked += 1
        self.given.add(box.name)
        self.held.append(box)

    @precondition(lambda self: self.held)
    @rule(index=st.integers(0), twice=st.booleans())
    def close_one(self, index: int, twice: bool) -> None:
        box = self.held.pop(index % len(self.held))
        for _ in range(1 + twice):
            box.close()
        with pytest.raises(SandboxDiedError):
            box.ping()

    @precondition(lambda self: self.held)
    @rule(index=st.integers(0))
    def fork(self, index: int) -> None:
        box = self.held[index % len(self.held)].fork()
        self.given.add(box.name)
        self.held.append(box)

    @rule()
    def a_warm_box_dies(self) -> None:
        settle(self.pool)
        for box in self.source.boxes:
            if box.alive and box.name not in self.given:
                box.alive = False
                return

    @invariant()
    def the_books_are_right(self) -> None:
        metrics = self.pool.metrics()
        assert metrics.in_use == len(self.held)
        assert metrics.hits + metrics.misses == self.asked
        assert metrics.starting <= 2
        assert self.source.most_opening <= 2 + 1  # a fork starts its box itself
        assert all(box.closes <= 1 for box in self.source.boxes)
        settle(self.pool)
        metrics = self.pool.metrics()
        closed = sum(box.closes for box in self.source.boxes)
        assert metrics.ended == closed
        assert len(self.source.boxes) == metrics.warm + metrics.in_use + closed

    def teardown(self) -> None:
        self.pool.close()
        assert all(box.closes == 1 for box in self.source.boxes), "a box stayed"
        assert self.pool.metrics().in_use == self.pool.metrics().warm == 0


TestAccounting = PoolMachine.TestCase
TestAccounting.settings = hypothesis.settings(max_examples=25, stateful_step_count=12, deadline=None)


def test_many_threads_at_once(source: MemorySource, make: Callable[..., SandboxPool]):
    pool = make(warm=3, starters=2)
    names: list[str] = []

    def episode(number: int) -> None:
        with pool.open(SandboxSpec(pids=1 + number % 3)) as box:
            names.append(box.name)
            box.write_file("/work/mine", b"x")

    with ThreadPoolExecutor(16) as threads:
        list(threads.map(episode, range(200)))
    assert len(set(names)) == 200
    assert source.most_opening <= 2
    metrics = pool.metrics()
    assert (metrics.in_use, metrics.hits + metrics.misses) == (0, 200)
    pool.close()
    assert {box.closes for box in source.boxes} == {1}


# ------------------------------------------------------------------------------------------------------ warm boxes


def test_a_prefetched_box_is_a_hit_and_the_shelf_is_filled_again(source: MemorySource, make):
    pool = make(warm=2)
    pool.prefetch(SPEC)
    eventually(lambda: pool.metrics().warm == 2)
    box = pool.open(SandboxSpec())
    assert (pool.metrics().hits, pool.metrics().misses, pool.metrics().hit_rate) == (1, 0, 1.0)
    eventually(lambda: pool.metrics().warm == 2)
    box.close()
    pool.open(SandboxSpec(memory_mb=1)).close()
    assert (pool.metrics().hits, pool.metrics().misses) == (1, 1)
    assert pool.metrics().named()["sandbox_hit_rate"] == 0.5


def test_a_used_box_is_never_given_again(source: MemorySource, make):
    pool = make(warm=0)
    first = pool.open()
    first.write_file("/work/secret", b"1")
    first.close()
    with pytest.raises(SandboxDiedError, match="closed"):
        first.read_file("/work/secret")
    assert pool.open().name != first.name
    eventually(lambda: not source.boxes[0].alive)


def test_a_box_that_died_on_the_shelf_is_not_given(source: MemorySource, make):
    pool = make(warm=2)
    pool.prefetch(SPEC)
    settle(pool)
    for box in source.boxes:
        box.alive = False
    box = pool.open()
    box.ping()
    assert pool.metrics().dead_at_handout == 2
    settle(pool)
    assert [dead.closes for dead in source.boxes[:2]] == [1, 1]


def test_specs_that_differ_in_their_environment_are_not_mixed(source: MemorySource, make):
    pool = make(warm=1)
    pool.prefetch(SandboxSpec(environment={"A": "1", "B": "2"}))
    settle(pool)
    assert pool.open(SandboxSpec(environment={"B": "2", "A": "1"})).name == "box-0"
    assert pool.open(SandboxSpec(environment={"A": "2", "B": "1"})).spec.environment["A"] == "2"


def test_what_nobody_asks_for_is_not_kept(source: MemorySource, make):
    pool = make(warm=1, idle_s=0.05)

    def starts() -> bool:
        pool.prefetch(SPEC)  # again, where the pool's threads came so late that nobody had asked for long
        return bool(source.tries)

    eventually(starts)
    eventually(lambda: not pool._shelves and not pool.metrics().ending)
    assert {box.closes for box in source.boxes} == {1}
    assert pool.metrics().warm == 0
    pool.open().ping()  # and can be had again


def test_only_the_latest_specs_are_kept_warm(source: MemorySource, make):
    pool = make(warm=1)
    for pids in range(1, KEPT_SPECS + 4):
        pool.open(SandboxSpec(pids=pids)).close()
        settle(pool)
    assert pool.metrics().warm == KEPT_SPECS
    kept = {box.spec.pids for box in source.boxes if box.alive}
    assert kept == set(range(4, KEPT_SPECS + 4))


def test_used_boxes_do_not_pile_up(source: MemorySource, make):
    """While nothing can be ended, whoever closes one box too many waits."""
    pool = make(warm=0, starters=1)
    boxes = [pool.open() for _ in range(BACKLOG + 3)]
    source.may_close.clear()
    for box in boxes[: BACKLOG + 1]:
        box.close()
        eventually(lambda: source.closing == 1)  # the first is under way, the others wait
    closing = threading.Thread(target=lambda: [box.close() for box in boxes[BACKLOG + 1 :]])
    closing.start()
    closing.join(0.1)
    assert closing.is_alive()
    source.may_close.set()
    closing.join(60)
    settle(pool)
    assert pool.metrics().ended == BACKLOG + 3
