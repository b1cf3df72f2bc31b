"""Episodes that are played turn by turn, all together, with the weights that the caller chooses for each turn. Law:
equal plans and weights give equal trajectories, bit for bit (where the environment does not block): nothing waits for
a clock, and lag is what the caller says it is.

The episodes are those of `episode.py`, as a rollout runs them. For experiments about lag; a rollout that overlaps
training is the collector's.
"""

from __future__ import annotations

import asyncio
import tempfile
import zlib
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from agentgym import registry
from agentgym.engine.torch_engine_direct import DirectEngine
from agentgym.env import Split
from agentgym.policy import Completion, SamplingParams
from agentgym.render import load_renderer
from agentgym.rollout.environments import EnvironmentPool
from agentgym.rollout.episode import EpisodePlan, run_episode
from agentgym.rollout.evaluation import plan_evaluation
from agentgym.rollout.limits import EpisodeLimits
from agentgym.rollout.schedule import Schedule
from agentgym.trajectory import Trajectory
from agentgym.weight_file import save_file

Weights = Mapping[str, np.ndarray]
VersionOf = Callable[[int, int], int]  # (number of the episode within its batch, number of the turn) -> version


class Lockstep:
    """An environment, a renderer and an engine in the caller's thread.

    `weights(version)` is what the engine is given as that version: the published weights, or others on purpose.

    >>> lockstep = Lockstep(Path("model"), "maze", limits, slots=384, weights=log.read, seed=0)
    >>> lockstep.play(lockstep.next_groups(48, 8), lambda episode, turn: 5)
    [Trajectory(...), ...]
    """

    def __init__(
        self, model_folder: Path, env_id: str, limits: EpisodeLimits, *, slots: int, weights: Callable[[int], Weights],
        seed: int, temperature: float = 1.0, env_kwargs: Mapping[str, Any] | None = None, tool_format: str = "auto",
    ) -> None:  # fmt: skip
        """Raises InputError and its kin for what cannot run here."""
        self.env_id = registry.lookup(env_id).env_id
        kwargs = dict(env_kwargs or {})
        self._limits = limits
        self._weights = weights
        self._seed = seed
        self._temperature = temperature
        self._renderer = load_renderer(model_folder, tool_format)
        self._environments = EnvironmentPool(
            lambda: registry.make(self.env_id, **kwargs), slots, limits.max_env_call_s
        )  # fmt: skip
        self._schedule = Schedule(self._environments.task_ids("train"), seed)
        self._engine = DirectEngine(model_folder, slots=slots, max_context=limits.max_episode_tokens)
        self._loaded: int | None = None

    @property
    def max_turns(self) -> int:
        return self._limits.max_turns

    @property
    def model(self) -> Any:
        """The engine's module, to be hooked by whoever distorts its logits."""
        return self._engine.model

    def next_groups(self, num_groups: int, group_size: int) -> list[EpisodePlan]:
        """The next `num_groups` training tasks, `group_size` siblings of each."""
        plans = []
        for _ in range(num_groups):
            task = self._schedule.next()
            self._schedule.finish(task.index)
            group = f"g-{task.index:06d}"
            for member in range(group_size):
                name = f"{group}.{member}"
                draws = zlib.crc32(f"{self._seed} {name}".encode())
                plans.append(EpisodePlan(name, group, self.env_id, task.task_id, task.seed, draws, self._temperature))
        return plans

    def evaluation(self, episodes: int, split: Split, temperature: float, seed: int) -> list[EpisodePlan]:
        """Plans of a held-out evaluation, as the service makes them."""
        return plan_evaluation(self.env_id, self._environments, episodes, split, temperature, seed)

    def play(self, plans: Sequence[EpisodePlan], version_of: VersionOf) -> list[Trajectory]:
        """One trajectory of each plan, in their order; a failed episode is one with status FAILED. Raises EngineError
        and VersionError."""
        return asyncio.run(self._play(plans, version_of))

    def close(self) -> None:
        asyncio.run(self._environments.close())

    async def _play(self, plans: Sequence[EpisodePlan], version_of: VersionOf) -> list[Trajectory]:
        policy = _Turns({plan.trajectory_id: number for number, plan in enumerate(plans)}, version_of)
        episodes = [
            asyncio.create_task(run_episode(plan, self._environments, self._renderer, policy, self._limits))
            for plan in plans
        ]
        for episode in episodes:
            episode.add_done_callback(lambda _: policy.leave())
        try:
            while requests := await policy.gathered():
                for version in sorted(requests):
                    self._bring(version)
                    turns = requests[version]
                    for turn, completion in zip(turns, self._engine.sample([turn[:2] for turn in turns]), strict=True):
                        turn[2].set_result(completion)
            return [await episode for episode in episodes]
        finally:
            for episode in episodes:
                episode.cancel()
            await asyncio.gather(*episodes, return_exceptions=True)

    def _bring(self, version: int) -> None:
        """Loads `version`, unless it is served: keys of the turns before are then still good."""
        if version != self._loaded:
            self._loaded = None
            with tempfile.TemporaryDirectory(prefix="agentgym-lockstep-") as scratch:
                save_file(self._weights(version), path := Path(scratch) / "weights.safetensors")
                self._engine.load(version, path)
            self._loaded = version


def registered_turns(env_id: str) -> int:
    """How many turns an episode of `env_id` has where nobody says otherwise."""
    return registry.lookup(env_id).max_turns


_Turn = tuple[Sequence[int], SamplingParams, "asyncio.Future[Completion]"]


class _Turns:
    """The policy of a batch of episodes: it holds every request until all episodes that go on have made theirs."""

    def __init__(self, numbers: Mapping[str, int], version_of: VersionOf) -> None:
        self._numbers = numbers
        self._version_of = version_of
        self._taken: dict[int, int] = defaultdict(int)  # turns by episode
        self._live = len(numbers)
        self._waiting: dict[int, list[tuple[int, _Turn]]] = {}
        self._change = asyncio.Event()

    async def complete(self, prompt_ids: Sequence[int], params: SamplingParams) -> Completion:
        assert params.session is not None, "episodes name themselves"
        number = self._numbers[params.session]
        version = self._version_of(number, self._taken[number])
        self._taken[number] += 1
        reply: asyncio.Future[Completion] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(version, []).append((number, (prompt_ids, params, reply)))
        self._change.set()
        return await reply

    def leave(self) -> None:
        """An episode has ended."""
        self._live -= 1
        self._change.set()

    async def gathered(self) -> dict[int, list[_Turn]]:
        """The requests of the next turn by version, in the order of the episodes; empty when all have ended."""
        while sum(map(len, self._waiting.values())) < self._live:
            self._change.clear()
            await self._change.wait()
        waiting, self._waiting = self._waiting, {}
        return {
            version: [turn for _, turn in sorted(turns, key=lambda numbered: numbered[0])]
            for version, turns in waiting.items()
        }
