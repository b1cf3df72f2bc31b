"""One request's visit: its id, who asks, and what must happen when it ends. Law: a visit holds no key and no text of
a message, because it is what logs and metrics are made of."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable
from contextlib import AsyncExitStack

from agentgym.server.keys import Principal


class Visit:
    """Made by the door for every request; handlers find it at `request.state.visit`.

    `after` is closed when the request has ended, in whichever way; `when_sent` is called once the last byte of a
    successful answer was handed to the connection.
    """

    def __init__(self, method: str) -> None:
        self.request_id = f"req-{uuid.uuid4().hex}"
        self.method = method
        self.route = "unknown"  # the route's template: a path may hold anything
        self.principal: Principal | None = None
        self.session_id: str | None = None
        self.status = 0
        self.failed = ""  # the class of what went wrong
        self.prompt_tokens = 0
        self.sampled_tokens = 0
        self.first_token_s: float | None = None
        self.after = AsyncExitStack()
        self.when_sent: list[Callable[[], None]] = []
        self.began = time.perf_counter()

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.began

    def first_token(self) -> None:
        """Notes when the first token of a stream came."""
        if self.first_token_s is None:
            self.first_token_s = self.seconds
