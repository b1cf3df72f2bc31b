"""The feed: the token rows of every buffered and in-flight trajectory, as they grow, for whoever scores them. Pure.

Laws: a token that was shown stays at its place (trajectory, row, position) while its episode goes on; what is shown of
an ended trajectory is exactly its `to_sequences`; and the feed holds no trajectory that can no longer be delivered.

It is read in pages, from a cursor on: what was shown before is not shown again. Rows only grow, but for sessions: which
of an outside agent's replies reached it, and in which order, is settled at the end. Where the end differs from what was
shown, the trajectory begins anew with its next generation, and readers find by their tokens what they know already.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from agentgym.errors import InputError
from agentgym.trajectory import NO_VERSION, TokenSequence


@dataclass(frozen=True, slots=True)
class Piece:
    """What a row grew by: tokens from `start` on; version -1 where nothing was sampled.

    Example: a prompt of two tokens and a reply: `Piece("g-000004.2", 0, 0, 0, (1, 7, 5, 2), (-1, -1, 3, 3), False)`.
    """

    trajectory_id: str
    generation: int  # higher than seen before: forget the rows seen before
    row: int
    start: int
    token_ids: tuple[int, ...]
    policy_versions: tuple[int, ...]
    ended: bool  # nothing follows in this trajectory; such a piece may be empty


@dataclass(frozen=True, slots=True)
class FeedPage:
    """A page of the feed. `live` names every trajectory that the feed holds; None where more pages follow.

    Example: `FeedPage(17, (piece,), ("g-000004.2",), policy_version=3, pause_id=None)`.
    """

    cursor: int  # where the next page begins
    pieces: tuple[Piece, ...]
    live: tuple[str, ...] | None
    policy_version: int  # served when the page was read
    pause_id: int | None  # of the pause under way: while it lasts nothing is sampled


@dataclass(slots=True)
class _Row:
    token_ids: list[int] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)


@dataclass(slots=True)
class _Followed:
    group_id: str
    generation: int = 0
    ended: bool = False
    rows: list[_Row] = field(default_factory=list)
    events: list[int] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _Event:
    """Row `row` grew from `start` to `stop`; or, where both are 0 and `ended`, an end alone."""

    trajectory_id: str
    row: int
    start: int
    stop: int
    ended: bool


class Feed:
    """The rows under way, and the order in which they grew.

    >>> feed = Feed()
    >>> feed.begin("g-0.0", "g-0")
    >>> feed.extend("g-0.0", [1, 7], [5], [3])
    >>> feed.read(0, max_tokens=1000)
    (1, (Piece('g-0.0', 0, 0, 0, (1, 7, 5), (-1, -1, 3), False),), True)
    """

    def __init__(self) -> None:
        self._followed: dict[str, _Followed] = {}
        self._events: dict[int, _Event] = {}  # in the order of their numbers
        self._numbers = itertools.count(1)
        self._last = 0

    # ------------------------------------------------------------------------------------------------- questions

    def __contains__(self, trajectory_id: str | None) -> bool:
        return trajectory_id in self._followed

    @property
    def live(self) -> tuple[str, ...]:
        return tuple(self._followed)

    @property
    def num_tokens(self) -> int:
        """Tokens that are held, prompts included."""
        return sum(len(row.token_ids) for followed in self._followed.values() for row in followed.rows)

    def read(self, cursor: int, max_tokens: int) -> tuple[int, tuple[Piece, ...], bool]:
        """What was shown since `cursor` (0: everything): the next cursor, at most `max_tokens` tokens (but at least one
        piece), and whether that was all. Raises InputError for a cursor that no page gave."""
        if not 0 <= cursor <= self._last or max_tokens < 1:
            raise InputError(
                f"the feed is at {self._last}: no page gave cursor {cursor}, or max_tokens {max_tokens} < 1"
            )
        pieces: list[Piece] = []
        size = 0
        for number, event in self._since(cursor):
            if pieces and size + event.stop - event.start > max_tokens:
                return cursor, tuple(pieces), False
            pieces.append(self._piece(event))
            size += event.stop - event.start
            cursor = number
        return self._last, tuple(pieces), True

    # ---------------------------------------------------------------------------------------------------- orders

    def begin(self, trajectory_id: str, group_id: str) -> None:
        """Follows a trajectory from here on. Raises InputError if it is followed already."""
        if trajectory_id in self._followed:
            raise InputError(f"trajectory {trajectory_id} is followed already")
        self._followed[trajectory_id] = _Followed(group_id)

    def extend(
        self, trajectory_id: str, prompt_ids: Sequence[int], sampled_ids: Sequence[int], versions: Sequence[int]
    ) -> None:
        """Shows a completion, or the first part of one that is being sampled: `sampled_ids` [C] behind `prompt_ids`,
        with the versions that sampled them. What was shown of it before is not shown again."""
        followed = self._followed[trajectory_id]
        if not sampled_ids:
            return
        ids = [*prompt_ids, *sampled_ids]
        marks = [*(NO_VERSION for _ in prompt_ids), *versions]
        place = next((n for n in reversed(range(len(followed.rows))) if _leads_to(followed.rows[n], ids, marks)), None)
        if place is None:
            place = len(followed.rows)
            followed.rows.append(_Row())
        row = followed.rows[place]
        if len(ids) > len(row.token_ids):
            self._grow(trajectory_id, place, ids[len(row.token_ids) :], marks[len(row.token_ids) :])

    def end(self, trajectory_id: str, group_id: str, sequences: Sequence[TokenSequence]) -> None:
        """A trajectory that ended, with its rows; it stays until it is forgotten."""
        if trajectory_id not in self._followed:
            self.begin(trajectory_id, group_id)
        followed = self._followed[trajectory_id]
        if len(followed.rows) > len(sequences) or not all(map(_is_prefix, followed.rows, sequences)):
            self._drop_events(followed)
            followed.rows.clear()
            followed.generation += 1
        for place, sequence in enumerate(sequences):
            if place == len(followed.rows):
                followed.rows.append(_Row())
            known = len(followed.rows[place].token_ids)
            if known < len(sequence):
                self._grow(trajectory_id, place, sequence.token_ids[known:], _marks(sequence)[known:])
        followed.ended = True
        self._note(_Event(trajectory_id, 0, 0, 0, True))

    def forget(self, trajectory_ids: Iterable[str]) -> None:
        """Trajectories that were delivered, or never will be. Those that are not followed are no error."""
        for trajectory_id in trajectory_ids:
            followed = self._followed.pop(trajectory_id, None)
            if followed is not None:
                self._drop_events(followed)

    def forget_group(self, group_id: str) -> None:
        self.forget([name for name, followed in self._followed.items() if followed.group_id == group_id])

    # ----------------------------------------------------------------------------------------------------- parts

    def _grow(self, trajectory_id: str, place: int, ids: Sequence[int], versions: Sequence[int]) -> None:
        row = self._followed[trajectory_id].rows[place]
        start = len(row.token_ids)
        row.token_ids += ids
        row.versions += versions
        self._note(_Event(trajectory_id, place, start, len(row.token_ids), False))

    def _note(self, event: _Event) -> None:
        self._last = next(self._numbers)
        self._events[self._last] = event
        self._followed[event.trajectory_id].events.append(self._last)

    def _drop_events(self, followed: _Followed) -> None:
        for number in followed.events:
            del self._events[number]
        followed.events.clear()

    def _since(self, cursor: int) -> Iterator[tuple[int, _Event]]:
        recent = itertools.takewhile(lambda number: number > cursor, reversed(self._events))
        return ((number, self._events[number]) for number in reversed(list(recent)))

    def _piece(self, event: _Event) -> Piece:
        followed = self._followed[event.trajectory_id]
        part = slice(event.start, event.stop)
        row = followed.rows[event.row] if event.stop else _Row()
        return Piece(
            event.trajectory_id, followed.generation, event.row, event.start, tuple(row.token_ids[part]),
            tuple(row.versions[part]), event.ended,
        )  # fmt: skip


def _leads_to(row: _Row, ids: Sequence[int], versions: Sequence[int]) -> bool:
    """Whether a row is the beginning of a prompt and completion. What the row sampled itself is context in the prompt;
    within the completion the versions must agree, too."""
    length = len(row.token_ids)
    if length > len(ids) or row.token_ids != ids[:length]:
        return False
    own = next((place for place, version in enumerate(versions) if version != NO_VERSION), len(ids))
    return row.versions[own:] == list(versions[own:length])


def _is_prefix(row: _Row, sequence: TokenSequence) -> bool:
    length = len(row.token_ids)
    return tuple(row.token_ids) == sequence.token_ids[:length] and tuple(row.versions) == _marks(sequence)[:length]


def _marks(sequence: TokenSequence) -> tuple[int, ...]:
    return tuple(v if loss else NO_VERSION for v, loss in zip(sequence.policy_versions, sequence.loss_mask))
