"""Players without weights of ours: oracle, nop, random, mixtures, and any OpenAI-compatible model.

Law: an agent is a plain function `(env, history, rng) -> Message`, and `rng` is its only randomness. It may look into
the environment only if it is that environment's own oracle or habit.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from agentgym.errors import InputError, ServiceError, UnknownNameError
from agentgym.messages import Message, ToolCall
from agentgym.registry import EnvRecord
from agentgym.tools import sample_arguments, sample_text

# the first argument is the AgentEnv being played; Any, because an oracle is written for its own subclass
Agent = Callable[[Any, Sequence[Message], np.random.Generator], Message]


def oracle(record: EnvRecord) -> Agent:
    """The oracle that `record` was registered with. Raises InputError if there is none."""
    if record.oracle is None:
        raise InputError(f"{record.env_id} has no oracle; register it with oracle=...")
    return record.oracle


def habit(record: EnvRecord) -> Agent:
    """The habit that `record` was registered with. Raises InputError if there is none."""
    if record.habit is None:
        raise InputError(f"{record.env_id} has no habit; register it with habit=...")
    return record.habit


def nop(env: Any, history: Sequence[Message], rng: np.random.Generator) -> Message:
    """Says nothing."""
    return Message("assistant", "")


def random_agent(env: Any, history: Sequence[Message], rng: np.random.Generator) -> Message:
    """Calls a tool chosen uniformly, with arguments drawn from its schema; without tools it says a short text."""
    if not env.tools:
        return Message("assistant", sample_text(rng))
    spec = env.tools[int(rng.integers(len(env.tools)))]
    return Message(
        "assistant", "", (ToolCall("call_0", spec.name, json.dumps(sample_arguments(spec.parameters, rng))),)
    )


def mixture(parts: Sequence[tuple[Agent, float]]) -> Agent:
    """An agent that for each move becomes one of `parts`, with a probability in proportion to its weight."""
    weights = np.array([weight for _, weight in parts], dtype=float)
    if not len(parts) or not np.all(np.isfinite(weights)) or np.any(weights < 0) or weights.sum() <= 0:
        raise InputError(f"a mixture needs weights >= 0, one of them > 0, got {weights.tolist()}")
    bounds = np.cumsum(weights / weights.sum())
    agents = [agent for agent, _ in parts]

    def mixed(env: Any, history: Sequence[Message], rng: np.random.Generator) -> Message:
        index = int(np.searchsorted(bounds, rng.random(), side="right"))
        return agents[min(index, len(agents) - 1)](env, history, rng)

    return mixed


def agent_from(text: str, record: EnvRecord, key: str | None = None, **request: Any) -> Agent:
    """The agent that a command line names: oracle, habit, nop, random, or openai:URL#MODEL (with the API key `key`
    and `request` in every chat request)."""
    if text.startswith("openai:"):
        url, hash_sign, model = text.removeprefix("openai:").partition("#")
        if not url or not hash_sign or not model:
            raise InputError(f"an OpenAI endpoint reads openai:URL#MODEL, got {text!r}")
        return OpenAIAgent(url, model, key, **request)
    if text == "oracle":
        return oracle(record)
    if text == "habit":
        return habit(record)
    plain: dict[str, Agent] = {"nop": nop, "random": random_agent}
    if text not in plain:
        raise UnknownNameError.of("agent", text, ["oracle", "habit", *plain, "openai:URL#MODEL"])
    return plain[text]


class OpenAIAgent:
    """A model behind an OpenAI-compatible URL, through the official client."""

    def __init__(
        self, url: str, model: str, key: str | None = None, *, timeout_s: float = 120.0, **request: Any
    ) -> None:
        """`request` goes into every chat request (temperature, max_tokens, ...). Without `key` no secret is sent:
        the client's own environment variable is not read."""
        import openai  # here, because it takes longer to import than everything else of the core

        if not url.startswith(("http://", "https://")):
            raise InputError(f"an OpenAI endpoint needs a URL that begins with http:// or https://, got {url!r}")
        self.url, self.model, self.request = url, model, request
        self._error = openai.OpenAIError
        self._client = openai.OpenAI(base_url=url, api_key=key or "none", timeout=timeout_s, max_retries=2)

    def __call__(self, env: Any, history: Sequence[Message], rng: np.random.Generator) -> Message:
        """Asks for the next message. Raises ServiceError naming the URL."""
        request: dict[str, Any] = {"model": self.model, "messages": [message.to_openai() for message in history]}
        if env.tools:
            request["tools"] = [spec.to_openai() for spec in env.tools]
        try:
            answer = self._client.chat.completions.create(**request, **self.request)
        except self._error as error:
            raise ServiceError(f"{self.url} failed to answer for model {self.model!r}: {error}") from error
        if not answer.choices:
            raise ServiceError(f"{self.url} answered without a choice for model {self.model!r}")
        return Message.from_openai(answer.choices[0].message.model_dump(exclude_none=True))

    def close(self) -> None:
        self._client.close()
