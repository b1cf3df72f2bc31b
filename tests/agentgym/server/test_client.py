"""The service as a child process: it works, it explains its death, and it never outlives its parent."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from agentgym.config import parse_config
from agentgym.errors import ServiceError, TemplateError, UnknownNameError
from agentgym.server.client import ServiceClient, start_service
from agentgym.server.settings import ServiceConfig
from agentgym.server.wire import Batch

DEADLINE_S = 90.0


def config_of(**sections: Any) -> ServiceConfig:
    rollout = {"group_size": 3, "groups_per_step": 2, "in_flight": 6, "max_tokens_per_turn": 5}
    values: dict[str, Any] = {
        "env": {"id": "maze"},
        "model": {"name": "small"},
        "engine": {"slots": 6},
        "rollout": rollout | {"max_episode_tokens": 120},
    }
    return parse_config(ServiceConfig, values | sections)


def is_alive(pid: int) -> bool:
    """Whether a process is there and not a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def descendants(pid: int) -> list[int]:
    """The process and everything below it."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        children.setdefault(int(fields[1]), []).append(int(stat.parent.name))
    found = [pid]
    for parent in found:
        found += children.get(parent, [])
    return found


def wait_until_gone(pids: list[int]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while (left := [pid for pid in pids if is_alive(pid)]) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not left, f"still there: {left}"


Processes = Callable[[], list[int]]


@pytest.fixture
def service_pids(service_processes: Processes) -> Iterator[Processes]:
    """As service_processes; and when the test is over, none of them is left."""
    yield service_processes
    wait_until_gone(service_processes())


@pytest.fixture
def left_behind() -> Iterator[subprocess.Popen[bytes]]:
    """What an earlier test may have left: a process that looks like a service."""
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)", "agentgym.server"]) as process:
        yield process
        process.kill()


def test_what_came_before_and_what_is_dead_is_not_counted(
    left_behind: subprocess.Popen[bytes], service_processes: Processes
) -> None:
    assert service_processes() == []
    mine = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)", "agentgym.server"])
    try:
        deadline = time.monotonic() + DEADLINE_S  # between fork and exec it still has our arguments
        while service_processes() != [mine.pid] and time.monotonic() < deadline:
            time.sleep(0.01)
        assert service_processes() == [mine.pid]
        mine.kill()
        wait_until_gone([mine.pid])
        left_behind.kill()
        wait_until_gone([left_behind.pid])  # both are zombies now
        assert service_processes() == []
    finally:
        mine.kill()
        mine.wait()


def versions_of(batch: Batch) -> set[int]:
    return {version for g in batch.groups for m in g.members for row in m.sequences for version in row.policy_versions}


def test_a_child_collects_publishes_and_evaluates(random_model: Path, tmp_path: Path, service_pids: Processes) -> None:
    with start_service(config_of(), random_model, tmp_path, tmp_path / "versions") as client:
        pids = service_pids()
        assert len(pids) >= 2  # the service, and the engine in a process of its own
        for pid in pids:  # the key is in nobody's arguments
            command = Path(f"/proc/{pid}/cmdline").read_bytes().decode()
            assert client._http.headers["authorization"].removeprefix("Bearer ") not in command
        client.collect(True)
        first = client.take_batch(0, timeout_s=60)
        weights = load_file(random_model / "model.safetensors")
        path = tmp_path / "versions" / "00000001.safetensors"
        save_file({name: value + 0.01 for name, value in weights.items()}, path)
        assert client.publish(1, path).version == 1
        batches = [client.take_batch(1, timeout_s=60)]
        assert {first.batch_id, batches[0].batch_id} == {"step-000001-0", "step-000002-1"}
        while not versions_of(batches[-1]) >= {1}:  # of version 0 there is as much as max_staleness allows
            assert versions_of(batches[-1]) <= {-1, 0}
            assert len(batches) <= config_of().rollout.max_staleness
            batches.append(client.take_batch(1, timeout_s=60, step=2 + len(batches)))
        assert client.evaluate(6).valid == 6
    wait_until_gone(pids)
    assert (tmp_path / "service.log").exists()
    assert json.loads((tmp_path / "service.json").read_text())["env"]["id"] == "maze"


def test_a_killed_service_is_told_with_the_end_of_its_log(
    random_model: Path, tmp_path: Path, service_pids: Processes
) -> None:
    with start_service(config_of(), random_model, tmp_path, tmp_path / "versions") as client:
        pids = service_pids()
        os.kill(pids[0], signal.SIGKILL)
        with pytest.raises(ServiceError, match="gone: its process was killed by signal 9"):
            client.take_batch(0, timeout_s=60)
        wait_until_gone(pids)  # its engine ended with it


def test_a_killed_engine_is_told_and_nothing_hangs(random_model: Path, tmp_path: Path, service_pids: Processes) -> None:
    from agentgym.errors import EngineDiedError

    with start_service(config_of(), random_model, tmp_path, tmp_path / "versions") as client:
        client.collect(True)
        client.take_batch(0, timeout_s=60)
        service, *engine = service_pids()
        for pid in engine:
            os.kill(pid, signal.SIGKILL)
        with pytest.raises(EngineDiedError):
            client.take_batch(9, timeout_s=60)
        assert is_alive(service)


def test_a_signal_ends_it_in_order(random_model: Path, tmp_path: Path, service_pids: Processes) -> None:
    with start_service(config_of(), random_model, tmp_path, tmp_path / "versions") as client:
        client.collect(True)
        pids = service_pids()
        os.kill(pids[0], signal.SIGTERM)
        wait_until_gone(pids)
        with pytest.raises(ServiceError, match="ended with exit code 0"):
            client.status()
    assert "ending: episodes, environments, engine" in (tmp_path / "service.log").read_text()
    assert "Traceback" not in (tmp_path / "service.log").read_text()


def test_shutdown_by_request(random_model: Path, tmp_path: Path, service_pids: Processes) -> None:
    with start_service(config_of(), random_model, tmp_path, tmp_path / "versions") as client:
        pids = service_pids()
        client.shutdown()
        wait_until_gone(pids)


def test_what_keeps_it_from_starting_keeps_its_class(
    random_model: Path, tmp_path: Path, service_pids: Processes
) -> None:
    with (
        pytest.raises(UnknownNameError, match="unknown environment 'mase'; did you mean 'maze'"),
        start_service(config_of(env={"id": "mase"}), random_model, tmp_path / "a", tmp_path / "versions"),
    ):
        pass
    empty = tmp_path / "empty"
    empty.mkdir()
    with (
        pytest.raises(TemplateError, match="no tokenizer"),
        start_service(config_of(), empty, tmp_path / "b", tmp_path / "versions"),
    ):
        pass


LATE = """
import select, sys
if "agentgym.server" in sys.orig_argv:  # until nobody waits for it any more
    select.select([0], [], [])
"""


def test_a_start_that_takes_too_long_is_ended(
    random_model: Path, tmp_path: Path, service_pids: Processes, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sitecustomize.py").write_text(LATE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with (
        pytest.raises(ServiceError, match="not ready within 0 s"),
        start_service(config_of(), random_model, tmp_path, tmp_path / "versions", startup_s=0.1),
    ):
        pass


TRAINER = """
    import sys, time
    from pathlib import Path
    from agentgym.config import parse_config
    from agentgym.server.client import start_service
    from agentgym.server.settings import ServiceConfig

    config = parse_config(ServiceConfig, {config!r})
    with start_service(config, Path({model!r}), Path({run!r}), Path({run!r}) / "versions") as client:
        client.collect(True)
        client.take_batch(0, timeout_s=60)
        print("training", flush=True)
        time.sleep(600)
"""


def test_the_death_of_the_trainer_ends_service_and_engine(random_model: Path, tmp_path: Path) -> None:
    values = config_of().model_dump(mode="json")
    script = textwrap.dedent(TRAINER).format(config=values, model=str(random_model), run=str(tmp_path))
    trainer = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    try:
        assert trainer.stdout is not None
        assert trainer.stdout.readline() == "training\n"
        pids = descendants(trainer.pid)
        assert len(pids) >= 3
        os.kill(trainer.pid, signal.SIGKILL)
        trainer.wait(DEADLINE_S)
        wait_until_gone(pids)
    finally:
        trainer.kill()
        trainer.wait()
    assert "ending: episodes, environments, engine" in (tmp_path / "service.log").read_text()


def test_serve_in_the_foreground_announces_itself_and_ends_on_ctrl_c(random_model: Path, tmp_path: Path) -> None:
    config = config_of().model_dump(mode="json")
    script = textwrap.dedent(f"""
        import sys
        from pathlib import Path
        from agentgym.config import parse_config
        from agentgym.server.process import serve
        from agentgym.server.settings import ServiceConfig
        say = lambda text: print(text, flush=True)
        config = parse_config(ServiceConfig, {config!r})
        sys.exit(serve(config, Path({str(random_model)!r}), Path({str(tmp_path / "run")!r}), say))
    """)
    server = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        first = server.stdout.readline()
        assert first.startswith("small is served at http://127.0.0.1:")
        url = first.split("served at ")[1].split("/v1")[0]
        server.stdout.readline()
        key_file = tmp_path / "run" / "trainer.key"
        assert key_file.stat().st_mode & 0o777 == 0o600
        with ServiceClient(url, key_file.read_text()) as client:
            assert client.wait_ready(DEADLINE_S).policy_version == 0
        pids = descendants(server.pid)
        server.send_signal(signal.SIGINT)
        assert server.wait(DEADLINE_S) == 0
        wait_until_gone(pids)
    finally:
        server.kill()
        server.wait()
