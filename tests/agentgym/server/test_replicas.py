"""A service on several replicas, as callers see it when one of them is another model, and when none is left."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
from vllm_pretender import TOKEN, Pretender

from agentgym.engine.vllm.engine import VllmEngine
from agentgym.server.settings import ServiceConfig

CHAT = {"model": "small", "messages": [{"role": "user", "content": "1 up 2 left"}], "max_tokens": 3}
OTHER = "another model: its num_hidden_layers is 4, and not 2"


def test_one_that_is_another_model_is_shown_and_without_any_the_service_says_so(
    start: Callable[..., Any], random_model: Path
) -> None:
    pretenders = [Pretender(), Pretender()]
    kept: list[Any] = []

    async def engine_of(config: ServiceConfig, folder: Path) -> VllmEngine:
        for pretender in pretenders:
            kept.append(listening := pretender.listening())
            await listening.__aenter__()
        engine = await VllmEngine.connect(folder, [one.url for one in pretenders], max_context=config.max_context)
        engine._dispatch._lost_s = 0.2
        return engine

    server = start(random_model, engine_factory=engine_of)
    engine = server.service.policy.engine
    with httpx.Client(base_url=server.url, trust_env=False) as http:

        def lose(index: int) -> dict[str, Any]:
            """Takes a replica out, and what it then comes back as is another model; how it is shown."""
            pretenders[index].failing["/init_weight_transfer_engine"] = 500, OTHER
            server.loop.call_soon_threadsafe(engine.seats[index].lose, "it went away")
            deadline = time.monotonic() + 60
            while OTHER.split(": ")[1] not in (shown := http.get("/v1/policy").json()["replicas"][index])["error"]:
                assert time.monotonic() < deadline
                time.sleep(0.01)
            return shown

        asked = CHAT | {"return_token_ids": True}
        assert http.post("/v1/chat/completions", json=asked).json()["choices"][0]["token_ids"] == [TOKEN] * 3
        shown = lose(1)
        assert shown["state"] != "serving"
        assert shown["error"].startswith(f"vllm at {pretenders[1].url} serves another model: its num_hidden_layers")
        assert http.get("/health").status_code == 200
        assert f'agentgym_replica_serving{{replica="vllm at {pretenders[1].url}"}} 0.0' in http.get("/metrics").text
        assert http.post("/v1/chat/completions", json=asked).status_code == 200
        lose(0)
        health = http.get("/health")
        assert (health.status_code, health.json()["status"]) == (503, "no replica serves")
        assert [replica["state"] == "serving" for replica in health.json()["replicas"]] == [False, False]
        assert not any(pretender.url in health.text for pretender in pretenders)  # anybody may ask
        answer = http.post("/v1/chat/completions", json=asked)
        assert answer.status_code == 500
        assert answer.json()["error"]["type"] == "server_error"
        assert "no vLLM replica has served for" in answer.json()["error"]["message"]
