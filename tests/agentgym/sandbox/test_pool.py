"""The pool's bookkeeping over a scripted source of boxes, and the pool over real boxes."""

from __future__ import annotations

import itertools
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import hypothesis
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from agentgym.errors import InputError, SandboxDiedError, SandboxError, UnavailableError
from agentgym.sandbox.spec import Answer, ExecResult, SandboxSpec
from agentgym.sandbox.warm.pool import BACKLOG, KEPT_SPECS, SandboxPool, box_source, spec_key
from agentgym.sandbox.warm.pooled_box import PooledBox

TIERS = [
    pytest.param("docker", marks=pytest.mark.docker),
    pytest.param("namespace", marks=pytest.mark.bubblewrap),
]
SPEC = SandboxSpec()


class MemoryBox:
    """A box that holds files in a dictionary and runs nothing."""

    tier, limits, frozen = "namespace", {}, False

    def __init__(self, name: str, spec: SandboxSpec, source: MemorySource) -> None:
        self.name, self.spec, self._source = name, spec, source
        self.files: dict[str, bytes] = {}
        self.alive = True
        self.pings = self.closes = 0

    def ping(self, *, timeout_s: float = 30.0) -> None:
        self.pings += 1
        if not self.alive:
            raise SandboxDiedError(f"sandbox {self.name} died")

    def exec(
        self, command: Sequence[str] | str, *, timeout_s: float = 10.0, stdin: bytes = b"", cwd: str | None = None
    ) -> ExecResult:
        self.ping()
        return ExecResult(0, stdin, b"", 0, 0.0)

    def read_file(self, path: str) -> bytes:
        self.ping()
        return self.files[path]

    def write_file(self, path: str, data: bytes) -> None:
        self.ping()
        self.files[path] = data

    def put(self, source: Mapping[str, bytes], path: str = "/work") -> None:
        self.files.update(source)

    def export(self, paths: Sequence[str]) -> Mapping[str, bytes]:
        return {path: self.files[path] for path in paths}

    def freeze(self) -> None: ...

    def thaw(self) -> None: ...

    def fork(self) -> MemoryBox:
        box = self._source.open(self.spec)
        box.files = dict(self.files)
        return box

    def start_process(self, command: Sequence[str], *, cwd: str | None = None) -> int:
        return 0

    def ask_process(self, process: int, message: bytes, *, timeout_s: float = 10.0) -> Answer:
        return Answer("answered", message, b"", 0, None, 0.0)

    def stop_process(self, process: int) -> None: ...

    def __enter__(self) -> MemoryBox:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._source.closing += 1
        self._source.may_close.wait(20)
        self.alive = False
        self.closes += 1


class MemorySource:
    """Opens boxes in memory; the test says when a start succeeds, fails or waits."""

    tier = "namespace"

    def __init__(self) -> None:
        self.boxes: list[MemoryBox] = []
        self.failures: list[BaseException] = []  # the next starts fail with these
        self.may_open, self.may_close = threading.Event(), threading.Event()
        self.may_open.set()
        self.may_close.set()
        self.opening = self.most_opening = self.closing = 0
        self.tries: list[float] = []
        self._lock = threading.Lock()
        self._names = itertools.count()

    def open(self, spec: SandboxSpec | None = None) -> MemoryBox:
        with self._lock:
            self.opening += 1
            self.most_opening = max(self.most_opening, self.opening)
            self.tries.append(time.monotonic())
        self.may_open.wait(20)
        with self._lock:
            self.opening -= 1
            if self.failures:
                raise self.failures.pop(0)
            box = MemoryBox(f"box-{next(self._names)}", spec or SPEC, self)
            self.boxes.append(box)
            return box

    def prefetch(self, spec: SandboxSpec) -> None: ...


def eventually(what: Callable[[], bool], seconds: float = 5.0) -> None:
    until = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < until, "it never became so"
        time.sleep(0.002)


def settle(pool: SandboxPool) -> None:
    """Waits until the background has done what there is to do."""

    def quiet() -> bool:
        first = pool.metrics()
        time.sleep(0.004)
        return first == pool.metrics() and not first.starting and not first.ending

    eventually(quiet)


@pytest.fixture
def source() -> MemorySource:
    return MemorySource()


@pytest.fixture
def make(source: MemorySource) -> Iterator[Callable[..., SandboxPool]]:
    pools: list[SandboxPool] = []

    def make(**kwargs: object) -> SandboxPool:
        pools.append(SandboxPool(source, **kwargs))
        return pools[-1]

    yield make
    source.may_open.set()
    source.may_close.set()
    for pool in pools:
        pool.close()


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
    pool.prefetch(SPEC)
    eventually(lambda: [box.closes for box in source.boxes] == [1])
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
    closing.join(5)
    settle(pool)
    assert pool.metrics().ended == BACKLOG + 3


# --------------------------------------------------------------------------------------------------------- failures


def test_the_failure_of_a_background_start_is_raised_at_the_next_open(source: MemorySource, make):
    pool = make(warm=1, starters=1)
    source.failures = [SandboxError("the daemon is tired")] * 1000
    pool.prefetch(SPEC)
    eventually(lambda: pool.metrics().failed_starts >= 1)
    with pytest.raises(SandboxError, match="tired"):
        pool.open()
    source.failures = []
    eventually(lambda: pool.metrics().warm == 1)
    pool.open().ping()


def test_a_broken_daemon_is_not_asked_in_a_loop_and_everyone_hears_of_it(source: MemorySource, make):
    pool = make(warm=1, starters=2)
    source.failures = [SandboxDiedError("no daemon")] * 1000
    with ThreadPoolExecutor(8) as threads:
        began = time.monotonic()
        calls = [threads.submit(pool.open) for _ in range(8)]
        failures = [call.exception(10) for call in calls]
    assert {type(failure) for failure in failures} == {SandboxDiedError}
    assert time.monotonic() - began < 5
    time.sleep(1.0)
    assert len(source.tries) < 12
    source.failures = []
    eventually(lambda: pool.metrics().warm == 1)  # it recovers by itself
    pool.open().ping()


def test_what_is_the_persons_turn_is_told_to_all_at_once(source: MemorySource, make):
    pool = make(warm=0, starters=1)
    source.failures = [UnavailableError("the image is not built yet")] * 2
    source.may_open.clear()
    with ThreadPoolExecutor(4) as threads:
        calls = [threads.submit(pool.open) for _ in range(4)]
        eventually(lambda: len(source.tries) == 1)
        time.sleep(0.05)
        source.may_open.set()
        failures = [call.exception(5) for call in calls]
    assert all(isinstance(failure, UnavailableError) for failure in failures[:1])
    assert sum(isinstance(failure, UnavailableError) for failure in failures) == 4
    assert len({id(failure) for failure in failures}) == 4


def test_what_was_refused_is_tried_again_when_it_is_asked_for_and_not_before(source: MemorySource, make):
    pool = make(warm=2, starters=2)
    source.failures = [UnavailableError("the image is not built yet")] * 2
    pool.prefetch(SPEC)
    settle(pool)
    tries = len(source.tries)
    assert 1 <= tries <= 2
    time.sleep(0.6)
    assert len(source.tries) == tries
    source.failures = []
    pool.open().ping()  # it was built meanwhile: what was said before is not told
    eventually(lambda: pool.metrics().warm == 2)


def test_a_bug_in_a_start_leaves_nobody_waiting(source: MemorySource, make, monkeypatch: pytest.MonkeyPatch):
    shown = []
    monkeypatch.setattr(threading, "excepthook", lambda args: shown.append(args.exc_type))
    pool = make(warm=0, starters=1)
    source.failures = [ZeroDivisionError("bug")]
    with pytest.raises(SandboxError, match="ZeroDivisionError: bug"):
        pool.open()
    pool.open().ping()
    assert shown == [ZeroDivisionError]


@pytest.mark.parametrize("kwargs", [{"warm": -1}, {"starters": 0}])
def test_sizes_that_cannot_be(source: MemorySource, kwargs: dict[str, int]):
    with pytest.raises(InputError, match=f"sandbox.{next(iter(kwargs))} must be"):
        SandboxPool(source, **kwargs)


# ----------------------------------------------------------------------------------------------------------- the end


def test_close_ends_what_is_warm_used_starting_and_waited_for(source: MemorySource, make):
    pool = make(warm=2, starters=2)
    held = pool.open()
    settle(pool)
    source.may_open.clear()
    with ThreadPoolExecutor(4) as threads:
        waiting = [threads.submit(pool.open, SandboxSpec(pids=7)) for _ in range(3)]
        eventually(lambda: source.opening == 2)
        closing = threads.submit(pool.close)
        failures = [call.exception(5) for call in waiting]
        assert not closing.done()  # two boxes are being started
        source.may_open.set()
        closing.result(5)
    assert all(isinstance(failure, SandboxDiedError) for failure in failures)
    assert {box.closes for box in source.boxes} == {1}
    with pytest.raises(SandboxDiedError):
        held.ping()
    with pytest.raises(SandboxDiedError, match="closed"):
        pool.open()
    pool.close()


def test_a_pool_that_nobody_asked_has_no_thread(make):
    before = threading.active_count()
    pool = make()
    assert threading.active_count() == before
    pool.close()


def test_a_forked_child_leaves_the_pool_alone(source: MemorySource, make):
    pool = make(warm=1)
    box = pool.open()
    settle(pool)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            box.close()
            pool.close()
            try:
                pool.open()
            except SandboxError:
                code = 0
        finally:
            os._exit(code)
    assert os.waitpid(child, 0)[1] == 0
    box.ping()


# -------------------------------------------------------------------------------------------------------- real boxes


def test_a_tier_that_does_not_exist():
    with pytest.raises(InputError, match="dokcer"):
        box_source("dokcer")


@pytest.mark.parametrize("tier", TIERS)
def test_real_boxes(tier: str):
    with SandboxPool(tier, warm=2) as pool:
        assert pool.tier == tier
        pool.prefetch(SandboxSpec(memory_mb=64))
        eventually(lambda: pool.metrics().warm == 2, 20)
        names = set()
        for _ in range(3):
            with pool.open(SandboxSpec(memory_mb=64)) as box:
                names.add(box.name)
                assert box.exec("cat /work/note").exit_code
                box.write_file("/work/note", b"dirty")
        assert len(names) == 3
        assert pool.metrics().hits >= 2


@pytest.mark.parametrize("tier", TIERS)
def test_a_real_box_that_was_killed_on_the_shelf(tier: str):
    with SandboxPool(tier, warm=1) as pool:
        pool.prefetch(SPEC)
        eventually(lambda: pool.metrics().warm == 1, 20)
        (shelf,) = pool._shelves.values()
        shelf.warm[0].close()
        with pool.open(SPEC) as box:
            assert box.exec("echo hi").text == "hi\n"
        assert pool.metrics().dead_at_handout == 1
