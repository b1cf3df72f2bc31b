"""What our server costs in front of vLLM: 48 requests at once, asked of vLLM itself and through our gateway.

One service with one stock vLLM server behind it, both in processes of their own, as `agentgym serve --engine vllm`
starts them; the clients in this process. Random weights in the tiny model's shape (every forward is as cheap as can
be, so that whatever the gateway costs shows), a vocabulary of 512, fresh prompts of 64 tokens, replies of 128 at most.

* `direct`: vLLM's /inference/v1/generate, the route that the gateway uses behind, with what it asks for: logprobs,
  versions, our stop tokens. Token ids in, token ids out.
* `gateway`: our /v1/completions with the same token ids; `ratio` is gateway to direct.
* `direct_chat`, `gateway_chat`: /v1/chat/completions of both, the same messages.
* `direct_completions`: vLLM's plain /v1/completions, which says less: no logprobs, no versions.

Routes in turn, medians. `added_latency_p50_ms`: one request of one token alone, gateway minus direct, in turn. Client,
gateway and vLLM share the cores, so CPU microseconds a token stand beside: the gateway's process, vLLM's, the client's.
"""

from __future__ import annotations

import asyncio
import random
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil

from agentgym.config import parse_config
from agentgym.render import load_renderer
from agentgym.server.client import start_service
from agentgym.server.models import resolve_model
from agentgym.server.settings import ServiceConfig
from benchmarks.publish import vllm_python

_CONCURRENT = 48
_PROMPT, _REPLY, _CONTEXT = 64, 128, 256
_VOCABULARY = 8192
_ROUTES = ("direct", "gateway", "direct_completions", "direct_chat", "gateway_chat")


@dataclass(frozen=True, slots=True)
class Sides:
    """Two clients and what a request needs. `model` is vLLM's name of it, its folder."""

    vllm: httpx.AsyncClient
    gateway: httpx.AsyncClient
    model: str
    stop_token_ids: tuple[int, ...]
    words: tuple[str, ...]


def run(quick: bool) -> dict[str, object]:
    """Starts one service with one vLLM server."""
    with tempfile.TemporaryDirectory(prefix="agentgym-gateway-") as scratch:
        run_dir = Path(scratch)
        folder = _model(run_dir / "model")
        engine = {
            "kind": "vllm", "vllm_python": str(vllm_python()), "slots": _CONCURRENT,
            "vllm_args": ["--no-skip-tokenizer-init"],  # for vLLM's own text routes; the gateway needs none
        }  # fmt: skip
        rollout = {"max_episode_tokens": _CONTEXT}
        values = {"env": {"id": "maze"}, "model": {"name": "tiny"}, "rollout": rollout, "engine": engine}
        config = parse_config(ServiceConfig, values)
        with start_service(config, folder, run_dir, run_dir / "versions", startup_s=300) as client:
            return asyncio.run(_measure(client.url, folder, quick))


def _model(folder: Path) -> Path:
    """Random weights in the tiny model's shape, behind its tokenizer; most ids are no words, so that few replies end
    early."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    shutil.copytree(resolve_model("tiny", "maze", 0, report=lambda text: print(text, file=sys.stderr)), folder)
    config = AutoConfig.from_pretrained(folder)
    config.vocab_size = _VOCABULARY
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


async def _measure(url: str, folder: Path, quick: bool) -> dict[str, object]:
    service, engine, socket = _processes()
    renderer = load_renderer(folder)
    words = tuple(word for word in ("up", "down", "left", "right", "goal", "hole", "0", "1", "2", "3"))
    # vLLM ends a connection that was idle for 5 s: ours are given up before
    limits = httpx.Limits(
        max_connections=_CONCURRENT, max_keepalive_connections=_CONCURRENT, keepalive_expiry=2.0
    )  # fmt: skip
    transport = httpx.AsyncHTTPTransport(uds=socket, limits=limits)
    async with (
        httpx.AsyncClient(transport=transport, base_url="http://vllm", timeout=300) as vllm,
        httpx.AsyncClient(base_url=url, limits=limits, timeout=300, trust_env=False) as gateway,
    ):
        sides = Sides(vllm, gateway, str(folder.resolve()), tuple(renderer.stop_token_ids), words)
        rng = random.Random(0)
        requests = 1 if quick else 3
        for route in _ROUTES:
            await _load(sides, route, rng, 1)  # connections, caches, lazy imports
        rates: dict[str, list[float]] = {route: [] for route in _ROUTES}
        cpu: dict[str, list[Mapping[str, float]]] = {route: [] for route in _ROUTES}
        for repetition in range(1 if quick else 3):
            for route in _ROUTES:
                before = _cpu(service, engine)
                began = time.perf_counter()
                tokens = await _load(sides, route, rng, requests)
                rates[route].append(tokens / (time.perf_counter() - began))
                after = _cpu(service, engine)
                cpu[route].append({name: 1e6 * (after[name] - before[name]) / tokens for name in after})
                print(f"{repetition} {route}: {rates[route][-1]:.0f}", _rounded(cpu[route][-1]), file=sys.stderr)
        latency = await _latency(sides, rng, 10 if quick else 100)
    rate = {route: statistics.median(rates[route]) for route in _ROUTES}
    return {
        "concurrent": _CONCURRENT,
        **{f"{route}_tokens_per_s": round(rate[route], 1) for route in _ROUTES},
        "ratio": round(rate["gateway"] / rate["direct"], 3),
        "ratio_chat": round(rate["gateway_chat"] / rate["direct_chat"], 3),
        "ratio_completions": round(rate["gateway"] / rate["direct_completions"], 3),
        "direct_latency_p50_ms": round(latency["direct"], 2),
        "gateway_latency_p50_ms": round(latency["gateway"], 2),
        "added_latency_p50_ms": round(latency["gateway"] - latency["direct"], 2),
        "cpu_us_per_token": {
            route: _rounded({name: statistics.median(one[name] for one in cpu[route]) for name in cpu[route][0]})
            for route in _ROUTES
        },
    }


async def _load(sides: Sides, route: str, rng: random.Random, requests: int) -> int:
    """Tokens sampled for 48 clients that ask `requests` times each, one request behind the other."""

    async def client(seeds: list[int]) -> int:
        return sum([await _ask(sides, route, random.Random(seed), _REPLY) for seed in seeds])

    seeds = [[rng.randrange(2**32) for _ in range(requests)] for _ in range(_CONCURRENT)]
    return sum(await asyncio.gather(*map(client, seeds)))


async def _ask(sides: Sides, route: str, rng: random.Random, max_tokens: int) -> int:
    """One request; how many tokens it sampled."""
    prompt = [rng.randrange(32, _VOCABULARY) for _ in range(_PROMPT)]
    text = " ".join(rng.choice(sides.words) for _ in range(_PROMPT - 4))
    sampling: dict[str, Any] = {"max_tokens": max_tokens, "temperature": 1.0}
    if route == "direct":
        more = {"logprobs": 0, "ignore_eos": True, "stop_token_ids": sides.stop_token_ids, "detokenize": False}
        body: dict[str, Any] = {"token_ids": prompt, "sampling_params": sampling | more}
        answer = await _post(sides.vllm, "/inference/v1/generate", body)
        return len(answer["choices"][0]["token_ids"])
    if route.startswith("direct"):
        body = {"model": sides.model, "ignore_eos": True, "stop_token_ids": sides.stop_token_ids} | sampling
    else:
        body = {"model": "tiny"} | sampling
    chats = route.endswith("chat")
    body |= {"messages": [{"role": "user", "content": text}]} if chats else {"prompt": prompt}
    body["return_token_ids"] = True
    path = "/v1/chat/completions" if chats else "/v1/completions"
    answer = await _post(sides.vllm if route.startswith("direct") else sides.gateway, path, body)
    return answer["usage"]["completion_tokens"]


async def _post(client: httpx.AsyncClient, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
    answer = await client.post(path, json=body)
    if answer.status_code != 200:
        raise RuntimeError(f"{path} failed with status {answer.status_code}: {answer.text[:500]}")
    return answer.json()


async def _latency(sides: Sides, rng: random.Random, repetitions: int) -> dict[str, float]:
    """Median milliseconds of one request of one token, without others."""
    seconds: dict[str, list[float]] = {"direct": [], "gateway": []}
    for _ in range(repetitions):
        for route, measured in seconds.items():
            seeded = random.Random(rng.randrange(2**32))
            began = time.perf_counter()
            await _ask(sides, route, seeded, 1)
            measured.append(time.perf_counter() - began)
    return {route: 1e3 * statistics.median(measured) for route, measured in seconds.items()}


def _processes() -> tuple[psutil.Process, list[psutil.Process], str]:
    """The service, vLLM's processes, and the socket that vLLM's server listens on."""
    (service,) = [child for child in psutil.Process().children() if "agentgym.server" in child.cmdline()]
    below = service.children(recursive=True)
    lines = [process.cmdline() for process in below]
    sockets = {line[line.index("--uds") + 1] for line in lines if "--uds" in line}
    return service, below, sockets.pop()


def _cpu(service: psutil.Process, engine: list[psutil.Process]) -> dict[str, float]:
    """CPU seconds so far."""
    used: Callable[[psutil.Process], float] = lambda process: sum(process.cpu_times()[:2])  # noqa: E731
    return {"gateway": used(service), "vllm": sum(map(used, engine)), "client": used(psutil.Process())}


def _rounded(values: Mapping[str, float]) -> dict[str, float]:
    return {name: round(value, 1) for name, value in values.items()}
