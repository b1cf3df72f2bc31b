"""One vLLM server over HTTP. Law: a token has the version that the server itself stamped on it; a request that the
server cannot finish leaves what it has sampled with the caller.

The routes are vLLM's own: /inference/v1/generate for tokens in and tokens out, and those that pause, update and resume.
A weight version is `RUN:NUMBER` there, so that weights which somebody else has loaded are seen. Must never know
messages, processes or other replicas.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import msgspec

from agentgym.engine.protocol import PauseMode
from agentgym.engine.vllm.facts import ServerFacts, understood
from agentgym.engine.vllm.sampling import Sampling
from agentgym.engine.vllm.stream import StreamClient
from agentgym.engine.vllm.weights import PublishedTensors
from agentgym.errors import EngineDiedError, EngineError, InputError
from agentgym.policy import FinishReason

_INTERVAL = 16  # tokens a chunk where nobody listens: enough to lose little with a server that dies
_LOST_LOGPROB = -9998.0  # vLLM says -9999 for what is not finite
_FINISH: dict[str, FinishReason] = {"stop": "stop", "length": "length", "abort": "abort"}
_PAUSED = 503  # what 0.33 says to a request while it is paused; 0.32 lets it wait


class ReplicaLostError(EngineDiedError):
    """The server is gone, or answers no more."""


class ForeignWeightsError(EngineError):
    """The server has weights that this run did not publish."""


class ReplicaPausedError(EngineError):
    """The server takes no requests just now."""


@dataclass(slots=True)
class _Asked:
    """What a request met: tokens that it has already, the version that was served, and whether that is an adapter."""

    start: int
    version: int
    adapted: bool
    heard: int  # the version under which its last tokens arrived


class VllmReplica:
    """A server that answers at `url`, or at the Unix socket `socket`. `run` names this run in its weight versions."""

    def __init__(self, name: str, run: str, *, url: str | None = None, socket: str | None = None) -> None:
        self.name = name
        self.url = url
        self.version = 0
        self.adapted = False  # whether the version is an adapter, which its requests name
        self._run = run
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        transport = httpx.AsyncHTTPTransport(uds=socket, limits=limits) if socket else None
        self._http = httpx.AsyncClient(
            base_url=(url or "http://vllm").rstrip("/"), transport=transport, limits=limits, timeout=None,
            trust_env=False,
        )  # fmt: skip
        self._streams = StreamClient(url=url, socket=socket)

    # ------------------------------------------------------------------------------------------------- sampling

    async def sample(self, work: Sampling) -> None:
        """Continues `work` to its end, or to where the server interrupts it.

        Raises ReplicaLostError or ReplicaPausedError, and what has come until then is in `work`; EngineError.
        """
        asked = _Asked(len(work.token_ids), self.version, self.adapted, self.version)
        try:
            async with self._streams.post("/inference/v1/generate", self._request(work)) as answer:
                if answer.status != 200:
                    raise self._refusal(answer.status, await answer.read())
                async for line in answer.lines():
                    if line.startswith(b"data: {"):
                        self._take(msgspec.json.decode(line[len(b"data: ") :]), work, asked)
                        if work.finish_reason is not None:
                            answer.suffices = True
                            break
        except EngineError:  # some of which are OSErrors, too
            raise
        except (OSError, EOFError, ValueError, asyncio.LimitOverrunError) as error:
            if work.finish_reason is None:
                raise ReplicaLostError(f"{self.name} went away: {type(error).__name__}: {error}") from error
        if work.finish_reason is None:
            raise ReplicaLostError(f"{self.name} ended a reply half-way")

    def _request(self, work: Sampling) -> dict[str, Any]:
        params, context = work.params, [*work.prompt_ids, *work.token_ids]
        sampling: dict[str, Any] = {
            "max_tokens": params.max_tokens - len(work.token_ids),
            "temperature": params.temperature,
            "logprobs": 0,
            "ignore_eos": True,  # stop tokens are the caller's, and only those
            "stop_token_ids": list(params.stop_token_ids),
            "detokenize": False,
            "stream_interval": 1 if work.on_tokens else _INTERVAL,
        }
        if params.seed is not None:
            sampling["seed"] = derived_seed(params.seed, len(context))
        return {"token_ids": context, "sampling_params": sampling, "stream": True, **self._weights()}

    def _weights(self) -> dict[str, str]:
        """What a request says of the weights that it wants; keys of others are never found in the prefix cache."""
        label = self.label(self.version)
        return {"cache_salt": label, "model": label} if self.adapted else {"cache_salt": label}

    def _take(self, chunk: dict[str, Any], work: Sampling, asked: _Asked) -> None:
        if "error" in chunk:
            raise self._refusal(int(chunk["error"].get("code") or 500), json.dumps(chunk["error"]).encode())
        if not chunk.get("choices"):
            return
        choice = chunk["choices"][0]
        logprobs = [entry["logprob"] for entry in (choice.get("logprobs") or {}).get("content") or ()]
        if any(logprob <= _LOST_LOGPROB for logprob in logprobs):
            raise EngineError(f"the model's logits are not finite (policy version {self.version})")
        if len(logprobs) != len(choice["token_ids"]):
            raise EngineError(f"{self.name} sent {len(choice['token_ids'])} tokens with {len(logprobs)} logprobs")
        start, served = asked.start, asked.version
        version = served if asked.adapted else self.version
        if version != asked.heard and work.doubtful is None:  # some of these may be from before the publication
            work.doubtful = len(work.token_ids)
        asked.heard = version
        work.add(choice["token_ids"], logprobs, version, served)
        reason = choice.get("finish_reason")
        if reason is None:
            return
        if reason not in _FINISH:
            raise EngineError(f"{self.name} ended a request with {reason!r}")
        spans = choice.get("weight_versions") or []
        if len(work.token_ids) > start and (not spans or spans[-1]["end"] != len(work.token_ids) - start):
            raise EngineError(f"{self.name} gives no weight versions for its tokens, but {spans}")
        labels = [(start + span["start"], self._number(span["version"]), served) for span in spans]
        if asked.adapted:  # a request keeps the adapter that it named, whatever is served meanwhile
            labels = [(start, served, served)]
        work.relabel(start, [label for label in labels if label[0] < len(work.token_ids)])
        work.finish_reason = _FINISH[reason]

    def _refusal(self, status: int, body: bytes) -> EngineError:
        said = body[:500].decode(errors="replace")
        if status == _PAUSED:
            return ReplicaPausedError(f"{self.name} is paused: {said}")
        if status >= 500:
            return ReplicaLostError(f"{self.name} failed with status {status}: {said}")
        return EngineError(f"{self.name} refuses a request with status {status}: {said}")

    def label(self, version: int) -> str:
        return f"{self._run}:{version}"

    def _number(self, label: str) -> int:
        run, _, number = label.rpartition(":")
        if run != self._run or not number.isdigit():
            raise ForeignWeightsError(
                f"{self.name} sampled under weights {label!r}, which this run ({self._run}) did not publish; somebody "
                "else updates this server"
            )
        return int(number)

    async def score(self, token_ids: Sequence[int]) -> list[float]:
        """The logprobs of `token_ids[1:]` under the weights now served, by one forward. Not while it is paused, nor on
        a server that takes adapters: 0.32 ends there at such a request, unless it is alone in its batch."""
        sampling = {"max_tokens": 1, "temperature": 1.0, "prompt_logprobs": 0, "detokenize": False}
        answer = await self._generate(list(token_ids), sampling)
        rows = answer.get("prompt_logprobs") or []
        if len(rows) != len(token_ids):
            raise EngineError(f"{self.name} scored {len(rows)} of {len(token_ids)} tokens")
        return [row[str(token)]["logprob"] for row, token in zip(rows[1:], token_ids[1:], strict=True)]

    async def off_at(self, token_ids: Sequence[int], position: int, wanted: float) -> float:
        """How far the logprob of the token at `position` is from `wanted`, by a request like any other. At least so
        far, where the token is not among the likeliest that a server tells."""
        sampling = {"max_tokens": 1, "temperature": 1.0, "logprobs": _LIKELIEST, "detokenize": False}
        answer = await self._generate(list(token_ids[:position]), sampling)
        (content,) = answer["choices"][0]["logprobs"]["content"]
        told = {entry["token_id"]: float(entry["logprob"]) for entry in content["top_logprobs"]}
        token = token_ids[position]
        if token in told:
            return abs(told[token] - wanted)
        del told[content["token_id"]]  # the sampled one is told whatever its rank, the others are the likeliest
        return max(wanted - min(told.values()), 0.0)

    async def _generate(self, token_ids: list[int], sampling: dict[str, Any]) -> dict[str, Any]:
        request = {"token_ids": token_ids, "sampling_params": sampling, **self._weights()}
        try:
            return await self._post("/inference/v1/generate", request)
        except ReplicaLostError:
            raise
        except EngineError as error:
            if not await self.answers():
                raise ReplicaLostError(str(error)) from error
            raise

    # -------------------------------------------------------------------------------------------------- weights

    async def pause(self, mode: PauseMode) -> None:
        """Returns when the server computes nothing any more."""
        # told to clear its caches, 0.32 computes the keys of kept requests again, and they would not be kept
        await self._post(f"/pause?mode={mode}&clear_cache={'false' if mode == 'keep' else 'true'}")

    async def interrupt(self) -> None:
        """Ends every request behind what it was given, and the server takes others; a step under way is for nobody."""
        await self._post("/abort_requests", {})

    async def resume(self) -> None:
        await self._post("/resume")

    async def stage(self, published: PublishedTensors, names: Mapping[str, str]) -> None:
        """Has the server map the tensors `names` and compare their checksums, while it samples."""
        if names:
            await self.open_update({"step": "discard"})
            info = {"step": "stage", "path": str(published.path), "tensors": dict(names)}
            await self._post("/update_weights", {"update_info": info})
            await self._post("/update_weights", {"update_info": {"step": "verify"}})

    async def open_update(self, discard: Mapping[str, Any] | None = None) -> None:
        """Begins an update; one that was begun and never ended is closed before, behind `discard`."""
        try:
            await self._post("/start_weight_update")
        except ReplicaLostError:
            raise
        except EngineError:
            if discard is not None:
                await self._post("/update_weights", {"update_info": dict(discard)})
            await self._post("/finish_weight_update")
            await self._post("/start_weight_update")

    async def load(self, version: int, names: Mapping[str, str]) -> None:
        """Serves what was staged, as `version`; only while paused. A failure leaves weights that nobody knows."""
        if names:
            await self._post("/finish_weight_update", {"weight_version": self.label(version)})
        else:
            await self._post("/update_weight_version", {"new_version": self.label(version)})
        self.loaded(version)

    def loaded(self, version: int) -> None:
        """The server has the weights of `version` by now, and calls them so."""
        self.version, self.adapted = version, False

    async def stage_adapter(self, version: int, folder: Path) -> None:
        """Has the server load the adapter in `folder`, while it samples under others: requests name theirs.

        Each version is a name of its own. With `load_inplace` the server (0.32) would read the adapter again from its
        folder at every step of every request that names it.
        """
        await self._post("/v1/load_lora_adapter", {"lora_name": self.label(version), "lora_path": str(folder)})

    def name_adapter(self, version: int) -> None:
        """Serves the adapter that was staged, as `version`: requests name it from now on."""
        self.version, self.adapted = version, True

    async def tell_version(self) -> None:
        """Has the server call what it serves as requests do."""
        await self._post("/update_weight_version", {"new_version": self.label(self.version)})

    async def forget_adapter(self, version: int) -> None:
        """No request will name `version` any more."""
        await self._post("/v1/unload_lora_adapter", {"lora_name": self.label(version)})

    async def begin(self, version: int) -> None:
        """Calls the weights that a server was started with `version`."""
        await self._post("/update_weight_version", {"new_version": self.label(version)})
        await self._post("/reset_prefix_cache")
        self.version, self.adapted = version, False

    # ------------------------------------------------------------------------------------------------- the server

    async def answers(self) -> bool:
        """Whether the server is up and its engine alive."""
        try:
            return (await self._http.get("/health", timeout=20.0)).status_code == 200
        except httpx.TransportError:
            return False

    async def facts(self) -> ServerFacts:
        """What the server says about itself. Raises InputError where it lacks the routes."""
        routes = (await self._get("/openapi.json")).get("paths", {})
        lacking = [route for route in _ROUTES if route not in routes]
        if lacking:
            raise InputError(
                f"{self.name} has no route {lacking[0]}; start vLLM (0.32 or newer) with VLLM_SERVER_DEV_MODE=1 and "
                "--enable-scale-out"
            )
        told = await self._get("/server_info?config_format=json")
        return ServerFacts.of(told["vllm_config"], takes_adapters="/v1/load_lora_adapter" in routes)

    async def introduce(self, config: Mapping[str, Any]) -> None:
        """Says which model is meant (what config.json says of it). Raises InputError where the server has another."""
        try:
            await self._post("/init_weight_transfer_engine", {"init_info": {"config": dict(config)}})
        except ReplicaLostError:
            raise
        except EngineError as error:
            raise understood(self.name, error) from error

    async def control(self, route: str, body: Mapping[str, Any] | None) -> None:
        """What a sender of weights asks of the server (carrier.py). Raises ReplicaLostError, EngineError."""
        if route == "/start_weight_update":
            await self.open_update()
        else:
            await self._post(route, body)

    async def close(self) -> None:
        with contextlib.suppress(httpx.TransportError, RuntimeError):
            await self._http.aclose()
        await self._streams.close()

    async def _get(self, route: str) -> dict[str, Any]:
        return await self._call(lambda: self._http.get(route, timeout=60.0), route)

    async def _post(self, route: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        close = {"connection": "close"}  # a server that failed a call hangs up, and the next one must not meet that
        return await self._call(lambda: self._http.post(route, json=body, timeout=_CONTROL_S, headers=close), route)

    async def _call(self, send: Callable[[], Any], route: str) -> dict[str, Any]:
        try:
            response: httpx.Response = await send()
        except httpx.TransportError as error:
            raise ReplicaLostError(f"{self.name} went away at {route}: {type(error).__name__}: {error}") from error
        if response.status_code != 200:
            said = response.text[:1000]
            raise EngineError(f"{self.name} failed at {route} with status {response.status_code}: {said}")
        is_json = response.headers.get("content-type", "").startswith("application/json")
        return response.json() if is_json else {}  # of an adapter it says in words that it is loaded


_CONTROL_S = 300.0
_LIKELIEST = 20  # vLLM's limit, unless it is started with another
_ROUTES = (
    "/inference/v1/generate", "/pause", "/resume", "/abort_requests", "/update_weights", "/weight_info", "/server_info",
)  # fmt: skip


def derived_seed(seed: int, position: int) -> int:
    """The seed of a request that begins at `position`: one that is resumed never draws its numbers again."""
    digest = hashlib.blake2b(f"{seed}:{position}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
