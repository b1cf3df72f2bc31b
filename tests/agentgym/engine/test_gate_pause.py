"""A pause of sampling: nothing is sampled in it, nothing is lost by it, and it ends even if nobody ends it."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace

import pytest

from agentgym.engine import gate
from agentgym.engine.gate import VersionedPolicy
from agentgym.engine.protocol import WeightUpdate
from agentgym.errors import EngineError, InputError
from agentgym.policy import Completion, SamplingParams
from agentgym.testing.scripted_engine import ScriptedEngine, hashed_logits

PARAMS = [SamplingParams(max_tokens=12, seed=n, session=f"t{n}") for n in range(4)]
PROMPT = [1, 2]


def policy_of(latency_s: float = 0.002) -> tuple[VersionedPolicy, ScriptedEngine]:
    engine = ScriptedEngine(hashed_logits(16), latency_s=lambda: latency_s)
    return VersionedPolicy(engine), engine


class Unhurried(asyncio.SelectorEventLoop):
    """An event loop whose time passes only while everybody waits, and then at once: no machine is too slow for it."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0

    def time(self) -> float:
        return self.now

    def _run_once(self) -> None:
        if not self._ready and self._scheduled:  # type: ignore[attr-defined]
            self.now = max(self.now, self._scheduled[0].when())  # type: ignore[attr-defined]
        super()._run_once()  # type: ignore[misc]


async def begun(policy: VersionedPolicy, tokens: int = 4) -> list[asyncio.Task[Completion]]:
    tasks = [asyncio.create_task(policy.complete(PROMPT, params)) for params in PARAMS]
    while (await policy.engine.stats()).sampled_tokens < tokens:
        await asyncio.sleep(0)
    return tasks


def shown(policy: VersionedPolicy) -> dict[str | None, list[int]]:
    return {under.session: [t for s in under.segments for t in s.token_ids] for under in policy.in_flight()}


def test_a_pause_shows_every_token_and_the_next_version_ends_it() -> None:
    async def run() -> None:
        policy, _ = policy_of()
        tasks = await begun(policy)
        pause = await policy.pause(limit_s=30.0)
        before = shown(policy)
        assert set(before) == {"t0", "t1", "t2", "t3"}
        assert any(before.values())
        await asyncio.sleep(0.05)
        assert shown(policy) == before
        assert not any(task.done() for task in tasks)
        report = await policy.publish(WeightUpdate(1, Path("unread")))
        assert report.ended_pause == pause.pause_id
        assert report.pause_s >= 0.05  # since the pause began
        assert policy.pause_under_way is None
        for params, task in zip(PARAMS, tasks):
            done = await task
            old = sum(version == 0 for version in done.policy_versions)
            assert list(done.token_ids[:old]) == before[params.session]  # nothing of version 0 came after the pause
            assert len(done.token_ids) == 12
        assert policy.pauses.done == 1
        assert policy.pauses.expired == 0
        assert list(policy.in_flight()) == []
        assert (await policy.publish(WeightUpdate(2, Path("unread")))).ended_pause is None

    asyncio.run(run())


def test_a_pause_ends_when_it_is_ended() -> None:
    async def run() -> None:
        policy, _ = policy_of()
        tasks = await begun(policy)
        await policy.pause(limit_s=30.0)
        await policy.resume()
        await policy.resume()  # nothing to end
        alike = await asyncio.gather(*tasks)
        assert all(set(done.policy_versions) == {0} and len(done.token_ids) == 12 for done in alike)
        assert policy.pauses.done == 1

    asyncio.run(run())


def test_a_pause_that_nobody_ends_ends_by_itself() -> None:
    async def run() -> None:
        policy, _ = policy_of()
        tasks = await begun(policy)
        pause = await policy.pause(limit_s=0.05)
        await asyncio.wait_for(asyncio.gather(*tasks), 60.0)
        assert policy.pauses.expired == 1
        assert policy.pause_under_way is None
        assert (await policy.publish(WeightUpdate(1, Path("unread")))).ended_pause != pause.pause_id

    asyncio.run(run())


def test_a_pause_can_be_lengthened_and_says_whether_it_was_unbroken(monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        policy, _ = policy_of(latency_s=0.0)
        tasks = await begun(policy)
        first = await policy.pause(limit_s=10.0)
        for _ in range(5):  # longer together than the first limit
            await asyncio.sleep(4.0)
            assert (await policy.pause(limit_s=10.0)).pause_id == first.pause_id
        assert not any(task.done() for task in tasks)
        await asyncio.sleep(9.5)
        assert not any(task.done() for task in tasks)
        await asyncio.sleep(1.0)
        assert all(task.done() for task in tasks)
        second = await policy.pause(limit_s=10.0)
        assert second.pause_id != first.pause_id
        assert (await policy.pause(limit_s=1.0)).pause_id == second.pause_id
        await asyncio.sleep(1.5)
        assert policy.pause_under_way is None, "it counts from the last call on, also where that is less"
        assert (policy.pauses.done, policy.pauses.expired) == (2, 2)

    with asyncio.Runner(loop_factory=Unhurried) as runner:
        loop = runner.get_loop()
        monkeypatch.setattr(gate, "time", SimpleNamespace(monotonic=loop.time, perf_counter=loop.time))
        runner.run(run())


def test_requests_that_come_during_a_pause_wait() -> None:
    async def run() -> None:
        policy, engine = policy_of(latency_s=0.0)
        await policy.pause(limit_s=30.0)
        tasks = await begun(policy, tokens=0)
        for _ in range(100):
            await asyncio.sleep(0)
        assert (await engine.stats()).sampled_tokens == 0
        await policy.publish(WeightUpdate(1, Path("unread")))
        assert {v for done in await asyncio.gather(*tasks) for v in done.policy_versions} == {1}

    asyncio.run(run())


def test_whoever_listens_has_a_completion_before_its_caller() -> None:
    async def run() -> None:
        policy, _ = policy_of(latency_s=0.0)
        heard: list[tuple[str | None, Completion]] = []
        policy.on_completion = lambda prompt_ids, params, completion: heard.append((params.session, completion))
        done = await policy.complete(PROMPT, PARAMS[2])
        assert heard == [("t2", done)]

    asyncio.run(run())


def test_an_engine_that_cannot_pause_goes_on_sampling() -> None:
    class Stubborn(ScriptedEngine):
        async def pause(self, mode: str = "abort") -> None:  # type: ignore[override]
            raise EngineError("not now")

    async def run() -> None:
        policy = VersionedPolicy(Stubborn(hashed_logits(16)))
        with pytest.raises(EngineError, match="not now"):
            await policy.pause(limit_s=1.0)
        assert policy.pause_under_way is None
        assert len((await policy.complete(PROMPT, PARAMS[0])).token_ids) == 12

    asyncio.run(run())


@pytest.mark.parametrize("limit_s", [0.0, -1.0, float("inf"), float("nan")])
def test_a_pause_without_a_limit_is_refused(limit_s: float) -> None:
    policy, _ = policy_of()
    with pytest.raises(InputError, match="time limit"):
        asyncio.run(policy.pause(limit_s))
