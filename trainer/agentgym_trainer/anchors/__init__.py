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
from agentgym_trainer.anchors.recorded import RecordedAnchor
from agentgym_trainer.anchors.snapshot import SnapshotAnchor

RECORDED = {  # anchors whose old logprobs are recorded before a batch is built; why a record may be missing
    "interrupt": "Only what is sampled and scored within one run has them: a batch of an earlier run's tokens, or a "
    "pause that ended before the publication, has not.",
    "old_logit_model": "The scorer process could not score them.",
}
APPROXIMATE = ("behavior", "ewma", "linear", "loglinear", "resident")
ANCHORS = tuple(sorted(("auto", "snapshot", *APPROXIMATE, *RECORDED)))

__all__ = ["ANCHORS", "APPROXIMATE", "RECORDED", "Anchor", "Proximal", "Resolvable", "VersionSource", "make_anchor"]


def make_anchor(
    name: str, model: nn.Module, versions: VersionSource, *, temperature: float, max_staleness: int,
    interpolation_weight: float | None = None, fallback: str | None = None,
) -> Anchor:  # fmt: skip
    """The anchor called `name`, of the trainer's `model` (wrapped or not) while its weights are the newest version.
    Tokens without exact old logprobs are the anchor `fallback`'s, counted; None: they are an error.

    `auto` is `snapshot` with a fallback, `ewma` if none is named. Raises UnknownNameError.
    """
    if name == "behavior":
        return BehaviorAnchor()
    if name in ("linear", "loglinear"):
        return InterpolationAnchor(name, interpolation_weight)  # type: ignore[arg-type]
    if name == "resident":
        return ResidentAnchor(model, temperature)
    if name == "ewma":
        return EwmaAnchor(model, temperature, max_staleness=max_staleness)
    instead = None
    if name == "auto" or fallback is not None:
        if fallback not in (None, *APPROXIMATE):
            raise UnknownNameError.of("fallback", fallback, APPROXIMATE)
        instead = make_anchor(fallback or "ewma", model, versions, temperature=temperature, max_staleness=max_staleness)
    if name in RECORDED:
        return RecordedAnchor(name, model, RECORDED[name], instead)
    if name in ("snapshot", "auto"):
        return SnapshotAnchor(model, temperature, versions, instead)
    raise UnknownNameError.of("anchor", name, ANCHORS)
