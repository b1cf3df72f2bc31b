"""Checkpoints: everything that an interrupted run needs to go on as if nothing had happened.

Law: a checkpoint is there whole or not at all (written beside its place, renamed when durable), and holds model,
optimizer, schedule, random states, the anchor's state, the step, the policy version and the data position.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from agentgym.errors import CheckpointError

# What torch and pickle raise for files that are cut off, empty or something else altogether.
_UNREADABLE = (OSError, RuntimeError, ValueError, TypeError, EOFError, LookupError, AttributeError, pickle.PickleError)


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a run stands, beside its tensors.

    Example: `Progress(step=50, policy_version=50, position={"next": 2400, "redo": []}, seconds=31.0)`.
    """

    step: int  # batches trained on
    policy_version: int
    position: Mapping[str, Any]  # the rollout service's data position, opaque to the trainer
    seconds: float  # spent so far


def save_checkpoint(
    accelerator: Accelerator, folder: Path, progress: Progress, anchor_state: Mapping[str, Any], keep: int
) -> None:
    """Writes `folder/step-000050`; every rank calls it. Older ones beyond `keep` are removed.

    Raises CheckpointError if the disk refuses; then the checkpoint before it is still the latest.
    """
    target = folder / f"step-{progress.step:06d}"
    partial = folder / f".{target.name}.partial"
    try:
        if accelerator.is_main_process:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        accelerator.wait_for_everyone()
        accelerator.save_state(str(partial), safe_serialization=False)  # tied tensors once, without a warning
        if accelerator.is_main_process:
            torch.save(dict(anchor_state), partial / "anchor.pt")
            (partial / "progress.json").write_text(json.dumps(asdict(progress)))
            _make_durable(partial)
            shutil.rmtree(target, ignore_errors=True)
            partial.rename(target)
            for old in list_checkpoints(folder)[:-keep]:
                shutil.rmtree(old, ignore_errors=True)
        accelerator.wait_for_everyone()
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if not isinstance(error, OSError | RuntimeError):  # Ctrl-C
            raise
        # torch reports a full disk as RuntimeError
        raise CheckpointError(f"the checkpoint {target} cannot be written: {error}") from error


def list_checkpoints(folder: Path) -> list[Path]:
    """Whole checkpoints, oldest first."""
    return sorted(path for path in folder.glob("step-*") if (path / "progress.json").is_file())


def load_checkpoint(accelerator: Accelerator, path: Path) -> tuple[Progress, dict[str, Any]]:
    """Restores the tensors and random states into what `accelerator` prepared; returns the rest.

    Raises CheckpointError if the files do not belong together.
    """
    try:
        accelerator.load_state(str(path))
        anchor_state = torch.load(path / "anchor.pt", weights_only=True)
        return Progress(**json.loads((path / "progress.json").read_text())), anchor_state
    except CheckpointError:  # an OSError, too, that says what is wrong
        raise
    except _UNREADABLE as error:
        said = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise CheckpointError(
            f"the checkpoint {path} cannot be read: {said}; if its files are damaged, remove it, and --resume takes "
            "the one before"
        ) from error


def _make_durable(folder: Path) -> None:
    for path in [*folder.rglob("*"), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
