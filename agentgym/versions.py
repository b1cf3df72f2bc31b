"""The version log: which policy versions exist, and their published weights for as long as a token refers to them.

Laws: only the log issues policy versions; a version is durable before anyone can hear of it; a number is never used
twice, not even after a crash; a version that somebody holds is never dropped, and what no held version needs is not
kept. Must never know torch or an optimizer.

    00000007.safetensors      a full copy: the newest version, the one before it (an engine may still load it), and
                              one whose successor changed so much that a delta would be no bargain
    00000005-00000006.delta   what turns version 6 into 5, or 5 into 6: all that is kept of an older version
    issued                    the last number given out

An older version is reached from the next full copy, back along the deltas. Deltas point backwards so that the newest
weights never wait for a chain, and the oldest version leaves by the removal of one file.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from agentgym.deltas import MAX_CHANGED, Delta, changed_fraction, decode, difference, encode, flip, same_model
from agentgym.errors import CheckpointError, VersionError
from agentgym.weight_file import BFLOAT16, WHOLE_MODEL, is_whole, load_file, map_file, read_metadata, save_file

__all__ = ["BFLOAT16", "WHOLE_MODEL", "Delta", "Recorded", "VersionLog", "VersionReader"]

# The file of the last number given out. It is written before the weights: a crash can burn a number, never reuse it.
_ISSUED = "issued"


@dataclass(frozen=True, slots=True)
class Recorded:
    """What one publication cost.

    Example: a step at a learning rate of 5e-6, bf16 published: `Recorded(7, 0.0068, 1_900_000, 270_000_000, 0.9)`.
    """

    version: int
    changed_fraction: float  # of the elements, against the version before; 1.0 where there is none
    delta_bytes: int  # 0: the version before stays a full copy
    full_bytes: int  # what the engine loads
    seconds: float


class VersionReader:
    """Reads the log that another process of the same run keeps (a trainer rank beside rank 0).

    >>> VersionReader(Path("versions")).read(0)["w"]
    array([0., 0.], dtype=float32)
    """

    def __init__(self, folder: Path, metadata: Mapping[str, str] | None = None) -> None:
        """With `metadata`, versions that say otherwise of themselves cannot be read: of two adapters of one shape and
        different scale, one is not the other's older version."""
        self.folder = folder
        self._metadata = metadata

    def __contains__(self, version: int) -> bool:
        return self._nearest_full(version) is not None

    @property
    def versions(self) -> tuple[int, ...]:
        """The versions that can be read, ascending."""
        return tuple(sorted(self._readable()))

    def path(self, version: int) -> Path:
        """The full copy of `version`, for an engine. Raises VersionError if there is none."""
        self._require(version)
        if not self._full(version).exists():
            raise VersionError(f"policy version {version} is kept as a delta only; engines load the newest versions")
        return self._full(version)

    def read(self, version: int) -> dict[str, np.ndarray]:
        """The published weights of `version`, in memory of their own. Raises VersionError if it was dropped, is of
        another model, or its file is corrupt, CheckpointError if the disk refuses."""
        self._require(version)
        start = self._nearest_full(version)
        steps = self.steps(start, version) if start is not None else None
        if start is None or steps is None:
            raise VersionError(f"policy version {version} left the log {self.folder} while it was read")
        try:
            if self._metadata is not None and read_metadata(self._full(start)) != self._metadata:
                raise VersionError(f"policy version {version} in {self.folder} is of another model, or adapter")
            weights = load_file(self._full(start))
            for step in steps:
                flip(weights, step)
        except OSError as error:
            raise CheckpointError(f"policy version {version} cannot be read from {self.folder}: {error}") from error
        return weights

    def steps(self, start: int, stop: int) -> Iterator[Delta] | None:
        """The deltas that turn the weights of `start` into those of `stop` one after the other, in either direction;
        None where no deltas connect them. Raises VersionError, while iterating, for a corrupt file."""
        older, newer = sorted((start, stop))
        links = self._links()
        files, at = [], older
        while at != newer:
            if at not in links or links[at] > newer:
                return None
            files.append(self._delta(at, links[at]))
            at = links[at]
        return map(_read_delta, files if start == older else files[::-1])

    def _require(self, version: int) -> None:
        if version not in self:
            raise VersionError(f"policy version {version} is not in the log {self.folder} (it holds {self.versions})")

    def _nearest_full(self, version: int) -> int | None:
        """The first full copy from `version` on along the deltas; None if there is none."""
        links = self._links()
        while not self._full(version).exists():
            if version not in links:
                return None
            version = links[version]
        return version

    def _links(self) -> dict[int, int]:
        """Version -> the next one, where there is a delta between them."""
        names = (path.stem.split("-") for path in self.folder.glob("*.delta"))
        return {int(version): int(following) for version, following in names}

    def _readable(self) -> set[int]:
        return {version for version in self._stored() if self._nearest_full(version) is not None}

    def _stored(self) -> set[int]:
        return {int(path.stem.partition("-")[0]) for path in self._files()}

    def _files(self) -> list[Path]:
        return [path for path in self.folder.iterdir() if path.suffix in (".safetensors", ".delta")]

    def _full(self, version: int) -> Path:
        return self.folder / f"{version:08d}.safetensors"

    def _delta(self, version: int, following: int) -> Path:
        return self.folder / f"{version:08d}-{following:08d}.delta"


class VersionLog(VersionReader):
    """Issues versions, records their weights and drops what nobody holds. One process keeps it.

    >>> log = VersionLog(Path("versions"))
    >>> log.append({"w": np.zeros(2, np.float32)})
    0
    >>> log.hold("service", [0])
    """

    def __init__(self, folder: Path, first: int = 0) -> None:
        """Opens the log in `folder`, which may hold an earlier run's; numbers start at `first` or behind the last one
        issued there. Raises CheckpointError if the folder is unusable."""
        super().__init__(folder)
        self._holders: dict[str, frozenset[int]] = {}
        self.last: Recorded | None = None  # the newest publication of this process
        try:
            folder.mkdir(parents=True, exist_ok=True)
            written = max(self._stored(), default=-1)
            self._leave_out_torn()
            self._versions = self._readable()
            issued = folder / _ISSUED
            written = max(written, int(issued.read_text()) if issued.exists() else -1)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"the version log {folder} cannot be opened: {error}") from error
        self._issued = max(first - 1, written)

    @property
    def latest(self) -> int | None:
        """The newest version in the log, or None while it is empty."""
        return max(self._versions, default=None)

    @property
    def versions(self) -> tuple[int, ...]:
        """The versions that can be read, ascending."""
        return tuple(sorted(self._versions))

    @property
    def stored_bytes(self) -> int:
        return sum(path.stat().st_size for path in self._files())

    @property
    def num_full_copies(self) -> int:
        return sum(path.suffix == ".safetensors" for path in self._files())

    def __contains__(self, version: int) -> bool:
        return version in self._versions

    def append(self, weights: Mapping[str, np.ndarray], metadata: Mapping[str, str] = WHOLE_MODEL) -> int:
        """Issues the next version for `weights` and returns it once the file is durable. The one before it may be
        dropped now, unless it is held. `metadata`: what the file says of them to engines (see weight_file.py).

        Raises CheckpointError (disk full, no permission); then no version was added.
        """
        began = time.monotonic()
        version, before = self._issued + 1, self.latest
        target = self._full(version)
        partial = target.with_suffix(".partial")
        try:
            _write_durably(self.folder / _ISSUED, str(version).encode())
            self._issued = version
            save_file(weights, partial, metadata)
            partial.rename(target)
            _sync(self.folder)
            changed, delta_bytes = (1.0, 0) if before is None else self._link(before, version, weights, metadata)
        except BaseException as error:  # Ctrl-C, too: what is not in the log is not left beside it
            for left in (target, *self.folder.glob(f"*-{version:08d}.delta"), *self.folder.glob("*.partial")):
                left.unlink(missing_ok=True)
            if not isinstance(error, OSError):
                raise
            raise CheckpointError(f"policy version {version} cannot be written to {self.folder}: {error}") from error
        self._versions.add(version)
        self._drop_unheld()
        full_bytes = target.stat().st_size
        self.last = Recorded(version, changed, delta_bytes, full_bytes, time.monotonic() - began)
        return version

    def hold(self, holder: str, versions: Iterable[int]) -> None:
        """Replaces what `holder` refers to; what nobody refers to any more is dropped, except the latest.

        Raises VersionError, changing nothing, for a version that the log does not hold.
        """
        wanted = frozenset(versions)
        missing = sorted(wanted - self._versions)
        if missing:
            raise VersionError(f"{holder} refers to policy versions {missing}, but the log holds {self.versions}")
        self._holders[holder] = wanted
        self._drop_unheld()

    def _link(
        self, before: int, version: int, weights: Mapping[str, np.ndarray], metadata: Mapping[str, str]
    ) -> tuple[float, int]:
        """Writes the delta between `before` and `version` where it is a bargain; the changed fraction and its size."""
        try:
            base, said = map_file(self._full(before)), read_metadata(self._full(before))
        except VersionError:  # whoever reads `before` is told; the new version stands on its own
            return 1.0, 0
        if said != metadata or not same_model(base, weights):  # a run in the folder of another model, or adapter
            return 1.0, 0
        changed = changed_fraction(base, weights)
        if changed > MAX_CHANGED:
            return changed, 0
        data = encode(difference(base, weights))
        _write_durably(self._delta(before, version), data)
        return changed, len(data)

    def _drop_unheld(self) -> None:
        """Removes every file that no live version is reached through."""
        live = {*frozenset[int]().union(*self._holders.values()), *self._versions & {self.latest}}
        self._versions &= live
        links = self._links()
        newest = sorted(self._stored())[-2:]
        needed: set[Path] = set()
        for version in live:
            if version in newest:
                needed.add(self._full(version))
            at = version
            while at in links:
                needed.add(self._delta(at, links[at]))
                at = links[at]
            needed.add(self._full(at))
        for path in set(self._files()) - needed:
            path.unlink(missing_ok=True)

    def _leave_out_torn(self) -> None:
        """Removes what a crash left unfinished: it was never published, for it was not durable."""
        for unfinished in self.folder.glob("*.partial"):
            unfinished.unlink()
        newest = max(self._stored(), default=None)
        if newest is not None and self._full(newest).exists() and not is_whole(self._full(newest)):
            self._full(newest).unlink()
            for path in self.folder.glob(f"*-{newest:08d}.delta"):
                path.unlink()
        for version, following in self._links().items():
            if self._full(version).exists() and not _is_whole_delta(self._delta(version, following)):
                self._delta(version, following).unlink()


def _read_delta(path: Path) -> Delta:
    try:
        return decode(path.read_bytes())
    except VersionError as error:
        raise VersionError(f"{path} is corrupt: {error}") from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error


def _is_whole_delta(path: Path) -> bool:
    try:
        _read_delta(path)
    except VersionError:
        return False
    return True


def _write_durably(path: Path, data: bytes) -> None:
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    partial.rename(path)
    _sync(path.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
