"""The trajectories under way as a reader of the feed knows them, and what of them is to be scored. Pure; must never
know a model.

Law: each sampled token is given out for scoring once, under its own version, with the prefix that it stands behind. A
trajectory that begins anew (a session whose end differs from what was shown) keeps the records of what it still has.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from agentgym.server.wire import FeedPage, Piece
from agentgym.trajectory import NO_VERSION, ScoredSequences
from agentgym_trainer.anchors.records import OldLogprobs, RecordStore, Run, digests, runs_of

FOR_A_BATCH = -1  # the generation of a passage that was cut from a batch's own rows


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
    num_open: int = 0  # of them


@dataclass(slots=True)
class _Trajectory:
    generation: int
    ended: bool = False
    rows: dict[int, _Row] = field(default_factory=dict)
    before: list[OldLogprobs] = field(default_factory=list)  # records of the generations before


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

    def take(
        self, *, version: int | None = None, below: int | None = None, ended_only: bool = False,
        most_tokens: int | None = None,
    ) -> list[Passage]:  # fmt: skip
        """Gives out what was sampled under `version` (None: any), or of trajectories under way only what lies below
        the version `below`, under which more may follow (None: all). Each token is given out once; after `most_tokens`
        of forwards the rest is left for later."""
        passages: list[Passage] = []
        size = 0
        for name, trajectory in self._trajectories.items():
            if ended_only and not trajectory.ended:
                continue
            open_at = None if trajectory.ended else below
            for place, row in trajectory.rows.items():
                if not row.num_open:
                    continue
                if most_tokens is not None and size >= most_tokens:
                    return passages
                found = _take(name, trajectory.generation, place, row, version, open_at)
                size += sum(passage.num_tokens for passage in found)
                passages += found
        return passages

    def _grow(self, piece: Piece) -> None:
        trajectory = self._trajectories.get(piece.trajectory_id)
        if trajectory is None:
            trajectory = self._trajectories[piece.trajectory_id] = _Trajectory(piece.generation)
        elif piece.generation > trajectory.generation:
            before = [*trajectory.before, *self.records.of([piece.trajectory_id])]
            self.records.forget([piece.trajectory_id])
            trajectory = _Trajectory(piece.generation, before=before)
            self._trajectories[piece.trajectory_id] = trajectory
        trajectory.ended |= piece.ended
        if piece.token_ids:
            row = trajectory.rows.setdefault(piece.row, _Row())
            assert len(row.token_ids) == piece.start, "a page begins where the one before ended"
            row.token_ids += piece.token_ids
            row.versions += piece.policy_versions
            row.num_open += sum(version != NO_VERSION for version in piece.policy_versions)
            if trajectory.before:
                self._recall(piece, trajectory.before, row)

    def _recall(self, piece: Piece, before: Sequence[OldLogprobs], row: _Row) -> None:
        """Records of the same tokens behind the same tokens hold where the row stands now."""
        stops = sorted({record.stop for record in before if record.stop <= len(row.token_ids)})
        contexts = dict(zip(stops, digests(row.token_ids, stops)))
        for record in before:
            part = slice(record.start, record.stop)
            length = record.stop - record.start
            if contexts.get(record.stop) == record.context and row.versions[part] == [record.version] * length:
                self.records.add(replace(record, row=piece.row))
                row.versions[part] = [NO_VERSION] * length
                row.num_open -= length


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
        row.num_open -= stop - start
    return [
        Passage(name, generation, place, of, tuple(row.token_ids[: found[-1][1]]), tuple(found))
        for of, found in ranges.items()
    ]


def lacking(records: RecordStore, trajectory: ScoredSequences, known_version: int | None) -> list[Passage]:
    """The passages of a batch's trajectory that have no records; its records stand at their final places after."""
    rows = [
        (row.token_ids, [v if loss else NO_VERSION for v, loss in zip(row.policy_versions, row.loss_mask)])
        for row in trajectory.sequences
    ]
    by_version: dict[tuple[int, int], list[Run]] = {}
    for run in records.settle(trajectory.trajectory_id, rows):
        if run.version != known_version:
            by_version.setdefault((run.row, run.version), []).append(run)
    return [
        Passage(
            trajectory.trajectory_id, FOR_A_BATCH, row, version, tuple(rows[row][0][: runs[-1].stop]),
            tuple((run.start, run.stop) for run in runs),
        )
        for (row, version), runs in by_version.items()
    ]  # fmt: skip
