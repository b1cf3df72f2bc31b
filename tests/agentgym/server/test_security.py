"""Who may do what, what a server keeps to itself, and how it ends while somebody is being answered."""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from agentgym.config import parse_config
from agentgym.server.client import start_service
from agentgym.server.logs import JsonLines, TextLines
from agentgym.server.settings import ServiceConfig

KEY = "the-trainers-key-of-this-test"
ACTING = "the-acting-key-of-this-test"
CHAT = {"model": "small", "messages": [{"role": "user", "content": "1 up"}], "max_tokens": 2}
SECRET = "zebra-marmalade-xylophone"


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


@pytest.fixture
def locked(start: Callable[..., Any]) -> Iterator[tuple[Any, httpx.Client]]:
    server = start(openai_key=ACTING)
    with httpx.Client(base_url=server.url, trust_env=False) as http:
        yield server, http


def test_each_key_opens_its_own_door(locked: tuple[Any, httpx.Client]) -> None:
    server, http = locked
    session = http.post("/v1/sessions", json={"task": "t"}, headers=bearer(ACTING)).json()
    statuses = {  # by bearer: chat, plain completion, policy, metrics, the trainer's status, a publication
        None: (401, 401, 401, 401, 401, 401),
        "wrong": (401, 401, 401, 401, 401, 401),
        ACTING: (200, 200, 200, 200, 401, 401),
        KEY: (401, 401, 401, 401, 200, 400),
        session["api_key"]: (200, 403, 403, 403, 401, 401),
        session["api_key"] + "x": (401, 401, 401, 401, 401, 401),
    }
    for key, expected in statuses.items():
        headers = bearer(key) if key else {}
        answers = (
            http.post("/v1/chat/completions", json=CHAT, headers=headers),
            http.post("/v1/completions", json={"model": "small", "prompt": "up", "max_tokens": 2}, headers=headers),
            http.get("/v1/policy", headers=headers),
            http.get("/metrics", headers=headers),
            http.get("/trainer/status", headers=headers),
            http.post("/trainer/publish", content=b"\x80", headers=headers),
        )
        assert tuple(answer.status_code for answer in answers) == expected, key
        assert all(answer.headers["x-request-id"] for answer in answers)
    for path in ("/health", "/health/live", "/health/ready"):
        assert http.get(path).status_code == 200
    assert http.get("/openapi.json").status_code == 401
    refused = http.get("/v1/models")
    assert (refused.headers["www-authenticate"], refused.json()["error"]["code"]) == ("Bearer", "invalid_api_key")
    assert server.service.policy.policy_version == 0


def test_no_key_is_asked_for_on_loopback_but_the_trainer_s(server: Any) -> None:
    assert httpx.get(f"{server.url}/v1/models").status_code == 200
    assert httpx.get(f"{server.url}/v1/models", headers=bearer("anything")).status_code == 200
    assert httpx.get(f"{server.url}/trainer/status").status_code == 401
    assert httpx.get(f"{server.url}/v1/models", headers=bearer("ags-of-an-ended-session")).status_code == 401


def test_without_a_key_no_web_page_s_domain_is_a_name_of_this_server(start: Callable[..., Any]) -> None:
    """A browser lets a page ask its own domain, wherever the page has that point to."""
    server = start()
    with httpx.Client(base_url=server.url, trust_env=False) as http:
        for host in ("localhost:80", "LocalHost.", "127.0.0.1", "[::1]:80", "agentgym", "app.localhost", ""):
            assert http.get("/v1/models", headers={"Host": host}).status_code == 200, host
        for host in (
            "evil.example",
            "evil.example:80",
            "evil.example.",
            "127.0.0.1.evil.example",
            "localhost.evil.example",
        ):
            refused = http.post("/v1/sessions", json={"task": "t"}, headers={"Host": host})
            assert (refused.status_code, refused.json()["error"]["code"]) == (403, "forbidden_host"), host
        session = http.post("/v1/sessions", json={"task": "t"}).json()
        secret = {"Host": "evil.example", **bearer(session["api_key"])}  # who knows a key is no stranger's page
        assert http.get("/v1/models", headers=secret).status_code == 200
        assert http.get("/health", headers={"Host": "evil.example"}).status_code == 200
    locked = start(openai_key=ACTING)
    named = {"Host": "rollouts.example", **bearer(ACTING)}
    assert httpx.get(f"{locked.url}/v1/models", headers=named, trust_env=False).status_code == 200


def test_health_policy_and_figures(start: Callable[..., Any]) -> None:
    server = start()
    with httpx.Client(base_url=server.url, trust_env=False) as http:
        body = http.get("/health").json()
        assert (body["status"], body["policy_version"], body["model"], body["requests"]) == ("ok", 0, "small", 0)
        assert body["engine"]["status"] == "ok"
        assert http.get("/health/live").json() == http.get("/health/ready").json() == {"status": "ok"}
        assert http.get("/v1/policy").json()["last_publication"] is None
        server.client.publish(3, server.weights(3))
        policy = http.get("/v1/policy").json()
        assert (policy["policy_version"], policy["publishing"], policy["publications"]["done"]) == (3, None, 1)
        assert policy["last_publication"]["version"] == 3
        assert policy["last_publication"]["loaded_bytes"] == 8
        assert [replica["policy_version"] for replica in policy["replicas"]] == [3]
        sampled = http.post("/v1/chat/completions", json=CHAT).json()["usage"]
        http.post("/v1/chat/completions", json=CHAT | {"stream": True, "max_tokens": 3})
        http.post("/v1/chat/completions", json=CHAT | {"top_p": 0.5})
        http.get("/v1/models/another")
        http.get(f"/{SECRET}")
        figures = http.get("/metrics")
        assert figures.headers["content-type"].startswith("text/plain; version=0.0.4")
        values = dict(line.rsplit(" ", 1) for line in figures.text.splitlines() if not line.startswith("#"))
        route = "/v1/chat/completions"
        assert values[f'agentgym_http_requests_total{{method="POST",route="{route}",status="200"}}'] == "2.0"
        assert values[f'agentgym_http_requests_total{{method="POST",route="{route}",status="400"}}'] == "1.0"
        assert values[f'agentgym_http_request_seconds_count{{route="{route}"}}'] == "3.0"
        assert values[f'agentgym_first_token_seconds_count{{route="{route}"}}'] == "1.0"
        assert values['agentgym_failures_total{kind="ParameterError"}'] == "1.0"
        assert values['agentgym_failures_total{kind="UnknownModelError"}'] == "1.0"
        assert float(values['agentgym_http_tokens_total{kind="prompt"}']) == 2 * sampled["prompt_tokens"]
        assert values["agentgym_policy_version"] == "3.0"
        assert values['agentgym_publications_total{result="done"}'] == "1.0"
        assert float(values["agentgym_last_publication_pause_seconds"]) > 0.0
        assert values["agentgym_publication_loaded_bytes_total"] == "8.0"  # as a scripted engine says
        assert values["agentgym_engine_up"] == "1.0"
        assert float(values["agentgym_engine_sampled_tokens_total"]) >= sampled["completion_tokens"]
        assert SECRET not in figures.text  # a path is no label


def test_an_engine_that_died_is_seen(
    random_model: Path, tmp_path: Path, service_processes: Callable[[], list[int]]
) -> None:
    values = {"env": {"id": "maze"}, "model": {"name": "small"}, "rollout": {"max_episode_tokens": 120}}
    config = parse_config(ServiceConfig, values)
    with (
        start_service(config, random_model, tmp_path, tmp_path / "versions") as client,
        httpx.Client(base_url=client.url, trust_env=False) as http,
    ):
        until(lambda: http.get("/health").json()["status"] == "ok")  # an engine that is slow is not there for a moment
        _, *engine = service_processes()
        for pid in engine:
            os.kill(pid, signal.SIGKILL)
        answer = http.post("/v1/chat/completions", json=CHAT)
        assert (answer.status_code, answer.json()["error"]["type"]) == (500, "server_error")
        seen = http.get("/health")
        assert (seen.status_code, seen.json()["status"]) == (503, "the engine is gone")
        assert http.get("/health/ready").status_code == 503
        assert http.get("/health/live").status_code == 200
        assert "agentgym_engine_up 0.0" in http.get("/metrics").text


# --------------------------------------------------------------------------------------------------- a whole process


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


SCRIPT = """
    import sys
    from pathlib import Path
    from agentgym.config import parse_config
    from agentgym.engine.protocol import Engine
    from agentgym.render import load_renderer
    from agentgym.server.process import serve
    from agentgym.server.settings import ServiceConfig
    from agentgym.testing.scripted_engine import ScriptedEngine, forced_logits

    async def slow(config, folder):
        size = max(load_renderer(folder).encoder.control_ids) + 1
        latency_s = lambda: 0.0 if Path({go!r}).exists() else 0.6
        return ScriptedEngine(forced_logits(size, lambda prefix: 5), max_context=120, latency_s=latency_s)

    config = parse_config(ServiceConfig, {config!r})
    say = lambda text: print(text, flush=True)
    sys.exit(serve(config, Path({folder!r}), Path({run!r}), say, slow))
"""


class Process:
    """A served model in a process of its own, 0.6 s a token until there is a file `go`, and its log."""

    def __init__(self, folder: Path, run: Path, server: dict[str, Any]) -> None:
        import textwrap

        config = {
            "env": {"id": "maze"},
            "model": {"name": "small"},
            "rollout": {"max_episode_tokens": 120},
            "server": {"log_format": "json"} | server,
        }
        script = textwrap.dedent(SCRIPT).format(
            config=config, folder=str(folder), run=str(run), go=str(run.parent / "go")
        )
        self.go = run.parent / "go"
        self.log_file = run.parent / "log"
        with self.log_file.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=log, text=True
            )
        assert self.process.stdout is not None
        found = re.search(r"served at (http://[^/]+)/v1", self.process.stdout.readline())
        assert found is not None, self.log_file.read_text()
        self.url = found[1]

    def log(self) -> list[dict[str, Any]]:
        whole = self.log_file.read_text().rpartition("\n")[0]
        return [json.loads(line) for line in whole.splitlines()]

    def ask(self, answers: list[Any], **body: Any) -> threading.Thread:
        def run() -> None:
            try:
                answers.append(httpx.post(f"{self.url}/v1/chat/completions", json=CHAT | body, timeout=120.0))
            except httpx.HTTPError as error:
                answers.append(error)

        thread = threading.Thread(target=run)
        thread.start()
        until(lambda: httpx.get(f"{self.url}/health").json()["requests"] > 0)
        return thread


@pytest.fixture
def process(maze_folder: Path, tmp_path: Path) -> Iterator[Callable[..., Process]]:
    begun: list[Process] = []

    def begin(**server: Any) -> Process:
        begun.append(Process(maze_folder, tmp_path / f"{len(begun)}" / "run", server))
        return begun[-1]

    for number in range(3):
        (tmp_path / f"{number}").mkdir()
    yield begin
    for one in begun:
        one.process.kill()
        one.process.wait()


def test_it_drains_at_sigterm_and_says_what_it_waits_for(process: Callable[..., Process]) -> None:
    server = process(drain_s=60.0)
    answers: list[Any] = []
    asking = server.ask(answers, max_tokens=100)  # 60 s
    with httpx.Client(base_url=server.url) as kept:
        assert kept.get("/health/ready").status_code == 200
        server.process.send_signal(signal.SIGTERM)
        until(lambda: kept.get("/health/ready").status_code != 200)
        assert kept.get("/health/ready").json() == {"status": "draining"}
        refused = kept.post("/v1/chat/completions", json=CHAT)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "draining")
        assert refused.headers["retry-after"] == "1"
    server.go.touch()
    asking.join()
    assert answers[0].status_code == 200
    assert answers[0].json()["usage"]["completion_tokens"] == 100
    assert server.process.wait(60) == 0
    messages = [line["message"] for line in server.log()]
    assert any(re.match(r"draining: 1 requests run, the oldest .*req-\w+\) for ", message) for message in messages)


@pytest.mark.parametrize("how", ["limit", "second signal"])
def test_a_drain_has_a_limit(process: Callable[..., Process], how: str) -> None:
    server = process(drain_s=0.5 if how == "limit" else 60.0)
    answers: list[Any] = []
    asking = server.ask(answers, max_tokens=100)  # 60 s
    server.process.send_signal(signal.SIGTERM)
    if how == "second signal":
        until(lambda: any(line["message"].startswith("draining: ") for line in server.log()))
        server.process.send_signal(signal.SIGTERM)
    asking.join()
    assert (answers[0].status_code, answers[0].json()["error"]["code"]) == (503, "draining")
    assert server.process.wait(60) == 0
    assert any("1 requests are cut off" in line["message"] for line in server.log())


def test_the_log_has_ids_and_neither_keys_nor_messages(process: Callable[..., Process], tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.write_text(ACTING)
    server = process(api_key_file=str(key))
    server.go.touch()
    secret = [{"role": "user", "content": SECRET}]
    with httpx.Client(base_url=server.url, headers=bearer(ACTING)) as http:
        answer = http.post("/v1/chat/completions", json=CHAT | {"messages": secret})
        session = http.post("/v1/sessions", json={"task": SECRET}).json()
        own = bearer(session["api_key"])
        within = http.post("/v1/chat/completions", json=CHAT | {"messages": secret}, headers=own)
        wrong = http.post("/v1/chat/completions", json={"messages": secret, SECRET: 1})
        http.get(f"/v1/{SECRET}%0A{SECRET}", headers=bearer(SECRET))
    trainer_key = (tmp_path / "0" / "run" / "trainer.key").read_text()
    os.kill(server.process.pid, signal.SIGTERM)
    assert server.process.wait(60) == 0
    lines = server.log()
    by_id = {line["request_id"]: line for line in lines if line.get("logger") == "agentgym.server.access"}
    line = by_id[answer.headers["x-request-id"]]
    assert (line["method"], line["route"], line["status"]) == ("POST", "/v1/chat/completions", 200)
    assert line["sampled_tokens"] == answer.json()["usage"]["completion_tokens"]
    assert line["principal"] == "actor"
    line = by_id[within.headers["x-request-id"]]
    assert (line["principal"], line["session_id"]) == ("session", session["id"])
    assert by_id[wrong.headers["x-request-id"]]["failed"] == "InputError"
    text = server.log_file.read_text()
    for unsaid in (SECRET, ACTING, trainer_key, session["api_key"]):
        assert unsaid not in text


def test_no_line_of_the_log_is_another_s_text() -> None:
    forged = "the grader said\n2026-11-23 02:00:00,000 INFO agentgym.server.access: GET /v1\r\x1b[2J\x9b0m"
    record = logging.LogRecord("agentgym", logging.WARNING, "", 0, "group discarded: %s", (forged,), None)
    first, *more = TextLines().format(record).split("\n")
    assert first.endswith("WARNING agentgym: group discarded: the grader said")
    assert more == [r"    2026-11-23 02:00:00,000 INFO agentgym.server.access: GET /v1\x0d\x1b[2J\x9b0m"]
    assert json.loads(JsonLines().format(record))["message"] == f"group discarded: {forged}"
