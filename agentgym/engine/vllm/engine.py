"""vLLM as one engine: N stock servers behind the protocol. Law: a replica serves the version of the engine, or nothing.

A replica that dies is restarted and brought to the current version before it serves again; its requests go on elsewhere
from the tokens they have (dispatch.py). One that fails to take new weights, or whose logprobs are not the
trainer's, is treated as dead. Servers are started here (`VllmEngine.start`) or run already (`VllmEngine.connect`). Must
never know a message.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import secrets
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from agentgym.engine.owned_folder import remove_orphans
from agentgym.engine.protocol import EngineStats, PauseMode, Probe, WeightUpdate
from agentgym.engine.vllm.adapters import AdapterShelf
from agentgym.engine.vllm.carrier import PREFIX, SenderOptions, check_senders
from agentgym.engine.vllm.dispatch import Dispatch
from agentgym.engine.vllm.facts import shape_of
from agentgym.engine.vllm.replica import ReplicaLostError
from agentgym.engine.vllm.sampling import Sampling
from agentgym.engine.vllm.seat import ReplicaStatus, Seat
from agentgym.engine.vllm.server import VllmServerOptions, python_with_vllm, remove_left_folders
from agentgym.engine.vllm.weights import PublishedTensors
from agentgym.errors import EngineDiedError, EngineError, InputError, PromptTooLongError, VersionError
from agentgym.policy import OnTokens, SamplingParams, Segment


class VllmEngine:
    """Make one with `await VllmEngine.start(...)` or `connect(...)`, in the event loop that uses it.

    Example: `engine = await VllmEngine.start(Path("model"), options, replicas=2)`.
    """

    def __init__(
        self,
        model_folder: Path,
        max_context: int,
        dtype: str,
        max_lora_rank: int | None = None,
        lost_s: float = 600.0,
        senders: SenderOptions | None = None,
    ) -> None:
        self.max_context = max_context
        self.policy_version = 0
        self.run = secrets.token_hex(4)
        self.seats: list[Seat] = []
        self.model_folder = model_folder
        self.dtype = dtype
        self.max_lora_rank = max_lora_rank
        self.senders = senders
        self.going = asyncio.Event()
        self.going.set()
        config = _config(model_folder)
        self.shape: Mapping[str, Any] = shape_of(config)
        self._vocab_size = int(config["vocab_size"])
        self._files = _files(model_folder)
        self._update: WeightUpdate | None = None  # what is served; None: the weights of the model's folder
        self._prepared: tuple[WeightUpdate, PublishedTensors] | None = None
        self._probe: tuple[int, Probe] | None = None  # the last one, and its version
        self._base: PublishedTensors | None = None
        self._pause: PauseMode | None = None
        self._dispatch = Dispatch(self.seats, lost_s)
        self._shelf = AdapterShelf()

    @classmethod
    async def start(
        cls,
        model_folder: Path,
        options: VllmServerOptions,
        *,
        replicas: int = 1,
        devices: Sequence[str] = (),
        senders: SenderOptions | None = None,
    ) -> VllmEngine:
        """Starts `replicas` servers, each on its GPUs of `devices`, and waits until all serve. Raises InputError and
        its kin, EngineDiedError."""
        if replicas < 1:
            raise InputError(f"engine.replicas must be >= 1, got {replicas}")
        build = await python_with_vllm(options.python)
        if devices and build == "cpu":
            raise InputError(f"engine.vllm_devices names GPUs, and {options.python} has vLLM's build for CPUs")
        if devices and len(devices) != replicas:
            raise InputError(f"engine.vllm_devices must name the GPUs of {replicas} servers, got {list(devices)}")
        if senders is not None:
            await check_senders(senders)
            options = dataclasses.replace(options, backend=senders.backend)
        options = dataclasses.replace(options, build=build)
        engine = cls(model_folder, options.max_context, options.dtype, options.max_lora_rank, senders=senders)
        for index in range(replicas):
            own = dataclasses.replace(options, devices=devices[index] if devices else "")
            engine.seats.append(Seat(engine, f"vllm {index}", own, None, index))
        return await engine._begin()

    @classmethod
    async def connect(
        cls,
        model_folder: Path,
        urls: Sequence[str],
        *,
        max_context: int,
        dtype: str = "float32",
        max_lora_rank: int | None = None,
        senders: SenderOptions | None = None,
    ) -> VllmEngine:
        """Takes over running servers, which get the weights of `model_folder`. Raises InputError for one that lacks
        what correctness needs, EngineDiedError for one that does not answer."""
        if not urls or len(set(urls)) != len(urls):
            raise InputError(f"engine.vllm_urls must be one or more different URLs, got {list(urls)}")
        if senders is not None:
            await check_senders(senders)
            await python_with_vllm(senders.python)
        engine = cls(model_folder, max_context, dtype, max_lora_rank, senders=senders)
        engine.seats += [Seat(engine, f"vllm at {url}", None, url, index) for index, url in enumerate(urls)]
        return await engine._begin()

    async def _begin(self) -> VllmEngine:
        await asyncio.to_thread(remove_left_folders)
        await asyncio.to_thread(remove_orphans, PREFIX, Path(tempfile.gettempdir()))
        await asyncio.to_thread(self._shelf.remove_orphans)
        try:
            async with asyncio.TaskGroup() as group:  # one that cannot start ends the start of all
                for seat in self.seats:
                    group.create_task(seat.fill())
        except BaseExceptionGroup as errors:
            await self.close()
            raise errors.exceptions[0] from None
        except BaseException:
            await self.close()
            raise
        return self

    # ------------------------------------------------------------------------------------------------- sampling

    async def sample(
        self, prompt_ids: Sequence[int], params: SamplingParams, on_tokens: OnTokens | None = None
    ) -> tuple[Segment, ...]:
        """As Engine.sample. A request outlives the replicas that it runs on; EngineDiedError when none comes back.

        Under adapters, one that is kept over a publication goes on under the adapter that it began with."""
        self._check(prompt_ids, params)
        work = Sampling(list(prompt_ids), params, on_tokens)
        await self._dispatch.run(work)
        return work.segments(self.policy_version)

    def _check(self, prompt_ids: Sequence[int], params: SamplingParams) -> None:
        self._check_open()
        if not prompt_ids:
            raise InputError("a prompt must have at least one token")
        least, most = min(prompt_ids), max(prompt_ids)
        if least < 0 or most >= self._vocab_size:
            raise InputError(f"prompt ids must be in [0, {self._vocab_size}), got {least}..{most}")
        if len(prompt_ids) + params.max_tokens > self.max_context:
            raise PromptTooLongError(
                f"a prompt of {len(prompt_ids)} tokens and max_tokens {params.max_tokens} do not fit the context of "
                f"{self.max_context}; shorten one of them or raise engine.max_context"
            )

    def _check_open(self) -> None:
        if self._dispatch.closed:
            raise EngineDiedError("the vLLM engine was closed")

    # -------------------------------------------------------------------------------------------------- weights

    async def prepare(self, update: WeightUpdate) -> None:
        """As Engine.prepare: the file is read, and every replica has compared what it mapped with what was read. An
        adapter is loaded by every replica, beside the one that it serves."""
        self._check_newer(update)
        published = await asyncio.to_thread(PublishedTensors.read, update.path.absolute())
        self._check_kind(published, update.version)
        self._shelf.keep(self.named() | {update.version})
        serving = self._serving()
        replicas = [seat.replica for seat in serving]
        results = await asyncio.gather(
            *(seat.stage(update.version, published) for seat in serving), return_exceptions=True
        )
        for seat, replica, result in zip(serving, replicas, results, strict=True):
            if isinstance(result, ReplicaLostError):
                seat.lose(str(result), replica)
        refusals = _refusals(results)
        if refusals and None not in results:
            raise refusals[0]
        self._prepared = update, published

    async def pause(self, mode: PauseMode = "abort") -> None:
        """As Engine.pause. A replica that does not obey is taken out."""
        self._check_open()
        self._pause = mode
        self._dispatch.paused = True
        self.going.clear()
        self._dispatch.wake()  # who waits for a replica gets none in a pause, and a replica waits for its end
        serving = self._serving()
        results = await asyncio.gather(*(seat.pause(mode) for seat in serving), return_exceptions=True)
        for seat, result in zip(serving, results, strict=True):
            if isinstance(result, BaseException):
                seat.lose(f"does not pause: {result}")
        if mode == "abort":
            await self._dispatch.cut()

    async def load(self, update: WeightUpdate) -> int:
        """As Engine.load. Replicas that fail are taken out and restarted; EngineError where none could load, unless all
        have died: they come back with the new version."""
        if self._pause is None:
            raise EngineError("weights can be loaded only while the engine is paused")
        if self._prepared is None or self._prepared[0] != update:
            await self.prepare(update)
        self._check_newer(update)
        assert self._prepared is not None
        published = self._prepared[1]
        serving = self._serving()
        results = await asyncio.gather(
            *(seat.load(update.version, published) for seat in serving), return_exceptions=True
        )
        self._prepared = None
        loaded = [result for result in results if isinstance(result, int)]
        for seat, result in zip(serving, results, strict=True):
            if isinstance(result, BaseException):
                seat.lose(f"failed to load version {update.version}: {result}")
        refusals = _refusals(results)
        if refusals and not loaded:
            raise EngineError(f"no replica could load version {update.version}: {refusals[0]}")
        self.policy_version, self._update = update.version, update
        return max(loaded, default=0)  # where none serves just now, each loads it before it does

    async def resume(self) -> None:
        """As Engine.resume."""
        serving = self._serving()
        results = await asyncio.gather(*(seat.resume() for seat in serving), return_exceptions=True)
        for seat, result in zip(serving, results, strict=True):
            if isinstance(result, BaseException):
                seat.lose(f"does not resume: {result}")
        self._pause = None
        self._dispatch.paused = False
        self.going.set()
        self._dispatch.wake()

    def _check_newer(self, update: WeightUpdate) -> None:
        if update.version <= self.policy_version:
            raise VersionError(
                f"version {update.version} cannot be loaded: the engine serves {self.policy_version}, and versions "
                "only go up"
            )

    def _check_kind(self, published: PublishedTensors, version: int) -> None:
        if published.adapter_config is not None and self.max_lora_rank is None:
            raise EngineError(
                f"version {version} is an adapter, and these servers take none; set engine.max_lora_rank to its rank"
            )

    async def verify(self, probe: Probe) -> float | None:
        """As VerifyingEngine.verify: every replica scores the probe, between its requests."""
        self._probe = self.policy_version, probe
        serving = self._serving()
        replicas = [seat.replica for seat in serving]
        results = await asyncio.gather(*(seat.off(probe) for seat in serving), return_exceptions=True)
        differences: list[float] = []
        wrong: list[str] = []
        for seat, replica, result in zip(serving, replicas, results, strict=True):
            if isinstance(result, float):
                differences.append(result)
            if isinstance(result, ReplicaLostError):  # it has died meanwhile, and is compared before it serves again
                seat.lose(str(result), replica)
            elif isinstance(result, BaseException) or not result <= probe.tolerance:
                what = f"cannot be compared ({result})" if isinstance(result, BaseException) else f"off by {result:.2g}"
                wrong.append(f"{seat.name} {what}")
                seat.lose(f"its logprobs after version {self.policy_version} are not the trainer's: {what}", replica)
        if wrong and len(wrong) == len(serving):
            raise EngineError(
                f"after version {self.policy_version} no replica has the trainer's logprobs: {', '.join(wrong)}, where "
                f"{probe.tolerance:g} is allowed; all are taken out. Either the weights arrived wrong, or the engine "
                "computes this model differently (another dtype, attention or rotary scaling than the trainer's)"
            )
        return max(differences, default=None)

    # ------------------------------------------------------------------------------------------------- everybody's

    def replicas(self) -> tuple[ReplicaStatus, ...]:
        """All replicas and what they serve."""
        return tuple(seat.status() for seat in self.seats)

    def _serving(self) -> list[Seat]:
        return [seat for seat in self.seats if seat.state == "serving"]

    def check_folder(self) -> None:
        """Raises InputError where the model's folder holds something else than when the engine began."""
        now = _files(self.model_folder)
        changed = sorted(name for name in self._files.keys() | now.keys() if self._files.get(name) != now.get(name))
        if changed:
            raise InputError(
                f"{', '.join(changed)} in the model's folder {self.model_folder} changed since this engine began with "
                "it, and a server that reads it now would serve another model; start the service again, with a folder "
                "that stays"
            )

    def serves(self) -> tuple[int, Path | None]:
        """The version that a replica must have, and the file that has its weights (None: the model's folder)."""
        return self.policy_version, self._update.path if self._update is not None else None

    def probe(self) -> Probe | None:
        """What a replica must agree with before it serves; None where the trainer has sent nothing for this version."""
        return self._probe[1] if self._probe is not None and self._probe[0] == self.policy_version else None

    async def base(self) -> PublishedTensors | None:
        """The weights in the model's folder, read once; None where they are no single file."""
        path = self.model_folder / "model.safetensors"
        if self._base is None and path.is_file():
            self._base = await asyncio.to_thread(PublishedTensors.read, path.absolute())
        return self._base

    def adapter_folder(self, version: int, published: PublishedTensors) -> Path:
        """Where `published`, an adapter, lies for a server of this machine."""
        return self._shelf.put(version, published)

    def named(self) -> set[int]:
        """The versions that a request names, or will."""
        return {self.policy_version} | {call.version for call in self._dispatch.calls}

    def seat_changed(self, seat: Seat) -> None:
        """A replica has come to serve, or is lost with the requests on it, which go on elsewhere."""
        if seat.state != "serving":
            self._dispatch.lose(seat)
        self._dispatch.wake()

    async def stats(self) -> EngineStats:
        """As Engine.stats; a server's queue is part of what is running."""
        running, dispatch = sum(seat.running for seat in self.seats), self._dispatch
        return EngineStats(self.policy_version, running, 0, dispatch.sampled, dispatch.prompted, dispatch.busy_s)

    async def close(self) -> None:
        """Ends servers that were started here, and every request with EngineDiedError; idempotent."""
        self._dispatch.close()
        await asyncio.gather(*(seat.close() for seat in self.seats))
        self._shelf.close()


def _refusals(results: Sequence[object]) -> list[BaseException]:
    """What servers that live would not do; one that died says nothing of what it was asked."""
    errors = [result for result in results if isinstance(result, BaseException)]
    return [error for error in errors if not isinstance(error, ReplicaLostError)]


def _files(model_folder: Path) -> dict[str, tuple[int, int]]:
    """Size and time of the files that make the model. Raises InputError."""
    kinds = (".safetensors", ".bin", ".index.json")
    try:
        paths = [path for path in model_folder.iterdir() if path.name == "config.json" or path.name.endswith(kinds)]
        return {path.name: ((stat := path.stat()).st_size, stat.st_mtime_ns) for path in paths}
    except OSError as error:
        raise InputError(f"the model's folder {model_folder} cannot be read: {error}; put it back") from error


def _config(model_folder: Path) -> dict[str, Any]:
    """What config.json says of the text model. Raises InputError where it says no vocab_size."""
    try:
        config: dict[str, Any] = json.loads((model_folder / "config.json").read_text(encoding="utf-8"))
        config = config.get("text_config") or config
        return config | {"vocab_size": int(config["vocab_size"])}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(f"no model at {model_folder}: its config.json says no vocab_size ({error!r})") from error
