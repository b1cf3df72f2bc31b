"""Engines as the mismatch lab meets them: over HTTP, tokens in and tokens out. Must never know a model's forward.

Two doors: the rollout service, which starts the engine that training would use and can publish weights to it; and a
vLLM server that runs already, as it is, wrongly configured ones included. Law: what is compared is what came over the
wire; prompt ids are checked against those that were sent.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import httpx
import numpy as np

from agentgym.errors import EngineError, ServiceError
from agentgym.server.client import ServiceClient, start_service
from agentgym.server.settings import ServiceConfig
from agentgym.trajectory import NO_VERSION, TokenSequence
from agentgym.versions import VersionLog

_TIMEOUT_S = 600.0
_ROUNDS = 4  # replies to a prompt at most, where they are short


class LabEngine(Protocol):
    """An engine that samples what the lab asks for."""

    name: str

    def sample(
        self, prompts: Sequence[Sequence[int]], num_tokens: int, temperature: float, seed: int
    ) -> list[TokenSequence]:
        """Replies to all prompts, sampled together; where they end soon, several to each. The same arguments draw the
        same tokens. Raises ServiceError, EngineError."""
        ...

    def chat_ids(self, messages: Sequence[Mapping[str, str]]) -> list[int] | None:
        """The prompt ids that the engine's side makes of a conversation; None where it makes none."""
        ...


class ServedEngine:
    """The engine of a rollout service that the lab started."""

    def __init__(self, name: str, client: ServiceClient, model: str, log: VersionLog) -> None:
        self.name = name
        self._client = client
        self._model = model
        self._log = log
        self._http = httpx.Client(base_url=client.url, timeout=_TIMEOUT_S, trust_env=False)

    @classmethod
    @contextlib.contextmanager
    def started(
        cls, config: ServiceConfig, model_folder: Path, weights: Mapping[str, np.ndarray], scratch: Path
    ) -> Iterator[ServedEngine]:
        """Starts the service on `model_folder`; `weights` are recorded as version 0, which it serves."""
        log = VersionLog(scratch / "versions")
        log.append(weights)
        with start_service(config, model_folder, scratch, scratch / "versions") as client:
            engine = cls(f"{config.engine.kind} engine", client, config.model.name, log)
            try:
                yield engine
            finally:
                engine._http.close()

    def episodes(self) -> list[TokenSequence]:
        """Rows of the environment's episodes, as training gets them."""
        self._client.collect(True)
        batch = self._client.take_batch(0)
        self._client.collect(False)
        return [row for group in batch.groups for member in group.members for row in member.sequences]

    def sample(
        self, prompts: Sequence[Sequence[int]], num_tokens: int, temperature: float, seed: int
    ) -> list[TokenSequence]:
        asked = [(prompt, seed + index) for index, prompt in enumerate(list(prompts) * _ROUNDS)]
        rows: list[TokenSequence] = []
        with ThreadPoolExecutor(len(prompts)) as threads:
            for start in range(0, len(asked), len(prompts)):
                part = asked[start : start + len(prompts)]
                rows += threads.map(lambda one: self._row(one[0], num_tokens, temperature, one[1]), part)
                if sum(row.num_loss_tokens for row in rows) >= len(prompts) * num_tokens // 2:
                    break
        return rows

    def publish(self, weights: Mapping[str, np.ndarray]) -> int:
        """Serves `weights` from now on; returns their version."""
        version = self._log.append(weights)
        self._client.publish(version, self._log.path(version))
        return version

    def sample_through_publication(
        self, prompts: Sequence[Sequence[int]], num_tokens: int, seed: int, weights: Mapping[str, np.ndarray]
    ) -> tuple[int, list[TokenSequence]]:
        """Publishes `weights` while every prompt is being answered, again and again, since replies may be short.
        Returns their version and the rows that were under way."""
        version = self._log.append(weights)
        rows: list[TokenSequence] = []
        going, published = threading.Event(), threading.Event()

        def keep_sampling(index: int) -> None:
            for number in itertools.count():
                if published.is_set():
                    return
                rows.append(self._row(prompts[index], num_tokens, 1.0, seed + index + number * len(prompts)))
                going.set()

        with ThreadPoolExecutor(len(prompts)) as threads:
            samplers = [threads.submit(keep_sampling, index) for index in range(len(prompts))]
            try:
                going.wait(_TIMEOUT_S)
                self._client.publish(version, self._log.path(version))
            finally:
                published.set()
            for sampler in samplers:
                sampler.result()
        return version, [row for row in rows if len(set(row.policy_versions)) > 2]  # -1 of the prompt, and two

    def _row(self, prompt: Sequence[int], num_tokens: int, temperature: float, seed: int) -> TokenSequence:
        body = self._request(prompt, num_tokens) | {"temperature": temperature, "seed": seed}
        answer = _answered(self._http.post("/v1/completions", json=body))
        choice = answer["choices"][0]
        _check_prompt(self.name, prompt, answer["prompt_token_ids"])
        logprobs = choice["logprobs"]["token_logprobs"]
        return row_of(prompt, choice["token_ids"], logprobs, choice["policy_versions"], choice["kv_versions"])

    def _request(self, prompt: Sequence[int], num_tokens: int) -> dict[str, Any]:
        return {
            "model": self._model, "prompt": list(prompt), "max_tokens": num_tokens, "logprobs": 0,
            "return_token_ids": True, "return_policy_versions": True,
        }  # fmt: skip

    def chat_ids(self, messages: Sequence[Mapping[str, str]]) -> list[int] | None:
        body = {"model": self._model, "messages": list(messages), "max_tokens": 1, "return_token_ids": True}
        return _answered(self._http.post("/v1/chat/completions", json=body))["prompt_token_ids"]


class VllmServer:
    """A vLLM server at a URL, taken as it is; the lab only samples from it."""

    def __init__(self, url: str) -> None:
        self.name = f"vLLM at {url}"
        self._http = httpx.Client(base_url=url.rstrip("/"), timeout=_TIMEOUT_S, trust_env=False)
        with self._reaching("/v1/models"):
            self._model = _answered(self._http.get("/v1/models"))["data"][0]["id"]
            routes = _answered(self._http.get("/openapi.json"))["paths"]
        self._generates = "/inference/v1/generate" in routes  # else only /v1/completions, with ids all the same

    def close(self) -> None:
        self._http.close()

    def sample(
        self, prompts: Sequence[Sequence[int]], num_tokens: int, temperature: float, seed: int
    ) -> list[TokenSequence]:
        row: Callable[..., TokenSequence] = self._generated if self._generates else self._completed
        with ThreadPoolExecutor(len(prompts)) as threads:
            rows = [
                threads.submit(row, prompt, num_tokens, temperature, seed + index)
                for index, prompt in enumerate(prompts)
            ]
            return [row.result() for row in rows]

    def _generated(self, prompt: Sequence[int], num_tokens: int, temperature: float, seed: int) -> TokenSequence:
        sampling = {
            "max_tokens": num_tokens, "temperature": temperature, "logprobs": 0, "seed": seed, "ignore_eos": True,
            "detokenize": False,
        }  # fmt: skip
        body = {"token_ids": list(prompt), "sampling_params": sampling}
        with self._reaching("/inference/v1/generate"):
            choice = _answered(self._http.post("/inference/v1/generate", json=body))["choices"][0]
        return _unversioned(prompt, choice["token_ids"], [e["logprob"] for e in choice["logprobs"]["content"]])

    def _completed(self, prompt: Sequence[int], num_tokens: int, temperature: float, seed: int) -> TokenSequence:
        body = {
            "model": self._model, "prompt": list(prompt), "max_tokens": num_tokens, "temperature": temperature,
            "logprobs": 0, "seed": seed, "ignore_eos": True, "return_token_ids": True,
        }  # fmt: skip
        with self._reaching("/v1/completions"):
            choice = _answered(self._http.post("/v1/completions", json=body))["choices"][0]
        if choice.get("prompt_token_ids") is not None:
            _check_prompt(self.name, prompt, choice["prompt_token_ids"])
        return _unversioned(prompt, choice["token_ids"], choice["logprobs"]["token_logprobs"])

    def chat_ids(self, messages: Sequence[Mapping[str, str]]) -> list[int] | None:
        body = {"model": self._model, "messages": list(messages), "max_tokens": 1, "return_token_ids": True}
        with self._reaching("/v1/chat/completions"):
            response = self._http.post("/v1/chat/completions", json=body)
        if response.status_code != 200:  # started without a tokenizer: token ids are all it takes
            return None
        return response.json().get("prompt_token_ids")

    @contextlib.contextmanager
    def _reaching(self, route: str) -> Iterator[None]:
        try:
            yield
        except httpx.TransportError as error:
            raise ServiceError(f"{self.name} does not answer at {route}: {type(error).__name__}: {error}") from error


def row_of(
    prompt: Sequence[int], token_ids: Sequence[int], logprobs: Sequence[float], versions: Sequence[int],
    kv_versions: Sequence[int],
) -> TokenSequence:  # fmt: skip
    """A prompt and what was sampled behind it as one row of the trainer."""
    blank = len(prompt)
    return TokenSequence(
        (*prompt, *token_ids), (False,) * blank + (True,) * len(token_ids), (0.0,) * blank + tuple(logprobs),
        (NO_VERSION,) * blank + tuple(versions), (NO_VERSION,) * blank + tuple(kv_versions),
    )  # fmt: skip


def _unversioned(prompt: Sequence[int], token_ids: Sequence[int], logprobs: Sequence[float]) -> TokenSequence:
    zeros = (0,) * len(token_ids)
    return row_of(prompt, token_ids, logprobs, zeros, zeros)


def _check_prompt(name: str, sent: Sequence[int], read: Sequence[int]) -> None:
    if list(sent) != list(read):
        place = next((i for i, (a, b) in enumerate(zip(sent, read)) if a != b), min(len(sent), len(read)))
        raise EngineError(
            f"{name} read other tokens than were sent: they differ from index {place} on ({len(sent)} sent, "
            f"{len(read)} read)"
        )


def _answered(response: httpx.Response) -> dict[str, Any]:
    if response.status_code != 200:
        said = response.text[:500]
        raise ServiceError(f"{response.request.url.path} answered {response.status_code}: {said}")
    return response.json()
