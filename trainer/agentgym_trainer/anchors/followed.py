"""The trajectories under way as a reader of the feed knows them, and what of them is to be scored. Pure; must never
know a model.

Law: each sampled token is given out for scoring once, under its own version, with the prefix that it stands behind. A
trajectory that begins anew (a session whose end differs from what was shown) keeps the records of what it still has.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from agentgym.server.wire import FeedPage, Piece
from agentgym.trajectory import NO_VERSION
from agentgym_trainer.anchors.records import OldLogprobs, RecordStore, runs_of


@dataclass(frozen=True, slots=True)
class Passage:
    """Tokens of one version in one row, to be scored: the row up to the last of them, and where they are.

    Example: a prompt of two, a reply of two, one token of context, one more: `Passage("g-000004.2", 0, 0, 3,
    (1, 7, 5, 2, 9, 6), ((2, 4), (5, 6)))`.
    """

    trajectory_id: str
    generation: int
    row: int
    version: int
    token_ids: tuple[int, ...]
    ranges: tuple[tuple[int, int], ...]

    @property
    def num_tokens(self) -> int:
        """Tokens of the forward."""
        return len(self.token_ids)

    @property
    def num_wanted(self) -> int:
        return sum(stop - start for start, stop in self.ranges)


@dataclass(slots=True)
class _Row:
    token_ids: list[int] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)  # of the tokens not given out yet; -1 elsewhere


@dataclass(slots=True)
class _Trajectory:
    generation: int
    ended: bool = False
    rows: dict[int, _Row] = field(default_factory=dict)
    before: list[tuple[OldLogprobs, list[int]]] = field(default_factory=list)  # records of the generation before


class Followed:
    """What the pages read so far say, and what is in `records` of it.

    >>> followed = Followed(RecordStore())
    >>> followed.apply(client.feed(followed.cursor))
    >>> followed.take(version=3)
    [Passage('g-000004.2', 0, 0, 3, (1, 7, 5, 2), ((2, 4),))]
    """

    def __init__(self, records: RecordStore) -> None:
        self.records = records
        self.cursor = 0
        self._trajectories: dict[str, _Trajectory] = {}

    @property
    def live(self) -> frozenset[str]:
        """The trajectories that the feed held when it was last read to its end."""
        return frozenset(self._trajectories)

    def generation_of(self, trajectory_id: str) -> int | None:
        """The present generation, or None for a trajectory that is gone."""
        trajectory = self._trajectories.get(trajectory_id)
        return None if trajectory is None else trajectory.generation

    def apply(self, page: FeedPage) -> None:
        """Takes in a page that began at `cursor`. Trajectories that the feed does not hold any more are forgotten,
        their records not: a batch may be about to look them up."""
        for piece in page.pieces:
            self._grow(piece)
        self.cursor = page.cursor
        if page.live is not None:
            live = frozenset(page.live)
            self._trajectories = {name: known for name, known in self._trajectories.items() if name in live}

    def take(self, *, version: int | None = None, below: int | None = None, ended_only: bool = False) -> list[Passage]:
        """Gives out what was sampled under `version` (None: any), or of trajectories under way only what lies below
        the version `below`, under which more may follow (None: all). Each token is given out once."""
        passages = []
        for name, trajectory in self._trajectories.items():
            if ended_only and not trajectory.ended:
                continue
            for place, row in trajectory.rows.items():
                open_at = None if trajectory.ended else below
                passages += _take(name, trajectory.generation, place, row, version, open_at)
        return passages

    def give_back(self, passages: Sequence[Passage]) -> None:
        """What was not scored after all is given out again."""
        for passage in passages:
            trajectory = self._trajectories.get(passage.trajectory_id)
            if trajectory is not None and trajectory.generation == passage.generation:
                for start, stop in passage.ranges:
                    trajectory.rows[passage.row].versions[start:stop] = [passage.version] * (stop - start)

    def _grow(self, piece: Piece) -> None:
        trajectory = self._trajectories.get(piece.trajectory_id)
        if trajectory is None:
            trajectory = self._trajectories[piece.trajectory_id] = _Trajectory(piece.generation)
        elif piece.generation > trajectory.generation:
            trajectory = self._begin_anew(piece, trajectory)
        trajectory.ended |= piece.ended
        if piece.token_ids:
            row = trajectory.rows.setdefault(piece.row, _Row())
            assert len(row.token_ids) == piece.start, "a page begins where the one before ended"
            row.token_ids += piece.token_ids
            row.versions += piece.policy_versions
            self._recall(piece, trajectory.before, row)

    def _begin_anew(self, piece: Piece, old: _Trajectory) -> _Trajectory:
        before = old.before + [
            (record, old.rows[record.row].token_ids) for record in self.records.of([piece.trajectory_id])
        ]
        self.records.forget([piece.trajectory_id])
        new = self._trajectories[piece.trajectory_id] = _Trajectory(piece.generation, before=before)
        return new

    def _recall(self, piece: Piece, before: Sequence[tuple[OldLogprobs, list[int]]], row: _Row) -> None:
        """Records of the same tokens behind the same tokens hold where the row stands now."""
        for record, token_ids in before:
            part = slice(record.start, record.stop)
            same = row.token_ids[: record.stop] == token_ids[: record.stop]
            if same and row.versions[part] == [record.version] * (record.stop - record.start):
                self.records.add(
                    OldLogprobs(
                        piece.trajectory_id, piece.row, record.start, record.stop, record.version, record.logprobs
                    )
                )
                row.versions[part] = [NO_VERSION] * (record.stop - record.start)


def _take(name: str, generation: int, place: int, row: _Row, version: int | None, below: int | None) -> list[Passage]:
    wanted = np.asarray(row.versions)
    if version is not None:
        wanted = np.where(wanted == version, wanted, NO_VERSION)
    if below is not None:
        wanted = np.where(wanted < below, wanted, NO_VERSION)
    ranges: dict[int, list[tuple[int, int]]] = {}
    for start, stop, of in runs_of(wanted):
        ranges.setdefault(of, []).append((start, stop))
        row.versions[start:stop] = [NO_VERSION] * (stop - start)
    return [
        Passage(name, generation, place, of, tuple(row.token_ids[: found[-1][1]]), tuple(found))
        for of, found in ranges.items()
    ]
