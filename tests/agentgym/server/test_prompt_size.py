"""What can never fit is refused before it is rendered and encoded: a few megabytes of it would hold up everybody."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentgym.engine.gate import VersionedPolicy
from agentgym.errors import PromptTooLongError
from agentgym.messages import Message, ToolCall, ToolSpec
from agentgym.render import load_renderer
from agentgym.server.replies import Replies
from agentgym.testing.scripted_engine import ScriptedEngine, hashed_logits

CONTEXT = 40


@pytest.fixture(scope="module")
def replies(maze_folder: Path) -> Replies:
    return Replies(VersionedPolicy(ScriptedEngine(hashed_logits(8))), load_renderer(maze_folder), CONTEXT, 60.0)


def calls(count: int) -> Message:
    return Message("assistant", "", tuple(ToolCall("c", "f", "{}") for _ in range(count)))


def tools(count: int, description: str = "", **schema: Any) -> list[ToolSpec]:
    return [ToolSpec(f"f{index}", description, schema) for index in range(count)]


@pytest.mark.parametrize(
    ("messages", "offered", "text"),
    [
        ([Message("user", "x" * 64 * CONTEXT)], [], ""),
        ([Message("user", "")] * (CONTEXT + 1), [], ""),
        ([calls(CONTEXT)], [], ""),
        ([Message("assistant", "", (ToolCall("c", "f", "9" * 64 * CONTEXT),))], [], ""),
        ([], tools(CONTEXT + 1), ""),
        ([], tools(1, "x" * 64 * CONTEXT), ""),
        ([], tools(1, "", properties={"a": "x" * 64 * CONTEXT}), ""),
        ([], [], "x" * 64 * (CONTEXT + 1)),
    ],
)
def test_what_can_never_fit_is_refused_by_its_size(replies: Replies, messages: Any, offered: Any, text: str) -> None:
    assert replies.renderer.encoder.longest == 64
    with pytest.raises(PromptTooLongError, match=r"is 4\d tokens or more, does not fit the context of 40 tokens"):
        replies.check_size(messages, offered, text)


@given(contents=st.lists(st.text("ab \n", max_size=60), min_size=1, max_size=4), count=st.integers(0, 2))
def test_what_fits_is_not_refused(replies: Replies, contents: list[str], count: int) -> None:
    messages = [Message("user", content) for content in contents]
    size = len(replies.renderer.render(messages, tools(count)))
    Replies(replies._policy, replies.renderer, size, 60.0).check_size(messages, tools(count))


def test_every_route_refuses_it_in_its_own_words(server: Any) -> None:
    huge = "x" * 40_000
    with httpx.Client(base_url=server.url, trust_env=False) as http:
        session = http.post("/v1/sessions", json={"task": "t"}).json()
        for path, body in (
            ("/v1/chat/completions", {"messages": [{"role": "user", "content": huge}]}),
            (f"/v1/sessions/{session['id']}/chat/completions", {"messages": [{"role": "user", "content": huge}]}),
            ("/v1/responses", {"input": huge}),
            ("/v1/messages", {"messages": [{"role": "user", "content": huge}], "max_tokens": 3}),
            ("/v1/completions", {"prompt": huge}),
        ):
            answer = http.post(path, json={"model": "small", **body})
            error = answer.json()["error"]
            assert answer.status_code == 400, (path, answer.text)
            assert "tokens or more, does not fit the context of 120 tokens" in error["message"], path
            if path == "/v1/messages":
                assert error["message"].startswith("prompt is too long: ")
                assert error["details"] == {"error_code": "context_length_exceeded"}
            else:
                assert (error["code"], error["param"]) == ("context_length_exceeded", next(iter(body)))
