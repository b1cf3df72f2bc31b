"""Several servers as one engine: who gets a request, and what becomes of a server that fails. The servers speak vLLM's
routes and have no model: what they would compute is not the question here (test_vllm_engine.py)."""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import signal
from contextvars import ContextVar
from pathlib import Path

import pytest
from vllm_pretender import HANGS_UP, Pretender, house

from agentgym.engine.gate import VersionedPolicy
from agentgym.engine.protocol import WeightUpdate
from agentgym.engine.vllm.engine import VllmEngine
from agentgym.engine.vllm.seat import Seat
from agentgym.engine.vllm.server import VllmServer, VllmServerOptions
from agentgym.errors import EngineDiedError, EngineError, InputError
from agentgym.policy import SamplingParams

PATIENCE_S = 150.0  # a seat that is filled in vain is tried again after 0, 1, 5, 30 and 60 s


async def until(engine: VllmEngine, *states: str) -> None:
    while [status.state for status in engine.replicas()] != list(states):
        await asyncio.sleep(0.005)


async def ask(policy: VersionedPolicy, session: str | None = None) -> tuple[int, ...]:
    return (await policy.complete([1, 2], SamplingParams(3, seed=1, session=session))).policy_versions


def requests_at(servers: list[Pretender]) -> list[int]:
    return [server.asked["/inference/v1/generate"] for server in servers]


def test_a_session_stays_where_its_keys_are_and_others_go_where_least_is_running(model_of) -> None:
    async def main() -> None:
        async with house(model_of("llama")[0]) as (engine, servers):
            policy = VersionedPolicy(engine)
            for server in servers:
                server.go.clear()
            held = [asyncio.ensure_future(ask(policy, "first"))]
            while sum(requests_at(servers)) < 1:
                await asyncio.sleep(0.001)
            home = requests_at(servers).index(1)
            away = 1 - home
            held += [asyncio.ensure_future(ask(policy, "second")), asyncio.ensure_future(ask(policy, "third"))]
            while sum(requests_at(servers)) < 3:
                await asyncio.sleep(0.001)
            assert requests_at(servers)[away] >= 1, "the second went to the one that had nothing to do"
            before = requests_at(servers)
            for server in servers:
                server.go.set()
            await asyncio.gather(*held)
            for _ in range(5):
                await ask(policy, "second")  # whose server is not the one that is tried first
            assert requests_at(servers)[away] == before[away] + 5
            assert requests_at(servers)[home] == before[home]

    asyncio.run(asyncio.wait_for(main(), PATIENCE_S))


def test_a_replica_that_fails_to_load_is_taken_out_and_never_serves_what_is_old(model_of, perturbed) -> None:
    folder, model = model_of("llama")

    async def main() -> None:
        async with house(folder) as (engine, servers):
            policy = VersionedPolicy(engine)
            right, wrong = servers
            wrong.failing["/finish_weight_update"] = 500, "no memory left"
            report = await policy.publish(WeightUpdate(1, perturbed(model, 1)[0]))
            assert report.loaded_bytes > 0
            assert [status.state == "serving" for status in engine.replicas()] == [True, False]
            before = requests_at(servers)
            assert await asyncio.gather(*(ask(policy, f"s{index}") for index in range(6))) == [(1, 1, 1)] * 6
            assert requests_at(servers) == [before[0] + 6, before[1]]
            while "status 500: " not in engine.replicas()[1].error:  # that of the attempt to bring it back
                await asyncio.sleep(0.005)
            assert "no memory left" in engine.replicas()[1].error
            del wrong.failing["/finish_weight_update"]
            await until(engine, "serving", "serving")
            assert [status.policy_version for status in engine.replicas()] == [1, 1]
            assert engine.replicas()[1].restarts == 1
            right.failing["/finish_weight_update"] = wrong.failing["/finish_weight_update"] = 500, "no memory left"
            with pytest.raises(EngineError, match=r"no replica could load version 2: .*no memory left"):
                await policy.publish(WeightUpdate(2, perturbed(model, 2)[0]))
            assert policy.policy_version == 1

    asyncio.run(asyncio.wait_for(main(), PATIENCE_S))


def test_a_comeback_is_logged_under_nobodys_request(model_of) -> None:
    """The service's log adds whose request a line is about, from a context that every task inherits."""
    whose: ContextVar[str | None] = ContextVar("whose", default=None)
    heard: list[tuple[str, str | None]] = []

    class Hears(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            heard.append((record.getMessage(), whose.get()))

    async def main() -> None:
        async with house(model_of("llama")[0]) as (engine, _):
            whose.set("req-1")
            engine.seats[1].lose("it went away")
            while engine.replicas()[1].restarts < 1:
                await asyncio.sleep(0.005)

    log, hears = logging.getLogger("agentgym.engine.vllm.seat"), Hears()
    before = log.level
    log.addHandler(hears)
    log.setLevel(logging.INFO)
    try:
        asyncio.run(asyncio.wait_for(main(), PATIENCE_S))
    finally:
        log.removeHandler(hears)
        log.setLevel(before)
    assert [who for said, who in heard if "is taken out" in said] == ["req-1"]  # by whoever noticed
    assert [who for said, who in heard if "serves version" in said][-1] is None


def test_who_learns_late_that_a_server_failed_does_not_take_out_the_next_one(model_of) -> None:
    async def main() -> None:
        async with house(model_of("llama")[0]) as (engine, _):
            seat = engine.seats[0]
            failed = seat.replica
            assert failed is not None
            seat.lose("it went away")
            while engine.replicas()[0].restarts < 1:
                await asyncio.sleep(0.005)
            seat.lose("a request that was on it says so now", failed)
            assert seat.state == "serving"
            seat.lose("it went away", seat.replica)
            assert seat.state == "lost"

    asyncio.run(asyncio.wait_for(main(), PATIENCE_S))


def test_a_replica_that_comes_back_as_another_model_stays_out_and_says_so(model_of) -> None:
    async def main() -> None:
        async with house(model_of("llama")[0]) as (engine, servers):
            policy = VersionedPolicy(engine)
            said = "Worker failed with error 'another model: its hidden_size is 64, and not 32', please check the trace"
            servers[1].failing["/init_weight_transfer_engine"] = 500, said
            engine.seats[1].lose("it went away")
            while "another model" not in engine.replicas()[1].error:
                await asyncio.sleep(0.005)
            status = engine.replicas()[1]
            assert status.error.startswith(
                f"{status.name} serves another model: its hidden_size is 64, and not 32; start"
            )
            assert [await ask(policy, f"s{index}") for index in range(4)] == [(0, 0, 0)] * 4
            assert requests_at(servers) == [4, 0]
            loaded = servers[1].asked["/finish_weight_update"]
            assert loaded == 1, "nothing was loaded into the other model"

    asyncio.run(asyncio.wait_for(main(), PATIENCE_S))


def test_a_server_of_another_model_is_refused_at_the_start_before_anything_is_loaded(model_of) -> None:
    async def main() -> None:
        server = Pretender()
        server.failing["/init_weight_transfer_engine"] = 500, "another model: its vocab_size is 9, and not 61"
        async with server.listening():
            with pytest.raises(
                InputError, match=f"{server.url} serves another model: its vocab_size is 9, and not 61; start"
            ):
                await VllmEngine.connect(model_of("llama")[0], [server.url], max_context=64)
            server.failing["/init_weight_transfer_engine"] = 500, "unexpected keyword argument 'config'"
            with pytest.raises(InputError, match="another version of this distribution"):
                await VllmEngine.connect(model_of("llama")[0], [server.url], max_context=64)
        assert not [route for route in server.asked if route.startswith(("/update", "/start", "/pause"))]

    asyncio.run(asyncio.wait_for(main(), PATIENCE_S))


def test_keys_of_one_version_are_never_asked_for_under_another(model_of, perturbed) -> None:
    folder, model = model_of("llama")

    async def main() -> None:
        async with house(folder, 1) as (engine, servers):
            policy = VersionedPolicy(engine)
            for version in (1, 2):
                await ask(policy)
                await policy.publish(WeightUpdate(version, perturbed(model, version)[0]), "keep")
            await ask(policy)
            assert servers[0].salts == [f"{engine.run}:{version}" for version in range(3)]

    asyncio.run(asyncio.wait_for(main(), PATIENCE_S))


def test_a_server_that_somebody_else_has_paused_is_asked_again(model_of) -> None:
    """0.33 answers 503 where 0.32 lets a request wait."""

    async def main() -> None:
        async with house(model_of("llama")[0], 1) as (engine, servers):
            servers[0].failing["/inference/v1/generate"] = 503, "the engine is paused"
            asked = asyncio.ensure_future(ask(VersionedPolicy(engine)))
            while servers[0].asked["/inference/v1/generate"] < 3:
                await asyncio.sleep(0.005)
            assert not asked.done()
            del servers[0].failing["/inference/v1/generate"]
            assert await asked == (0, 0, 0)
            assert [status.state for status in engine.replicas()] == ["serving"]

    asyncio.run(asyncio.wait_for(main(), PATIENCE_S))


def test_a_request_that_only_ever_loses_its_server_fails_typed(model_of) -> None:
    async def main() -> None:
        async with house(model_of("llama")[0]) as (engine, servers):
            for server in servers:
                server.failing["/inference/v1/generate"] = HANGS_UP, ""
            with pytest.raises(EngineError, match=r"a request failed 3 times in a row: vllm at .* went away") as failed:
                await ask(VersionedPolicy(engine))
            assert not isinstance(failed.value, EngineDiedError), "others are served: no reason to end a run"
            assert sorted(requests_at(servers)) == [1, 2], "in turn"

    asyncio.run(asyncio.wait_for(main(), PATIENCE_S))


def test_a_request_goes_on_elsewhere_when_its_server_dies(model_of) -> None:
    async def main() -> None:
        async with house(model_of("llama")[0]) as (engine, servers):
            for route in ("/inference/v1/generate", "/health"):
                servers[0].failing[route] = HANGS_UP, ""
            assert await ask(VersionedPolicy(engine)) == (0, 0, 0)
            assert requests_at(servers) == [1, 1]
            assert engine.replicas()[0].state != "serving"

    asyncio.run(asyncio.wait_for(main(), PATIENCE_S))


def test_a_request_is_tried_on_another_replica_than_the_one_that_failed_it(model_of) -> None:
    async def main() -> None:
        async with house(model_of("llama")[0]) as (engine, servers):
            policy = VersionedPolicy(engine)
            await ask(policy, "s")
            home = requests_at(servers).index(1)
            servers[home].failing["/inference/v1/generate"] = 500, "out of memory"  # and it says that it is well
            assert await ask(policy, "s") == (0, 0, 0)
            assert [requests_at(servers)[home], requests_at(servers)[1 - home]] == [2, 1]
            assert await ask(policy, "s") == (0, 0, 0)
            assert requests_at(servers)[1 - home] == 2, "where the session's keys are now"

    asyncio.run(asyncio.wait_for(main(), PATIENCE_S))


@pytest.mark.parametrize("route", ["/start_weight_update", "/finish_weight_update"])
def test_a_publication_outlives_the_death_of_the_only_replica(model_of, perturbed, route: str) -> None:
    folder, model = model_of("llama")

    async def main() -> None:
        async with house(folder, 1) as (engine, servers):
            policy = VersionedPolicy(engine)
            servers[0].failing[route] = HANGS_UP, ""
            report = await policy.publish(WeightUpdate(1, perturbed(model, 1)[0]))
            assert (report.version, report.loaded_bytes) == (1, 0)
            assert engine.replicas()[0].state != "serving"
            del servers[0].failing[route]
            assert await ask(policy) == (1, 1, 1)
            assert servers[0].label == f"{engine.run}:1"

    asyncio.run(asyncio.wait_for(main(), PATIENCE_S))


def test_a_pause_does_not_wait_for_a_replica_that_waits_for_its_end(model_of) -> None:
    async def main() -> None:
        async with house(model_of("llama")[0], 1) as (engine, servers):
            policy = VersionedPolicy(engine)
            servers[0].failing["/health"] = HANGS_UP, ""
            engine.seats[0].lose("it went away")
            asked = asyncio.ensure_future(ask(policy))
            await asyncio.sleep(0.05)  # it waits for a replica by now
            await asyncio.wait_for(policy.pause(100.0), 60)
            del servers[0].failing["/health"]
            await asyncio.sleep(0.05)
            assert not asked.done()
            await policy.resume()
            assert await asked == (0, 0, 0)

    asyncio.run(asyncio.wait_for(main(), PATIENCE_S))


def test_a_seat_that_cannot_be_filled_says_why_and_is_tried_again(model_of, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(model_of("llama")[0], tmp_path / "model"))

    async def main() -> None:
        async with house(folder, 1) as (engine, servers):
            servers[0].failing["/server_info"] = 200, "what no vLLM says"
            engine.seats[0].lose("it went away")
            while "KeyError: 'vllm_config'" not in engine.replicas()[0].error:
                await asyncio.sleep(0.005)
            assert engine.replicas()[0].state == "lost"
            del servers[0].failing["/server_info"]
            await until(engine, "serving")
            folder.rename(tmp_path / "elsewhere")
            with pytest.raises(InputError, match=rf"folder {folder} cannot be read: .*No such file.*; put it back"):
                engine.check_folder()

    asyncio.run(asyncio.wait_for(main(), PATIENCE_S))


def test_a_seat_that_is_closed_while_it_is_emptied_leaves_no_server(model_of, tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nsleep 60\n")
    python.chmod(0o700)
    options = VllmServerOptions(python, max_context=64)

    async def main() -> None:
        engine = VllmEngine(model_of("llama")[0], 64, "float32")
        seat = Seat(engine, "vllm 0", options, None)
        server = seat.server = await VllmServer.start(model_of("llama")[0], options)
        seat.state = "serving"
        os.kill(server.pid, signal.SIGSTOP)  # so that its end takes longer than this process may stand still
        seat.lose("it went away")
        await asyncio.sleep(0.01)  # it is being ended by now
        assert not server.ended.done()
        os.kill(server.pid, signal.SIGCONT)
        await seat.close()
        assert server.ended.done()
        assert not Path(server.socket).parent.exists()

    asyncio.run(asyncio.wait_for(main(), PATIENCE_S))


@pytest.mark.parametrize(("published", "kept"), [(True, 0), (False, 2)])
def test_a_token_that_no_server_has_labelled_is_sampled_again(model_of, perturbed, published: bool, kept: int) -> None:
    """Tokens come in chunks, and their versions behind the last one. Of a chunk that came behind a publication, from a
    server that died then, nobody knows which were sampled before."""
    folder, model = model_of("llama")

    async def main() -> None:
        async with house(folder, 1) as (engine, servers):
            policy = VersionedPolicy(engine)
            servers[0].dies_behind = 2
            servers[0].go.clear()
            asked = asyncio.ensure_future(policy.complete([1, 2], SamplingParams(5, seed=1)))
            await servers[0].begun.wait()
            if published:
                await policy.publish(WeightUpdate(1, perturbed(model, 1)[0]), "keep")
            servers[0].go.set()
            done = await asked
            version = int(published)
            assert done.policy_versions == done.kv_versions == (version,) * 5
            assert servers[0].wanted == [5, 5 - kept]

    asyncio.run(asyncio.wait_for(main(), PATIENCE_S))


def test_requests_do_not_wait_for_ever_for_a_replica(model_of) -> None:
    async def main() -> None:
        async with house(model_of("llama")[0], 1) as (engine, servers):
            servers[0].failing["/health"] = HANGS_UP, ""
            engine._dispatch._lost_s = 0.2
            engine.seats[0].lose("it went away")
            while "no vLLM server" not in engine.replicas()[0].error:
                await asyncio.sleep(0.005)
            with pytest.raises(
                EngineDiedError, match=r"no vLLM replica has served for 0 s: vllm at .*: no vLLM server"
            ):
                await ask(VersionedPolicy(engine))

    asyncio.run(asyncio.wait_for(main(), PATIENCE_S))
