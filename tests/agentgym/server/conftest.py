"""A real HTTP server in a thread, over a scripted engine or a tiny random torch model."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from outside_agents import Service, sessions_config

from agentgym.config import parse_config
from agentgym.engine.protocol import Engine
from agentgym.render import load_renderer
from agentgym.rollout.demonstrations import Mixture, write_demonstrations
from agentgym.server.app import create_app
from agentgym.server.client import ServiceClient
from agentgym.server.connection import ConnectionLimits
from agentgym.server.door import Door, Limits
from agentgym.server.keys import Keyring, Keys
from agentgym.server.process import listen, serve_http, url
from agentgym.server.service import RolloutService
from agentgym.server.settings import ServiceConfig
from agentgym.testing.scripted_engine import ScriptedEngine, hashed_logits

KEY = "the-trainers-key-of-this-test"
PATIENCE_S = 60.0  # of callers: a machine that stands still for seconds is no failure
httpx._config.DEFAULT_TIMEOUT_CONFIG.__dict__.update(httpx.Timeout(PATIENCE_S).__dict__)  # in the place of 5 s
CONNECTION = ConnectionLimits(max_connections=256, max_head_s=30.0, max_read_s=30.0)
LIMITS = Limits(max_body_bytes=50_000, max_body_s=30.0, max_requests=64, max_request_s=60.0, connection=CONNECTION)


def config_of(**rollout: Any) -> ServiceConfig:
    """A small run on the maze."""
    small = {"group_size": 3, "groups_per_step": 2, "in_flight": 6, "max_tokens_per_turn": 5, "max_episode_tokens": 120}
    values = {"env": {"id": "maze"}, "model": {"name": "small"}, "rollout": small | rollout}
    return parse_config(ServiceConfig, values)


@pytest.fixture(scope="session")
def maze_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tokenizer, template and configuration of a tiny maze model that has no weights."""
    folder = tmp_path_factory.mktemp("maze-tokenizer")
    write_demonstrations("maze", 200, 0, folder, Mixture())
    size = max(load_renderer(folder).encoder.control_ids) + 1
    (folder / "config.json").write_text(json.dumps({"model_type": "scripted", "vocab_size": size}))
    return folder


@pytest.fixture(scope="session")
def random_model(maze_folder: Path) -> Path:
    """The same folder with a random model in it."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        vocab_size=max(load_renderer(maze_folder).encoder.control_ids) + 1, hidden_size=32, intermediate_size=48,
        num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=256,
        bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(maze_folder)
    return maze_folder


@dataclass
class Server:
    """A running service: its address, its client, and the thread's loop."""

    url: str
    client: ServiceClient
    service: RolloutService
    door: Door
    loop: asyncio.AbstractEventLoop
    versions_dir: Path
    run_dir: Path

    def weights(self, version: int) -> Path:
        """A file where the weights of `version` would be; a scripted engine does not read it."""
        path = self.versions_dir / f"{version:08d}.safetensors"
        path.write_bytes(b"")
        return path


EngineFactory = Callable[[ServiceConfig, Path], Awaitable[Engine]]


async def scripted(config: ServiceConfig, folder: Path) -> Engine:
    size = max(load_renderer(folder).encoder.control_ids) + 1
    return ScriptedEngine(hashed_logits(size), max_context=config.max_context)


@contextlib.contextmanager
def running(
    folder: Path,
    run_dir: Path,
    config: ServiceConfig | None = None,
    engine_factory: EngineFactory = scripted,
    openai_key: str | None = None,
    limits: Limits = LIMITS,
) -> Iterator[Server]:
    config = config or config_of()
    versions_dir = run_dir / "versions"
    versions_dir.mkdir(parents=True)
    listener = listen(config.server)
    ready: Future[tuple[RolloutService, Door, asyncio.AbstractEventLoop, asyncio.Event]] = Future()

    async def main() -> None:
        service = await RolloutService.start(config, folder, run_dir, versions_dir, engine_factory)
        stop = asyncio.Event()
        app = create_app(service, Keyring(Keys(KEY, openai_key)), stop.set, limits)
        stopped = asyncio.ensure_future(stop.wait())
        stopped.add_done_callback(lambda _: service.collector.end_waiting())
        loop = asyncio.get_running_loop()
        try:
            begun = (service, app, loop, stop)
            await serve_http(app, listener, lambda: ready.set_result(begun), stopped, 0.5, asyncio.Event())
        finally:
            await service.close()

    def thread() -> None:
        try:
            asyncio.run(main())
        except BaseException as error:
            if not ready.done():
                ready.set_exception(error)
            raise

    runner = threading.Thread(target=thread, daemon=True)
    runner.start()
    service, door, loop, stop = ready.result(2 * PATIENCE_S)
    address = url(listener, config.server)
    try:
        with ServiceClient(address, KEY) as client:
            yield Server(address, client, service, door, loop, versions_dir, run_dir)
    finally:
        loop.call_soon_threadsafe(stop.set)
        runner.join(PATIENCE_S)
        assert not runner.is_alive()


@pytest.fixture
def limits() -> Limits:
    """What servers of tests allow, where a test says nothing else."""
    return LIMITS


@pytest.fixture
def start(tmp_path: Path, maze_folder: Path) -> Iterator[Callable[..., Server]]:
    """Starts servers that end with the test."""
    with contextlib.ExitStack() as stack:
        count = 0

        def begin(folder: Path | None = None, **options: Any) -> Server:
            nonlocal count
            count += 1
            return stack.enter_context(running(folder or maze_folder, tmp_path / f"run{count}", **options))

        yield begin


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, maze_folder: Path) -> Iterator[Server]:
    """One server for tests that only ask."""
    with running(maze_folder, tmp_path_factory.mktemp("shared") / "run") as server:
        yield server


@pytest.fixture
def service(start: Callable[..., Server]) -> Iterator[Callable[..., Service]]:
    """Starts services that train on sessions; `options` are those of sessions_config."""
    with contextlib.ExitStack() as stack:

        def begin(
            openai_key: str | None = None, collect: bool = True, engine: Any = scripted, **options: Any
        ) -> Service:
            config = sessions_config(**options)
            server = start(config=config, openai_key=openai_key, engine_factory=engine)
            if collect:
                server.client.collect(True)
            headers = {"Authorization": f"Bearer {openai_key}"} if openai_key else {}
            http = httpx.Client(base_url=server.url, headers=headers, timeout=PATIENCE_S, trust_env=False)
            return Service(server, stack.enter_context(http))

        yield begin


@pytest.fixture
def service_processes() -> Callable[[], list[int]]:
    """Asks for the services that this test started and what lives below them, a service before its engine.

    What other tests left below this process, and zombies, are none of a test's business: a process counts if it came
    after the test began.
    """
    began = set(psutil.Process().children())  # by pid and birth, so that a pid that comes again is another one

    def ask() -> list[int]:
        services = [child for child in psutil.Process().children() if child not in began and _is_service(child)]
        below = [one for service in services for one in _living(service)]
        return [service.pid for service in services] + [one.pid for one in below]

    return ask


def _is_service(process: psutil.Process) -> bool:
    try:  # a zombie has no command line, and a process may become one between two questions
        return _is_alive(process) and "agentgym.server" in process.cmdline()
    except psutil.NoSuchProcess:
        return False


def _living(process: psutil.Process) -> list[psutil.Process]:
    try:
        return [one for one in process.children(recursive=True) if _is_alive(one)]
    except psutil.NoSuchProcess:
        return []


def _is_alive(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
