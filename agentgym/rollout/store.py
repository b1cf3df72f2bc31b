"""The trajectories of a run on disk: one file a step, one trajectory a line, JSON.

Law: a file is there whole or not at all; a disk that is full is said, not swallowed.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterable
from pathlib import Path

import msgspec

from agentgym.errors import CheckpointError, InputError
from agentgym.trajectory import Trajectory

FOLDER = "trajectories"
OTHERS = "untrained.jsonl"  # sessions of a run that trains on its environment
_encoder = msgspec.json.Encoder()
_decoder = msgspec.json.Decoder(Trajectory)


def step_file(run_dir: Path, step: int) -> Path:
    """`run_dir/trajectories/step-000012.jsonl`."""
    return run_dir / FOLDER / f"step-{step:06d}.jsonl"


class TrajectoryStore:
    """Keeps the lines of the step under way, and writes them when the step is named.

    >>> store = TrajectoryStore(Path("runs/quickstart"))
    >>> store.put(trajectory)
    >>> store.write(step=12)
    """

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir
        self._lines: list[bytes] = []
        self._written: tuple[int, bytes] | None = None

    def put(self, trajectory: Trajectory) -> None:
        self._lines.append(_encoder.encode(trajectory) + b"\n")

    def append(self, trajectory: Trajectory) -> None:
        """Writes a trajectory that belongs to no step, at once. Raises CheckpointError."""
        path = self._run_dir / FOLDER / OTHERS
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("ab") as file:
                file.write(_encoder.encode(trajectory) + b"\n")
        except OSError as error:
            raise CheckpointError(
                f"cannot write trajectory {trajectory.trajectory_id} to {path}: {error.strerror}"
            ) from error

    def write(self, step: int) -> None:
        """Writes what was put since the last `write` as the file of `step`; a second batch of the same step is
        appended. A file that an earlier run left for the step is replaced. Raises CheckpointError, and keeps the
        lines, if the disk does not take them."""
        earlier = self._written[1] if self._written is not None and self._written[0] == step else b""
        data = earlier + b"".join(self._lines)
        path = step_file(self._run_dir, step)
        partial = path.with_suffix(".partial")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with partial.open("wb") as file:
                file.write(data)
            os.replace(partial, path)
        except OSError as error:
            with contextlib.suppress(OSError):
                partial.unlink()
            raise CheckpointError(
                f"cannot write the trajectories of step {step} to {path}: {error.strerror}"
            ) from error
        self._written = (step, data)
        self._lines.clear()


def _decode(line: bytes) -> Trajectory:
    """JSON has no nan: a logprob that an engine did not give is written as null, and read back as nan."""
    try:
        return _decoder.decode(line)
    except msgspec.ValidationError:
        match found := msgspec.json.decode(line):
            case {"turns": [*turns]}:
                for turn in turns:
                    match turn:
                        case {"completion": {"logprobs": [*logprobs]} as completion}:
                            completion["logprobs"] = [math.nan if value is None else value for value in logprobs]
        return msgspec.convert(found, Trajectory)


def read_trajectories(path: Path) -> Iterable[Trajectory]:
    """The trajectories of one step's file, one after the other. Raises InputError naming the line that is not one."""
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                try:
                    yield _decode(line)
                except (msgspec.DecodeError, UnicodeDecodeError) as error:
                    raise InputError(f"{path} line {number} is not a trajectory: {error}") from error
    except OSError as error:
        raise InputError(f"cannot read the trajectories {path}: {error.strerror}") from error
