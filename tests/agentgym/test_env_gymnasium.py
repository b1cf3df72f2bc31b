"""An environment of ours is one of Gymnasium's: its checker, wrappers, time limit and vectors take it."""

from __future__ import annotations

import warnings
from typing import Any, Literal

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from agentgym import registry
from agentgym.env import ToolEnv
from agentgym.messages import Message, call
from agentgym.tools import tool


class Diary(ToolEnv):
    """A tool that goes on, and one that ends the episode."""

    reward_weights = {"good": 2.0}  # noqa: RUF012

    def reset_task(self, task: str, rng: np.random.Generator) -> str:
        return "Begin."

    @tool
    def note(self, text: str) -> None:
        """Write down."""

    @tool
    def stop(self) -> str:
        self.finish(good=1.0)
        return "over"


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_records", dict(registry._records))
    registry.register("test_env/Diary-v0", Diary, max_turns=3)


@pytest.mark.usefixtures("registered")
def test_gymnasium_takes_it_with_time_limit_and_wrappers():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(gymnasium.make("test_env/Diary-v0").unwrapped)
        env = gymnasium.wrappers.RecordEpisodeStatistics(gymnasium.make("test_env/Diary-v0"))
        env.reset(seed=1)
        steps = [env.step(call("note", text="a")) for _ in range(3)]
    assert [step[3] for step in steps] == [False, False, True]
    assert "score" not in steps[-1][4]
    unwrapped = env.unwrapped
    assert isinstance(unwrapped, Diary)
    assert unwrapped.score_unfinished().value == 0.0


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize("mode", ["sync", "async"])
def test_gymnasium_makes_vectors_of_it(mode: Literal["sync", "async"]):
    # shared memory holds arrays of fixed shape only: Gymnasium says so for any space of its own with variable length
    vector_kwargs: dict[str, Any] = {"shared_memory": False, "context": "fork"} if mode == "async" else {}
    envs = gymnasium.make_vec("test_env/Diary-v0", 2, vectorization_mode=mode, vector_kwargs=vector_kwargs)
    try:
        openings, _ = envs.reset(seed=5)
        assert len(openings) == 2
        observation, reward, terminated, _, info = envs.step((call("note", text="a"), call("stop")))
    finally:
        envs.close()
    assert observation[1] == (Message("tool", "over", tool_call_id="call_0"),)
    assert reward.tolist() == [0.0, 2.0]
    assert terminated.tolist() == [False, True]
    assert info["score"][1].value == 2.0
