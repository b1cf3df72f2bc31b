"""A server that speaks vLLM's routes and has no model: what an engine does with servers can be asked without one."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from agentgym.engine.vllm.engine import VllmEngine
from agentgym.engine.vllm.replica import _ROUTES
from agentgym.engine.vllm.server import BACKEND

TOKEN = 7
HANGS_UP = 0
FACTS: dict[str, Any] = {
    "model_config": {
        "model": "m", "dtype": "torch.float32", "max_model_len": 128, "logprobs_mode": "processed_logprobs",
    },
    "scheduler_config": {"async_scheduling": False, "enable_chunked_prefill": False},
    "cache_config": {"cache_dtype": "auto"},
    "device_config": {"device": "cpu"},
    "lora_config": None,
    "weight_transfer_config": {"backend": BACKEND},
}  # fmt: skip


class Pretender:
    """Answers like a vLLM server (0.32) that samples token 7 for ever; one that is paused lets requests wait. `failing`
    says by route what it fails with: a status and a message. With `max_lora_rank` it takes adapters."""

    def __init__(self, max_lora_rank: int | None = None) -> None:
        self.max_lora_rank = max_lora_rank
        self.failing: dict[str, tuple[int, str]] = {}
        self.asked: Counter[str] = Counter()
        self.begun = asyncio.Event()  # a request is being sampled
        self.go = asyncio.Event()  # may go on
        self.go.set()
        self.resumed = asyncio.Event()
        self.resumed.set()
        self.label = "what it was started with"
        self.salts: list[str] = []
        self.wanted: list[int] = []  # tokens, by request
        self.dies_behind: int | None = None  # tokens of the next request

    @contextlib.asynccontextmanager
    async def listening(self) -> AsyncIterator[None]:
        async with await asyncio.start_server(self.speak, "127.0.0.1", 0) as server:
            self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
            yield

    async def speak(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
                length = int(head.partition("content-length:")[2].split()[0]) if "content-length:" in head else 0
                body = json.loads(await reader.readexactly(length) or b"null")
                status, answer = await self._answer(head.split()[1].partition("?")[0], body)
                if status == HANGS_UP:
                    break
                content = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
                kind = "text/event-stream" if isinstance(answer, bytes) else "application/json"
                writer.write(f"HTTP/1.1 {status} Said\r\ncontent-type: {kind}\r\n".encode())
                dies = isinstance(answer, bytes) and b"DONE" not in answer
                writer.write((b"" if dies else b"content-length: %d\r\n" % len(content)) + b"\r\n" + content)
                await writer.drain()
                if dies:
                    break
        writer.close()

    async def _answer(self, route: str, body: Any) -> tuple[int, Any]:
        step = (body or {}).get("update_info", {}).get("step", "")
        self.asked[route + step] += 1
        if route + step in self.failing:
            status, said = self.failing[route + step]
            return status, {"error": {"message": said}}
        if route == "/openapi.json":
            adapters = ["/v1/load_lora_adapter"] if self.max_lora_rank else []
            return 200, {"paths": {route: {} for route in [*_ROUTES, *adapters]}}
        if route == "/server_info":
            lora = {"max_lora_rank": self.max_lora_rank} if self.max_lora_rank else None
            return 200, {"vllm_config": FACTS | {"lora_config": lora}}
        if route in ("/pause", "/resume"):
            (self.resumed.clear if route == "/pause" else self.resumed.set)()
        if route in ("/finish_weight_update", "/update_weight_version"):
            self.label = body.get("weight_version") or body["new_version"]
        if route == "/inference/v1/generate":
            return 200, await self._generate(body)
        return 200, {}

    async def _generate(self, body: Any) -> bytes:
        self.begun.set()
        self.salts.append(body["cache_salt"])
        self.wanted.append(body["sampling_params"]["max_tokens"])
        await self.resumed.wait()
        await self.go.wait()
        count, self.dies_behind = self.dies_behind, None
        if count is not None:
            choice = {"token_ids": [TOKEN] * count, "logprobs": {"content": [{"logprob": -1.0}] * count}}
            return f"data: {json.dumps({'choices': [choice]})}\n\n".encode()
        count = body["sampling_params"]["max_tokens"]
        choice = {
            "token_ids": [TOKEN] * count,
            "logprobs": {"content": [{"logprob": -1.0}] * count},
            "finish_reason": "length",
            "weight_versions": [{"version": self.label, "start": 0, "end": count}],
        }
        return f"data: {json.dumps({'choices': [choice]})}\n\ndata: [DONE]\n\n".encode()


@contextlib.asynccontextmanager
async def house(
    folder: Path, count: int = 2, max_lora_rank: int | None = None
) -> AsyncIterator[tuple[VllmEngine, list[Pretender]]]:
    servers = [Pretender(max_lora_rank) for _ in range(count)]
    async with contextlib.AsyncExitStack() as stack:
        for server in servers:
            await stack.enter_async_context(server.listening())
        urls = [server.url for server in servers]
        engine = await VllmEngine.connect(folder, urls, max_context=64, max_lora_rank=max_lora_rank)
        try:
            yield engine, servers
        finally:
            await engine.close()
