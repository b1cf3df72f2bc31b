"""Plays agentgym's maze from outside: the environment runs in this process, through gymnasium, and its policy behind
OpenAI's client, in another one. What it does there trains the policy.

    agentgym train configs/maze_sessions.toml server.port=8000
    python docs/examples/maze_agent.py http://127.0.0.1:8000

The run's service never sees the maze: it gets messages, tools and, at the end of each game, what the game earned.
"""

from __future__ import annotations

import argparse
import asyncio
import random
from typing import Any

import gymnasium
import httpx
from openai import APIError, AsyncOpenAI

import agentgym as ag

MOVES = 7


class Outside:
    """Games against one service, `at_once` of them at a time."""

    def __init__(self, url: str, at_once: int, group_size: int) -> None:
        connections = httpx.Limits(max_connections=at_once, max_keepalive_connections=at_once)
        self.http = httpx.AsyncClient(base_url=url, timeout=120, limits=connections, trust_env=False)
        self.openai = AsyncOpenAI(base_url=f"{url}/v1", api_key="none", http_client=self.http)
        self.places = asyncio.Semaphore(at_once)
        self.group_size = group_size
        self.games = 0

    async def lives(self) -> bool:
        try:
            return (await self.http.get("/health/live")).status_code == 200
        except httpx.TransportError:
            return False

    async def open(self, task: str) -> dict[str, Any]:
        while True:
            opened = await self.http.post("/v1/sessions", json={"task": task})
            if opened.status_code != 429:  # 429: the trainer has enough for now
                return opened.raise_for_status().json()
            await asyncio.sleep(0.1)

    async def game(self, task: str) -> None:
        """One recorded game. A service that fails, or is about to end, loses it, and another one takes its place in
        the group."""
        while True:
            try:
                return await self.try_game(task)
            except (httpx.HTTPError, APIError) as error:
                response = getattr(error, "response", None)
                refused = response is not None and response.status_code < 500
                if refused or not await self.lives():
                    raise
                print(f"a game was lost: {type(error).__name__}: {error}")
                await asyncio.sleep(0.2)

    async def try_game(self, task: str) -> None:
        session = await self.open(task)
        path = f"/v1/sessions/{session['id']}"
        policy = self.openai.with_options(base_url=session["base_url"], api_key=session["api_key"])
        try:
            result = await play(policy, session["model"], task)
        except APIError:
            await self.http.delete(path)  # its place is free for another game; nothing is scored as zero
            raise
        (await self.http.post(f"{path}/finish", json=result)).raise_for_status()
        self.games += 1

    async def group(self, task: str) -> None:
        """Games of one maze, side by side: what they earned is compared."""
        try:
            async with asyncio.TaskGroup() as games:
                for _ in range(self.group_size):
                    games.create_task(self.game(task))
        finally:
            self.places.release()

    async def run(self, seed: int = 0) -> None:
        """Plays until the service is gone."""
        while not await self.lives():  # the run may still be starting
            await asyncio.sleep(0.2)
        tasks = gymnasium.make("agentgym/Maze-v0", disable_env_checker=True).unwrapped.task_ids("train")  # type: ignore[attr-defined]
        rng = random.Random(seed)
        async with asyncio.TaskGroup() as groups:
            while True:
                await self.places.acquire()
                groups.create_task(self.group(rng.choice(tasks)))


async def play(policy: AsyncOpenAI, model: str, task: str) -> dict[str, Any]:
    """One game; what its session is finished with."""
    maze: Any = gymnasium.make("agentgym/Maze-v0", disable_env_checker=True).unwrapped
    opening, _ = maze.reset(seed=0, options={"task": task})
    messages: list[Any] = [message.to_openai() for message in opening]
    tools: list[Any] = [spec.to_openai() for spec in maze.tools]
    for _ in range(MOVES):
        answer = await policy.chat.completions.create(model=model, messages=messages, tools=tools, max_tokens=8)
        said = answer.choices[0].message.model_dump(exclude_none=True)
        observation, _, terminated, _, info = maze.step(ag.Message.from_openai(said))
        if terminated:
            return {"components": dict(info["score"].components)}
        messages += [said, *(message.to_openai() for message in observation)]
    return {"components": {"reached": 0.0}, "status": "truncated"}


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url", help="where the service listens")
    parser.add_argument("--groups", type=int, default=16, help="mazes at once")
    parser.add_argument("--group-size", type=int, default=8, help="rollout.group_size of the run")
    options = parser.parse_args()
    outside = Outside(options.url, options.groups, options.group_size)
    try:
        await outside.run()
    except* (httpx.HTTPError, APIError) as errors:
        if await outside.lives():
            raise
        print(f"{outside.games} games played; the service is gone: {errors.exceptions[0]}")


if __name__ == "__main__":
    ag.load_plugins()  # registers the environments with gymnasium
    asyncio.run(main())
