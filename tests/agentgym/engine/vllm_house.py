"""A vLLM engine with its servers, the weights of every version that was published to it, and what a token must be."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import psutil
import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from agentgym import weight_file
from agentgym.engine.gate import PublishMode, VersionedPolicy
from agentgym.engine.protocol import Probe, WeightUpdate
from agentgym.engine.vllm.carrier import SenderOptions
from agentgym.engine.vllm.engine import VllmEngine
from agentgym.engine.vllm.server import VllmServerOptions
from agentgym.errors import InputError
from agentgym.policy import Completion, SamplingParams

VOCAB = 61
CONTEXT = 256
TOLERANCE = 1e-4
T = TypeVar("T")
_ADAPTED = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def save_small_model(path: Path) -> Path:
    """A tied model without a tokenizer: tokens are all that the engine knows."""
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=1, head_dim=32, max_position_embeddings=512, tie_word_embeddings=True, bos_token_id=None,
        eos_token_id=5, pad_token_id=None,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.15, generator=generator)
    model.save_pretrained(path)
    return path


@dataclass
class House:
    """The engine, the loop that it lives in, and the model of every version."""

    runner: asyncio.Runner
    engine: VllmEngine
    folder: Path
    tmp: Path
    models: dict[int, PreTrainedModel] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.policy = VersionedPolicy(self.engine)
        self.models[0] = AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.float32).eval()

    @classmethod
    @contextmanager
    def opened(
        cls,
        folder: Path,
        options: VllmServerOptions,
        tmp: Path,
        replicas: int,
        senders: SenderOptions | None = None,
        devices: Sequence[str] = (),
    ) -> Iterator[House]:
        torch.set_num_threads(1)
        with asyncio.Runner() as runner:
            starting = VllmEngine.start(folder, options, replicas=replicas, senders=senders, devices=devices)
            engine = runner.run(starting)
            try:
                yield cls(runner, engine, folder, tmp)
            finally:
                runner.run(engine.close())

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return self.runner.run(asyncio.wait_for(work, 280))

    def twin(self, version: int) -> PreTrainedModel:
        model = AutoModelForCausalLM.from_config(self.models[0].config).eval()
        model.load_state_dict(self.models[version].state_dict())
        return model

    @torch.no_grad()
    def update(self, *, only: str = "") -> WeightUpdate:
        """A new version: another point near the first model, or the last one with the parameters `only` moved."""
        version = max(self.models) + 1
        model = self.twin(version - 1 if only else 0)
        generator = torch.Generator().manual_seed(version)
        for name, parameter in model.named_parameters():
            if only in name:
                parameter.add_(0.08 * torch.randn(parameter.shape, generator=generator))
        self.models[version] = model
        path = self.tmp / f"{version:06d}.safetensors"
        save_file({name: parameter.detach().contiguous() for name, parameter in model.named_parameters()}, path)
        return WeightUpdate(version, path)

    @torch.no_grad()
    def adapter(self, *, rank: int = 4, alpha: int = 8) -> WeightUpdate:
        """A new version that is an adapter to the first model, as a trainer publishes it; the model is the merged one,
        so that it is computed in another way than the server does."""
        version = max(self.models) + 1
        model = self.twin(0)
        generator = torch.Generator().manual_seed(version)
        tensors: dict[str, np.ndarray] = {}
        for name, module in model.named_modules():
            if isinstance(module, torch.nn.Linear) and name.endswith(_ADAPTED):
                a = 0.2 * torch.randn(rank, module.in_features, generator=generator)
                b = 0.2 * torch.randn(module.out_features, rank, generator=generator)
                module.weight += alpha / rank * b @ a
                tensors[f"base_model.model.{name}.lora_A.weight"] = a.numpy()
                tensors[f"base_model.model.{name}.lora_B.weight"] = b.numpy()
        self.models[version] = model
        config = {"peft_type": "LORA", "r": rank, "lora_alpha": alpha, "target_modules": list(_ADAPTED), "bias": "none"}
        path = self.tmp / f"{version:06d}.safetensors"
        weight_file.save_file(tensors, path, {"format": "lora", "adapter_config": json.dumps(config)})
        return WeightUpdate(version, path)

    @torch.no_grad()
    def probe(self, version: int, tolerance: float = 1e-3) -> Probe:
        """What a trainer with the weights of `version` would send."""
        tokens = np.random.default_rng(version).integers(0, VOCAB, 24).tolist()
        logprobs = self.models[version](torch.tensor([tokens])).logits[0, :-1].float().log_softmax(-1)
        chosen = logprobs.gather(1, torch.tensor(tokens[1:])[:, None])[:, 0]
        return Probe(tuple(tokens), tuple(chosen.tolist()), tolerance)

    @torch.no_grad()
    def off(self, version: int, prompt: Sequence[int], completion: Completion, temperature: float = 1.0) -> np.ndarray:
        """How far recorded logprobs are from a clean forward of `version`, by token."""
        logits = self.models[version](torch.tensor([[*prompt, *completion.token_ids]])).logits[0, len(prompt) - 1 : -1]
        chosen = torch.tensor(completion.token_ids)[:, None]
        wanted = (logits.float() / (temperature or 1.0)).log_softmax(-1).gather(1, chosen)[:, 0]
        return (torch.tensor(completion.logprobs) - wanted).abs().numpy()

    def assert_exact(self, prompt: Sequence[int], completion: Completion, temperature: float = 1.0) -> None:
        """Every token is the forward of its own version, where its keys are of that version too."""
        versions, keys = np.array(completion.policy_versions), np.array(completion.kv_versions)
        assert list(versions) == sorted(versions)
        assert (keys <= versions).all()
        for version in np.unique(versions):
            fresh = (versions == version) & (keys == version)
            assert (self.off(int(version), prompt, completion, temperature)[fresh] < TOLERANCE).all()

    async def all_serve(self) -> None:
        """Waits for every replica, one that was lost too."""
        while any(status.state != "serving" for status in self.engine.replicas()):
            await asyncio.sleep(0.2)

    async def sampled(self, tokens: int) -> None:
        """Until `tokens` more have come."""
        wanted = (await self.engine.stats()).sampled_tokens + tokens
        while (await self.engine.stats()).sampled_tokens < wanted:
            await asyncio.sleep(0.005)

    def server_processes(self, index: int) -> list[psutil.Process]:
        server = self.engine.seats[index].server
        assert server is not None
        return psutil.Process(server.pid).children(recursive=True)

    async def running_on_server(self, index: int) -> int:
        return await self.figure_of_server(index, "num_requests_running")

    async def cached_tokens(self) -> int:
        """How many tokens all servers have found in their prefix caches so far."""
        count = len(self.engine.seats)
        return sum([await self.figure_of_server(index, "prefix_cache_hits_total") for index in range(count)])

    async def figure_of_server(self, index: int, name: str) -> int:
        """What the server itself says at /metrics."""
        replica = self.engine.seats[index].replica
        assert replica is not None
        text = (await replica._http.get("/metrics")).text
        return int(sum(float(value) for value in re.findall(rf"^vllm:{name}\{{.*\}} (\S+)$", text, re.M)))


OTHERS: dict[str, object] = {
    "vocab_size": VOCAB + 3,
    "num_hidden_layers": 4,
    "rope_parameters": {"rope_theta": 500000.0, "rope_type": "default"},
}


def another_model(folder: Path, to: Path, **changes: object) -> Path:
    """A copy of `folder` whose config.json says something else."""
    shutil.copytree(folder, to)
    config = json.loads((to / "config.json").read_text())
    (to / "config.json").write_text(json.dumps(config | changes))
    return to


async def refused_as_others(house: House, url: str) -> None:
    """The server at `url`, which has the house's model, is another one to runs of other models."""
    for name, value in OTHERS.items():
        other = another_model(house.folder, house.tmp / f"other-{name}", **{name: value})
        with pytest.raises(InputError, match=f"{url} serves another model: its {name} is .*, and not .*; start"):
            await VllmEngine.connect(other, [url], max_context=CONTEXT)
    in_parts = house.tmp / "in-parts"
    house.models[0].save_pretrained(in_parts, max_shard_size="50KB")
    with pytest.raises(InputError, match=rf"serves {house.folder}, and this run {in_parts}; start it with"):
        await VllmEngine.connect(in_parts, [url], max_context=CONTEXT)


def prompts(count: int) -> list[list[int]]:
    rng = np.random.default_rng(count)
    return [rng.integers(0, VOCAB, rng.integers(1, 30)).tolist() for _ in range(count)]


async def begun(streams: Sequence[list[int]], tokens: int) -> None:
    """Until every one of `streams` has heard of so many tokens."""
    while min(map(len, streams)) < tokens:
        await asyncio.sleep(0.002)


def hearing(stream: list[int]) -> Callable[..., None]:
    return lambda ids, *_: stream.extend(ids)


async def published_among_requests(house: House, mode: PublishMode) -> tuple[int, int]:
    """Publishes among episodes, and checks every token. Returns how many completions have two versions, and how many
    tokens of the new one are seen to differ from its clean forward, because of the old one's keys."""
    before = house.engine.policy_version
    update = house.update()
    work = prompts(10)
    lengths = [120 + 13 * index for index in range(len(work))]  # they do not end, and begin again, in step
    ended = asyncio.Event()
    first: list[list[int]] = [[] for _ in work]  # what was heard of each episode's first completion

    async def episode(index: int) -> list[tuple[Completion, list[int]]]:
        """Completions one after another, so that there is something to interrupt whenever it comes to it."""
        done: list[tuple[Completion, list[int]]] = []
        while not ended.is_set():
            stream = [] if done else first[index]
            params = SamplingParams(lengths[index], seed=index + 100 * len(done), session=str(index))
            done.append((await house.policy.complete(work[index], params, hearing(stream)), stream))
        return done

    running = [asyncio.ensure_future(episode(index)) for index in range(len(work))]
    await begun(first, 12)
    report = await house.policy.publish(update, mode)
    ended.set()
    late = await house.policy.complete(work[0], SamplingParams(20, seed=0))
    assert (report.version, report.mode) == (update.version, mode)
    assert [status.policy_version for status in house.engine.replicas()] == [update.version] * len(house.engine.seats)
    assert late.kv_versions == late.policy_versions == (update.version,) * 20
    house.assert_exact(work[0], late)
    split = mixed = 0
    for prompt, length, done in zip(work, lengths, await asyncio.gather(*running), strict=True):
        for completion, stream in done:
            assert stream == list(completion.token_ids)
            assert len(stream) == length
            house.assert_exact(prompt, completion)
            versions, keys = np.array(completion.policy_versions), np.array(completion.kv_versions)
            stale = keys < versions
            assert mode == "keep" or not stale.any()
            split += len(set(completion.policy_versions)) == 2
            assert (house.off(before, prompt, completion)[versions == before] < TOLERANCE).all()
            if stale.sum() >= 8:  # the new version on the old one's keys: the forward of neither, but for one by chance
                assert house.off(before, prompt, completion)[stale].max() > 0.01
                mixed += int((house.off(update.version, prompt, completion)[stale] > 0.001).sum())
    return split, mixed


@asynccontextmanager
async def relayed(socket: str) -> AsyncIterator[str]:
    """A server's Unix socket as a TCP address."""

    async def pipe(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
        try:
            while data := await source.read(65536):
                target.write(data)
                await target.drain()
        except (ConnectionError, asyncio.CancelledError):
            pass
        finally:
            target.close()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        upstream, downstream = await asyncio.open_unix_connection(socket)
        await asyncio.gather(pipe(reader, downstream), pipe(upstream, writer))

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()
