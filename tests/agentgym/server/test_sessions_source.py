"""Whose episodes a run is trained on: the environment's, outside agents', or both; and what a run needs for it."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from outside_agents import HELLO, agent, say

from agentgym.config import parse_config
from agentgym.errors import ConfigError, InputError
from agentgym.server.models import resolve_model
from agentgym.server.settings import OUTSIDE, ServiceConfig

BOTH = {"source": "both", "group_size": 2, "groups_per_step": 2, "in_flight": 8, "max_staleness": 1}


def play(it: Any, task: str) -> None:
    """A group of two sessions, opened as soon as there is a place for it."""
    opened = []
    deadline = time.monotonic() + 120
    while len(opened) < 2:
        answer = it.http.post("/v1/sessions", json={"task": task})
        if answer.status_code == 201:
            opened.append(answer.json())
        else:
            assert (answer.status_code, time.monotonic() < deadline) == (429, True), answer.text
            time.sleep(0.02)
    for session in opened:
        assert session["trains"] is True
        with agent(session) as client:
            say(client, HELLO)
        it.finish(session)


def test_episodes_and_sessions_fill_the_same_batches(service: Any) -> None:
    it = service(**BOTH)
    played: dict[str, int] = {OUTSIDE: 0, "agentgym/Maze-v0": 0}
    deadline = time.monotonic() + 120
    step = 0
    with ThreadPoolExecutor(3) as agents:
        playing = [agents.submit(play, it, f"task-{number}") for number in range(3)]
        while min(played.values()) < 3:
            assert time.monotonic() < deadline, played
            step += 1
            batch = it.server.client.take_batch(step - 1, timeout_s=60, step=step)
            outside = [group for group in batch.groups if group.env_id == OUTSIDE]
            assert batch.metrics["session_groups"] == len(outside)
            assert ("session_reward_mean" in batch.metrics) == bool(outside)
            assert all(len(group.members) == 2 for group in batch.groups)
            for group in batch.groups:
                played[group.env_id] += 1
            stored = {trajectory.trajectory_id for trajectory in it.trajectories(step)}
            assert stored >= {member.trajectory_id for group in batch.groups for member in group.members}
            it.server.client.publish(step, it.server.weights(step))
            while it.http.get("/health").json()["sessions"]:  # a trainer so quick would outdate every session
                time.sleep(0.01)
        for one in playing:
            one.result()
    assert played[OUTSIDE] == 3  # no more than were played, and none was lost
    status = it.server.client.status()
    assert (status.failed, status.discarded_groups) == (0, 0)


def test_sessions_that_nobody_finishes_hold_up_no_batch_of_both(service: Any) -> None:
    it = service(**BOTH)
    deadline = time.monotonic() + 120
    opened = 0
    step = 0
    while opened < 2:  # half of the four places
        answer = it.http.post("/v1/sessions", json={"task": f"left-{opened}"})
        opened += answer.status_code == 201
        if answer.status_code == 429:  # the environment was first; what is trained on makes room
            step += 1
            it.server.client.take_batch(step - 1, timeout_s=60, step=step)
            it.server.client.publish(step, it.server.weights(step))
        assert time.monotonic() < deadline
    assert "as many as rollout.max_staleness allows" in it.open("one too many", expect=429)["error"]["message"]
    for _ in range(3):
        step += 1
        batch = it.server.client.take_batch(step - 1, timeout_s=60, step=step)
        assert {group.env_id for group in batch.groups} == {"agentgym/Maze-v0"}
        it.server.client.publish(step, it.server.weights(step))
    assert "sessions: 2 open" in it.server.client.status().waiting_for


def test_a_run_on_sessions_needs_no_environment(service: Any) -> None:
    it = service(env=None)
    for _ in range(2):
        session = it.open()
        with agent(session) as client:
            say(client, HELLO)
        it.finish(session)
    batch = it.server.client.take_batch(0, timeout_s=60, step=1)
    (group,) = batch.groups
    assert (group.env_id, batch.data_position) == (OUTSIDE, {})
    with pytest.raises(InputError, match="an evaluation needs an environment"):
        it.server.client.evaluate(4)


def test_a_run_on_its_environment_has_one() -> None:
    for source in ("environment", "both"):
        with pytest.raises(ConfigError, match=r"env\.id is not set"):
            parse_config(ServiceConfig, {"rollout": {"source": source}})
    assert parse_config(ServiceConfig, {"rollout": {"source": "sessions"}}).env.id == OUTSIDE
    with pytest.raises(InputError, match="the tiny model begins as an imitation of an environment"):
        resolve_model("tiny", OUTSIDE, 0)


def test_half_a_buffer_that_holds_no_batch_is_refused() -> None:
    values = {"env": {"id": "maze"}, "rollout": {"source": "both", "max_staleness": 0}}
    with pytest.raises(ConfigError, match=r"needs rollout\.max_staleness >= 1"):
        parse_config(ServiceConfig, values)
