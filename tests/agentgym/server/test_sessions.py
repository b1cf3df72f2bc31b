"""Sessions over HTTP, with OpenAI's own client: what an outside agent does becomes one trajectory, id by id."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from outside_agents import HELLO, MOVE, agent, say

from agentgym.rollout.store import OTHERS, read_trajectories
from agentgym.trajectory import to_sequences

# ---------------------------------------------------------------------------------------------------- what is recorded


@pytest.mark.parametrize("stream", [False, True])
def test_what_an_agent_says_is_one_row_of_exactly_the_ids_it_was_sent(service, stream):
    it = service()
    sampled: list[list[int]] = []
    for _ in range(2):
        session = it.open("maze-17", seed=3)
        messages = list(HELLO)
        ids: list[int] = []
        with agent(session) as client:
            for turn in range(3):
                if stream:
                    with client.chat.completions.stream(
                        model="small", messages=messages, tools=[MOVE], max_tokens=5,
                        extra_body={"return_token_ids": True},
                    ) as events:  # fmt: skip
                        for _ in events:
                            pass
                        reply = events.current_completion_snapshot.choices[0].message
                else:
                    answer = say(client, messages, tools=[MOVE])
                    ids += answer.choices[0].token_ids
                    reply = answer.choices[0].message
                messages.append(reply if turn % 2 else reply.to_dict())
                calls = reply.tool_calls or []
                messages += [{"role": "tool", "tool_call_id": call.id, "content": "1 left"} for call in calls]
                messages += [] if calls else [{"role": "user", "content": "go on"}]
        sampled.append(ids)
        done = it.finish(session, components={"reached": 0.5, "short": 0.25})
        assert (done["status"], done["turns"], done["links"]) == ("finished", 3, {"opening": 1, "continuation": 2})
        assert done["score"] == {"value": 0.75, "components": {"reached": 0.5, "short": 0.25}, "valid": True}
    batch = it.server.client.take_batch(0, timeout_s=60, step=1)
    (group,) = batch.groups
    assert (group.task_id, group.seed) == ("maze-17", 3)
    assert batch.metrics["delivered_fraction"] == 1.0
    for member, ids in zip(group.members, sampled, strict=True):
        (row,) = member.sequences
        trained = [t for t, loss in zip(row.token_ids, row.loss_mask) if loss]
        assert len(trained) == member.num_sampled_tokens
        assert stream or trained == ids
        assert member.score == 0.75


def test_sub_agents_of_one_session_run_beside_each_other(service):
    it = service()
    session = it.open()

    def work(number: int) -> None:
        messages: list[Any] = [{"role": "user", "content": f"{number} up"}]
        with agent(session) as client:
            for _ in range(3):
                messages += [say(client, messages).choices[0].message, {"role": "user", "content": "go on"}]

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(work, range(1, 4)))
    done = it.finish(session)
    assert done["links"] == {"opening": 3, "continuation": 6}
    other = it.open()
    with agent(other) as client:
        say(client, HELLO)
    it.finish(other)
    it.server.client.take_batch(0, timeout_s=60, step=1)
    first = it.trajectories()[0]
    assert len(first.turns) == 9
    assert len(to_sequences(first)) == 3


def test_a_rewritten_history_forks_over_http(service):
    it = service()
    session = it.open()
    with agent(session) as client:
        first = say(client, HELLO).choices[0].message
        say(client, [*HELLO, first, {"role": "user", "content": "go on"}])
        edited = {"role": "assistant", "content": "up up up"}
        say(client, [*HELLO, edited, {"role": "user", "content": "go on"}])
    assert it.finish(session)["links"] == {"opening": 1, "continuation": 1, "rewrite": 1}


def test_several_replies_at_once_are_branches_and_what_follows_knows_which(service):
    it = service()
    session = it.open()
    with agent(session) as client:
        answer = say(client, HELLO, n=3, seed=1)
        chosen = answer.choices[1]
        after = say(client, [*HELLO, chosen.message, {"role": "user", "content": "go on"}])
    assert after.prompt_token_ids[: len(answer.prompt_token_ids)] == answer.prompt_token_ids
    rest = after.prompt_token_ids[len(answer.prompt_token_ids) :]
    assert rest[: len(chosen.token_ids)] == chosen.token_ids
    assert it.finish(session)["links"] == {"opening": 1, "branch": 2, "continuation": 1}


# ------------------------------------------------------------------------------------- beside a run on its environment


def test_sessions_of_a_run_on_its_environment_are_recorded_and_not_trained_on(service):
    it = service(source="environment", group_size=3, groups_per_step=2, in_flight=6)
    session = it.open()
    assert session["trains"] is False
    with agent(session) as client:
        say(client, HELLO, temperature=0.0)
    it.finish(session)
    batch = it.server.client.take_batch(0, timeout_s=60, step=1)
    assert session["id"] not in {member.trajectory_id for group in batch.groups for member in group.members}
    (kept,) = read_trajectories(it.server.run_dir / "trajectories" / OTHERS)
    assert (kept.trajectory_id, len(kept.turns)) == (session["id"], 1)


def test_versions_that_open_sessions_hold_stay_alive(service):
    it = service(max_staleness=3)
    session = it.open()
    with agent(session) as client:
        say(client, HELLO)
        it.server.client.publish(1, it.server.weights(1))
        assert it.server.client.status().live_versions == (0, 1)
        say(client, HELLO)
        it.server.client.publish(2, it.server.weights(2))
    assert it.server.client.status().live_versions == (0, 1, 2)
    it.http.delete(f"/v1/sessions/{session['id']}")
    assert it.server.client.status().live_versions == (2,)
