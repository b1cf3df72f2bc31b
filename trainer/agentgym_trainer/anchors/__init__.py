"""Anchors: where proximal logprobs come from. This package must never know the loss.

`make_anchor(name, ...)` is the one way in; `protocol.py` says what an anchor owes.
"""

from __future__ import annotations

from torch import nn

from agentgym.errors import UnknownNameError
from agentgym_trainer.anchors.direct import BehaviorAnchor, ResidentAnchor
from agentgym_trainer.anchors.ewma import EwmaAnchor
from agentgym_trainer.anchors.interpolation import InterpolationAnchor
from agentgym_trainer.anchors.protocol import Anchor, Proximal, Resolvable, VersionSource
from agentgym_trainer.anchors.snapshot import SnapshotAnchor

ANCHORS = ("auto", "behavior", "ewma", "linear", "loglinear", "resident", "snapshot")

__all__ = ["ANCHORS", "Anchor", "Proximal", "Resolvable", "VersionSource", "make_anchor"]


def make_anchor(
    name: str, model: nn.Module, versions: VersionSource, *, temperature: float, max_staleness: int,
    interpolation_weight: float | None = None,
) -> Anchor:
    """The anchor called `name`, of the trainer's `model` (wrapped or not) while its weights are the newest version.

    `auto` is `snapshot` where the log has the version and `ewma` where not. Raises UnknownNameError.
    """
    if name == "behavior":
        return BehaviorAnchor()
    if name in ("linear", "loglinear"):
        return InterpolationAnchor(name, interpolation_weight)  # type: ignore[arg-type]
    if name == "resident":
        return ResidentAnchor(model, temperature)
    if name == "ewma":
        return EwmaAnchor(model, temperature, max_staleness=max_staleness)
    if name == "snapshot":
        return SnapshotAnchor(model, temperature, versions)
    if name == "auto":
        fallback = EwmaAnchor(model, temperature, max_staleness=max_staleness)
        return SnapshotAnchor(model, temperature, versions, fallback)
    raise UnknownNameError.of("anchor", name, ANCHORS)
