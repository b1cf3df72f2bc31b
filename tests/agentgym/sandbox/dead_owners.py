"""Owners that are killed together with their reapers."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

from agentgym.sandbox.ownership.reaper import is_locked


def kill_with_reaper(owner: subprocess.Popen[str], reaper: int, folder: Path) -> None:
    """Returns when both are gone. The reaper stands still meanwhile: it neither takes anything away, nor has its owner,
    which looks after it now and then, the time to start another."""
    os.kill(reaper, signal.SIGSTOP)
    owner.kill()
    owner.wait()
    os.kill(reaper, signal.SIGKILL)
    until = time.monotonic() + 60
    while is_locked(folder / "reaper"):
        assert time.monotonic() < until, "the reaper does not end"
        time.sleep(0.01)
