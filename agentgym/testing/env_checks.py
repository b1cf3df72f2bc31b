"""What a test of an environment asks first, for ours and for a stranger's.

Law: each check plays the real environment; one that fails raises AssertionError naming the environment and the mend.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
from gymnasium.utils.env_checker import check_env

from agentgym import agents, registry
from agentgym.agents import Agent
from agentgym.env import AgentEnv, Split
from agentgym.messages import Message
from agentgym.rewards import Score


def check_environment(name: str, *, episodes: int = 20, seed: int = 0, **kwargs: Any) -> None:
    """Gymnasium's own check, equal starts, reproducible episodes, finite scores, and an oracle that beats nop.

    `kwargs` go to the constructor. Raises AssertionError, and InputError for a name that is not registered.
    """
    record = registry.lookup(name)
    env: AgentEnv = registry.make(name, **kwargs)
    other: AgentEnv = registry.make(name, **kwargs)
    try:
        check_gymnasium(env)
        tasks = some_tasks(env, episodes, seed)
        check_splits(env)
        check_equal_starts(env, other, tasks)
        check_reproducible(env, other, tasks[:3], record.max_turns)
        for agent in (agents.nop, agents.random_agent):
            scores(env, agent, tasks, record.max_turns)
        if record.oracle is not None:
            check_oracle_beats_nop(env, record.oracle, tasks, record.max_turns)
    finally:
        env.close()
        other.close()


def check_gymnasium(env: AgentEnv) -> None:
    """Gymnasium's `check_env`, whose warnings count as failures."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(env)


def check_splits(env: AgentEnv) -> None:
    """Training and held-out tasks exist, are told apart, and come in the same order each time."""
    name = type(env).__name__
    train, heldout = env.task_ids("train"), env.task_ids("heldout")
    assert len(train), f"{name}.task_ids('train') is empty"
    assert len(heldout), f"{name}.task_ids('heldout') is empty"
    shared = set(train) & set(heldout)
    assert not shared, f"{name}: {len(shared)} tasks are in both splits, {sorted(shared)[0]!r} for one"
    assert len(set(train)) == len(train), f"{name}.task_ids('train') names a task twice"
    assert list(train) == list(env.task_ids("train")), f"{name}.task_ids must name the same tasks in the same order"


def check_equal_starts(env: AgentEnv, other: AgentEnv, tasks: Sequence[str]) -> None:
    """Two environments that get the same task and seed, as siblings of a group do, start equal, whatever either
    played before."""
    for index, task in enumerate(tasks):
        ours, _ = env.reset(seed=index, options={"task": task})
        other.reset(seed=index + 1, options={"task": tasks[-1 - index]})
        theirs, _ = other.reset(seed=index, options={"task": task})
        assert ours == theirs, f"{type(env).__name__}: task {task!r} with seed {index} starts as {ours} and as {theirs}"


def check_reproducible(env: AgentEnv, other: AgentEnv, tasks: Sequence[str], max_turns: int) -> None:
    """The same actions get the same answers."""
    for index, task in enumerate(tasks):
        ours = _transcript(env, agents.random_agent, task, index, max_turns)
        theirs = _transcript(other, agents.random_agent, task, index, max_turns)
        assert ours == theirs, f"{type(env).__name__}: the same actions in task {task!r} gave {ours} and {theirs}"


def check_oracle_beats_nop(env: AgentEnv, oracle: Agent, tasks: Sequence[str], max_turns: int) -> None:
    """The oracle's mean score is above that of saying nothing."""
    best = np.mean([score.value for score in scores(env, oracle, tasks, max_turns) if score.valid])
    floor = np.mean([score.value for score in scores(env, agents.nop, tasks, max_turns) if score.valid])
    assert best > floor, f"{type(env).__name__}: the oracle reaches {best:.3f} and saying nothing {floor:.3f}"


def scores(env: AgentEnv, agent: Agent, tasks: Sequence[str], max_turns: int) -> list[Score]:
    """What `agent` earns in each task; an invalid score or one that is not finite is a failure."""
    earned = []
    for index, task in enumerate(tasks):
        score = _transcript(env, agent, task, index, max_turns)[1]
        assert score.valid, f"{type(env).__name__}: task {task!r} ended without a valid score: {score.why}"
        assert math.isfinite(score.value), f"{type(env).__name__}: task {task!r} scored {score.value}"
        earned.append(score)
    return earned


def some_tasks(env: AgentEnv, count: int, seed: int, split: Split = "train") -> list[str]:
    """`count` tasks of a split, drawn without repetition while there are enough."""
    tasks = env.task_ids(split)
    order = np.random.default_rng(seed).permutation(len(tasks))
    return [tasks[int(order[index % len(tasks)])] for index in range(count)]


def _transcript(env: AgentEnv, agent: Agent, task: str, seed: int, max_turns: int) -> tuple[tuple[Message, ...], Score]:
    """One episode: everything said, and the score."""
    rng = np.random.default_rng([seed, 1])
    opening, _ = env.reset(seed=seed, options={"task": task})
    messages = list(opening)
    for _ in range(max_turns):
        action = agent(env, tuple(messages), rng)
        observation, _, terminated, _, info = env.step(action)
        messages += (action, *observation)
        if terminated:
            return tuple(messages), info["score"]
    return tuple(messages), env.score_unfinished()
