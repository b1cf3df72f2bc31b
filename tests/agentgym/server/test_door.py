"""What the door has put away when a caller has its answer: its next request may come before anything else is done."""

from __future__ import annotations

import asyncio
from typing import Any

from starlette.types import Message, Receive, Scope, Send

from agentgym.server.door import Door, Limits
from agentgym.server.keys import Keyring, Keys
from agentgym.server.metrics import Metrics


def test_with_the_last_byte_a_request_s_place_is_free_and_it_is_counted(limits: Limits) -> None:
    metrics = Metrics()
    seen: list[tuple[int, bool]] = []

    def look() -> None:
        counted = (
            'agentgym_http_requests_total{method="POST",route="unknown",status="200"} 1.0' in metrics.text().decode()
        )
        seen.append((door.running, counted))

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"half", "more_body": True})
        look()
        await send({"type": "http.response.body", "body": b"whole"})
        look()

    async def receive() -> Message:
        if not asked:
            asked.append(True)
            return {"type": "http.request", "body": b"", "more_body": False}
        await asyncio.Event().wait()
        raise AssertionError("unreachable")

    async def send(message: Message) -> None:
        pass

    asked: list[bool] = []
    door = Door(app, Keyring(Keys("the-trainers-key", None)), limits, metrics)
    scope: dict[str, Any] = {"type": "http", "method": "POST", "path": "/v1/x", "headers": [(b"host", b"localhost")]}
    asyncio.run(door(scope, receive, send))
    assert seen == [(1, False), (0, True)]
    look()
    assert seen[-1] == (0, True), "and once"
