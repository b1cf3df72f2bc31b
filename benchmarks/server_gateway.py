"""What our server costs in front of vLLM: 48 requests at once, asked of vLLM itself and through our gateway.

One service with one stock vLLM server behind it, both in processes of their own, as `agentgym serve --engine vllm`
starts them; the clients in this process. Fresh prompts of 64 tokens each.

* `direct`: vLLM's /inference/v1/generate, the route that the gateway uses behind, with what it asks for: logprobs,
  versions, our stop tokens. Token ids in, token ids out.
* `gateway`: our /v1/completions with the same token ids.
* `direct_chat`, `gateway_chat`: /v1/chat/completions of both, the same messages.
* `direct_completions`: vLLM's plain /v1/completions, which says less: no logprobs, no versions.

Two models. SmolLM2-135M, replies of 32 tokens: `ratio` is gateway to direct. And `tiny_`: random weights in the tiny
model's shape, replies of 128, every forward as cheap as can be, so that whatever the gateway costs shows; a vocabulary
of 8,192 of which one id is a stop token lets nearly all replies come to their end.

Rates swing with the machine, so routes are paired: each repetition runs all of them, in turned order, and a ratio is
the median of the repetitions' ratios. `added_latency_p50_ms` (tiny): one request of one token alone, gateway minus
direct, in turn. Client, gateway and vLLM share the cores, so CPU microseconds a token stand beside: the gateway's
process, vLLM's, the client's.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
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
_PROMPT, _CONTEXT = 64, 256
_VOCABULARY = 8192
_PAIR = ("direct", "gateway")
_ROUTES = (*_PAIR, "direct_completions", "direct_chat", "gateway_chat")


@dataclass(frozen=True, slots=True)
class Sides:
    """Two clients and what a request needs. `folder` is vLLM's name of the model."""

    vllm: httpx.AsyncClient
    gateway: httpx.AsyncClient
    model: str
    folder: str
    stop_token_ids: tuple[int, ...]
    words: tuple[str, ...]


@dataclass(slots=True)
class Rates:
    """Tokens a second and CPU microseconds a token, by route, an entry a repetition."""

    tokens_per_s: dict[str, list[float]]
    cpu_us: dict[str, list[Mapping[str, float]]]

    def median(self, route: str) -> float:
        return round(statistics.median(self.tokens_per_s[route]), 1)

    def ratio(self, route: str, to: str) -> float:
        pairs = zip(self.tokens_per_s[route], self.tokens_per_s[to], strict=True)
        return round(statistics.median(mine / others for mine, others in pairs), 3)

    def cpu(self, route: str) -> dict[str, float]:
        rows = self.cpu_us[route]
        return _rounded({name: statistics.median(row[name] for row in rows) for name in rows[0]})


def run(quick: bool) -> dict[str, object]:
    """Starts a service with a vLLM server for each model, one after the other."""
    tiny, latency = _with_service("tiny", lambda url, folder: _measure_tiny(url, folder, quick))
    figures: dict[str, object] = {"concurrent": _CONCURRENT}
    if not quick:
        (real,) = _with_service("smollm2-135m", _measure_real)
        figures |= {f"{route}_tokens_per_s": real.median(route) for route in _PAIR}
        figures |= {"ratio": real.ratio("gateway", "direct"), "cpu_us_per_token": {r: real.cpu(r) for r in _PAIR}}
    return figures | {
        "added_latency_p50_ms": round(latency["gateway"] - latency["direct"], 2),
        "direct_latency_p50_ms": round(latency["direct"], 2),
        "gateway_latency_p50_ms": round(latency["gateway"], 2),
        **{f"tiny_{route}_tokens_per_s": tiny.median(route) for route in _ROUTES},
        "tiny_ratio": tiny.ratio("gateway", "direct"),
        "tiny_ratio_chat": tiny.ratio("gateway_chat", "direct_chat"),
        "tiny_ratio_completions": tiny.ratio("gateway", "direct_completions"),
        "tiny_cpu_us_per_token": {route: tiny.cpu(route) for route in _ROUTES},
    }


def _with_service(model: str, measure: Callable[[str, Path], Coroutine[Any, Any, Any]]) -> Any:
    with tempfile.TemporaryDirectory(prefix="agentgym-gateway-") as scratch:
        run_dir = Path(scratch)
        folder = _model(run_dir / "model") if model == "tiny" else _bundled(model)
        engine = {
            "kind": "vllm", "vllm_python": str(vllm_python()), "slots": _CONCURRENT,
            "vllm_args": ["--no-skip-tokenizer-init"],  # for vLLM's own text routes; the gateway needs none
        }  # fmt: skip
        rollout = {"max_episode_tokens": _CONTEXT}
        values = {"env": {"id": "maze"}, "model": {"name": model}, "rollout": rollout, "engine": engine}
        config = parse_config(ServiceConfig, values)
        with start_service(config, folder, run_dir, run_dir / "versions", startup_s=300) as client:
            return asyncio.run(measure(client.url, folder))


def _bundled(model: str) -> Path:
    return resolve_model(model, "maze", 0, report=lambda text: print(text, file=sys.stderr))


def _model(folder: Path) -> Path:
    """Random weights in the tiny model's shape, behind its tokenizer; most ids are no words, so that few replies end
    early."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    shutil.copytree(_bundled("tiny"), folder)
    config = AutoConfig.from_pretrained(folder)
    config.vocab_size = _VOCABULARY
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


async def _measure_tiny(url: str, folder: Path, quick: bool) -> tuple[Rates, dict[str, float]]:
    async with _sides(url, folder, "tiny") as sides:
        rng = random.Random(0)
        rates = await _rates(sides, _ROUTES, rng, 128, 1 if quick else 9)
        return rates, await _latency(sides, rng, 10 if quick else 200)


async def _measure_real(url: str, folder: Path) -> tuple[Rates]:
    async with _sides(url, folder, "smollm2-135m") as sides:
        return (await _rates(sides, _PAIR, random.Random(0), 32, 5),)


@contextlib.asynccontextmanager
async def _sides(url: str, folder: Path, model: str) -> AsyncIterator[Sides]:
    renderer = load_renderer(folder)
    words = tuple(word for word in ("up", "down", "left", "right", "goal", "hole", "0", "1", "2", "3"))
    # vLLM ends a connection that was idle for 5 s: ours are given up before
    limits = httpx.Limits(
        max_connections=_CONCURRENT, max_keepalive_connections=_CONCURRENT, keepalive_expiry=2.0
    )  # fmt: skip
    transport = httpx.AsyncHTTPTransport(uds=_processes()[2], limits=limits)
    async with (
        httpx.AsyncClient(transport=transport, base_url="http://vllm", timeout=300) as vllm,
        httpx.AsyncClient(base_url=url, limits=limits, timeout=300, trust_env=False) as gateway,
    ):
        yield Sides(vllm, gateway, model, str(folder.resolve()), tuple(renderer.stop_token_ids), words)


async def _rates(sides: Sides, routes: tuple[str, ...], rng: random.Random, reply: int, repetitions: int) -> Rates:
    service, engine, _ = _processes()
    rates = Rates({route: [] for route in routes}, {route: [] for route in routes})
    for route in routes:
        await _load(sides, route, rng, reply)  # connections, caches, lazy imports
    for repetition in range(repetitions):
        for route in routes[:: 1 if repetition % 2 else -1]:
            before = _cpu(service, engine)
            began = time.perf_counter()
            tokens = await _load(sides, route, rng, reply)
            rates.tokens_per_s[route].append(tokens / (time.perf_counter() - began))
            after = _cpu(service, engine)
            rates.cpu_us[route].append({name: 1e6 * (after[name] - before[name]) / tokens for name in after})
            print(f"{repetition} {route}: {rates.tokens_per_s[route][-1]:.0f}", file=sys.stderr)
    return rates


async def _load(sides: Sides, route: str, rng: random.Random, reply: int) -> int:
    """Tokens sampled for 48 clients that ask at once."""
    seeds = [rng.randrange(2**32) for _ in range(_CONCURRENT)]
    return sum(await asyncio.gather(*(_ask(sides, route, random.Random(seed), reply) for seed in seeds)))


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
        body = {"model": sides.folder, "ignore_eos": True, "stop_token_ids": sides.stop_token_ids} | sampling
    else:
        body = {"model": sides.model} | sampling
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
