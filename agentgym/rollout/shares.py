"""Who may begin the next group where the environment here and outside agents fill one buffer. Pure but for its clock.

Laws: the environment alone can always fill a batch, since outside agents may be gone and leave groups half-played; and
outside agents that ask for a place get one although the environment here would take every place at once.
"""

from __future__ import annotations

import time
from collections.abc import Callable

WISH_S = 5.0  # an outside agent that was told to ask again is waited for so long


class Shares:
    """The places of a buffer of `most` groups, in two halves: the environment's, which it exceeds while nobody outside
    asks, and that of outside agents, which they never exceed.

    >>> shares = Shares(most=4)
    >>> shares.may_play(playing=3)
    True
    >>> shares.refused()
    >>> shares.may_play(playing=3), shares.may_play(playing=1), shares.may_open(opened=1), shares.may_open(opened=2)
    (False, True, True, False)
    """

    def __init__(self, most: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._playing = (most + 1) // 2
        self._outside = most // 2
        self._clock = clock
        self._wished_until = float("-inf")

    def refused(self) -> None:
        """An outside agent asked for a place and was told to ask again."""
        self._wished_until = self._clock() + WISH_S

    def may_play(self, playing: int) -> bool:
        """Whether the environment may begin a group, besides `playing` others of its own."""
        return playing < self._playing or self._clock() >= self._wished_until

    def may_open(self, opened: int) -> bool:
        """Whether outside agents may begin a group, besides `opened` others of theirs."""
        return opened < self._outside
