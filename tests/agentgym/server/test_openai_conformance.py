"""The official client against a server process: what it is documented to do works, streamed and whole, and both say the
same."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import openai
import pytest
from outside_agents import Pace, says

from agentgym import registry
from agentgym.config import parse_config
from agentgym.render import load_renderer
from agentgym.server.client import start_service
from agentgym.server.door import Limits
from agentgym.server.settings import ServiceConfig

QUESTION: Any = [{"role": "user", "content": "1 up 2 left U. D. L. R#"}]
MOVE: Any = registry.make("maze").tools[0].to_openai()
OURS = {"return_token_ids": True, "return_policy_versions": True}


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory, random_model: Path) -> Iterator[str]:
    """A service in a process of its own, with its torch engine in another."""
    values = {"env": {"id": "maze"}, "model": {"name": "small"}, "engine": {"slots": 8}}
    config = parse_config(ServiceConfig, values | {"rollout": {"max_episode_tokens": 120}})
    folder = tmp_path_factory.mktemp("conformance")
    with start_service(config, random_model, folder, folder / "versions") as client:
        yield client.url


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0) as client:
        yield client


def joined(chunks: list[Any]) -> list[dict[str, Any]]:
    """What a stream's chunks say, put together by choice."""
    choices: dict[int, dict[str, Any]] = {}
    for chunk in chunks:
        for choice in chunk.choices:
            empty = {"content": "", "finish_reason": None, "token_ids": [], "policy_versions": [], "kv_versions": []}
            whole = choices.setdefault(choice.index, empty | {"logprobs": []})
            delta = getattr(choice, "delta", None)
            whole["content"] += (delta.content if delta else choice.text) or ""
            whole["finish_reason"] = choice.finish_reason or whole["finish_reason"]
            for name in ("token_ids", "policy_versions", "kv_versions"):
                whole[name] += (choice.model_extra or {}).get(name, [])
            if choice.logprobs is not None and delta is not None:
                whole["logprobs"] += [(token.token, token.logprob) for token in choice.logprobs.content or []]
            elif choice.logprobs is not None:
                whole["logprobs"] += zip(choice.logprobs.tokens, choice.logprobs.token_logprobs, strict=True)
    return [choices[index] for index in sorted(choices)]


def told(answer: Any) -> list[dict[str, Any]]:
    """The same of an answer that came whole."""
    choices = []
    for choice in answer.choices:
        chat = hasattr(choice, "message")
        logprobs: list[Any] = []
        if choice.logprobs is not None and chat:
            logprobs = [(token.token, token.logprob) for token in choice.logprobs.content]
        elif choice.logprobs is not None:
            logprobs = list(zip(choice.logprobs.tokens, choice.logprobs.token_logprobs, strict=True))
        extra = choice.model_extra or {}
        named = {name: extra.get(name, []) for name in ("token_ids", "policy_versions", "kv_versions")}
        content = choice.message.content if chat else choice.text
        choices.append({"content": content, "finish_reason": choice.finish_reason, "logprobs": logprobs} | named)
    return choices


def alike(these: list[dict[str, Any]], those: list[dict[str, Any]]) -> bool:
    """The same but for the last bits of logprobs, in which a torch batch of another size may differ."""
    for one, other in zip(these, those, strict=True):
        assert {**one, "logprobs": None} == {**other, "logprobs": None}
        assert [token for token, _ in one["logprobs"]] == [token for token, _ in other["logprobs"]]
        assert [logprob for _, logprob in one["logprobs"]] == pytest.approx([x for _, x in other["logprobs"]], abs=1e-4)
    return len(these) > 0


@pytest.mark.parametrize(
    "options",
    [
        {"seed": 3, "max_tokens": 12},
        {"seed": 4, "max_completion_tokens": 9, "temperature": 0.5, "n": 3},
        {"temperature": 0, "max_tokens": 20},
        {"seed": 5, "max_tokens": 30, "tools": [MOVE]},
        {"seed": 6, "max_tokens": 30, "stop": [" up", " down"], "n": 2},
    ],
)
def test_a_stream_put_together_is_the_whole_answer(client: openai.OpenAI, options: dict[str, Any]) -> None:
    asked = {"model": "small", "messages": QUESTION, "logprobs": True, "extra_body": OURS} | options
    whole = client.chat.completions.create(**asked)
    chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert alike(joined(chunks), told(whole))
    assert chunks[-1].choices == []
    assert chunks[-1].usage == whole.usage
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert {chunk.id for chunk in chunks} == {chunks[0].id}
    assert (chunks[0].model_extra or {})["prompt_token_ids"] == (whole.model_extra or {})["prompt_token_ids"]
    assert whole.usage is not None
    assert whole.usage.completion_tokens == sum(len(choice["token_ids"]) for choice in told(whole))


def test_replies_of_one_request_have_seeds_of_their_own(client: openai.OpenAI) -> None:
    asked: Any = {"model": "small", "messages": QUESTION, "seed": 11, "max_tokens": 12, "extra_body": OURS}
    one = told(client.chat.completions.create(**asked))
    four = told(client.chat.completions.create(**asked, n=4))
    assert alike(four[:1], one)
    assert len({tuple(choice["token_ids"]) for choice in four}) == 4
    assert alike(told(client.chat.completions.create(**asked, n=4)), four)


def test_a_stop_string_cuts_the_text_and_never_the_tokens(client: openai.OpenAI, random_model: Path) -> None:
    decode = load_renderer(random_model).encoder.decode
    asked: Any = {"model": "small", "messages": QUESTION, "max_tokens": 40, "extra_body": OURS}
    for seed in range(30):  # until a reply is long enough to be cut
        asked["seed"] = seed
        (free,) = told(client.chat.completions.create(**asked))
        new = list(dict.fromkeys(free["content"].split()))
        if len(new) > 5:
            break
    word = new[4]
    assert free["content"].index(word) > 0
    (cut,) = told(client.chat.completions.create(**asked, stop=word))
    assert cut["finish_reason"] == "stop"
    assert cut["content"] == free["content"][: free["content"].index(word)]
    ids = cut["token_ids"]
    assert ids == free["token_ids"][: len(ids)]  # what was sampled, with the token that completed the stop string
    assert word in decode(ids)
    assert word not in decode(ids[:-1])
    (by_id,) = told(client.chat.completions.create(**asked | {"extra_body": OURS | {"stop_token_ids": [ids[-1]]}}))
    assert (by_id["token_ids"], by_id["finish_reason"]) == (ids[: ids.index(ids[-1]) + 1], "stop")


def test_plain_completions_of_ids_and_of_text(client: openai.OpenAI, random_model: Path) -> None:
    ids = load_renderer(random_model).encoder.outside("1 up 2 left")
    asked: Any = {"model": "small", "seed": 5, "max_tokens": 10, "logprobs": 0, "extra_body": OURS}
    by_ids = client.completions.create(prompt=ids, **asked)
    by_text = client.completions.create(prompt="1 up 2 left", **asked)
    assert alike(told(by_ids), told(by_text))
    assert alike(told(by_ids), told(client.completions.create(prompt=[ids], **asked)))
    assert (by_text.model_extra or {})["prompt_token_ids"] == ids
    assert by_ids.choices[0].text
    for prompt in (ids, "1 up 2 left"):
        chunks = list(client.completions.create(prompt=prompt, stream=True, n=2, **asked))
        assert alike(joined(chunks), told(client.completions.create(prompt=prompt, n=2, **asked)))
    default = client.completions.create(model="small", prompt=ids, extra_body=OURS)
    assert default.usage is not None
    assert default.usage.completion_tokens <= 16  # OpenAI's default
    with pytest.raises(openai.BadRequestError, match="prompt: 100000 is not in the vocabulary") as refused:
        client.completions.create(model="small", prompt=[5, 100_000])
    assert refused.value.param == "prompt"


def test_the_asynchronous_client_streams_and_asks_at_once(url: str) -> None:
    async def main() -> None:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0) as client:

            async def ask(seed: int) -> None:
                asked: Any = {"model": "small", "messages": QUESTION, "max_tokens": 12, "extra_body": OURS}
                whole = await client.chat.completions.create(seed=seed, **asked)
                stream = await client.chat.completions.create(seed=seed, stream=True, **asked)
                assert alike(joined([chunk async for chunk in stream]), told(whole))

            await asyncio.gather(*(ask(seed) for seed in range(12)))
            assert (await client.models.list()).data[0].id == "small"

    asyncio.run(main())


def test_headers_and_raw_answers(client: openai.OpenAI) -> None:
    raw = client.chat.completions.with_raw_response.create(model="small", messages=QUESTION, max_tokens=2)
    assert raw.headers["x-request-id"] == raw.parse()._request_id
    assert (raw.request_id or "").startswith("req-")
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(model="small", messages=QUESTION, top_p=0.1)
    assert (refused.value.request_id or "").startswith("req-")


def test_a_stream_is_refused_before_it_begins(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(model="small", messages=QUESTION, stream=True, max_tokens=10_000)
    assert refused.value.code == "context_length_exceeded"


# ---------------------------------------------------------------------------------------- tools, with chosen replies


def test_tool_calls_in_a_stream(start: Callable[..., Any]) -> None:
    server = start(engine_factory=says("goal <call> move up <call> move left"))
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0) as client:
        asked: Any = {"model": "small", "messages": QUESTION, "tools": [MOVE], "temperature": 0}
        whole = client.chat.completions.create(**asked).choices[0]
        calls: dict[int, dict[str, str]] = {}
        content = ""
        for chunk in client.chat.completions.create(**asked, stream=True):
            content += chunk.choices[0].delta.content or ""
            for part in chunk.choices[0].delta.tool_calls or []:
                assert part.function is not None
                if part.id is not None:  # the first part of a call names it; the others bring its arguments
                    assert part.type == "function"
                    calls[part.index] = {"id": part.id, "name": part.function.name or "", "arguments": ""}
                calls[part.index]["arguments"] += part.function.arguments or ""
            reason = chunk.choices[0].finish_reason
        assert reason == whole.finish_reason == "tool_calls"
        assert content == whole.message.content == "goal"
        assert [(call["name"], json.loads(call["arguments"])) for call in calls.values()] == [
            (call.function.name, json.loads(call.function.arguments)) for call in whole.message.tool_calls or []  # type: ignore[union-attr]
        ] == [("move", {"dir": "up"}), ("move", {"dir": "left"})]  # fmt: skip
        assert len({call["id"] for call in calls.values()}) == 2
        with client.chat.completions.stream(**asked) as stream:
            for event in stream:
                assert event.type != "error"
            final = stream.get_final_completion().choices[0].message
        assert [call.function.name for call in final.tool_calls or []] == ["move", "move"]
        asked["tool_choice"] = "none"  # no tools, no calls: what looks like one is text
        assert client.chat.completions.create(**asked).choices[0].message.tool_calls is None


def test_a_client_that_leaves_ends_its_sampling(start: Callable[..., Any]) -> None:
    server = start(engine_factory=says("up " * 90, latency_s=0.3))
    engine = server.service.policy.engine
    where = urlsplit(server.url)
    for stream in (False, True):
        body = json.dumps({"model": "small", "messages": QUESTION, "temperature": 0, "stream": stream}).encode()
        head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: "
        with socket.create_connection((where.hostname, where.port), timeout=60) as connection:
            connection.sendall(head + b"%d\r\n\r\n" % len(body) + body)
            while stream and b"up" not in connection.recv(65536):
                pass
            while not engine._sampled:
                time.sleep(0.005)
        deadline = time.monotonic() + 60
        while (engine._running or server.door.running) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert engine._running == server.door.running == 0
        assert 0 < engine._sampled < 60
        engine._sampled = 0


def test_a_deadline_of_its_own(start: Callable[..., Any]) -> None:
    server = start(engine_factory=says("up " * 90, latency_s=0.05))
    asked: Any = {"model": "small", "messages": QUESTION, "extra_body": {"timeout_s": 0.3}}
    requests: list[httpx.Request] = []
    http = httpx.Client(event_hooks={"request": [requests.append]})
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=5, http_client=http) as client:
        with pytest.raises(openai.InternalServerError, match="not sampled to the end within 0") as late:
            client.chat.completions.create(**asked)
        assert (late.value.status_code, late.value.code) == (504, "deadline_exceeded")
        assert len(requests) == 1, "the client was told not to ask again"
        with pytest.raises(openai.APIError, match="not sampled to the end within 0"):
            list(client.chat.completions.create(**asked, stream=True))


def test_a_request_that_sets_no_deadline_has_the_servers(start: Callable[..., Any], limits: Limits) -> None:
    slow = says("up " * 90, latency_s=0.05)  # 4.5 s
    server = start(engine_factory=slow, limits=replace(limits, max_request_s=0.3))
    asked = {"model": "small", "messages": QUESTION}
    answer = httpx.post(f"{server.url}/v1/chat/completions", json=asked, timeout=60)
    assert (answer.status_code, answer.json()["error"]["code"]) == (504, "deadline_exceeded")
    longer = httpx.post(f"{server.url}/v1/chat/completions", json=asked | {"timeout_s": 0.4})
    assert (longer.status_code, longer.json()["error"]["param"]) == (400, "timeout_s")


def test_too_many_at_once_are_told_when_to_come_back(start: Callable[..., Any], limits: Limits) -> None:
    pace = Pace(0.5)
    server = start(engine_factory=says("up " * 90, pace), limits=replace(limits, max_requests=1))
    body = {"model": "small", "messages": QUESTION, "temperature": 0}
    statuses: list[int] = []

    def hear(response: httpx.Response) -> None:
        statuses.append(response.status_code)
        pace.token_s = 0.0  # the first one ends

    http = httpx.Client(event_hooks={"response": [hear]})
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=4, http_client=http) as client:
        first = threading.Thread(target=httpx.post, args=(f"{server.url}/v1/chat/completions",), kwargs={"json": body})
        first.start()
        while server.door.running == 0:
            time.sleep(0.005)
        refused = httpx.post(f"{server.url}/v1/chat/completions", json=body)
        assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
        assert refused.json()["error"]["type"] == "rate_limit_error"
        assert client.chat.completions.create(**body).choices  # type: ignore[arg-type] # which obeys, and asks again
        assert (statuses[0], statuses[-1]) == (429, 200)
        first.join()


def test_the_client_retries_what_fell_on_the_way(url: str) -> None:
    """A proxy that drops the first connection: the client's second attempt is an ordinary request."""
    attempts = []

    class Flaky(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            attempts.append(self.headers["x-stainless-retry-count"])
            if len(attempts) == 1:
                self.close_connection = True
                return
            answer = httpx.post(f"{url}{self.path}", content=body, headers={"content-type": "application/json"})
            self.send_response(answer.status_code)
            self.send_header("content-type", answer.headers["content-type"])
            self.send_header("content-length", str(len(answer.content)))
            self.end_headers()
            self.wfile.write(answer.content)

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Flaky) as proxy:
        threading.Thread(target=proxy.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{proxy.server_address[1]}/v1"
        with openai.OpenAI(base_url=address, api_key="unused", max_retries=2) as client:
            answer = client.chat.completions.create(model="small", messages=QUESTION, max_tokens=2)
        proxy.shutdown()
    assert answer.choices
    assert attempts == ["0", "1"]
