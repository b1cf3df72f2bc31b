"""The service as a process: where it listens, who may end it, and in which order it ends.

Law: it ends in order (requests, episodes, environments, sandboxes, engine) on SIGTERM, SIGINT, a shutdown request and,
as a child, on the death of its parent; and it ends in any case, because an order that hangs has a deadline. Requests
that run are answered first, within `server.drain_s`; not on a second signal, and not for a parent that is gone.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import resource
import secrets
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvicorn

from agentgym.errors import AgentGymError, InputError, UnavailableError
from agentgym.server import wire
from agentgym.server.app import create_app
from agentgym.server.door import Door, Limits
from agentgym.server.engines import start_engine
from agentgym.server.keys import Keyring, Keys
from agentgym.server.logs import configure
from agentgym.server.service import EngineFactory, RolloutService
from agentgym.server.settings import ServerSection, ServiceConfig

log = logging.getLogger(__name__)
ENDING_S = 45.0  # for ending in order, which a busy machine makes long; then the process ends out of order
PARENT_S = 0.5  # between two looks at the parent
KEEP_ALIVE_S = 75  # longer than clients keep theirs, so that a request never meets a connection that is being closed
KEY_FILE = "trainer.key"
SPARE_FILES = 512  # for everything but connections


@dataclass(frozen=True, slots=True)
class Listening:
    """Where a started service is found. Example: `Listening("http://127.0.0.1:8000", Keys("k7...", None))`."""

    url: str
    keys: Keys


def serve(
    config: ServiceConfig,
    model_folder: Path,
    run_dir: Path,
    report: Callable[[str], None] = print,
    engine_factory: EngineFactory = start_engine,
) -> int:
    """Runs the service in the foreground until SIGINT or SIGTERM; returns the exit code. The key that a trainer needs
    is left in `run_dir/trainer.key`. Raises InputError and its kin, and the failures of what it starts."""
    if config.server.log_format == "json":
        configure("json")
    run_dir.mkdir(parents=True, exist_ok=True)
    versions_dir = run_dir / "versions"
    versions_dir.mkdir(exist_ok=True)
    key_file = run_dir / KEY_FILE

    def announce(listening: Listening) -> None:
        partial = key_file.with_suffix(".partial")  # whoever waits for the file finds it whole
        partial.unlink(missing_ok=True)
        with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(listening.keys.trainer)
        os.replace(partial, key_file)
        locked = "with the key of server.api_key_file" if listening.keys.openai else "without a key"
        report(f"{config.model.name} is served at {listening.url}/v1 ({locked})")
        report(f"a trainer connects with run.service_url={listening.url} and the key in {key_file}; Ctrl-C ends it")

    return asyncio.run(_run(config, model_folder, run_dir, versions_dir, announce, engine_factory, parent=None))


def run_child(config: ServiceConfig, model_folder: Path, run_dir: Path, versions_dir: Path, ready_fd: int) -> int:
    """Runs the service as a child: says on `ready_fd` where it listens, or why it does not, in one JSON line; ends
    when stdin ends or the parent is gone."""
    parent = os.getppid()

    def say(value: dict[str, str]) -> None:
        with contextlib.suppress(BrokenPipeError):
            os.write(ready_fd, json.dumps(value).encode() + b"\n")
        os.close(ready_fd)

    def announce(listening: Listening) -> None:
        say({"url": listening.url, "key": listening.keys.trainer})

    try:
        return asyncio.run(_run(config, model_folder, run_dir, versions_dir, announce, start_engine, parent))
    except AgentGymError as error:
        log.error("%s: %s", type(error).__name__, error)
        fault = wire.to_fault(error)
        with contextlib.suppress(OSError):  # it may have been said before that the service is ready
            say({"kind": fault.kind, "message": fault.message})
        return error.exit_code


async def _run(
    config: ServiceConfig,
    model_folder: Path,
    run_dir: Path,
    versions_dir: Path,
    announce: Callable[[Listening], None],
    engine_factory: EngineFactory,
    parent: int | None,
) -> int:
    stopping, hurry = asyncio.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()

    def signalled() -> None:
        (hurry if stopping.is_set() else stopping).set()

    def orphaned() -> None:
        hurry.set()
        stopping.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, signalled)
    watching = asyncio.create_task(_watch_parent(parent, orphaned)) if parent is not None else None
    keys = Keys(secrets.token_urlsafe(32), read_key(config.server))
    _raise_file_limit(config.server.max_connections)
    with listen(config.server) as listener:
        starting = asyncio.create_task(
            RolloutService.start(config, model_folder, run_dir, versions_dir, engine_factory)
        )
        stopped = asyncio.create_task(stopping.wait())
        await asyncio.wait((starting, stopped), return_when=asyncio.FIRST_COMPLETED)
        if not starting.done():
            log.info("ended while starting")
            starting.cancel()
            await asyncio.wait((starting,), timeout=ENDING_S)
            return 0
        service = starting.result()
        try:
            app = create_app(service, Keyring(keys), stopping.set, Limits.of(config.server))
            where = Listening(url(listener, config.server), keys)
            stopped.add_done_callback(lambda _: service.collector.end_waiting())
            await serve_http(app, listener, lambda: announce(where), stopped, config.server.drain_s, hurry)
        finally:
            log.info("ending: episodes, environments, engine")
            stopped.cancel()
            if watching is not None:
                watching.cancel()
            closing = asyncio.create_task(service.close())
            done, _ = await asyncio.wait((closing,), timeout=ENDING_S)
            if not done:
                log.error("the order of the end hung for %.0f s; ending without it", ENDING_S)
                end_process(1)
            closing.result()
    return 0


class _Server(uvicorn.Server):
    """Signals are ours: they end episodes and environments too."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def serve_http(
    app: Door,
    listener: socket.socket,
    announce: Callable[[], None],
    stopped: asyncio.Future[Any],
    drain_s: float,
    hurry: asyncio.Event,
) -> None:
    """Serves `app` on `listener` until `stopped` is done and what runs then has ended, or `drain_s` is over, or it is
    to hurry; calls `announce` once it answers."""
    config = uvicorn.Config(
        app, log_config=None, access_log=False, lifespan="off", timeout_graceful_shutdown=2, ws="none",  # pyright: ignore[reportArgumentType]
        timeout_keep_alive=KEEP_ALIVE_S, http=app.connection, proxy_headers=False,  # pyright: ignore[reportArgumentType]
    )  # fmt: skip
    server = _Server(config)
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    while not server.started and not serving.done():
        await asyncio.sleep(0.01)
    if not serving.done():
        announce()
        await asyncio.wait((serving, stopped), return_when=asyncio.FIRST_COMPLETED)
        if not serving.done():
            await app.drain(drain_s, hurry)
        server.should_exit = True
    await serving


def listen(section: ServerSection) -> socket.socket:
    """A listening socket. Raises UnavailableError for an address that cannot be had."""
    try:
        family = socket.getaddrinfo(section.host, section.port, type=socket.SOCK_STREAM)[0][0]
        listener = socket.create_server((section.host, section.port), family=family, backlog=1024)
    except OSError as error:
        raise UnavailableError(f"cannot listen on {section.host}:{section.port}: {error}; choose another") from error
    # What is accepted inherits it. asyncio sets it only where a socket names its protocol, which this one does not; and
    # an answer of two writes, head and body, then waits 40 ms for the caller's delayed acknowledgement of the first.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    listener.setblocking(False)
    return listener


def _raise_file_limit(connections: int) -> None:
    """Each connection is a file, and so is that to a vLLM server behind it."""
    needed = 2 * connections + SPARE_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    allowed = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
    if soft != resource.RLIM_INFINITY and soft < allowed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
    if allowed < needed:
        log.warning(
            "this process may open %d files, server.max_connections=%d may need %d; raise `ulimit -Hn`, or lower it",
            allowed, connections, needed,
        )  # fmt: skip


def url(listener: socket.socket, section: ServerSection) -> str:
    host = f"[{section.host}]" if ":" in section.host else section.host
    return f"http://{host}:{listener.getsockname()[1]}"


def read_key(section: ServerSection) -> str | None:
    """The key of the OpenAI surface, if it has one. Raises InputError for a file that holds none."""
    if section.api_key_file is None:
        return None
    try:
        key = section.api_key_file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"server.api_key_file {section.api_key_file} cannot be read: {error}") from error
    if len(key) < 16:
        raise InputError(f"the key in {section.api_key_file} must have at least 16 characters, got {len(key)}")
    return key


async def _watch_parent(parent: int, orphaned: Callable[[], None]) -> None:
    """Sees the end of stdin, which the parent holds open, and the parent's death (its other children may hold the
    pipe open too)."""
    loop = asyncio.get_running_loop()

    def read() -> None:
        while os.read(0, 4096):
            pass
        with contextlib.suppress(RuntimeError):  # the loop has ended meanwhile
            loop.call_soon_threadsafe(orphaned)

    threading.Thread(target=read, name="parent", daemon=True).start()
    while os.getppid() == parent:
        await asyncio.sleep(PARENT_S)
    orphaned()


def end_process(code: int) -> None:
    """Ends this process without waiting for threads that hang in an environment."""
    logging.shutdown()
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    os._exit(code)
