"""One episode: where messages and tokens meet. Render the opening, then complete, parse, step, bridge, until it ends.

Laws: the ids of the next prompt come from `bridge` alone, so no sampled token is encoded again; a bad episode is data
(this is the only place that catches whatever an environment or an engine throws); and whichever way an episode ends,
its environment is either fit for the next one or closed.
"""

from __future__ import annotations

import asyncio
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from agentgym.env import AgentEnv
from agentgym.errors import EngineError, EnvError
from agentgym.messages import Message
from agentgym.policy import Completion, Policy, SamplingParams
from agentgym.render.protocol import Renderer
from agentgym.rewards import Score
from agentgym.rollout.correction import Correction
from agentgym.rollout.environments import EnvironmentPool
from agentgym.rollout.limits import EpisodeLimits
from agentgym.trajectory import EpisodeStatus, Trajectory, Turn

T = TypeVar("T")
TOOL_ERROR = "error: "  # how a ToolEnv begins the answer to a call that it refused
SHOWN = 8  # episodes that a stall warning describes one by one


@dataclass(frozen=True, slots=True)
class EpisodePlan:
    """Which episode to play. Siblings share task and seed and differ in `sampling_seed`.

    Example: `EpisodePlan("g-000004.2", "g-000004", "agentgym/Maze-v0", "train-3121", 17, sampling_seed=9)`.
    """

    trajectory_id: str
    group_id: str
    env_id: str
    task_id: str
    seed: int
    sampling_seed: int
    temperature: float = 1.0
    correction: Correction | None = None  # what it corrects; None: it plays the task as it is


class EpisodeProgress:
    """What a running episode is doing: for the watchdog, and for knowing which versions its tokens may carry."""

    __slots__ = ("_served", "_turn_version", "phase", "since", "turns", "versions")

    def __init__(self, served: Callable[[], int]) -> None:
        self.phase = "waiting to start"
        self.since = time.monotonic()
        self.turns = 0
        self.versions: set[int] = set()
        self._served = served
        self._turn_version = served()

    def enter(self, phase: str) -> None:
        self.phase = phase
        self.since = time.monotonic()
        self._turn_version = self._served()

    def finish_turn(self, completion: Completion) -> None:
        self.turns += 1
        self.versions.update(completion.policy_versions)

    def live_versions(self) -> set[int]:
        """Versions of the tokens sampled so far; of a reply still being sampled, every one it may hold."""
        if self.phase != "sampling":
            return self.versions
        return self.versions.union(range(self._turn_version, self._served() + 1))

    def describe(self) -> str:
        return f"{self.phase} for {time.monotonic() - self.since:.1f} s in turn {self.turns + 1}"


def describe_stall(running: Sequence[tuple[str, EpisodeProgress]], quiet_s: float) -> str:
    """What the episodes (trajectory id, progress) that have waited longest are waiting for."""
    oldest = sorted(running, key=lambda entry: entry[1].since)[:SHOWN]
    each = "; ".join(f"{trajectory_id} {progress.describe()}" for trajectory_id, progress in oldest)
    return f"no episode has finished for {quiet_s:.0f} s; {len(running)} are running, waiting longest: {each}"


async def run_episode(
    plan: EpisodePlan,
    environments: EnvironmentPool,
    renderer: Renderer,
    policy: Policy,
    limits: EpisodeLimits,
    progress: EpisodeProgress | None = None,
) -> Trajectory:
    """Plays one episode. Never raises but for cancellation: a failure is a trajectory with status FAILED, its error
    and what was sampled so far."""
    episode = _Episode(plan, environments, renderer, policy, limits, progress or EpisodeProgress(lambda: 0))
    env: AgentEnv | None = None
    fit = False
    try:
        env = await environments.acquire()
        status, score = await episode.play(env)
        fit = True
        return episode.trajectory(status, plan.correction.score(score) if plan.correction else score, None)
    except Exception as error:  # noqa: BLE001 - the one place: a bad episode is data
        return episode.trajectory(EpisodeStatus.FAILED, None, f"{type(error).__name__}: {error}")
    finally:
        if env is not None:
            if fit:
                environments.release(env)
            else:
                await environments.discard(env)


class _Episode:
    """The state of one `run_episode`."""

    def __init__(
        self,
        plan: EpisodePlan,
        environments: EnvironmentPool,
        renderer: Renderer,
        policy: Policy,
        limits: EpisodeLimits,
        progress: EpisodeProgress,
    ) -> None:
        self.plan = plan
        self.environments = environments
        self.renderer = renderer
        self.policy = policy
        self.limits = limits
        self.progress = progress
        self.opening: tuple[Message, ...] = ()
        self.turns: list[Turn] = []
        self.open_turn: Turn | None = None  # sampled, and not yet answered by the environment
        self.started = time.monotonic()
        self.env_s = 0.0
        self.sampling_s = 0.0
        self.tool_errors = 0

    async def play(self, env: AgentEnv) -> tuple[EpisodeStatus, Score]:
        options = {"task": self.plan.task_id}
        opening, _ = await self._call("reset", env, lambda: env.reset(seed=self.plan.seed, options=options))
        self.opening = self.plan.correction.opening(opening) if self.plan.correction else tuple(opening)
        prompt_ids = self.renderer.render(self.opening, env.tools)
        while self._may_go_on(len(prompt_ids)):
            completion = await self._sample(prompt_ids)
            action = self.renderer.parse(completion.token_ids, env.tools)
            self.open_turn = Turn(tuple(prompt_ids), completion, action, (), 0.0)
            used = len(prompt_ids) + len(completion.token_ids)
            if completion.finish_reason == "length" and used >= self.limits.max_episode_tokens:
                break  # cut by the episode's limit: the environment cannot answer what was never finished
            step = await self._call("step", env, lambda action=action: env.step(action))
            observation, reward, terminated, truncated, info = step
            self.turns.append(Turn(self.open_turn.prompt_ids, completion, action, tuple(observation), float(reward)))
            self.open_turn = None
            self.tool_errors += sum(m.role == "tool" and m.content.startswith(TOOL_ERROR) for m in observation)
            if terminated or truncated:
                return (EpisodeStatus.TERMINATED if terminated else EpisodeStatus.TRUNCATED), _score(env, info)
            prompt_ids = self.renderer.bridge(prompt_ids, completion.token_ids, observation)
        return EpisodeStatus.TRUNCATED, await self._call("score_unfinished", env, env.score_unfinished)

    def trajectory(self, status: EpisodeStatus, score: Score | None, error: str | None) -> Trajectory:
        turns = self.turns if self.open_turn is None else [*self.turns, self.open_turn]
        metrics = {
            "turns": float(len(turns)),
            "seconds": time.monotonic() - self.started,
            "env_s": self.env_s,
            "sampling_s": self.sampling_s,
            "tool_errors": float(self.tool_errors),
        }
        plan = self.plan
        return Trajectory(
            plan.trajectory_id, plan.group_id, plan.env_id, plan.task_id, plan.seed, self.opening, tuple(turns),
            status, score, metrics, error,
        )  # fmt: skip

    def _may_go_on(self, prompt_length: int) -> bool:
        limits = self.limits
        return (
            len(self.turns) < limits.max_turns
            and prompt_length < limits.max_episode_tokens
            and time.monotonic() - self.started < limits.max_episode_s
        )

    async def _sample(self, prompt_ids: Sequence[int]) -> Completion:
        limits = self.limits
        params = SamplingParams(
            max_tokens=min(limits.max_tokens_per_turn, limits.max_episode_tokens - len(prompt_ids)),
            temperature=self.plan.temperature,
            stop_token_ids=self.renderer.stop_token_ids,
            seed=zlib.crc32(b"%d turn %d" % (self.plan.sampling_seed, len(self.turns))),
            session=self.plan.trajectory_id,
        )
        self.progress.enter("sampling")
        began = time.monotonic()
        deadline = asyncio.timeout(limits.max_episode_s)
        try:
            async with deadline:
                completion = await self.policy.complete(prompt_ids, params)
        except TimeoutError:
            if deadline.expired():
                raise EngineError(f"the engine gave no completion within {limits.max_episode_s:g} s") from None
            raise
        finally:
            self.sampling_s += time.monotonic() - began
        self.progress.finish_turn(completion)
        return completion

    async def _call(self, what: str, env: AgentEnv, function: Callable[[], T]) -> T:
        self.progress.enter(f"env.{what}")
        began = time.monotonic()
        try:
            return await self.environments.call(what, env, function)
        finally:
            self.env_s += time.monotonic() - began


def _score(env: AgentEnv, info: Mapping[str, Any]) -> Score:
    score = info.get("score")
    if not isinstance(score, Score):
        raise EnvError(f"{type(env).__name__}.step ended the episode without a Score in info['score'], got {score!r}")
    return score
