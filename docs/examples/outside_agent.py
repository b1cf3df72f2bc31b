"""An agent that knows nothing of agentgym trains its model: it brings its own game, speaks to the policy through
OpenAI's client, and says at the end what it earned.

    agentgym train configs/quickstart.toml env.id=guess_number rollout.source=sessions server.port=8000
    python docs/examples/outside_agent.py http://127.0.0.1:8000

Every game is a session. The service keeps its exact tokens; siblings (games with one secret number) form the groups
that the trainer learns from. It plays until the service is gone.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
from openai import APIError, OpenAI

HIGHEST, GUESSES = 32, 7
GUESS = {
    "type": "function",
    "function": {
        "name": "guess",
        "description": "Guess the number.",
        "parameters": {
            "type": "object",
            "properties": {"x": {"type": "integer", "minimum": 1, "maximum": HIGHEST, "description": "your guess."}},
            "required": ["x"],
        },
    },
}


def play(agent: OpenAI, model: str, secret: int) -> float:
    """One game; what it earned."""
    messages: list = [{"role": "user", "content": f"I think of a number from 1 to {HIGHEST}."}]
    for _ in range(GUESSES):
        reply = agent.chat.completions.create(model=model, messages=messages, tools=[GUESS], max_tokens=8)  # type: ignore[call-overload]
        message = reply.choices[0].message
        if not message.tool_calls:
            return 0.0
        messages.append(message)  # as it came: the service knows it by its content
        for call in message.tool_calls:
            answer = judge(call.function.arguments, secret)
            messages.append({"role": "tool", "tool_call_id": call.id, "content": answer})
            if answer == "correct":
                return 1.0
    return 0.0


def judge(arguments: str, secret: int) -> str:
    digits = "".join(filter(str.isdigit, arguments))
    if not digits:
        return "error: guess a number"
    return "correct" if int(digits) == secret else "higher" if int(digits) < secret else "lower"


def episode(service: httpx.Client, secret: int) -> float:
    """One recorded game; what it earned."""
    while True:
        opened = service.post("/v1/sessions", json={"task": f"secret-{secret}"})
        if opened.status_code != 429:  # 429: the trainer has enough for now
            break
        time.sleep(0.1)
    session = opened.raise_for_status().json()
    url = f"/v1/sessions/{session['id']}"
    try:
        with OpenAI(base_url=session["base_url"], api_key=session["api_key"]) as agent:
            reward = play(agent, session["model"], secret)
    except APIError:
        service.delete(url)  # its place is free for another game; nothing is scored as zero
        raise
    service.post(f"{url}/finish", json={"components": {"correct": reward}}).raise_for_status()
    return reward


def lives(service: httpx.Client) -> bool:
    try:
        return service.get("/health/live").status_code == 200
    except httpx.TransportError:
        return False


def secrets(group_size: int, seed: int = 0) -> Iterator[int]:
    """Each number `group_size` times in a row, so that its games become a group."""
    rng = random.Random(seed)
    while True:
        secret = rng.randint(1, HIGHEST)
        yield from [secret] * group_size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url", help="where the service listens")
    parser.add_argument("--key", help="server.api_key_file's, if the service has one")
    parser.add_argument("--agents", type=int, default=16, help="games at once")
    parser.add_argument("--group-size", type=int, default=8, help="rollout.group_size of the run")
    options = parser.parse_args()
    headers = {"Authorization": f"Bearer {options.key}"} if options.key else {}
    games = 0
    with httpx.Client(base_url=options.url, headers=headers, timeout=60, trust_env=False) as service:
        while not lives(service):  # the run may still be starting
            time.sleep(0.2)
        with ThreadPoolExecutor(options.agents) as agents:
            numbers = secrets(options.group_size)
            running = [agents.submit(episode, service, next(numbers)) for _ in range(options.agents)]
            while True:
                try:
                    running.pop(0).result()
                    games += 1
                except (httpx.HTTPError, APIError) as error:
                    if not lives(service):
                        break
                    print(f"a game was lost: {type(error).__name__}: {error}")
                    time.sleep(0.2)
                running.append(agents.submit(episode, service, next(numbers)))
            agents.shutdown(cancel_futures=True)
    print(f"{games} games played; the service is gone")


if __name__ == "__main__":
    main()
