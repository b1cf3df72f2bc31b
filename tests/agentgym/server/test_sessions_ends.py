"""How a session ends: once, with a score, with none, or in its time; and what is no reward."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest
from outside_agents import HELLO, Pace, agent, say, says

from agentgym.rollout.store import read_trajectories
from agentgym.trajectory import EpisodeStatus

DEADLINE_S = 60.0


def until_expired(it: Any, session: Any) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while it.show(session)["status"] == "open" and time.monotonic() < deadline:
        time.sleep(0.05)
    assert it.show(session)["status"] == "expired"


def test_a_session_ends_once(service):
    it = service()
    session = it.open()
    with agent(session) as client:
        say(client, HELLO)
        it.finish(session)
        assert "is finished" in it.finish(session, 409)["error"]["message"]
        assert it.http.delete(f"/v1/sessions/{session['id']}").status_code == 409
        with pytest.raises(openai.ConflictError) as refused:
            say(client, HELLO)
    assert refused.value.code == "session_ended"
    assert it.http.get("/v1/sessions/nothing").status_code == 404


NO_REWARDS = (
    '{"components": {"r": NaN}}', '{"components": {"r": Infinity}}', '{"components": {"r": 1e999}}',
    '{"components": {"r": 1e308, "s": 1e308}}', '{"components": {}}', '{"components": {"r": "1"}}',
    '{"components": {"r": null}}', '{"components": {"r": true}}', '{"reward": 1}', "[]", "",
    '{"components": {"": 1.0}}', '{"components": {"r": 1.0}, "status": "won"}',
)  # fmt: skip


def test_what_is_no_reward_is_refused_and_the_session_stays_open(service):
    it = service()
    session = it.open()
    with agent(session) as client:
        say(client, HELLO)
    for body in NO_REWARDS:
        url = f"/v1/sessions/{session['id']}/finish"
        answer = it.http.post(url, content=body, headers={"Content-Type": "application/json"})
        assert answer.status_code == 400, (body, answer.text)
        assert answer.json()["error"]["type"] == "invalid_request_error"
        assert it.show(session)["status"] == "open"


def test_an_unknown_reward_is_said_to_be_unknown(service):
    it = service()
    for invalid in ("the grader crashed", None):
        session = it.open()
        with agent(session) as client:
            say(client, HELLO)
        it.finish(session, **({"invalid": invalid} if invalid else {"components": {"r": 1.0}}))
    status = it.server.client.status()
    assert (status.ready_groups, status.discarded_groups) == (0, 1)  # one valid sibling is no baseline


def test_nothing_sampled_is_nothing_to_finish(service):
    it = service()
    session = it.open()
    assert "no turns" in it.finish(session, 400)["error"]["message"]
    done = it.http.delete(f"/v1/sessions/{session['id']}").json()
    assert (done["status"], done["score"]) == ("abandoned", None)


def test_a_session_that_nobody_finishes_expires_typed_and_counted(service):
    it = service()
    lost = it.open(ttl_s=1000.0)
    with agent(lost) as client:
        say(client, HELLO)
        it.server.service.sessions.get(lost["id"]).began -= 1000.0  # so much time passes
        until_expired(it, lost)
        assert it.show(lost)["score"] is None
        with pytest.raises(openai.ConflictError, match="expired"):
            say(client, HELLO)
    assert "expired" in it.finish(lost, 409)["error"]["message"]
    for _ in range(2):
        session = it.open()
        with agent(session) as client:
            say(client, HELLO)
        it.finish(session)
    batch = it.server.client.take_batch(0, timeout_s=60, step=1)
    assert batch.metrics["failed"] == 1
    assert [member.score for member in batch.groups[0].members] == [1.0, 1.0]
    expired = [t for t in it.trajectories() if t.status is EpisodeStatus.FAILED]
    assert [(t.trajectory_id, t.score) for t in expired] == [(lost["id"], None)]
    assert expired[0].error is not None
    assert expired[0].error.startswith("SessionExpired")
    assert it.server.client.status().failed == 1


def test_a_session_whose_agent_asks_nothing_expires_before_its_time(service):
    pace = Pace(1.0)
    it = service(sessions={"idle_s": 1000.0}, engine=says("up " * 90, pace))
    session, silent = it.open(), it.open()
    sessions = it.server.service.sessions
    with agent(session) as client, ThreadPoolExecutor(1) as thread:
        asking = thread.submit(say, client, HELLO, max_tokens=50, seed=3)
        while not sessions.get(session["id"]).num_under_way:
            assert not asking.done()
            time.sleep(0.005)
        for one in (session, silent):
            sessions.get(one["id"])._last_asked -= 1000.0  # so much time passes
        until_expired(it, silent)
        assert it.show(session)["status"] == "open", "it is being answered"
        pace.token_s = 0.0
        asking.result()
        assert it.show(session)["status"] == "open", "and is idle from now on"


def test_a_disk_that_takes_nothing_ends_no_session_and_not_the_watch_over_them(service, monkeypatch):
    monkeypatch.setattr("agentgym.server.sessions.SWEEP_S", 0.02)
    it = service(source="environment")  # nothing is trained on, and each session is written when it ends
    folder = it.server.run_dir / "trajectories"
    folder.write_text("where a folder should be")
    session, lost = it.open(), it.open(ttl_s=0.1)
    with agent(session) as client:
        say(client, HELLO)
    assert "cannot write trajectory" in it.finish(session, 500)["error"]["message"]
    time.sleep(0.3)  # the watch has met the disk by now, more than once
    assert [it.show(one)["status"] for one in (session, lost)] == ["open", "open"]
    folder.unlink()
    assert it.finish(session)["score"]["value"] == 1.0
    until_expired(it, lost)
    written = {t.trajectory_id: t.score for t in read_trajectories(folder / "untrained.jsonl")}
    assert set(written) == {session["id"], lost["id"]}
    assert written[lost["id"]] is None
