"""What tests of the surface share: a service that trains on sessions, agents that speak OpenAI's client, a network that
loses answers, engines that are slow or say what they are told to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from openai import OpenAI

from agentgym.config import parse_config
from agentgym.engine.protocol import Engine
from agentgym.render import load_renderer
from agentgym.rollout.store import read_trajectories, step_file
from agentgym.server.settings import ServiceConfig
from agentgym.testing.scripted_engine import ScriptedEngine, forced_logits, hashed_logits
from agentgym.trajectory import Trajectory

MOVE = {
    "type": "function",
    "function": {
        "name": "move",
        "description": "Move.",
        "parameters": {"type": "object", "properties": {"dir": {"type": "string"}}, "required": ["dir"]},
    },
}
HELLO: list[Any] = [{"role": "user", "content": "1 up 2 right"}]


@dataclass
class Service:
    """A service that trains on sessions, as whoever holds the acting key sees it."""

    server: Any
    http: httpx.Client

    def open(self, task: str = "t", expect: int = 201, **body: Any) -> Any:
        answer = self.http.post("/v1/sessions", json={"task": task, **body})
        assert answer.status_code == expect, answer.text
        return answer.json()

    def finish(self, session: Any, expect: int = 200, **body: Any) -> Any:
        answer = self.http.post(f"/v1/sessions/{session['id']}/finish", json=body or {"components": {"r": 1.0}})
        assert answer.status_code == expect, answer.text
        return answer.json()

    def show(self, session: Any) -> Any:
        return self.http.get(f"/v1/sessions/{session['id']}").raise_for_status().json()

    def trajectories(self, step: int = 1) -> list[Trajectory]:
        return list(read_trajectories(step_file(self.server.run_dir, step)))


class Losing(httpx.BaseTransport):
    """A network that loses the answers of the numbered requests after the server has given them."""

    def __init__(self, *lost: int) -> None:
        self.inner = httpx.HTTPTransport()
        self.lost = lost
        self.retries: list[str] = []

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        number = len(self.retries)
        self.retries.append(request.headers["x-stainless-retry-count"])
        response = self.inner.handle_request(request)
        if number in self.lost:
            response.read()
            response.close()
            raise httpx.ReadError("the answer was lost", request=request)
        return response


def agent(session: Any, **options: Any) -> OpenAI:
    return OpenAI(base_url=session["base_url"], api_key=session["api_key"], **options)


def say(client: OpenAI, messages: list[Any], **options: Any) -> Any:
    options = {"max_tokens": 5, "extra_body": {"return_token_ids": True}} | options
    return client.chat.completions.create(model="small", messages=messages, **options)


def sessions_config(env: str | None = "maze", sessions: dict[str, Any] | None = None, **rollout: Any) -> ServiceConfig:
    """A small run that outside agents play; `env=None`: on no environment."""
    small = {"source": "sessions", "group_size": 2, "groups_per_step": 1, "max_tokens_per_turn": 5}
    rollout = small | {"max_episode_tokens": 120} | rollout
    values: dict[str, Any] = {"model": {"name": "small"}, "rollout": rollout, "sessions": sessions or {}}
    return parse_config(ServiceConfig, values if env is None else values | {"env": {"id": env}})


@dataclass
class Pace:
    """Seconds that an engine takes for a token, until a test says otherwise: what must be under way is so, however late
    the test comes to look."""

    token_s: float

    def __call__(self) -> float:
        return self.token_s


def says(text: str, latency_s: float | Pace = 0.0) -> Callable[..., Any]:
    """An engine that answers everything with `text`, and closes its turn."""

    async def factory(config: ServiceConfig, folder: Path) -> Engine:
        renderer = load_renderer(folder)
        reply = [*renderer.encoder.scaffold(text), renderer.stop_token_ids[0]]
        begin = renderer.encoder.scaffold(" <assistant>")[-1]

        def following(prefix: Any) -> int:
            said = len(prefix) - 1 - max(i for i, token in enumerate(prefix) if token == begin)
            return reply[min(said, len(reply) - 1)]

        size = max(renderer.encoder.control_ids) + 1
        return ScriptedEngine(
            forced_logits(size, following), max_context=config.max_context, latency_s=_pace(latency_s)
        )

    return factory


def _pace(latency_s: float | Pace) -> Pace:
    return latency_s if isinstance(latency_s, Pace) else Pace(latency_s)


def slow(latency_s: float | Pace) -> Any:
    async def factory(config: ServiceConfig, folder: Path) -> Engine:
        size = max(load_renderer(folder).encoder.control_ids) + 1
        return ScriptedEngine(
            hashed_logits(size, scale=0.1), max_context=config.max_context, latency_s=_pace(latency_s)
        )  # fmt: skip

    return factory
