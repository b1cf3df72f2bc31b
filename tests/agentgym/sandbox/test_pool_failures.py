"""What a pool does when boxes cannot be started, and how it ends."""

from __future__ import annotations

import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from memory_boxes import SPEC, MemorySource, eventually, settle

from agentgym.errors import InputError, SandboxDiedError, SandboxError, UnavailableError
from agentgym.sandbox.spec import SandboxSpec
from agentgym.sandbox.warm.pool import SandboxPool

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
        calls = [threads.submit(pool.open) for _ in range(8)]
        failures = [call.exception(60) for call in calls]
    assert {type(failure) for failure in failures} == {SandboxDiedError}
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
        eventually(lambda: [shelf.waiting for shelf in list(pool._shelves.values())] == [4] and len(source.tries) == 1)
        source.may_open.set()
        failures = [call.exception(60) for call in calls]
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
    eventually(lambda: shown == [ZeroDivisionError])  # its thread ends after it has told who waits


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
        failures = [call.exception(60) for call in waiting]
        assert not closing.done()  # two boxes are being started
        source.may_open.set()
        closing.result(60)
    assert all(isinstance(failure, SandboxDiedError) for failure in failures)
    assert {box.closes for box in source.boxes} == {1}
    with pytest.raises(SandboxDiedError):
        held.ping()
    with pytest.raises(SandboxDiedError, match="closed"):
        pool.open()
    pool.close()


def test_close_waits_for_who_is_about_to_give_a_box_back(source: MemorySource, make):
    pool = make(warm=0)
    box = pool.open()
    give_back, has_come, go_on = box._give_back, threading.Event(), threading.Event()

    def late(*args: object) -> None:
        has_come.set()
        go_on.wait(60)
        give_back(*args)

    box._give_back = late
    with ThreadPoolExecutor(2) as threads:
        giving = threads.submit(box.close)
        assert has_come.wait(60)
        closing = threads.submit(pool.close)
        time.sleep(0.2)
        was_done = closing.done()
        go_on.set()
        closing.result(60)
        assert not was_done, "a box was not ended yet"
        assert source.boxes[0].closes == 1
        giving.result(60)


def test_a_pool_that_nobody_asked_has_no_thread(make):
    before = set(threading.enumerate())
    pool = make()
    assert not set(threading.enumerate()) - before
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
