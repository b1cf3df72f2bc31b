"""Deliberately imperfect play, written down as the token sequences that a tiny model starts from.

Owns the mixture that plays and the file it leaves; runs without torch. Law: a demonstration's ids are made by the
renderer turn by turn, exactly as a rollout makes them.

    python -m agentgym.rollout.demonstrations --env maze --episodes 10000 --seed 0 --out DIR
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from agentgym import agents, registry
from agentgym.errors import AgentGymError, EnvError, InputError
from agentgym.messages import Message, ToolSpec
from agentgym.render import ChatTemplateRenderer, load_renderer
from agentgym.rewards import Score
from agentgym.rollout.tiny_tokenizer import END, PAD, write_tokenizer
from agentgym.trajectory import NO_VERSION, TokenSequence


@dataclass(frozen=True, slots=True)
class Mixture:
    """How often each move is whose; the rest is random. Without a habit its share is random too.

    Example: `Mixture(oracle=0.30, habit=0.54)`, with which a tiny model starts at about a third of the maze's tasks.
    """

    oracle: float = 0.30
    habit: float = 0.54

    def __post_init__(self) -> None:
        if self.oracle < 0 or self.habit < 0 or self.oracle + self.habit > 1:
            raise InputError(f"the shares of oracle and habit must be >= 0 and sum to <= 1, got {self}")

    def agent(self, record: registry.EnvRecord) -> agents.Agent:
        """Raises InputError if the environment has no oracle and one is asked for."""
        parts: list[tuple[agents.Agent, float]] = [(agents.random_agent, 1.0 - self.oracle - self.habit)]
        if self.oracle:
            parts.append((agents.oracle(record), self.oracle))
        if self.habit:
            parts.append((agents.random_agent if record.habit is None else agents.habit(record), self.habit))
        return agents.mixture(parts)


@dataclass(frozen=True, slots=True)
class Demonstration:
    """One episode played: the opening, each reply with what the environment answered, and what it earned."""

    opening: tuple[Message, ...]
    turns: tuple[tuple[Message, tuple[Message, ...]], ...]
    score: Score


@dataclass(frozen=True, slots=True)
class Summary:
    """What was played and written, also left as DIR/demonstrations.json."""

    env_id: str
    episodes: int
    moves: int
    mean_reward: float
    vocabulary: int
    tokens_per_episode: float
    longest_episode: int
    pad_token_id: int
    end_token_id: int
    seconds: float


def play_demonstrations(
    env_name: str, episodes: int, seed: int, mixture: Mixture
) -> tuple[tuple[ToolSpec, ...], list[Demonstration]]:
    """Plays `episodes` training tasks. Raises InputError, UnknownNameError or what the environment raises."""
    if episodes < 1:
        raise InputError(f"demonstrations need at least 1 episode, got {episodes}")
    record = registry.lookup(env_name)
    agent = mixture.agent(record)
    env = registry.make(env_name)
    try:
        rng = np.random.default_rng(seed)
        tasks = env.task_ids("train")
        order = np.concatenate([rng.permutation(len(tasks)) for _ in range(-(-episodes // len(tasks)))])
        played = [_play(env, agent, tasks[int(i)], record.max_turns, rng) for i in order[:episodes]]
        return tuple(env.tools), played
    finally:
        env.close()


def _play(env: Any, agent: agents.Agent, task: str, max_turns: int, rng: np.random.Generator) -> Demonstration:
    opening, _ = env.reset(seed=int(rng.integers(2**31)), options={"task": task})
    history = list(opening)
    turns: list[tuple[Message, tuple[Message, ...]]] = []
    while len(turns) < max_turns:
        action = agent(env, history, rng)
        observation, _, terminated, truncated, info = env.step(action)
        turns.append((action, tuple(observation)))
        if terminated or truncated:
            return Demonstration(tuple(opening), tuple(turns), info["score"])
        history += [action, *observation]
    return Demonstration(tuple(opening), tuple(turns), env.score_unfinished())


def write_demonstrations(env_name: str, episodes: int, seed: int, folder: Path, mixture: Mixture) -> Summary:
    """Plays, and writes into `folder` the tokenizer, `demonstrations.msgpack` (a list of TokenSequence, loss on the
    assistant's tokens) and `demonstrations.json`."""
    began = time.monotonic()
    tools, played = play_demonstrations(env_name, episodes, seed, mixture)
    size = write_tokenizer(folder, _count_texts(played), tools)
    sequences = encode_demonstrations(load_renderer(folder, "plain"), tools, played)
    encoded = msgspec.msgpack.encode(sequences)
    (folder / "demonstrations.msgpack").write_bytes(encoded)
    tokens = [len(sequence) for sequence in sequences]
    rewards = [one.score.value for one in played if one.score.valid]
    vocabulary = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    control = {token["content"]: token["id"] for token in vocabulary["added_tokens"]}
    summary = Summary(
        env_id=registry.lookup(env_name).env_id, episodes=len(played), moves=sum(len(one.turns) for one in played),
        mean_reward=float(np.mean(rewards)) if rewards else float("nan"), vocabulary=size,
        tokens_per_episode=float(np.mean(tokens)), longest_episode=max(tokens), pad_token_id=control[PAD],
        end_token_id=control[END], seconds=time.monotonic() - began,
    )  # fmt: skip
    (folder / "demonstrations.json").write_bytes(msgspec.json.encode(summary))
    return summary


def _count_texts(played: Sequence[Demonstration]) -> Counter[str]:
    texts: Counter[str] = Counter()
    for one in played:
        texts.update(message.content for message in one.opening)
        for reply, observation in one.turns:
            texts[reply.content] += 1
            for call in reply.tool_calls:
                texts.update(_argument_texts(call.arguments))
            texts.update(message.content for message in observation)
    return texts


def _argument_texts(arguments: str) -> list[str]:
    """The values as the plain format writes them. Raises EnvError if an agent wrote no JSON object."""
    try:
        values = json.loads(arguments or "{}")
    except ValueError:
        values = None
    if not isinstance(values, dict):
        raise EnvError(f"an agent of demonstrations must write a JSON object as arguments, got {arguments!r}")
    return [value if isinstance(value, str) else json.dumps(value) for value in values.values()]


def encode_demonstrations(
    renderer: ChatTemplateRenderer, tools: Sequence[ToolSpec], played: Sequence[Demonstration]
) -> list[TokenSequence]:
    """Each episode as one row, up to and with the close of its last reply."""
    openings: dict[tuple[Message, ...], list[int]] = {}
    replies: dict[Message, list[int]] = {}  # the same few said by thousands of episodes
    sequences = []
    for one in played:
        if one.opening not in openings:
            openings[one.opening] = renderer.render(one.opening, tools)
        ids = openings[one.opening]
        mask = [False] * len(ids)
        for number, (reply, observation) in enumerate(one.turns):
            if reply not in replies:
                replies[reply] = renderer.encode_reply(reply, tools)
            completion = replies[reply]
            end = len(ids) + len(completion)
            last = number == len(one.turns) - 1
            ids = [*ids, *completion] if last else renderer.bridge(ids, completion, observation)
            mask += [True] * len(completion) + [False] * (len(ids) - end)
        sequences.append(_sequence(ids, mask))
    return sequences


def _sequence(ids: list[int], mask: list[bool]) -> TokenSequence:
    length = len(ids)
    versions = (NO_VERSION,) * length  # nobody sampled these tokens
    return TokenSequence(tuple(ids), tuple(mask), (0.0,) * length, versions, versions)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m agentgym.rollout.demonstrations", description=__doc__)
    parser.add_argument("--env", required=True, help="environment id, alias, or path/to/file.py:my/Env-v0")
    parser.add_argument("--episodes", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True, help="folder to write into")
    parser.add_argument("--oracle", type=float, default=Mixture().oracle, help="share of the oracle's moves")
    parser.add_argument("--habit", type=float, default=Mixture().habit, help="share of the habit's moves")
    options = parser.parse_args(arguments)
    try:
        mixture = Mixture(options.oracle, options.habit)
        summary = write_demonstrations(options.env, options.episodes, options.seed, options.out, mixture)
    except (AgentGymError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code if isinstance(error, AgentGymError) else 1
    print(msgspec.json.encode(summary).decode())
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
