"""Message spaces keep Gymnasium's contract of a space."""

from __future__ import annotations

import copy
import json
import pickle

import pytest

from agentgym.messages import Message, ToolCall, ToolSpec, call
from agentgym.spaces import ConversationSpace, MessageSpace

MOVE = ToolSpec(
    "move", "", {"type": "object", "properties": {"dir": {"enum": ["up", "down"]}}, "required": ["dir"]}
)  # fmt: skip
SPACES = [MessageSpace("assistant", (MOVE,)), MessageSpace("assistant"), ConversationSpace()]


@pytest.mark.parametrize("space", SPACES, ids=repr)
def test_samples_are_inside_and_follow_the_seed(space):
    space.seed(3)
    first = [space.sample() for _ in range(20)]
    space.seed(3)
    assert [space.sample() for _ in range(20)] == first
    assert all(sample in space for sample in first)
    assert len({json.dumps(space.to_jsonable([sample])) for sample in first}) > 1
    assert not space.is_np_flattenable


@pytest.mark.parametrize("space", SPACES, ids=repr)
def test_samples_survive_json_and_spaces_survive_copies(space):
    samples = [space.sample() for _ in range(5)]
    assert space.from_jsonable(json.loads(json.dumps(space.to_jsonable(samples)))) == samples
    assert copy.deepcopy(space) == space
    assert pickle.loads(pickle.dumps(space)) == space


def test_what_is_not_inside():
    actions, conversations = SPACES[0], SPACES[2]
    assert call("anything") in actions  # a space of messages: whether a call fits is the environment's to say
    assert Message("user", "hello") not in actions
    assert Message("assistant", None) not in actions  # pyright: ignore[reportArgumentType]
    assert Message("assistant", "", [ToolCall("a", "b", "")]) not in actions  # pyright: ignore[reportArgumentType]
    assert Message("assistant", "", ("move",)) not in actions  # pyright: ignore[reportArgumentType]
    assert Message("robot", "") not in conversations  # pyright: ignore[reportArgumentType]
    assert [Message("user", "hello")] not in conversations
    assert (Message("tool", "", tool_call_id=3),) not in conversations  # pyright: ignore[reportArgumentType]
    assert (Message("user", "hello"), "hello") not in conversations
    assert (Message("tool", "hello", tool_call_id="call_0"), Message("system", "")) in conversations
    assert actions != SPACES[1]
    assert actions != conversations
