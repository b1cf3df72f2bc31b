"""A 4x4 maze with three holes: the smallest multi-turn tool game that a tiny model can learn, and the quickstart's.

Seven moves, reward 1 at the goal, else 0. Random play succeeds in 7 % of the mazes, the habit in 5 %, the oracle in
all. Of what a policy sees, each word is one of `WORDS`, so that a word-level vocabulary covers it.
"""

from __future__ import annotations

import itertools
import zlib
from collections import deque
from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any, ClassVar, Literal

import numpy as np

from agentgym.env import Split, ToolEnv
from agentgym.errors import InputError
from agentgym.messages import Message, call
from agentgym.tools import tool

SIDE, HOLES = 4, 3
NEAREST, FARTHEST = 3, 5  # steps between start and goal, holes not counted
Direction = Literal["up", "down", "left", "right"]
Cell = tuple[int, int]  # row, column
STEPS: dict[Direction, Cell] = {"up": (-1, 0), "down": (1, 0), "left": (0, -1), "right": (0, 1)}
LETTERS: dict[Direction, str] = {"up": "U", "down": "D", "left": "L", "right": "R"}
CELLS: tuple[Cell, ...] = tuple((row, column) for row in range(SIDE) for column in range(SIDE))
NEIGHBOURS: dict[Cell, tuple[Cell, ...]] = {
    (row, column): tuple(
        (row + down, column + right)
        for down, right in STEPS.values()
        if 0 <= row + down < SIDE and 0 <= column + right < SIDE
    )
    for row, column in CELLS
}
WORDS = (
    *(str(number) for number in range(SIDE)), *STEPS, *(letter + mark for letter in LETTERS.values() for mark in ".#"),
    "goal", "hole",
)  # fmt: skip


class Maze(ToolEnv):
    """Walk to the goal. The task id draws the maze: `S...|.O.G|OO..|....` (S start, G goal, O hole)."""

    reward_weights = {"reached": 1.0}  # noqa: RUF012
    calls_per_message: ClassVar[int | None] = 1

    position: Cell
    goal: Cell
    free: frozenset[Cell]  # where one can stand

    @classmethod
    def task_ids(cls, split: Split) -> Sequence[str]:
        return _tasks()[split]

    def reset_task(self, task: str, rng: np.random.Generator) -> str:
        self.position, self.goal, self.free = _read(task)
        return self._view()

    @tool
    def move(self, dir: Direction) -> str:
        """Move one cell towards the goal. You see the way to it and your four neighbours: U. means that the cell above
        is free, U# that there is a wall or a hole. A wall stops you, a hole ends the game.

        Args:
            dir: where to go.
        """
        cell = _beside(self.position, dir)
        if cell not in NEIGHBOURS:
            return self._view()
        if cell not in self.free:
            self.finish(reached=0.0)
            return "hole"
        self.position = cell
        if cell == self.goal:
            self.finish(reached=1.0)
            return "goal"
        return self._view()

    def _view(self) -> str:
        """The way to the goal and the four neighbours, as in `2 up 1 left U. D. L. R#`."""
        rows, columns = self.goal[0] - self.position[0], self.goal[1] - self.position[1]
        way = f"{abs(rows)} {'down' if rows > 0 else 'up'} {abs(columns)} {'right' if columns > 0 else 'left'}"
        row, column = self.position
        free = self.free
        marks = [
            letter + ("." if (row + STEPS[dir][0], column + STEPS[dir][1]) in free else "#")
            for dir, letter in LETTERS.items()
        ]
        return f"{way} {' '.join(marks)}"


def oracle(env: Any, history: Sequence[Message], rng: np.random.Generator) -> Message:
    """Takes the first step of a shortest way."""
    maze: Maze = env.unwrapped
    distance = _distances(maze.goal, maze.free)
    steps = {dir: distance[cell] for dir in STEPS if (cell := _beside(maze.position, dir)) in distance}
    return call("move", dir=min(steps, key=lambda dir: steps[dir]))


def habit(env: Any, history: Sequence[Message], rng: np.random.Generator) -> Message:
    """Goes to the first free neighbour of up, down, left, right: it mostly walks to and fro."""
    maze: Maze = env.unwrapped
    free = [dir for dir in STEPS if _beside(maze.position, dir) in maze.free]
    return call("move", dir=free[0])


def _beside(cell: Cell, dir: Direction) -> Cell:
    return cell[0] + STEPS[dir][0], cell[1] + STEPS[dir][1]


def _read(task: str) -> tuple[Cell, Cell, frozenset[Cell]]:
    """Start, goal and free cells of a drawn maze. Raises InputError if it is not one."""
    drawn = task.replace("|", "")
    if len(drawn) != SIDE * SIDE or drawn.count("S") != 1 or drawn.count("G") != 1 or set(drawn) - set("SGO."):
        raise InputError(f"a maze task reads like 'S...|.O.G|OO..|....', got {task!r}")
    start, goal = CELLS[drawn.index("S")], CELLS[drawn.index("G")]
    return start, goal, frozenset(cell for cell, mark in zip(CELLS, drawn) if mark != "O")


def _draw(start: Cell, goal: Cell, free: Iterable[Cell]) -> str:
    marks = dict.fromkeys(CELLS, "O") | dict.fromkeys(free, ".") | {start: "S", goal: "G"}
    drawn = "".join(marks.values())  # in the order of CELLS: row by row
    return "|".join(drawn[row * SIDE : (row + 1) * SIDE] for row in range(SIDE))


def _distances(goal: Cell, free: frozenset[Cell]) -> dict[Cell, int]:
    """Steps to `goal` from every free cell that can reach it."""
    distance = {goal: 0}
    queue = deque([goal])
    while queue:
        cell = queue.popleft()
        for beside in NEIGHBOURS[cell]:
            if beside in free and beside not in distance:
                distance[beside] = distance[cell] + 1
                queue.append(beside)
    return distance


@cache
def _tasks() -> dict[Split, tuple[str, ...]]:
    """Every maze, split by a hash of its drawing."""
    tasks: dict[Split, list[str]] = {"train": [], "heldout": []}
    for holes in itertools.combinations(CELLS, HOLES):
        free = frozenset(CELLS).difference(holes)
        if len(_distances(next(iter(free)), free)) < len(free):
            continue  # a part is cut off
        for goal in free:
            sound = _sound_starts(goal, free)
            for start in CELLS:
                if start in sound and NEAREST <= _steps_between(start, goal) <= FARTHEST:
                    task = _draw(start, goal, free)
                    tasks["heldout" if zlib.crc32(task.encode()) % 4 == 0 else "train"].append(task)
    return {split: tuple(sorted(ids)) for split, ids in tasks.items()}


def _sound_starts(goal: Cell, free: frozenset[Cell]) -> set[Cell]:
    """Cells without a dead-end pocket before them: whoever steps from there to any free cell nearer to the goal, and
    so on, arrives. What is seen from a cell is therefore enough to play well."""
    sound: set[Cell] = {goal}
    for cell in sorted(free, key=lambda cell: _steps_between(cell, goal)):
        steps = _steps_between(cell, goal)
        nearer = [beside for beside in NEIGHBOURS[cell] if beside in free and _steps_between(beside, goal) < steps]
        if nearer and all(beside in sound for beside in nearer):
            sound.add(cell)
    return sound


def _steps_between(cell: Cell, other: Cell) -> int:
    return abs(cell[0] - other[0]) + abs(cell[1] - other[1])
