"""A pretrained model, a Python tool and Docker: episodes in which code that the model wrote runs in a box."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from pathlib import Path

import pytest

from agentgym import registry
from agentgym.config import load_config
from agentgym.engine.gate import VersionedPolicy
from agentgym.engine.torch_engine import TorchEngine
from agentgym.render import load_renderer
from agentgym.rollout.environments import EnvironmentPool
from agentgym.rollout.episode import EpisodePlan, run_episode
from agentgym.rollout.limits import EpisodeLimits
from agentgym.rollout.store import read_trajectories, step_file
from agentgym.server.models import resolve_model
from agentgym.trajectory import EpisodeStatus, Trajectory
from agentgym_trainer.settings import TrainConfig

pytestmark = [pytest.mark.docker, pytest.mark.smollm, pytest.mark.timeout(900)]
CONFIG = Path(__file__).parents[2] / "configs" / "smollm_python_math.toml"


def outputs(trajectory: Trajectory) -> list[str]:
    """What the code that the policy wrote printed, as it came out of the box."""
    return [
        message.content
        for turn in trajectory.turns
        for call, message in zip(turn.action.tool_calls, turn.observation)
        if call.name == "python" and not message.content.startswith("error: ")
    ]


def test_the_models_code_runs_in_a_box():
    """One episode by the configuration's own environment and tool format. Sampled almost greedily, because this
    is about the path and not about luck: the model writes the program, the box computes it."""
    config = load_config(TrainConfig, CONFIG)
    folder = resolve_model(config.model.name, config.env.id, 0)
    rollout = config.rollout
    limits = EpisodeLimits(rollout.max_turns or 1, rollout.max_tokens_per_turn, rollout.max_episode_tokens)
    plan = EpisodePlan("t", "g", "agentgym/PythonMath-v0", "train-1", 1, sampling_seed=0, temperature=0.01)

    async def play() -> Trajectory:
        make = lambda: registry.make(config.env.id, sandbox="docker", **config.env.kwargs)  # noqa: E731
        environments = EnvironmentPool(make, 1, rollout.max_env_call_s)
        engine = TorchEngine(folder, slots=1, max_context=config.max_context)
        try:
            renderer = load_renderer(folder, config.render.tool_format)
            return await run_episode(plan, environments, renderer, VersionedPolicy(engine), limits)
        finally:
            await engine.close()
            await environments.close()

    trajectory = asyncio.run(play())
    assert trajectory.status is not EpisodeStatus.FAILED, trajectory.error
    _, first, times, second = trajectory.opening[-1].content.partition("?")[0].rsplit(" ", 3)
    assert times == "*"
    assert outputs(trajectory)[0] == str(int(first) * int(second)), trajectory.turns


@pytest.mark.slow
def test_a_run_whose_episodes_run_code_in_boxes(tmp_path: Path):
    command = [sys.executable, "-m", "agentgym.cli", "train", str(CONFIG), f"run.dir={tmp_path}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=840)
    assert done.returncode == 0, done.stderr[-4000:]
    folder = tmp_path / "smollm_python_math"

    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2]
    fresh = [row for row in rows if row.get("policy/lag0/num_tokens", 0) > 0]
    assert fresh  # the first step's tokens are of the version that trains on them
    assert all(row["discrepancy/lag0/max_abs_log_ratio"] < 1e-4 for row in fresh)

    episodes = [t for step in (1, 2) for t in read_trajectories(step_file(folder, step))]
    assert len(episodes) >= 16
    assert not [t.error for t in episodes if t.status is EpisodeStatus.FAILED]
    ran = [t for t in episodes if outputs(t)]
    assert len(ran) >= len(episodes) / 4, [t.turns[0].action for t in episodes]
