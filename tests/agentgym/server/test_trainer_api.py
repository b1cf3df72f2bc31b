"""The trainer's door: batches, publications, evaluations; and who does not get in."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
from outside_agents import Pace, slow

from agentgym.errors import EngineDiedError, InputError, ServiceError, VersionError
from agentgym.rollout.store import read_trajectories, step_file
from agentgym.server import process, wire
from agentgym.server.client import DYING_S, ENDING_S, ServiceClient
from agentgym.server.settings import ServiceConfig
from agentgym.testing.scripted_engine import ScriptedEngine, hashed_logits


async def silent(config: ServiceConfig, folder: Path) -> ScriptedEngine:
    """An engine that takes a minute for a token."""
    return ScriptedEngine(hashed_logits(30), max_context=config.max_context, latency_s=lambda: 60.0)


def test_a_few_steps_of_a_trainer(start: Callable[..., Any]) -> None:
    server = start()
    client: ServiceClient = server.client
    assert client.wait_ready(60).policy_version == 0
    client.collect(True)
    versions: set[int] = set()
    taken: list[str] = []
    for version in range(4):
        batch = client.take_batch(version, timeout_s=60)
        assert len(batch.groups) == 2
        assert set(batch.live_versions) <= set(range(version + 1))
        assert batch.metrics["delivered_fraction"] == 1.0
        for group in batch.groups:
            assert len(group.members) == 3
            for member in group.members:
                assert member.group_id == group.group_id
                rows = member.sequences
                assert sum(row.num_loss_tokens for row in rows) == member.num_sampled_tokens > 0
                versions |= {v for row in rows for v, loss in zip(row.policy_versions, row.loss_mask) if loss}
        ids = [t.trajectory_id for t in read_trajectories(step_file(server.run_dir, version + 1))]
        assert ids == [member.trajectory_id for group in batch.groups for member in group.members]
        report = client.publish(version + 1, server.weights(version + 1))
        assert report.version == version + 1
        assert version + 1 in report.live_versions
        assert report.total_s >= report.pause_s >= 0
        assert report.loaded_bytes == 8  # as a scripted engine says
        taken.append(batch.batch_id)
    assert len(versions) > 1
    for batch_id in taken:
        client.acknowledge(batch_id)
    with pytest.raises(InputError, match="never taken"):
        client.acknowledge(taken[0])
    status = client.status()
    assert (status.policy_version, status.collecting, status.failed) == (4, True, 0)
    assert status.episodes >= 24
    assert Path(status.versions_dir) == server.versions_dir.resolve()


def test_the_step_that_is_asked_for_names_the_file(start: Callable[..., Any]) -> None:
    server = start()
    server.client.collect(True)
    server.client.take_batch(0, timeout_s=60, step=41)
    assert step_file(server.run_dir, 41).exists()


def test_a_wait_can_say_what_it_waits_for_and_ends(start: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agentgym.server.client.POLL_S", 0.1)
    server = start(engine_factory=silent)
    server.client.collect(True)
    seen: list[wire.ServiceStatus] = []

    class EnoughError(Exception):
        pass

    def see(status: wire.ServiceStatus) -> None:
        seen.append(status)
        if len(seen) == 2:
            raise EnoughError

    with pytest.raises(EnoughError):
        server.client.take_batch(0, on_wait=see)
    assert seen[0].in_flight == 6
    began = time.monotonic()
    with pytest.raises(ServiceError, match=r"waited in vain for a batch: 0 of 2 groups ready; episodes: 6 sampling"):
        server.client.take_batch(0, timeout_s=0.5)
    assert time.monotonic() - began >= 0.5


def test_an_empty_poll_is_answered_with_204(start: Callable[..., Any]) -> None:
    server = start()
    headers = {"Authorization": "Bearer the-trainers-key-of-this-test"}
    body = wire.encode(wire.BatchRequest(0, 0.05, 1))
    response = httpx.post(f"{server.url}/trainer/batch", content=body, headers=headers)
    assert (response.status_code, response.content) == (204, b"")


def test_versions_only_go_up(start: Callable[..., Any]) -> None:
    server = start()
    server.client.publish(3, server.weights(3))
    for version in (3, 2):
        with pytest.raises(VersionError, match="versions only go up"):
            server.client.publish(version, server.weights(version))
    assert server.client.status().policy_version == 3


def test_weights_come_from_the_versions_folder_alone(start: Callable[..., Any], tmp_path: Path) -> None:
    server = start()
    outside = tmp_path / "elsewhere.safetensors"
    outside.write_bytes(b"")
    link = server.versions_dir / "00000009.safetensors"
    os.symlink(outside, link)
    hidden = server.versions_dir / "weights.pickle"
    hidden.write_bytes(b"")
    climbing = server.versions_dir / ".." / ".." / "elsewhere.safetensors"
    for path in (outside, link, climbing, hidden, Path("/etc/passwd"), server.versions_dir):
        with pytest.raises(InputError, match=r"must be a \.safetensors file in"):
            server.client.publish(9, path)
    with pytest.raises(InputError, match="no weights at"):
        server.client.publish(9, server.versions_dir / "00000010.safetensors")
    for path in ("\0", "a" * 5000):
        with pytest.raises(InputError):
            server.client.publish(9, Path(str(server.versions_dir / path) + ".safetensors"))
    assert server.client.status().policy_version == 0


def test_an_evaluation_is_repeatable_and_leaves_no_trace(start: Callable[..., Any]) -> None:
    server = start()
    client = server.client
    first, again, other = (client.evaluate(20, seed=seed) for seed in (1, 1, 2))
    assert (first.episodes, first.valid, first.failed, first.policy_version) == (20, 20, 0, 0)
    assert first.seconds > 0
    same = ("mean_reward", "success_rate", "mean_turns")
    assert [getattr(first, name) for name in same] == [getattr(again, name) for name in same]
    assert [getattr(first, name) for name in same] != [getattr(other, name) for name in same]
    assert client.status().episodes == 0
    assert not list(server.run_dir.rglob("*.jsonl"))


def test_an_evaluation_shows_its_progress(start: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agentgym.server.client.POLL_S", 0.05)
    pace = Pace(0.1)
    server = start(engine_factory=slow(pace))
    seen: list[str] = []

    def see(status: wire.ServiceStatus) -> None:
        seen.append(status.evaluating)
        pace.token_s = 0.0

    server.client.evaluate(200, on_wait=see)
    assert seen[0].endswith("/200 episodes evaluated")
    assert all(text.endswith("/200 episodes evaluated") for text in seen if text)
    assert server.client.status().evaluating == ""


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"episodes": 0}, "episodes"),
        ({"episodes": 2, "split": "test"}, "split must be"),
        ({"episodes": 2, "temperature": -1.0}, "temperature"),
        ({"episodes": 2, "temperature": float("nan")}, "temperature"),
        ({"episodes": 2, "seed": -1}, "seed"),
    ],
)
def test_an_evaluation_that_cannot_be_is_refused(server: Any, arguments: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        server.client.evaluate(**arguments)


def test_the_data_position_is_restored_before_collecting(start: Callable[..., Any]) -> None:
    server, second = start(), start()
    server.client.collect(True)
    batch = server.client.take_batch(0, timeout_s=60)
    second.client.restore(batch.data_position)
    second.client.collect(True)
    resumed = second.client.take_batch(0, timeout_s=60)
    assert not {g.group_id for g in batch.groups} & {g.group_id for g in resumed.groups}
    with pytest.raises(InputError, match="before collecting"):
        second.client.restore(batch.data_position)
    with pytest.raises(InputError, match="data position"):
        start().client.restore({"seed": 0})


def test_a_dead_engine_reaches_the_trainer_as_what_it_is(start: Callable[..., Any]) -> None:
    import asyncio

    server = start()
    server.client.collect(True)
    server.client.take_batch(0, timeout_s=60)
    asyncio.run_coroutine_threadsafe(server.service.policy.engine.close(), server.loop).result(60)
    with pytest.raises(EngineDiedError, match="closed"):
        server.client.take_batch(9, timeout_s=60)


# ------------------------------------------------------------------------------------------------ who gets in


PATHS = ["status", "collect", "batch", "publish", "acknowledge", "evaluate", "restore", "shutdown", "evaluations/x", ""]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("header", [None, "Bearer wrong", "Bearer", "Basic the-trainers-key-of-this-test", "Bearer é"])
def test_no_key_no_entry(server: Any, path: str, header: str | None) -> None:
    headers = {} if header is None else {"Authorization": header.encode()}
    for method in ("GET", "POST"):
        response = httpx.request(method, f"{server.url}/trainer/{path}", headers=headers)  # type: ignore[arg-type]
        assert response.status_code == 401
        assert wire.decode(response.content, wire.Fault).kind == "ServiceError"


def test_a_wrong_key_ends_the_wait_for_readiness_at_once(server: Any) -> None:
    with ServiceClient(server.url, "wrong") as client, pytest.raises(ServiceError, match="Bearer KEY"):
        client.wait_ready(100)  # whose end would be another error


@pytest.mark.parametrize("body", [b"", b"\xc1", msgspec.msgpack.encode([1]), msgspec.msgpack.encode({"version": "x"})])
@pytest.mark.parametrize("path", ["collect", "batch", "publish", "acknowledge", "evaluate", "restore"])
def test_a_body_that_is_no_request(server: Any, path: str, body: bytes) -> None:
    headers = {"Authorization": "Bearer the-trainers-key-of-this-test"}
    response = httpx.post(f"{server.url}/trainer/{path}", content=body, headers=headers)
    assert response.status_code == 400
    fault = wire.decode(response.content, wire.Fault)
    assert fault.kind == "InputError"
    assert "not a" in fault.message


def test_absurd_numbers_are_refused(server: Any) -> None:
    headers = {"Authorization": "Bearer the-trainers-key-of-this-test"}
    for request in (wire.BatchRequest(0, 1e9, 1), wire.BatchRequest(0, float("nan"), 1), wire.BatchRequest(0, 1.0, -1)):
        response = httpx.post(f"{server.url}/trainer/batch", content=wire.encode(request), headers=headers)
        assert response.status_code == 400
    response = httpx.get(f"{server.url}/trainer/evaluations/none?timeout_s=abc", headers=headers)
    assert response.status_code == 400
    response = httpx.get(f"{server.url}/trainer/evaluations/none", headers=headers)
    assert "no evaluation 'none'" in wire.decode(response.content, wire.Fault).message


# --------------------------------------------------------------------------------------------- nobody there


def test_nobody_there_is_said_with_the_address(unused_tcp_port: int) -> None:
    with ServiceClient(f"http://127.0.0.1:{unused_tcp_port}", "key") as client:
        with pytest.raises(ServiceError, match=f"127.0.0.1:{unused_tcp_port} does not answer"):
            client.status()
        with pytest.raises(ServiceError, match="no rollout service answered"):
            client.wait_ready(0.3)


def test_one_that_hung_up_is_given_the_time_to_end_and_a_silent_one_is_not(unused_tcp_port: int) -> None:
    """A service closes its connections first, and its environments and engine then."""
    given: list[float] = []

    def explain(within_s: float) -> str:
        given.append(within_s)
        return "its process ended with exit code 0"

    def ask(port: int) -> None:
        with (
            ServiceClient(f"http://127.0.0.1:{port}", "key", timeout_s=0.2, explain_death=explain) as client,
            pytest.raises(ServiceError, match="is gone: its process ended with exit code 0"),
        ):
            client.status()

    ask(unused_tcp_port)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        ask(silent.getsockname()[1])
    assert given == [ENDING_S, DYING_S]
    assert ENDING_S > process.ENDING_S, "it has the time that it gives itself"


def test_waiting_until_it_is_there(start: Callable[..., Any]) -> None:
    server = start()
    results: list[int] = []
    with ServiceClient(server.url, "the-trainers-key-of-this-test") as client:
        waiter = threading.Thread(target=lambda: results.append(client.wait_ready(60).policy_version))
        waiter.start()
        waiter.join(60)
    assert results == [0]


@pytest.fixture
def unused_tcp_port() -> Iterator[int]:
    """One where nobody listens, and nobody can begin to."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        yield probe.getsockname()[1]
