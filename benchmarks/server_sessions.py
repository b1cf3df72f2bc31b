"""500 sessions at once: outside agents that all ask at the same time, turn after turn, and what each waits.

A service with the torch engine in processes of their own, as in a run; the tiny maze model; the clients in this
process, over HTTP. Every session is open before the first request, asks four turns with its whole history, and is
finished; then the batch of all groups is taken, so that no token is lost unseen. `p99_ms` is that of a chat completion
as its client sees it, sampling and the wait for 499 others included; `alone_p50_ms` is one session without others.
"""

from __future__ import annotations

import asyncio
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil

from agentgym.config import parse_config
from agentgym.server.client import ServiceClient, start_service
from agentgym.server.models import resolve_model
from agentgym.server.settings import ServiceConfig

_GROUP = 10
_TURNS = 4
_MAX_TOKENS = 8
_OPENING = {"role": "user", "content": "1 up 2 right U. D. L# R."}
_ANSWER = {"role": "user", "content": "1 left"}


@dataclass
class Seen:
    """What the clients saw. Example: `Seen(waits_s=[0.12], errors=0)`."""

    waits_s: list[float] = field(default_factory=list)
    errors: int = 0


def run(quick: bool) -> dict[str, object]:
    sessions, repetitions = (20, 1) if quick else (500, 3)
    folder = resolve_model("tiny", "maze", 0, report=lambda text: print(text, file=sys.stderr))
    with tempfile.TemporaryDirectory() as scratch:
        run_dir = Path(scratch)
        with start_service(_config(sessions), folder, run_dir, run_dir / "versions") as client:
            return asyncio.run(_measure(client, sessions, repetitions))


def _config(sessions: int) -> ServiceConfig:
    rollout = {
        "source": "sessions", "group_size": _GROUP, "groups_per_step": sessions // _GROUP, "max_staleness": 1,
        "max_episode_tokens": 192,
    }  # fmt: skip
    values = {"env": {"id": "maze"}, "model": {"name": "tiny"}, "rollout": rollout, "engine": {"slots": 256}}
    return parse_config(ServiceConfig, values)


async def _measure(client: ServiceClient, sessions: int, repetitions: int) -> dict[str, object]:
    client.collect(True)
    (service,) = psutil.Process().children()
    seen, alone, seconds = Seen(), Seen(), []
    limits = httpx.Limits(max_connections=sessions, max_keepalive_connections=sessions)
    async with httpx.AsyncClient(base_url=client.url, limits=limits, timeout=300, trust_env=False) as http:
        delivered = rss_mb = 0.0
        for repetition in range(repetitions):
            opened = [await _open(http, f"task-{number // _GROUP}") for number in range(sessions)]
            await _ask(http, opened[0], alone, 1)
            began = time.perf_counter()
            await asyncio.gather(*(_ask(http, session, seen, _TURNS) for session in opened))
            seconds.append(time.perf_counter() - began)
            rss_mb = service.memory_info().rss / 2**20
            for session in opened:
                body = {"components": {"reward": 1.0}}
                (await http.post(f"/v1/sessions/{session['id']}/finish", json=body)).raise_for_status()
            batch = await asyncio.to_thread(client.take_batch, 0, 60.0, None, repetition)
            members = [member for group in batch.groups for member in group.members]
            delivered = batch.metrics["delivered_fraction"] * len(members) / sessions
            print(f"repetition {repetition + 1}: {seconds[-1]:.1f} s, {seen.errors} errors", file=sys.stderr)
    waits = sorted(seen.waits_s)
    return {
        "concurrent": sessions,
        "turns": _TURNS,
        "errors": seen.errors,
        "p50_ms": round(1000 * statistics.median(waits), 1),
        "p99_ms": round(1000 * waits[min(len(waits) - 1, int(0.99 * len(waits)))], 1),
        "alone_p50_ms": round(1000 * statistics.median(alone.waits_s), 1),
        "requests_per_s": round(sessions * _TURNS / statistics.median(seconds), 1),
        "rss_mb": round(rss_mb, 1),
        "delivered_fraction": delivered,
    }


async def _open(http: httpx.AsyncClient, task: str) -> dict[str, Any]:
    answer = await http.post("/v1/sessions", json={"task": task})
    return answer.raise_for_status().json()


async def _ask(http: httpx.AsyncClient, session: dict[str, Any], seen: Seen, turns: int) -> None:
    url = f"{session['base_url']}/chat/completions"
    headers = {"Authorization": f"Bearer {session['api_key']}"}
    messages: list[Any] = [_OPENING]
    for _ in range(turns):
        body = {"model": session["model"], "messages": messages, "max_tokens": _MAX_TOKENS}
        began = time.perf_counter()
        try:
            answer = await http.post(url, json=body, headers=headers)
        except httpx.HTTPError as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
            seen.errors += 1
            return
        if answer.status_code != 200:
            print(answer.text[:300], file=sys.stderr)
            seen.errors += 1
            return
        seen.waits_s.append(time.perf_counter() - began)
        messages += [answer.json()["choices"][0]["message"], _ANSWER]
