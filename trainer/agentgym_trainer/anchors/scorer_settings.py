"""What trainer and scorer process say to each other. Must never know a model: both sides import it."""

from __future__ import annotations

from dataclasses import dataclass

from agentgym.server.wire import Fault
from agentgym_trainer.anchors.followed import Passage
from agentgym_trainer.anchors.records import OldLogprobs


@dataclass(frozen=True, slots=True)
class ScorerSettings:
    """What a scorer is started with; `config` is a TrainConfig as JSON.

    Example: `ScorerSettings("runs/x/model", "runs/x/versions", "{...}", "cpu")`.
    """

    model_folder: str
    versions_folder: str
    config: str
    device: str


@dataclass(frozen=True, slots=True)
class Job:
    """Passages of one version. Example: `Job(17, (passage,))`."""

    number: int
    passages: tuple[Passage, ...]


@dataclass(frozen=True, slots=True)
class Answer:
    """The records of a job; or of none, and why. The first answer, number -1, says that the scorer is ready.

    Example: `Answer(17, (record,), num_forwarded=412, seconds=0.02, fault=None)`.
    """

    number: int
    records: tuple[OldLogprobs, ...]
    num_forwarded: int
    seconds: float
    fault: Fault | None


READY = Answer(-1, (), 0, 0.0, None)
