"""The version log: which policy versions exist, and their published weights for as long as a token refers to them.

Laws: only the log issues policy versions; a version is durable before anyone can hear of it; a number is never used
twice, not even after a crash; a version that somebody holds is never dropped. Must never know torch or an optimizer.

One file per version serves three readers: the engine loads it (publication), the snapshot anchor scores with it (old
logprobs), and a restarted run finds it again.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from agentgym.errors import CheckpointError, VersionError

# The file of the last number given out. It is written before the weights: a crash can burn a number, never reuse it.
_ISSUED = "issued"


class VersionReader:
    """Reads the log that another process of the same run keeps (a trainer rank beside rank 0).

    >>> VersionReader(Path("versions")).read(0)["w"]
    array([0., 0.], dtype=float32)
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __contains__(self, version: int) -> bool:
        return self._file(version).exists()

    def read(self, version: int) -> dict[str, np.ndarray]:
        """The published weights of `version`. Raises VersionError if it was dropped, CheckpointError if unreadable."""
        path = self.path(version)
        try:
            return load_file(path)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"policy version {version} cannot be read from {path}: {error}") from error

    def path(self, version: int) -> Path:
        """The file of `version`. Raises VersionError if the log does not hold it."""
        if version not in self:
            raise VersionError(f"policy version {version} is not in the log {self.folder} (it holds {self.versions})")
        return self._file(version)

    @property
    def versions(self) -> tuple[int, ...]:
        """The versions that can be read, ascending."""
        return tuple(sorted(int(path.stem) for path in self.folder.glob("*.safetensors")))

    def _file(self, version: int) -> Path:
        return self.folder / f"{version:08d}.safetensors"


class VersionLog(VersionReader):
    """Full copies of published weights, one safetensors file a version, dropped when nobody holds them.

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
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for unfinished in folder.glob("*.partial"):
                unfinished.unlink()
            self._versions = {int(path.stem) for path in folder.glob("*.safetensors")}
            issued = folder / _ISSUED
            written = int(issued.read_text()) if issued.exists() else -1
        except (OSError, ValueError) as error:
            raise CheckpointError(f"the version log {folder} cannot be opened: {error}") from error
        self._issued = max([first - 1, written, *self._versions])

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
        return sum(self.path(version).stat().st_size for version in self._versions)

    def __contains__(self, version: int) -> bool:
        return version in self._versions

    def append(self, weights: Mapping[str, np.ndarray]) -> int:
        """Issues the next version for `weights` and returns it once the file is durable. The one before it may be
        dropped now, unless it is held.

        Raises CheckpointError (disk full, no permission); then no version was added.
        """
        version = self._issued + 1
        target = self._file(version)
        partial = target.with_suffix(".partial")
        try:
            _write_durably(self.folder / _ISSUED, str(version).encode())
            self._issued = version
            save_file(dict(weights), partial)
            _sync(partial)
            partial.rename(target)
            _sync(self.folder)
        except (OSError, SafetensorError) as error:
            partial.unlink(missing_ok=True)
            raise CheckpointError(f"policy version {version} cannot be written to {self.folder}: {error}") from error
        self._versions.add(version)
        self._drop_unheld()
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

    def _drop_unheld(self) -> None:
        held = frozenset[int]().union(*self._holders.values())
        for version in self._versions - held - {self.latest}:
            self._file(version).unlink(missing_ok=True)
            self._versions.discard(version)


def _write_durably(path: Path, data: bytes) -> None:
    partial = path.with_suffix(".partial")
    with partial.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    partial.rename(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
