"""A service whose environment runs code: one pool for its episodes and evaluations, told of in each batch, gone at the
end."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from agentgym import registry
from agentgym.config import parse_config
from agentgym.errors import UnavailableError
from agentgym.messages import Message
from agentgym.sandbox import SandboxSpec
from agentgym.sandbox.ownership.lease import owner
from agentgym.sandbox.spec import Sandbox, Tier
from agentgym.sandbox.warm.pool import BoxSource, SandboxPool, box_source
from agentgym.server.service import RolloutService
from agentgym.server.settings import ServiceConfig
from agentgym_envs.maze import Maze


class BoxMaze(Maze):
    """A maze that computes something in a box first, as an environment with tools would."""

    blocking: ClassVar[bool] = True
    sources: ClassVar[list[BoxSource]] = []

    def __init__(self, sandbox: Tier | BoxSource = "auto") -> None:
        super().__init__()
        self._boxes = box_source(sandbox)
        self._box: Sandbox | None = None
        self.sources.append(self._boxes)

    def reset_task(self, task: str, rng: np.random.Generator) -> str | Sequence[Message]:
        self.close()
        self._box = self._boxes.open(SandboxSpec(memory_mb=64))
        answer = self._box.exec("test -e /work/used && echo dirty; touch /work/used", timeout_s=60.0)
        assert answer.text == ""
        return super().reset_task(task, rng)

    def close(self) -> None:
        box, self._box = self._box, None
        if box is not None:
            box.close()


@pytest.fixture
def name() -> str:
    registry.register("test_sandboxes/BoxMaze-v0", BoxMaze, max_turns=3)
    BoxMaze.sources.clear()
    return "test_sandboxes/BoxMaze-v0"


def config_of(name: str, **sandbox: Any) -> ServiceConfig:
    rollout = {"group_size": 3, "groups_per_step": 2, "in_flight": 6, "max_tokens_per_turn": 5}
    values = {"env": {"id": name}, "model": {"name": "small"}, "rollout": rollout | {"max_episode_tokens": 120}}
    return parse_config(ServiceConfig, values | {"sandbox": {"tier": "namespace"} | sandbox})


def boxes_of_this_process() -> set[Path]:
    return set((owner().folder / "boxes").iterdir())


@pytest.mark.bubblewrap
def test_episodes_and_evaluations_share_a_pool_that_ends_with_the_service(start: Callable[..., Any], name: str):
    before = boxes_of_this_process()
    server = start(config=config_of(name, warm=3, starters=2))
    server.client.collect(True)
    batch = server.client.take_batch(0, timeout_s=60)
    server.client.evaluate(4, "heldout", 1.0, 0)
    assert len({id(source) for source in BoxMaze.sources}) == 1
    pool = BoxMaze.sources[0]
    assert isinstance(pool, SandboxPool)
    assert batch.metrics["sandbox_hits"] + batch.metrics["sandbox_misses"] >= 6
    assert 0 <= batch.metrics["sandbox_hit_rate"] <= 1
    assert batch.metrics["sandbox_failed_starts"] == 0
    assert batch.metrics["sandbox_start_p50_s"] > 0
    asyncio.run_coroutine_threadsafe(server.service.close(), server.loop).result(120)
    assert boxes_of_this_process() <= before
    assert (pool.metrics().warm, pool.metrics().in_use) == (0, 0)


def test_an_environment_without_code_gets_no_pool(start: Callable[..., Any]):
    before = set(threading.enumerate())
    server = start()
    server.client.collect(True)
    batch = server.client.take_batch(0, timeout_s=60)
    assert not [metric for metric in batch.metrics if metric.startswith("sandbox")]
    assert not [thread for thread in set(threading.enumerate()) - before if thread.name.startswith("sandbox-")]


def test_the_tier_and_the_host_are_those_of_the_settings(tmp_path: Path, maze_folder: Path, name: str):
    config = config_of(name, tier="docker", docker_host="unix:///nowhere/docker.sock")
    with pytest.raises(UnavailableError, match=r"/nowhere/docker\.sock"):
        asyncio.run(RolloutService.start(config, maze_folder, tmp_path, tmp_path))
    assert BoxMaze.sources == []


def test_a_service_of_an_environment_without_code_loads_no_docker():
    program = (
        "import sys, agentgym.server.service, agentgym.server.process, agentgym.cli\n"
        "from agentgym import registry; registry.make('maze')\n"
        "print('docker' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
