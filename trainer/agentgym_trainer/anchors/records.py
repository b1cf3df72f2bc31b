"""Old logprobs as records, and the store in which a batch looks them up. Pure; must never know a model.

Laws: a record is produced once, whole, and never changed; no token has two records that disagree; and a token without
a record is said to have none, never given a value.
"""

from __future__ import annotations

import bisect
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass

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

    Example: tokens 5 and 6 of the first row, sampled under version 3:
    `OldLogprobs("g-000004.2", 0, 5, 7, 3, np.array([-0.1, -1.2], np.float32))`.
    """

    trajectory_id: str
    row: int
    start: int
    stop: int
    version: int
    logprobs: np.ndarray

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
    >>> store.add(OldLogprobs("t", 0, 1, 3, version=3, logprobs=np.array([-0.1, -1.2], np.float32)))
    True
    >>> store.lookup("t", 0, versions=[-1, 3, 3, 4])
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
        self, trajectory_id: str, row: int, versions: Sequence[int] | np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Old logprobs [T] of a row whose tokens have `versions` [T] (-1 where nothing was sampled), and where there
        are any. Raises ContradictionError for a record of another version, or of a token that was not sampled."""
        wanted = np.asarray(versions)
        logprobs = np.zeros(len(wanted), self.dtype)
        known = np.zeros(len(wanted), bool)
        for record in self._rows.get(trajectory_id, {}).get(row, ()):
            part = slice(record.start, record.stop)
            if record.stop > len(wanted) or (wanted[part] != record.version).any():
                present = sorted(set(wanted[part].tolist()))
                raise ContradictionError(
                    f"{record.where} were scored under version {record.version}, but the row of {len(wanted)} tokens "
                    f"has versions {present} there"
                )
            logprobs[part] = record.logprobs
            known[part] = True
        return logprobs, known

    def unscored(
        self, trajectory_id: str, row: int, versions: Sequence[int] | np.ndarray
    ) -> list[tuple[int, int, int]]:
        """The runs (start, stop, version) of sampled tokens of one version that have no record, ascending."""
        wanted = np.asarray(versions)
        _, known = self.lookup(trajectory_id, row, wanted)
        return runs_of(np.where(known, NO_VERSION, wanted))

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
