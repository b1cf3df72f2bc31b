"""Old logprobs as records, and the store in which a batch looks them up. Pure; must never know a model.

Laws: a record is produced once, whole, and never changed; no token has two records that disagree; and a token without
a record is said to have none, never given a value. A record holds for its tokens behind the very tokens that it was
scored behind, which a digest proves: where a row turned out to be another one, the record is found where those are.
"""

from __future__ import annotations

import bisect
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from typing import NamedTuple

import numpy as np

from agentgym.errors import TrainingError
from agentgym.trajectory import NO_VERSION

Versions = Sequence[int] | np.ndarray  # [T], -1 where nothing was sampled
TOLERANCE = 1e-3  # two scorings of one token under one version differ by kernels and layout only, far less than this


class RecordError(TrainingError):
    """Old logprobs that cannot be what they say; names trajectory, row and tokens."""


class OverlapError(RecordError):
    """A record that covers tokens of another one, and is not the same again."""


class ContradictionError(RecordError):
    """Two records of the same tokens that disagree, or a record of another version than the token's."""


class MissingLogprobsError(RecordError, LookupError):
    """Tokens that were never scored under the version that sampled them; says which and why."""


@dataclass(frozen=True, slots=True, eq=False)
class OldLogprobs:
    """Logprobs [stop - start] of sampled tokens under the published weights of the version that sampled them, all one.
    `context` is the `digest` of the row's tokens up to `stop`.

    Example: tokens 5 and 6 of the first row, sampled under version 3:
    `OldLogprobs("g-000004.2", 0, 5, 7, 3, np.array([-0.1, -1.2], np.float32), digest(token_ids[:7]))`.
    """

    trajectory_id: str
    row: int
    start: int
    stop: int
    version: int
    logprobs: np.ndarray
    context: bytes

    def __post_init__(self) -> None:
        if not (self.row >= 0 and 0 <= self.start < self.stop and self.version >= 0):
            raise RecordError(f"{self.where} under version {self.version} is no range of sampled tokens")
        if self.logprobs.shape != (self.stop - self.start,) or not np.issubdtype(self.logprobs.dtype, np.floating):
            raise RecordError(f"{self.where} needs {self.stop - self.start} logprobs, got {self.logprobs.shape}")
        if not np.isfinite(self.logprobs).all():
            raise RecordError(f"{self.where} has a logprob that is not finite under version {self.version}")

    @property
    def where(self) -> str:
        return f"trajectory {self.trajectory_id} row {self.row} tokens {self.start}..{self.stop}"


class RecordStore:
    """Records by trajectory, until the trajectory is forgotten.

    >>> store = RecordStore()
    >>> store.add(OldLogprobs("t", 0, 1, 3, 3, np.array([-0.1, -1.2], np.float32), digest([7, 5, 2])))
    True
    >>> store.lookup("t", 0, token_ids=[7, 5, 2, 9], versions=[-1, 3, 3, 4])
    (array([ 0. , -0.1, -1.2,  0. ], dtype=float32), array([False,  True,  True, False]))
    """

    def __init__(self, dtype: np.dtype | type = np.float32) -> None:
        self.dtype = np.dtype(dtype)
        self._rows: dict[str, dict[int, list[OldLogprobs]]] = {}  # each list ascending, without overlap
        self.num_duplicates = 0  # the same tokens scored again, alike: a scorer that was restarted

    def __contains__(self, trajectory_id: str) -> bool:
        return trajectory_id in self._rows

    @property
    def num_tokens(self) -> int:
        return sum(record.stop - record.start for record in self)

    def __iter__(self) -> Iterator[OldLogprobs]:
        return (record for rows in self._rows.values() for records in rows.values() for record in records)

    def of(self, trajectory_ids: Collection[str]) -> tuple[OldLogprobs, ...]:
        """All records of these trajectories, to be handed on."""
        rows = (self._rows.get(name, {}) for name in trajectory_ids)
        return tuple(record for row in rows for records in row.values() for record in records)

    def add(self, record: OldLogprobs) -> bool:
        """Keeps a record; False for one that is here already. Raises OverlapError and ContradictionError."""
        records = self._rows.setdefault(record.trajectory_id, {}).setdefault(record.row, [])
        place = bisect.bisect_left(records, record.start, key=lambda known: known.start)
        for known in records[max(place - 1, 0) : place + 1]:
            if known.stop <= record.start or record.stop <= known.start:
                continue
            if (known.start, known.stop) != (record.start, record.stop):
                raise OverlapError(f"{record.where} overlaps tokens {known.start}..{known.stop}, which are scored")
            self._compare(known, record)
            self.num_duplicates += 1
            return False
        records.insert(place, record)
        return True

    def extend(self, records: Iterable[OldLogprobs]) -> None:
        for record in records:
            self.add(record)

    def lookup(
        self, trajectory_id: str, row: int, token_ids: Sequence[int] | np.ndarray, versions: Versions
    ) -> tuple[np.ndarray, np.ndarray]:
        """Old logprobs [T] of a row of `token_ids` [T] with `versions` [T] (-1 where nothing was sampled), and where
        there are any. Raises ContradictionError for a record of these tokens under another version."""
        wanted = np.asarray(versions)
        logprobs = np.zeros(len(wanted), self.dtype)
        known = np.zeros(len(wanted), bool)
        for record in self._matching(trajectory_id, row, token_ids, wanted):
            part = slice(record.start, record.stop)
            if not known[part].any():
                logprobs[part] = record.logprobs
                known[part] = True
        return logprobs, known

    def settle(self, trajectory_id: str, rows: Sequence[tuple[Sequence[int], Versions]]) -> list[Run]:
        """The rows (token ids, versions) of a trajectory are final: its records stand at their places in them, what
        belongs to none is dropped. Returns the runs (row, start, stop, version) that have no record."""
        kept: list[OldLogprobs] = []
        without: list[Run] = []
        for row, (token_ids, versions) in enumerate(rows):
            wanted = np.asarray(versions).copy()
            for record in self._matching(trajectory_id, row, token_ids, wanted):
                if (wanted[record.start : record.stop] == record.version).all():
                    kept.append(replace(record, row=row))
                    wanted[record.start : record.stop] = NO_VERSION
            without += [Run(row, start, stop, version) for start, stop, version in runs_of(wanted)]
        self.forget([trajectory_id])
        self.extend(kept)
        return without

    def _matching(
        self, trajectory_id: str, row: int, token_ids: Sequence[int] | np.ndarray, versions: np.ndarray
    ) -> list[OldLogprobs]:
        """The records whose tokens and context are those of a row, its own first."""
        rows = self._rows.get(trajectory_id, {})
        own, other = rows.get(row, []), [record for at, found in rows.items() if at != row for record in found]
        stops = sorted({record.stop for record in (*own, *other) if record.stop <= len(versions)})
        contexts = dict(zip(stops, digests(token_ids, stops)))
        matching: list[OldLogprobs] = []
        for record in (*own, *other):
            if contexts.get(record.stop) != record.context:
                continue
            present = sorted(set(versions[record.start : record.stop].tolist()))
            if present == [record.version]:
                matching.append(record)
            elif record.row == row:
                raise ContradictionError(
                    f"{record.where} were scored under version {record.version}, but the row has versions {present} "
                    "there"
                )
        return matching

    def forget(self, trajectory_ids: Iterable[str]) -> None:
        """Trajectories that were trained on, or never will be."""
        for name in trajectory_ids:
            self._rows.pop(name, None)

    def keep_only(self, trajectory_ids: Collection[str]) -> None:
        self._rows = {name: rows for name, rows in self._rows.items() if name in trajectory_ids}

    def _compare(self, known: OldLogprobs, record: OldLogprobs) -> None:
        if known.version != record.version:
            raise ContradictionError(
                f"{record.where} were scored under version {known.version}, and again under {record.version}"
            )
        apart = float(np.abs(known.logprobs - record.logprobs).max())
        if apart > TOLERANCE:
            raise ContradictionError(
                f"{record.where} were scored twice under version {record.version}, {apart:.3g} apart: the scoring "
                "weights are not those of the version"
            )


class Run(NamedTuple):
    """Sampled tokens of one version in one row. Example: `Run(row=0, start=5, stop=7, version=3)`."""

    row: int
    start: int
    stop: int
    version: int


def digest(token_ids: Sequence[int] | np.ndarray) -> bytes:
    """What stands for a row's first tokens."""
    return digests(token_ids, [len(token_ids)])[0]


def digests(token_ids: Sequence[int] | np.ndarray, stops: Sequence[int]) -> list[bytes]:
    """The digests of `token_ids` up to each of `stops`, ascending."""
    data = memoryview(np.asarray(token_ids, "<i8").tobytes())
    state, at, found = blake2b(digest_size=12), 0, []
    for stop in stops:
        state.update(data[8 * at : 8 * stop])
        at = stop
        found.append(state.digest())
    return found


def runs_of(versions: Versions) -> list[tuple[int, int, int]]:
    """Maximal runs (start, stop, version) of equal versions, those of -1 left out.

    >>> runs_of([-1, 3, 3, 4, -1, 4])
    [(1, 3, 3), (3, 4, 4), (5, 6, 4)]
    """
    values = np.asarray(versions)
    borders = np.flatnonzero(np.diff(values)) + 1
    starts = [0, *borders.tolist()] if len(values) else []
    stops = [*borders.tolist(), len(values)]
    return [(start, stop, int(values[start])) for start, stop in zip(starts, stops) if values[start] != NO_VERSION]
