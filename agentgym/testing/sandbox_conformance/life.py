"""How long a box lives, and with whom."""

from __future__ import annotations

import contextlib
import threading
import time

from agentgym.errors import SandboxDiedError, SandboxError
from agentgym.sandbox.ownership.lease import owner
from agentgym.sandbox.spec import Sandbox, SandboxSpec
from agentgym.testing.sandbox_conformance.questions import Opener, raises


def closes_for_good(open_box: Opener) -> None:
    box = open_box(SandboxSpec())
    caught: list[BaseException] = []

    def wait() -> None:
        try:
            box.exec("sleep 600", timeout_s=600)
        except SandboxDiedError as error:
            caught.append(error)

    waiting = threading.Thread(target=wait)
    waiting.start()
    time.sleep(0.3)
    box.close()
    waiting.join(60)
    assert caught, "a call that waits must end when the box is closed"
    raises(SandboxDiedError, lambda: box.exec("true"))
    box.close()


def outlives_the_thread_that_opened_it(open_box: Opener) -> None:
    boxes: list[Sandbox] = []
    opening = threading.Thread(target=lambda: boxes.append(open_box(SandboxSpec())))
    opening.start()
    opening.join()
    time.sleep(0.2)
    with boxes[0] as box:
        outputs: list[bytes] = []
        calls = [
            threading.Thread(target=lambda i=i: outputs.append(box.exec(f"sleep 0.02; echo {i}").stdout))
            for i in range(6)
        ]
        for call in calls:
            call.start()
        for call in calls:
            call.join()
        assert sorted(outputs) == [b"%d\n" % i for i in range(6)]


def ends_with_its_lease(open_box: Opener) -> None:
    def ended(box: Sandbox) -> bool:
        """Whether it had ended before this call, which renews the lease of one that has not noticed its end yet."""
        try:
            box.exec("true")
        except SandboxDiedError:
            return True
        except SandboxError:  # it is frozen, and so it lives
            return False
        return False

    def lives(lease_s: float) -> bool:
        """Whether it lived with a call for a good part of its lease, and ended because nobody renewed it."""
        spec = SandboxSpec(lease_s=lease_s)
        with open_box(spec) as idle, open_box(spec) as busy:
            with contextlib.suppress(SandboxDiedError):  # this machine stood still, and they have ended already
                for box in (idle, busy):
                    box.exec("sleep 600 >/dev/null 2>&1 &")
                idle.freeze()
            for box in (idle, busy):
                owner().forget(box.name)  # nobody renews it from here on; every call would
            started = time.monotonic()
            raises(SandboxDiedError, lambda: busy.exec("sleep 600", timeout_s=600))
            seconds = time.monotonic() - started
            time.sleep(max(0.0, started + 2 * lease_s - time.monotonic()))
            return seconds > 1 and ended(idle)

    assert lives(1.5) or lives(10.0)


def is_renewed_while_a_call_waits(open_box: Opener) -> None:
    def lives(lease_s: float) -> bool:
        with open_box(SandboxSpec(lease_s=lease_s)) as box:
            try:
                assert box.exec(f"sleep {lease_s + 1}; echo there", timeout_s=60).stdout == b"there\n"
                time.sleep(lease_s + 1)
                assert box.exec("echo still there").stdout == b"still there\n"
            except SandboxDiedError:
                return False
            return True

    # a machine that stands still for a second does not renew a lease of a second
    assert lives(1.5) or lives(10.0), "its lease is not renewed"
