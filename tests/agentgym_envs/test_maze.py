"""The quickstart's maze: its rules, its tasks, and how hard it is."""

from __future__ import annotations

import subprocess
import sys
import time
import zlib
from collections import deque

import numpy as np
import pytest

from agentgym import agents, registry
from agentgym.errors import InputError
from agentgym.messages import Message, ToolCall, call
from agentgym.rollout.play import PlayLimits, evaluate_agent, play
from agentgym.testing.env_checks import check_environment
from agentgym_envs.maze import WORDS, Maze

#   S . . O
#   . O . G
#   O . . .
#   . . . .
TASK = "S..O|.O.G|O...|...."
RECORD = registry.lookup("maze")


def said(env: Maze, dir: str) -> str:
    return env.step(call("move", dir=dir))[0][0].content


def at_start() -> Maze:
    env = Maze()
    env.reset(seed=0, options={"task": TASK})
    return env


def test_it_passes_the_public_checks():
    check_environment("maze", episodes=30)


def test_the_sight_and_the_way_to_the_goal():
    env = Maze()
    opening, _ = env.reset(seed=0, options={"task": TASK})
    assert opening == (Message("user", "1 down 3 right U# D. L# R."),)
    assert said(env, "up") == "1 down 3 right U# D. L# R."  # a wall: nothing happens
    assert said(env, "right") == "1 down 2 right U# D# L. R."
    assert said(env, "right") == "1 down 1 right U# D. L. R#"
    assert said(env, "down") == "0 up 1 right U. D. L# R."
    observation, reward, terminated, _, info = env.step(call("move", dir="right"))
    assert observation == (Message("tool", "goal", tool_call_id="call_0"),)
    assert (reward, terminated, info["score"].components) == (1.0, True, {"reached": 1.0})


def test_a_hole_ends_it():
    env = at_start()
    said(env, "down")
    observation, reward, terminated, _, info = env.step(call("move", dir="right"))
    assert (observation[0].content, reward, terminated) == ("hole", 0.0, True)
    assert info["score"].valid


def test_one_move_a_message():
    env = at_start()
    moves = tuple(ToolCall(str(index), "move", '{"dir": "right"}') for index in range(3))
    env.step(Message("assistant", "", moves))
    assert env.position == (0, 1)


@pytest.mark.parametrize("task", ["", "train-0", "S..O|.O.G|O...", "SS.O|.O.G|O...|....", "S..X|.O.G|O...|...."])
def test_a_task_that_draws_no_maze(task: str):
    with pytest.raises(InputError, match="a maze task reads like"):
        Maze().reset(seed=0, options={"task": task})


def test_the_tasks_are_what_the_module_says():
    train, heldout = Maze.task_ids("train"), Maze.task_ids("heldout")
    assert 18_000 < len(train) < 20_000
    assert 0.2 < len(heldout) / (len(train) + len(heldout)) < 0.3
    assert all(zlib.crc32(task.encode()) % 4 == 0 for task in heldout)
    assert not any(zlib.crc32(task.encode()) % 4 == 0 for task in train)
    assert len({*train, *heldout}) == len(train) + len(heldout)
    for task in np.random.default_rng(0).choice(np.array([*train, *heldout]), 300):
        drawn = str(task).replace("|", "")
        start, goal = drawn.index("S"), drawn.index("G")
        assert drawn.count("O") == 3
        assert 3 <= abs(start // 4 - goal // 4) + abs(start % 4 - goal % 4) <= 5
        assert shortest(drawn, start, goal) <= 5


def shortest(drawn: str, start: int, goal: int) -> int:
    """Steps of a shortest way, written apart from the environment's own search."""
    seen, queue = {start: 0}, deque([start])
    while queue:
        cell = queue.popleft()
        for other in range(16):
            near = abs(cell // 4 - other // 4) + abs(cell % 4 - other % 4) == 1
            if near and drawn[other] != "O" and other not in seen:
                seen[other] = seen[cell] + 1
                queue.append(other)
    return seen[goal]


def test_the_tasks_are_the_same_in_every_process():
    program = (
        "import zlib; from agentgym_envs.maze import Maze; "
        "print([zlib.crc32('\\n'.join(Maze.task_ids(split)).encode()) for split in ('train', 'heldout')])"
    )
    printed = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, env={"PYTHONHASHSEED": "7"}
    )
    sums = [zlib.crc32("\n".join(Maze.task_ids(split)).encode()) for split in ("train", "heldout")]
    assert printed.stdout.strip() == str(sums)


def test_any_free_step_nearer_to_the_goal_is_right():
    """No dead-end pockets: what is seen from a cell is enough to play well."""

    def greedy(env, history, rng) -> Message:
        rows, down_up, columns, right_left, *marks = history[-1].content.split()
        free = {mark[0] for mark in marks if mark.endswith(".")}
        wanted = [dir for number, dir in ((rows, down_up), (columns, right_left)) if number != "0"]
        return call("move", dir=str(rng.choice([dir for dir in wanted if dir[0].upper() in free])))

    assert evaluate_agent("maze", greedy, 500).mean_reward == 1.0


@pytest.mark.parametrize(
    ("agent", "low", "high"), [("oracle", 1.0, 1.0), ("random", 0.05, 0.09), ("habit", 0.03, 0.07)]
)
def test_how_hard_it_is(agent: str, low: float, high: float):
    for split in ("train", "heldout"):
        reached = evaluate_agent("maze", agents.agent_from(agent, RECORD), 2000, split=split).mean_reward
        assert reached is not None
        assert low <= reached <= high, split


def test_a_policy_sees_only_known_words():
    env = Maze()
    seen: set[str] = set()
    for index, task in enumerate(Maze.task_ids("train")[::20]):
        episode = play(env, agents.random_agent, task, index, PlayLimits(7))
        seen.update(word for message in episode.messages for word in message.content.split())
    assert seen == set(WORDS)


def test_a_step_is_fast():
    env, action = Maze(), call("move", dir="up")
    env.reset(seed=0, options={"task": TASK})
    best = min(timed(env, action, 100) for _ in range(20))
    assert best < 100e-6


def timed(env: Maze, action: Message, steps: int) -> float:
    started = time.thread_time()  # of the processor: what others take of it is not the step's
    for _ in range(steps):
        env.step(action)
    return (time.thread_time() - started) / steps
