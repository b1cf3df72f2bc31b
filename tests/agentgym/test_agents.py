"""Players: scripted ones, and one behind a real HTTP server that speaks OpenAI's dialect."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import pytest

from agentgym import agents, registry
from agentgym.agents import OpenAIAgent
from agentgym.errors import InputError, ServiceError, UnknownNameError
from agentgym.messages import Message, call


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def test_random_draws_every_action_about_equally(rng: np.random.Generator):
    env = registry.make("maze")
    drawn = [agents.random_agent(env, (), rng) for _ in range(4000)]
    counts = dict.fromkeys(("up", "down", "left", "right"), 0)
    for message in drawn:
        counts[json.loads(message.tool_calls[0].arguments)["dir"]] += 1
    assert all(900 < count < 1100 for count in counts.values()), counts


def test_random_without_tools_says_something(rng: np.random.Generator):
    texts = {agents.random_agent(registry.make("reverse_text"), (), rng).content for _ in range(20)}
    assert len(texts) > 15
    assert all(texts)


def test_a_mixture_chooses_by_weight_per_move(rng: np.random.Generator):
    def a(env: Any, history: Any, rng: Any) -> Message:
        return Message("assistant", "a")

    def b(env: Any, history: Any, rng: Any) -> Message:
        return Message("assistant", "b")

    mixed = agents.mixture([(a, 3.0), (agents.nop, 0.0), (b, 1.0)])
    said = "".join(mixed(None, (), rng).content for _ in range(4000))
    assert len(said) == 4000  # never nop
    assert 2880 < said.count("a") < 3120


@pytest.mark.parametrize("parts", [[], [(agents.nop, 0.0)], [(agents.nop, -1.0)], [(agents.nop, float("nan"))]])
def test_a_mixture_needs_weights(parts: list[Any]):
    with pytest.raises(InputError, match="weights"):
        agents.mixture(parts)


def test_agents_by_name():
    maze, reverse = registry.lookup("maze"), registry.lookup("reverse_text")
    assert agents.agent_from("oracle", maze) is maze.oracle
    assert agents.agent_from("habit", maze) is maze.habit
    assert agents.agent_from("nop", maze) is agents.nop
    assert agents.agent_from("random", maze) is agents.random_agent
    assert isinstance(agents.agent_from("openai:http://127.0.0.1:1/v1#m", maze), OpenAIAgent)
    with pytest.raises(InputError, match="has no habit"):
        agents.agent_from("habit", reverse)
    with pytest.raises(UnknownNameError, match="did you mean 'oracle'"):
        agents.agent_from("orakel", maze)
    for wrong in ("openai:http://127.0.0.1:1/v1", "openai:#m", "openai:"):
        with pytest.raises(InputError, match="openai:URL#MODEL"):
            agents.agent_from(wrong, maze)
    with pytest.raises(InputError, match="http://"):
        agents.agent_from("openai:localhost#m", maze)


# ------------------------------------------------------------------------------------------------------------ OpenAI


class Endpoint:
    """A chat server on loopback: keeps what it was asked, answers what it was told to."""

    def __init__(self) -> None:
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.status = 200
        self.message: dict[str, Any] = {"role": "assistant", "content": "hello"}
        endpoint = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                endpoint.requests.append(json.loads(body))
                endpoint.headers.append({key.lower(): value for key, value in self.headers.items()})
                choices = [{"index": 0, "finish_reason": "stop", "message": endpoint.message}]
                answer = {"id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": choices}
                data = json.dumps(answer if endpoint.status == 200 else {"error": {"message": "no"}}).encode()
                self.send_response(endpoint.status)
                self.send_header("content-type", "application/json")
                self.send_header("content-length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, format: str, *args: Any) -> None: ...

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        self.thread = threading.Thread(target=self.server.serve_forever)
        self.thread.start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    endpoint = Endpoint()
    yield endpoint
    endpoint.close()


def test_a_model_gets_history_and_tools_and_its_call_comes_back(
    endpoint: Endpoint, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("OPENAI_API_KEY", "a-real-secret")
    move = {"id": "c7", "type": "function", "function": {"name": "move", "arguments": '{"dir": "up"}'}}
    endpoint.message = {"role": "assistant", "content": None, "tool_calls": [move]}
    env = registry.make("maze")
    opening, _ = env.reset(seed=0)
    history = (*opening, call("move", dir="down"), Message("tool", "1 up", tool_call_id="call_0"))
    agent = OpenAIAgent(endpoint.url, "m", temperature=0.5)
    reply = agent(env, history, rng)
    agent.close()
    assert reply.tool_calls[0].call_id == "c7"
    assert reply.tool_calls[0].arguments == '{"dir": "up"}'
    (request,) = endpoint.requests
    assert request["messages"] == [message.to_openai() for message in history]
    assert request["tools"] == [spec.to_openai() for spec in env.tools]
    assert (request["model"], request["temperature"]) == ("m", 0.5)
    assert "a-real-secret" not in endpoint.headers[0]["authorization"]


def test_without_tools_none_are_sent(endpoint: Endpoint, rng: np.random.Generator):
    agent = agents.agent_from(f"openai:{endpoint.url}#m", registry.lookup("reverse_text"), "k", temperature=0.0)
    assert isinstance(agent, OpenAIAgent)
    reply = agent(registry.make("reverse_text"), (Message("user", "go"),), rng)
    agent.close()
    assert reply == Message("assistant", "hello")
    assert "tools" not in endpoint.requests[0]
    assert endpoint.requests[0]["temperature"] == 0.0
    assert endpoint.headers[0]["authorization"] == "Bearer k"


def test_failures_name_the_url(endpoint: Endpoint, rng: np.random.Generator):
    endpoint.status = 404
    agent = OpenAIAgent(endpoint.url, "m")
    with pytest.raises(ServiceError, match=endpoint.url):
        agent(registry.make("reverse_text"), (Message("user", "go"),), rng)
    agent.close()
    dead = OpenAIAgent("http://127.0.0.1:9/v1", "m", timeout_s=2.0)
    with pytest.raises(ServiceError, match=r"127\.0\.0\.1:9"):
        dead(registry.make("reverse_text"), (Message("user", "go"),), rng)
    dead.close()
