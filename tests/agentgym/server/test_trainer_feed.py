"""What scorers read over HTTP: the feed and the pause, for the trainer alone, visible to everybody who asks."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from agentgym.errors import InputError
from agentgym.server.client import ServiceClient
from agentgym.server.settings import ServiceConfig
from agentgym.server.wire import FeedPage
from agentgym.testing.scripted_engine import ScriptedEngine, hashed_logits


async def slow(config: ServiceConfig, folder: Path) -> ScriptedEngine:
    return ScriptedEngine(hashed_logits(30), max_context=config.max_context, latency_s=lambda: 0.01)


def read_all(client: ServiceClient, cursor: int, max_tokens: int) -> list[FeedPage]:
    pages = [client.feed(cursor, max_tokens)]
    while pages[-1].live is None:
        pages.append(client.feed(pages[-1].cursor, max_tokens))
    return pages


def test_a_paused_service_shows_what_was_sampled_and_publication_ends_the_pause(start: Callable[..., Any]) -> None:
    server = start(engine_factory=slow)
    client: ServiceClient = server.client
    client.collect(True)
    while not client.status().sampled_tokens:
        time.sleep(0.01)
    with client.another() as other:
        paused = other.pause(limit_s=300.0)
        policy = httpx.get(f"{server.url}/v1/policy").json()
        assert policy["pause"]["pause_id"] == paused.pause_id
        assert 0 < policy["pause"]["left_s"] <= 300.0
        assert "sampling is paused" in client.status().waiting_for
        assert other.pause(limit_s=300.0).pause_id == paused.pause_id
        time.sleep(0.3)  # environments answer; nothing is sampled any more
        pages = read_all(other, 0, max_tokens=60)
        assert len(pages) > 1
        assert all(sum(map(len, (p.token_ids for p in page.pieces))) <= 60 or len(page.pieces) == 1 for page in pages)
        assert {page.pause_id for page in pages} == {paused.pause_id}
        rows: dict[tuple[str, int], list[tuple[int, int]]] = {}
        for piece in (piece for page in pages for piece in page.pieces if piece.token_ids):
            row = rows.setdefault((piece.trajectory_id, piece.row), [])
            assert len(row) == piece.start
            row += zip(piece.token_ids, piece.policy_versions)
        assert {version for row in rows.values() for _, version in row} == {-1, 0}
        assert {name for name, _ in rows} <= set(pages[-1].live or ())
        assert read_all(other, pages[-1].cursor, 60)[0].pieces == ()  # nothing twice, and nothing goes on
    report = client.publish(1, server.weights(1))
    assert report.ended_pause == paused.pause_id
    assert httpx.get(f"{server.url}/v1/policy").json()["pause"] is None
    batch = client.take_batch(1, timeout_s=60)
    taken = {member.trajectory_id for group in batch.groups for member in group.members}
    assert not taken & set(read_all(client, 0, 1000)[-1].live or ())  # it holds what may still be delivered
    for group in batch.groups:
        for member in group.members:
            for number, sequence in enumerate(member.sequences):
                marks = [v if loss else -1 for v, loss in zip(sequence.policy_versions, sequence.loss_mask)]
                final = list(zip(sequence.token_ids, marks))
                before = rows.get((member.trajectory_id, number), [])
                assert final[: len(before)] == before
                assert all(version != 0 for _, version in final[len(before) :])  # all of version 0 was shown


def test_sampling_goes_on_without_the_trainer(start: Callable[..., Any]) -> None:
    server = start(engine_factory=slow)
    server.client.pause(limit_s=0.2)  # first: nothing can be sampled before its end
    server.client.collect(True)
    assert server.client.take_batch(0, timeout_s=60).groups
    assert httpx.get(f"{server.url}/v1/policy").json()["pauses"] == {"done": 1, "expired": 1}
    assert 'agentgym_pauses_total{end="expired"} 1' in httpx.get(f"{server.url}/metrics").text
    server.client.pause(limit_s=300.0)
    server.client.resume()
    assert server.client.take_batch(0, timeout_s=60).groups


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda client: client.feed(10**9), "no page gave cursor 1000000000"),
        (lambda client: client.feed(-1), "no page gave cursor -1"),
        (lambda client: client.feed(0, 0), "1 to 1000000 tokens, got max_tokens 0"),
        (lambda client: client.feed(0, 10**7), "1 to 1000000 tokens, got max_tokens 10000000"),
        (lambda client: client.pause(0.0), "up to 3600 s, got limit_s 0"),
        (lambda client: client.pause(float("inf")), "up to 3600 s, got limit_s inf"),
    ],
)
def test_bad_questions_are_refused(server: Any, call: Callable[[ServiceClient], object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        call(server.client)


@pytest.mark.parametrize("path", ["feed", "pause", "resume"])
def test_only_the_trainer_gets_in(server: Any, path: str) -> None:
    assert httpx.post(f"{server.url}/trainer/{path}", content=b"").status_code == 401
    wrong = {"Authorization": "Bearer another-key"}
    assert httpx.post(f"{server.url}/trainer/{path}", content=b"", headers=wrong).status_code in (401, 403)
    assert server.service.policy.pause_under_way is None
