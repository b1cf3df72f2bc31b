"""A folder that lives as long as its owner. Law: what an owner left that was killed is removed by the next one, and
nothing of a living owner ever is.

The owner is known by a lock that the kernel lets go of when the process ends, however it ends; so a process number
that is used again, or an owner in another container that sees the same files, is no trouble. Must never know what lies
in the folder.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import shutil
import tempfile
from pathlib import Path

OWNER = ".owner"  # locked for as long as the owner lives
_log = logging.getLogger(__name__)


class OwnedFolder:
    """A new folder `prefix...` in `near`; whoever else cannot read it. Raises OSError.

    Example: `folder = OwnedFolder("agentgym-vllm-", Path("/tmp")); ...; folder.remove()`.
    """

    def __init__(self, prefix: str, near: Path) -> None:
        self.path = Path(tempfile.mkdtemp(prefix=prefix, dir=near))
        half_made = self.path / f"{OWNER}.partial"
        self._lock = os.open(half_made, os.O_CREAT | os.O_RDWR, 0o600)
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        half_made.rename(self.path / OWNER)  # whoever finds it finds it locked

    def remove(self) -> None:
        """Removes it with all that it holds; idempotent."""
        if self._lock >= 0:
            shutil.rmtree(self.path, ignore_errors=True)
            os.close(self._lock)
            self._lock = -1


def remove_orphans(prefix: str, near: Path) -> list[Path]:
    """Removes the folders `prefix...` in `near` whose owner is gone; returns them."""
    removed: list[Path] = []
    for folder in near.glob(f"{prefix}*"):
        with contextlib.suppress(OSError):  # not ours to open, without a lock file yet, or locked: somebody's
            lock = os.open(folder / OWNER, os.O_RDWR)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
                removed.append(folder)
            finally:
                os.close(lock)
    if removed:
        _log.info("removed %d folders of owners that were killed: %s", len(removed), ", ".join(map(str, removed)))
    return removed
