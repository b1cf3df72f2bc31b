"""The rollout service's configuration. Law: every key here is read by something, and a value that cannot run is
refused before any work starts.

The trainer's configuration is made of the same sections, so that a person writes each number once.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from agentgym.config import Section
from agentgym.rollout.cipo import CipoSection

OUTSIDE = "outside"  # in the place of an environment's id: the agents that play bring their own


class ModelSection(Section):
    """`name` is a model that an `agentgym.models` entry point builds (from `seed`), or a folder that transformers
    loads."""

    name: str = "tiny"
    seed: int = 0


class EnvSection(Section):
    """`id` is an environment's registered id or alias; `kwargs` go to its constructor. A run on outside agents alone
    needs none: they bring theirs, and nothing is evaluated."""

    id: str = OUTSIDE
    kwargs: dict[str, Any] = Field(default_factory=dict)


class RolloutSection(Section):
    """What is collected, how much of it at once, and how old it may be."""

    source: Literal["environment", "sessions", "both"] = "environment"  # who plays: we, outside agents, or either
    group_size: int = 8  # G siblings of one task and seed
    groups_per_step: int = 16
    max_staleness: int = 2  # versions between a token's policy and the one that trains on it; 0 = synchronous
    in_flight: int = 64  # episodes that run at once; the engine's slots are what fills them
    max_turns: int | None = None  # None: what the environment was registered with
    max_tokens_per_turn: int = 256
    max_episode_tokens: int = 2048  # prompt and completions of the whole episode
    max_episode_s: float = 600.0
    max_env_call_s: float = 120.0  # one reset or step of an environment that blocks
    drop_zero_variance: bool = False  # True: groups without a gradient, all of one score, make room for others
    max_retries: int = 2  # times that a failed member of a group is run again
    stall_warning_s: float = 30.0  # without a finished episode for so long, the log says what each one waits for
    temperature: float = 1.0
    seed: int = 0
    cipo: CipoSection | None = None  # None: no correction prompts

    @field_validator("group_size")
    @classmethod
    def _siblings(cls, value: int) -> int:
        if value < 2:
            raise ValueError(f"must be >= 2 for group advantages, got {value}")
        return value

    @field_validator("groups_per_step", "in_flight", "max_tokens_per_turn", "max_episode_tokens", "max_turns")
    @classmethod
    def _at_least_one(cls, value: int | None) -> int | None:
        if value is not None and value < 1:
            raise ValueError(f"must be >= 1, got {value}")
        return value

    @field_validator("max_staleness", "max_retries", "seed")
    @classmethod
    def _not_negative(cls, value: int) -> int:
        if value < 0:
            raise ValueError(f"must be >= 0, got {value}")
        return value

    @field_validator("max_episode_s", "max_env_call_s", "stall_warning_s", "temperature")
    @classmethod
    def _positive(cls, value: float) -> float:
        if not 0.0 < value < float("inf"):
            raise ValueError(f"must be finite and > 0, got {value}")
        return value

    @model_validator(mode="after")
    def _corrections_can_be_made(self) -> RolloutSection:
        if self.cipo is None:
            return self
        if self.source == "sessions":
            raise ValueError(
                'cipo plays tasks of the environment again, and with source = "sessions" outside agents bring theirs; '
                'choose "environment" or "both", or leave [rollout.cipo] out'
            )
        if self.max_staleness < 1:
            raise ValueError(
                "cipo needs max_staleness >= 1: an original is of an earlier version by the time that its correction "
                "begins, got 0"
            )
        most = self.cipo.max_original_tokens
        if most is not None and most >= self.max_episode_tokens:
            raise ValueError(
                f"cipo.max_original_tokens must be < max_episode_tokens ({self.max_episode_tokens}), which hold the "
                f"original and its correction, got {most}"
            )
        return self


class SessionsSection(Section):
    """Episodes that outside agents play; whoever opens one may ask for less. A run with `rollout.source = "sessions"`
    or `"both"` trains on them; else they are recorded and not trained on."""

    max_open: int = Field(default=1024, ge=1)
    ttl_s: float = Field(default=3600.0, gt=0.0)  # a session that is not finished by then expires
    idle_s: float = Field(default=900.0, gt=0.0)  # so does one whose agent asks nothing for so long
    group_ttl_s: float = Field(default=7200.0, gt=0.0)  # an incomplete group in which nothing is open is given up then
    max_turns: int = Field(default=1000, ge=1)
    max_tokens: int = Field(default=1_000_000, ge=1)  # sampled ones of a session; the last reply is cut there
    any_temperature: bool = False  # True: training sessions may sample at another temperature than rollout.temperature


_OF_STARTED = ("replicas", "vllm_python", "vllm_args", "vllm_kv_cache_gb", "vllm_devices")
_OF_VLLM = (*_OF_STARTED, "max_lora_rank", "vllm_urls", "vllm_start_s", "weight_transfer", "sender_devices")


class EngineSection(Section):
    """The inference engine: the torch engine in this distribution, or stock vLLM servers, started here or elsewhere."""

    kind: Literal["torch", "vllm"] = "torch"
    slots: int = 64  # sequences that are decoded together, by each replica
    max_context: int | None = None  # tokens of one sequence; None: rollout.max_episode_tokens
    in_process: bool = False  # True: inside the service, for tests; else in a process of its own
    threads: int = 1
    dtype: Literal["float32", "bfloat16"] = "float32"
    publish_mode: Literal["abort", "wait", "keep"] = "abort"  # what new weights do to running requests
    replicas: int = 1  # vLLM servers to start
    max_lora_rank: int | None = None  # of the adapters that vLLM servers shall take; a run sets it to its own
    vllm_python: Path | None = None  # the interpreter that has vllm and this distribution; None: the service's own
    vllm_urls: tuple[str, ...] = ()  # vLLM servers that run already: none is started then
    vllm_args: tuple[str, ...] = ()  # more arguments for each server's command line
    vllm_kv_cache_gb: int = 1  # of a server on a CPU
    vllm_start_s: float = 600.0
    vllm_devices: tuple[str, ...] = ()  # GPUs of each server that is started here: ["0", "1"], or ["0,1", "2,3"]
    weight_transfer: Literal["file", "nccl", "ipc"] = "file"  # how a whole model gets into a vLLM server
    sender_devices: tuple[str, ...] = ()  # with "nccl" and "ipc" the GPU that sends: one, or one a server

    @field_validator("slots", "threads", "max_context", "replicas", "max_lora_rank", "vllm_kv_cache_gb")
    @classmethod
    def _at_least_one(cls, value: int | None) -> int | None:
        if value is not None and value < 1:
            raise ValueError(f"must be >= 1, got {value}")
        return value

    @field_validator("vllm_urls")
    @classmethod
    def _http(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for url in value:
            if not url.startswith(("http://", "https://")):
                raise ValueError(f"must be http:// or https:// URLs, got {url!r}")
        return value

    @model_validator(mode="after")
    def _one_kind(self) -> EngineSection:
        if self.kind == "torch" and (named := self._given(_OF_VLLM)):
            raise ValueError(f"only kind = 'vllm' has {named}; set it, or leave that out")
        if self.kind == "vllm" and self.in_process:
            raise ValueError("in_process is of kind = 'torch': vLLM always runs in processes of its own")
        here = [name for name in _OF_STARTED if name != "vllm_python" or self.weight_transfer == "file"]
        if self.vllm_urls and (named := self._given(here)):
            raise ValueError(
                f"vllm_urls names servers that run, and only one that is started here has {named}; leave that out"
            )
        return self._one_transfer()

    def _one_transfer(self) -> EngineSection:
        servers = len(self.vllm_urls) or self.replicas
        if self.vllm_devices and len(self.vllm_devices) != servers:
            raise ValueError(f"vllm_devices must name the GPUs of {servers} servers, got {len(self.vllm_devices)}")
        if self.weight_transfer == "file" and self.sender_devices:
            raise ValueError('sender_devices is of weight_transfer = "nccl" and "ipc"; leave it out, or choose one')
        if self.weight_transfer != "file" and len(self.senders_gpus()) not in (1, servers):
            rule = "that no server uses" if self.weight_transfer == "nccl" else "of the server itself"
            raise ValueError(
                f'weight_transfer = "{self.weight_transfer}" needs sender_devices: for each server a GPU {rule}, or '
                f"one for all {servers}, got {list(self.sender_devices)}"
            )
        return self

    def senders_gpus(self) -> tuple[str, ...]:
        """The GPU of each sender, or that of all; with CUDA IPC those of the servers that are started here."""
        return self.sender_devices or (self.vllm_devices if self.weight_transfer == "ipc" else ())

    def _given(self, names: Sequence[str]) -> str:
        """Those of them that are not as by default; a run's stored configuration names all."""
        fields = type(self).model_fields
        return ", ".join(name for name in names if getattr(self, name) != fields[name].default)


class SandboxSection(Section):
    """Where environments that run code run it: one pool of boxes for episodes and evaluations."""

    tier: Literal["auto", "namespace", "docker", "gvisor"] = "auto"
    warm: int = 4  # boxes of each kind that are held ready; raise it if sandbox_hit_rate is low
    starters: int = 2  # started at once; a Docker daemon gives about five a second, whatever this is
    docker_host: str | None = None  # unix:///path, ssh://host or tcp://host:port; None: what DOCKER_HOST says
    docker_tls: Path | None = None  # for tcp://: the folder of ca.pem, cert.pem and key.pem

    @field_validator("warm")
    @classmethod
    def _not_negative(cls, value: int) -> int:
        if value < 0:
            raise ValueError(f"must be >= 0, got {value}")
        return value

    @field_validator("starters")
    @classmethod
    def _at_least_one(cls, value: int) -> int:
        if value < 1:
            raise ValueError(f"must be >= 1, got {value}")
        return value

    @model_validator(mode="after")
    def _keys_of_a_host(self) -> SandboxSection:
        if self.docker_tls is not None and self.docker_host is None:
            raise ValueError("sandbox.docker_tls needs sandbox.docker_host=tcp://host:port, which it protects")
        return self


class RenderSection(Section):
    """How messages become tokens."""

    tool_format: str = "auto"


class ServerSection(Section):
    """Where the service listens. Other hosts than the loopback ones demand a key."""

    host: str = "127.0.0.1"
    port: int = 0  # 0: a free one
    api_key_file: Path | None = None  # the OpenAI surface then asks for the key in it; the trainer's API always has one
    max_body_mb: int = 16
    max_body_s: float = Field(default=30.0, gt=0.0)  # for a body to arrive
    max_requests: int = Field(default=1024, ge=1)  # answered at once, a quarter for a session; more get status 429
    max_request_s: float = Field(default=600.0, gt=0.0)  # for one answer to be sampled
    max_connections: int = Field(default=4096, ge=1)  # open at once, whatever they do; more get status 503
    max_head_s: float = Field(default=15.0, gt=0.0)  # for a request's first line and headers to arrive
    max_read_s: float = Field(default=60.0, gt=0.0)  # for a caller to read what waits for it
    drain_s: float = Field(default=10.0, ge=0.0)  # at the end, for running requests to be answered
    log_format: Literal["text", "json"] = "text"

    @field_validator("port")
    @classmethod
    def _port(cls, value: int) -> int:
        if not 0 <= value <= 65535:
            raise ValueError(f"must be 0 to 65535, got {value}")
        return value

    @field_validator("max_body_mb")
    @classmethod
    def _body(cls, value: int) -> int:
        if value < 1:
            raise ValueError(f"must be >= 1, got {value}")
        return value

    @property
    def is_loopback(self) -> bool:
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    @model_validator(mode="after")
    def _key(self) -> ServerSection:
        if not self.is_loopback and self.api_key_file is None:
            raise ValueError(f"listening on {self.host} demands server.api_key_file; or listen on 127.0.0.1")
        return self


class ServiceConfig(Section):
    """Everything that the rollout service is told, the model's folder and the run's folders excepted."""

    env: EnvSection = EnvSection()
    model: ModelSection = ModelSection()
    rollout: RolloutSection = RolloutSection()
    sessions: SessionsSection = SessionsSection()
    engine: EngineSection = EngineSection()
    sandbox: SandboxSection = SandboxSection()
    render: RenderSection = RenderSection()
    server: ServerSection = ServerSection()

    @model_validator(mode="after")
    def _context(self) -> ServiceConfig:
        if self.engine.max_context is not None and self.engine.max_context < self.rollout.max_episode_tokens:
            raise ValueError(
                f"engine.max_context must be >= rollout.max_episode_tokens ({self.rollout.max_episode_tokens}), "
                f"got {self.engine.max_context}"
            )
        return self

    @model_validator(mode="after")
    def _who_plays(self) -> ServiceConfig:
        if self.env.id == OUTSIDE and self.rollout.source != "sessions":
            raise ValueError(
                'env.id is not set: name an environment; only rollout.source = "sessions", where outside agents bring '
                "theirs, needs none"
            )
        if self.rollout.source == "both" and self.rollout.max_staleness < 1:
            raise ValueError(
                'rollout.source = "both" needs rollout.max_staleness >= 1: half of the buffer is for sessions, and the '
                "other half must hold a batch, got 0"
            )
        return self

    @property
    def max_context(self) -> int:
        return self.engine.max_context or self.rollout.max_episode_tokens
