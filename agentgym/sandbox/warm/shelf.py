"""The boxes of one spec in a pool, and what kept more from being started. Law: it counts and decides nothing else; the
pool's lock is held by whoever calls.
"""

from __future__ import annotations

import copy
import dataclasses
import time
from collections import deque
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field

from agentgym.errors import AgentGymError, InputError
from agentgym.sandbox.spec import Sandbox, SandboxSpec

FIRST_PAUSE_S = 0.25  # after the second failure in a row, doubled by each further one
LONGEST_PAUSE_S = 15.0


@dataclass(slots=True, eq=False)
class Shelf:
    """Example: `Shelf(SandboxSpec(), asked=time.monotonic())`."""

    spec: SandboxSpec
    asked: float  # when it was last asked for, on the monotonic clock
    warm: deque[Sandbox] = field(default_factory=deque)
    starting: int = 0
    waiting: int = 0  # callers
    failure: AgentGymError | None = None  # of the last start; None: it went well, or whom it concerned was told
    failures: int = 0  # in a row
    retry_at: float = 0.0
    is_refused: bool = False  # such boxes cannot be had until a person changes something: tried when asked for only

    def succeeded(self) -> None:
        """A box was started."""
        self.failure, self.failures, self.retry_at, self.is_refused = None, 0, 0.0, False

    def failed(self, failure: AgentGymError) -> None:
        """A box could not be started. The first failure may be an accident and is tried again at once."""
        self.is_refused = isinstance(failure, InputError)
        self.failure = None if self.is_refused and not self.waiting else failure
        self.failures += 1
        pause_s = min(FIRST_PAUSE_S * 2 ** (self.failures - 2), LONGEST_PAUSE_S)
        if self.failures > 1 and not self.is_refused:
            self.retry_at = time.monotonic() + pause_s

    def told(self) -> AgentGymError:
        """The failure, for one caller: an exception belongs to one traceback. After one failure one caller is told and
        the others have a second chance; after more, or when it is the person's turn, all that wait are told."""
        failure = self.failure
        assert failure is not None
        if self.waiting == 1 or (self.failures == 1 and not self.is_refused):
            self.failure = None
        told = copy.copy(failure).with_traceback(None)
        told.__cause__ = failure
        return told


def spec_key(spec: SandboxSpec) -> Hashable:
    """Equal for specs whose boxes are alike."""
    values = (getattr(spec, item.name) for item in dataclasses.fields(spec))
    return tuple(tuple(sorted(value.items())) if isinstance(value, Mapping) else value for value in values)
