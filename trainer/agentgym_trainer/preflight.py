"""What can be known to be wrong before any work starts. Raises InputError and its kin, nothing else."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

import torch

from agentgym.errors import UnavailableError
from agentgym_trainer.settings import TrainConfig


def check(config: TrainConfig) -> None:
    """Refuses what this machine cannot run."""
    _tracker_packages(config.trainer.trackers)
    if config.trainer.lora is not None and importlib.util.find_spec("peft") is None:
        raise UnavailableError("trainer.lora needs the package peft: pip install 'agentgym-rl[train]'")
    _scorer_device(config.trainer.old_logit_device)
    if config.trainer.dtype == "bfloat16" and not torch.cuda.is_available() and not cpu_has_bfloat16():
        raise UnavailableError(
            "trainer.dtype=bfloat16 needs a GPU or a CPU with AVX512-BF16 or AMX: matrix products would be hundreds of "
            "times slower here; use trainer.dtype=float32"
        )


def _scorer_device(name: str | None) -> None:
    try:
        torch.zeros(1, device=name or "cpu")
    except (RuntimeError, AssertionError) as error:
        first = str(error).splitlines()[0]
        raise UnavailableError(f"trainer.old_logit_device {name!r} is no device of this machine: {first}") from error


def _tracker_packages(names: Sequence[str]) -> None:
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise UnavailableError(f"trainer.trackers names {name!r}, which is not installed: pip install {name}")


def cpu_has_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 matrices in hardware."""
    supported = (getattr(torch.cpu, f"_is_{name}_supported", None) for name in ("avx512_bf16", "amx_tile"))
    return any(probe() for probe in supported if probe is not None)
