"""Training on outside agents alone: the example's agent, in a process that knows nothing of agentgym, trains the tiny
model through `agentgym train`."""

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from agentgym.rollout.store import read_trajectories, step_file

ROOT = Path(__file__).parents[2]
QUICKSTART = ROOT / "configs" / "quickstart.toml"
AGENT = ROOT / "docs" / "examples" / "outside_agent.py"
MAZE_SESSIONS = ROOT / "configs" / "maze_sessions.toml"
MAZE_AGENT = ROOT / "docs" / "examples" / "maze_agent.py"


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


def train(tmp_path, config, script, *arguments):
    """Runs `agentgym train` and, beside it, an agent from outside, until both have ended well."""
    port = free_port()
    with (tmp_path / "agent.log").open("w") as log:
        agent = subprocess.Popen([sys.executable, script, f"http://127.0.0.1:{port}"], stdout=log, stderr=log)
        try:
            command = [sys.executable, "-m", "agentgym.cli", "train", str(config), f"server.port={port}"]
            command += [f"run.dir={tmp_path}", "evaluation.episodes=0", *arguments]
            done = subprocess.run(command, capture_output=True, text=True, timeout=280)
            if "cannot listen on" in done.stderr:  # somebody else has had the port since it was seen to be free
                agent.kill()
                return train(tmp_path, config, script, *arguments)
            assert done.returncode == 0, done.stderr[-4000:]
            assert agent.wait(120) == 0, (tmp_path / "agent.log").read_text()
        finally:
            agent.kill()
            agent.wait()


@pytest.mark.slow
def test_an_environment_in_the_agent_s_own_process(tmp_path):
    train(tmp_path, MAZE_SESSIONS, MAZE_AGENT, "trainer.steps=2", "rollout.groups_per_step=4")
    games = [game for step in (1, 2) for game in read_trajectories(step_file(tmp_path / "maze_sessions", step))]
    assert len(games) == 2 * 4 * 8
    assert {game.env_id for game in games} == {"outside"}
    assert {game.status.value for game in games} <= {"terminated", "truncated"}
    rewards = [game.score.value for game in games if game.score]
    assert 0.0 < sum(rewards) / len(rewards) < 1.0  # the tiny model solves some


def test_a_run_trains_on_sessions_alone(tmp_path):
    train(
        tmp_path, QUICKSTART, AGENT, "env.id=guess_number", "rollout.source=sessions", "trainer.steps=3",
        "rollout.groups_per_step=4",
    )  # fmt: skip
    folder = tmp_path / "quickstart"
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["policy_version"] for row in rows] == [1, 2, 3]
    assert any(row["gradient_norm"] > 1e-3 for row in rows)
    assert all(row["trajectory/delivered_fraction"] == 1.0 for row in rows)
    assert all(row["trajectory/lag_max"] <= 2 for row in rows)
    # old logprobs were exact for every version: what the agent was sent is what was sampled, id by id
    assert all(row["anchor/num_fallbacks"] == 0 for row in rows)
    assert all(row["discrepancy/max_abs_log_ratio"] < 1e-4 for row in rows)
    games = [game for step in (1, 2, 3) for game in read_trajectories(step_file(folder, step))]
    assert len(games) == 3 * 4 * 8
    assert {game.trajectory_id[:4] for game in games} == {"ses-"}
    assert {game.task_id[:7] for game in games} == {"secret-"}
    assert len({game.trajectory_id for game in games}) == len(games)
    assert any(len(game.turns) > 1 for game in games)
    assert all(game.metrics.get("link_continuation", 0.0) == len(game.turns) - 1 for game in games)
    rewards = [game.score.value for game in games if game.score]
    assert 0.0 < sum(rewards) / len(rewards) < 1.0
