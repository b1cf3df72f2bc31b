"""Episodes without tokens: an agent plays an environment, message by message.

For oracles, nop, random and any OpenAI-compatible model. Law: an environment that fails makes a FAILED episode that
counts in no mean; an agent that fails (a dead endpoint) and bad input end the whole play.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np

from agentgym import registry
from agentgym.agents import Agent
from agentgym.env import AgentEnv, Split
from agentgym.errors import EnvError, InputError
from agentgym.messages import Message
from agentgym.rewards import Score
from agentgym.trajectory import EpisodeStatus

R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class PlayLimits:
    """Reaching one of these truncates the episode, which is then scored by `env.score_unfinished()`.

    `max_s` is looked at between turns. Example: `PlayLimits(max_turns=7, max_s=60.0)`.
    """

    max_turns: int
    max_s: float = 600.0

    def __post_init__(self) -> None:
        if self.max_turns < 1 or not self.max_s > 0:
            raise InputError(f"max_turns must be >= 1 and max_s > 0, got {self.max_turns} and {self.max_s}")


@dataclass(frozen=True, slots=True)
class PlayedEpisode:
    """One episode as messages. `score` is None exactly when the episode failed.

    Example: `PlayedEpisode("S...|.O.G|OO..|....", 17, (Message("user", "1 down 3 right U# D. L# R."), ...), 4,
    EpisodeStatus.TERMINATED, Score(1.0, {"reached": 1.0}, True, ""), None, 0.001)`.
    """

    task_id: str
    seed: int
    messages: tuple[Message, ...]
    turns: int
    status: EpisodeStatus
    score: Score | None
    error: str | None
    seconds: float


@dataclass(frozen=True, slots=True)
class PlaySummary:
    """What an agent reached in an environment. The means are over valid episodes, and None if there is none.

    Example: `PlaySummary("agentgym/Maze-v0", episodes, mean_reward=0.07, mean_turns=3.4, components={"reached": 0.07},
    valid=500, invalid=0, failed=0, truncated=110, seconds=0.2)`.
    """

    env_id: str
    episodes: tuple[PlayedEpisode, ...] = field(repr=False)
    mean_reward: float | None
    mean_turns: float | None
    components: Mapping[str, float]
    valid: int
    invalid: int  # ended with a score that says nothing
    failed: int
    truncated: int
    seconds: float

    @classmethod
    def of(cls, env_id: str, episodes: tuple[PlayedEpisode, ...], seconds: float) -> PlaySummary:
        scored = [(episode, episode.score) for episode in episodes if episode.score is not None]
        valid = [(episode, score) for episode, score in scored if score.valid]
        names = sorted({name for _, score in valid for name in score.components})
        return cls(
            env_id,
            episodes,
            mean_reward=_mean([score.value for _, score in valid]),
            mean_turns=_mean([float(episode.turns) for episode, _ in valid]),
            components={
                name: float(np.mean([score.components.get(name, 0.0) for _, score in valid])) for name in names
            },
            valid=len(valid),
            invalid=len(scored) - len(valid),
            failed=len(episodes) - len(scored),
            truncated=sum(episode.status is EpisodeStatus.TRUNCATED for episode in episodes),
            seconds=seconds,
        )


def play(env: AgentEnv, agent: Agent, task: str | None, seed: int, limits: PlayLimits) -> PlayedEpisode:
    """Plays one episode of `task` (None: the one that the seed chooses). What the environment throws makes a FAILED
    episode, but InputError (a component is missing, a bad task) goes up, and so does what the agent throws."""
    started = time.monotonic()
    rng = np.random.default_rng([seed, 1])
    messages: list[Message] = []
    turns = 0

    def ended(status: EpisodeStatus, score: Score | None, error: str | None = None) -> PlayedEpisode:
        task_id = task if task is not None else getattr(env, "task_id", "")
        return PlayedEpisode(
            task_id, seed, tuple(messages), turns, status, score, error, time.monotonic() - started
        )  # fmt: skip

    try:
        opening, _ = _call_env(lambda: env.reset(seed=seed, options=None if task is None else {"task": task}))
        messages += opening
        while turns < limits.max_turns and time.monotonic() - started < limits.max_s:
            action = agent(env, tuple(messages), rng)
            observation, _, terminated, truncated, info = _call_env(lambda action=action: env.step(action))
            turns += 1
            messages += (action, *observation)
            if terminated or truncated:
                status = EpisodeStatus.TERMINATED if terminated else EpisodeStatus.TRUNCATED
                return ended(status, _call_env(lambda info=info: _score(env, info)))
        return ended(EpisodeStatus.TRUNCATED, _call_env(env.score_unfinished))
    except _EnvFailedError as failure:
        return ended(EpisodeStatus.FAILED, None, str(failure))


def evaluate_agent(
    name: str,
    agent: Agent,
    episodes: int,
    *,
    split: Split = "heldout",
    seed: int = 0,
    limits: PlayLimits | None = None,
    env_kwargs: Mapping[str, Any] | None = None,
    report: Callable[[PlayedEpisode], None] | None = None,
) -> PlaySummary:
    """Plays `episodes` episodes of `name` over the tasks of a split, each task once before any comes again.

    `limits` are by default the environment's registered turns; `report` hears of each episode as it ends. Equal
    arguments give equal episodes if agent and environment are deterministic.
    """
    if episodes < 1:
        raise InputError(f"episodes must be >= 1, got {episodes}")
    record = registry.lookup(name)
    limits = limits or PlayLimits(record.max_turns)
    env: AgentEnv = registry.make(name, **(env_kwargs or {}))
    started = time.monotonic()
    played: list[PlayedEpisode] = []
    try:
        tasks = env.task_ids(split)
        if not tasks:
            raise InputError(f"{record.env_id} has no {split} tasks")
        order: list[int] = []
        for index in range(episodes):
            epoch, place = divmod(index, len(tasks))
            if place == 0:
                order = np.random.default_rng([seed, epoch]).permutation(len(tasks)).tolist()
            episode_seed = int(np.random.default_rng([seed, epoch, place, 1]).integers(2**31))
            played.append(play(env, agent, tasks[order[place]], episode_seed, limits))
            if report is not None:
                report(played[-1])
    finally:
        env.close()
    return PlaySummary.of(record.env_id, tuple(played), time.monotonic() - started)


class _EnvFailedError(Exception):
    """What an environment threw, on its way to `play`."""


def _call_env(function: Callable[[], R]) -> R:
    try:
        return function()
    except InputError:
        raise  # the person's turn: a missing component fails every episode alike
    except Exception as error:  # an episode runner: a bad episode is data
        raise _EnvFailedError(f"{type(error).__name__}: {error}") from error


def _score(env: AgentEnv, info: Mapping[str, Any]) -> Score:
    score = info.get("score")
    if not isinstance(score, Score):
        raise EnvError(f"{type(env).__name__}.step ended the episode without a Score in info['score'], got {score!r}")
    return score


def _mean(values: list[float]) -> float | None:
    return float(np.mean(values)) if values else None
