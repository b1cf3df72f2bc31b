"""What trainer and service say to each other: frozen dataclasses, msgpack on the wire. Must never know HTTP.

Law: one type is encoded on one side and decoded on the other; nothing travels as a loose dictionary except metrics.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import msgspec

from agentgym import errors
from agentgym.engine.protocol import Probe
from agentgym.errors import AgentGymError, ServiceError
from agentgym.rollout.feed import FeedPage as FeedPage
from agentgym.rollout.feed import Piece as Piece
from agentgym.trajectory import ScoredSequences

CONTENT_TYPE = "application/msgpack"
MAX_FEED_TOKENS = 1_000_000  # of one page
MAX_PAUSE_S = 3600.0


@dataclass(frozen=True, slots=True)
class Group:
    """The siblings of one task and seed that have a score; at least two of them valid, at most `group_size`.

    Example: `Group("g-000004", "agentgym/Maze-v0", "train-3121", 17, (scored, scored))`.
    """

    group_id: str
    env_id: str
    task_id: str
    seed: int
    members: tuple[ScoredSequences, ...]


@dataclass(frozen=True, slots=True)
class Batch:
    """`groups_per_step` groups, each within the staleness bound when it was taken.

    `metrics` are those of this step (names in `agentgym.rollout.collector`). `data_position` is where the data order
    stands once this batch is trained on: what a checkpoint stores and `ServiceClient.restore` takes.

    Example: `Batch("step-000003", (group,), live_versions=(1, 2), metrics={"reward_mean": 0.4}, data_position={})`.
    """

    batch_id: str
    groups: tuple[Group, ...]
    live_versions: tuple[int, ...]
    metrics: Mapping[str, float]
    data_position: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class PublishReport:
    """Weights reached the engine. `live_versions` are those that a buffered or in-flight token carries or may carry,
    and the one being served; every other one can be forgotten.

    Example: `PublishReport(version=3, pause_s=0.012, total_s=0.03, live_versions=(2, 3), loaded_bytes=1240064)`.
    """

    version: int
    pause_s: float
    total_s: float
    live_versions: tuple[int, ...]
    loaded_bytes: int  # by the engine: less than was published, where only what changed has to be loaded
    ended_pause: int | None = None  # the pause that it ended; pause_s counts from its beginning
    probe_off: float | None = None  # the engine's largest difference to the probe; None: nothing was compared


@dataclass(frozen=True, slots=True)
class PauseReport:
    """Nothing is sampled until the next publication, `resume`, or the end of the time. The id of a pause that was only
    lengthened is the same as before.

    Example: `PauseReport(pause_id=4, policy_version=3)`.
    """

    pause_id: int
    policy_version: int


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Episodes played to measure, not to train. Means are over valid episodes; an episode succeeded when its score
    reached 1.

    Example: `Evaluation(episodes=512, valid=512, failed=0, mean_reward=0.34, success_rate=0.34, mean_turns=4.9,
    policy_version=0, seconds=6.1)`.
    """

    episodes: int
    valid: int
    failed: int
    mean_reward: float
    success_rate: float
    mean_turns: float
    policy_version: int
    seconds: float


@dataclass(frozen=True, slots=True)
class ServiceStatus:
    """What the service is doing; `waiting_for` says it in one line for people.

    Example: `ServiceStatus(policy_version=3, collecting=True, in_flight=64, started_groups=9, ready_groups=4,
    episodes=800, failed=0, discarded_groups=0, sampled_tokens=88000, tokens_per_s=9100.0, live_versions=(2, 3),
    versions_dir="runs/quickstart/versions", evaluating="", waiting_for="4 of 48 groups ready; episodes: 64 sampling",
    model="tiny", model_id="93a1c0de93a1c0de")`.
    """

    policy_version: int
    collecting: bool
    in_flight: int
    started_groups: int  # started and not yet consumed
    ready_groups: int  # complete, within the bound, not yet taken
    episodes: int  # finished since the start
    failed: int
    discarded_groups: int
    sampled_tokens: int
    tokens_per_s: float  # over the last seconds
    live_versions: tuple[int, ...]
    versions_dir: str  # the folder that published weights must lie in
    evaluating: str  # "" when no evaluation runs, else such as "37/512 episodes"
    waiting_for: str
    model: str  # its name
    model_id: str  # which model that is (`agentgym.server.models.model_id`)


# ------------------------------------------------------------------------------------------------------ requests


@dataclass(frozen=True, slots=True)
class CollectRequest:
    running: bool


@dataclass(frozen=True, slots=True)
class BatchRequest:
    trainer_version: int
    timeout_s: float
    step: int  # names the file of its trajectories


@dataclass(frozen=True, slots=True)
class PublishRequest:
    version: int
    path: str
    probe: Probe | None = None  # what the trainer computes with these weights


@dataclass(frozen=True, slots=True)
class AcknowledgeRequest:
    batch_id: str


@dataclass(frozen=True, slots=True)
class FeedRequest:
    cursor: int
    max_tokens: int


@dataclass(frozen=True, slots=True)
class PauseRequest:
    limit_s: float


@dataclass(frozen=True, slots=True)
class EvaluateRequest:
    episodes: int
    split: str = "heldout"
    temperature: float = 1.0
    seed: int = 0


@dataclass(frozen=True, slots=True)
class EvaluationTicket:
    """An evaluation that has begun; its result is fetched by this id."""

    evaluation_id: str


@dataclass(frozen=True, slots=True)
class RestoreRequest:
    data_position: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Fault:
    """An error on its way back; `kind` is the class's name in `agentgym.errors`.

    Example: `Fault("VersionError", "version 3 is served already")`.
    """

    kind: str
    message: str


@dataclass(frozen=True, slots=True)
class Done:
    """The answer to a request that has nothing to say."""


# --------------------------------------------------------------------------------------------------------- coding

T = TypeVar("T")
_encoder = msgspec.msgpack.Encoder()


def encode(value: Any) -> bytes:
    return _encoder.encode(value)


def decode(data: bytes, kind: type[T]) -> T:
    """Raises ServiceError, naming the field, if `data` is not a `kind`."""
    try:
        return msgspec.msgpack.decode(data, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ServiceError(f"not a {kind.__name__}: {error}") from error


def to_fault(error: AgentGymError) -> Fault:
    return Fault(type(error).__name__, str(error))


def from_fault(fault: Fault) -> AgentGymError:
    """The error that the other side raised; ServiceError for a class that this side does not know."""
    kind = getattr(errors, fault.kind, None)
    if isinstance(kind, type) and issubclass(kind, AgentGymError):
        return kind(fault.message)
    return ServiceError(f"{fault.kind}: {fault.message}")
