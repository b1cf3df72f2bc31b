"""The wire: what goes in comes out, and errors keep their class."""

from __future__ import annotations

import math
from typing import Any

import pytest

from agentgym import errors
from agentgym.errors import AgentGymError, ServiceError, UnknownNameError
from agentgym.server import wire
from agentgym.trajectory import EpisodeStatus, ScoredSequences, TokenSequence

SEQUENCE = TokenSequence((1, 2), (False, True), (0.0, -math.inf), (-1, 3), (-1, 2))
SCORED = ScoredSequences("t", "g", "e", EpisodeStatus.TRUNCATED, 0.5, True, {"r": 0.5}, (SEQUENCE,), 1)
GROUP = wire.Group("g", "e", "task", 7, (SCORED, SCORED))

MESSAGES = [
    wire.Batch("b", (GROUP,), (2, 3), {"reward_mean": 0.5}, {"next": 4, "pending": [1, 2]}),
    wire.PublishReport(3, 0.1, 0.2, (2, 3), 4096),
    wire.Evaluation(8, 7, 1, 0.5, 0.25, 4.0, 3, 1.5),
    wire.ServiceStatus(3, True, 64, 9, 4, 800, 1, 0, 88, 9.5, (2, 3), "versions", "", "4 of 48 ready", "tiny", "9f"),
    wire.EvaluateRequest(4, "heldout", 1.0, 0),
    wire.BatchRequest(3, 5.0, 4),
]


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
def test_what_goes_in_comes_out(message: Any) -> None:
    assert wire.decode(wire.encode(message), type(message)) == message


def test_what_is_something_else_is_said() -> None:
    with pytest.raises(ServiceError, match=r"not a Batch: .*batch_id"):
        wire.decode(wire.encode(MESSAGES[1]), wire.Batch)


def test_errors_keep_class_and_text() -> None:
    tree = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, AgentGymError)]
    assert len(tree) > 15
    for kind in tree:
        back = wire.from_fault(wire.decode(wire.encode(wire.to_fault(kind("the text"))), wire.Fault))
        assert (type(back), str(back)) == (kind, "the text")
    known = wire.to_fault(UnknownNameError.of("model", "smal", ["small"]))
    assert str(wire.from_fault(known)) == "unknown model 'smal'; did you mean 'small'? (known: small)"


@pytest.mark.parametrize("kind", ["SystemExit", "Iterable", "difflib", "NoSuchError", ""])
def test_an_unknown_class_becomes_a_service_error(kind: str) -> None:
    error = wire.from_fault(wire.Fault(kind, "text"))
    assert type(error) is ServiceError
    assert str(error) == f"{kind}: text"
