"""What a vLLM server says of itself. Law: a server that would give wrong logprobs, or would end at what this engine
asks, is refused before it serves, with the mend. Must never know HTTP."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from agentgym.errors import AgentGymError, EngineError, InputError

_FORWARD = (
    "model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "hidden_act", "rms_norm_eps", "layer_norm_eps", "rope_parameters", "rope_theta",
    "rope_scaling", "sliding_window", "attention_bias", "mlp_bias", "tie_word_embeddings", "num_experts",
    "num_local_experts", "num_experts_per_tok", "n_embd", "n_layer", "n_head",
)  # fmt: skip


def shape_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """What config.json (of the text model) says that its weights fit and its logprobs depend on."""
    shape = {name: config[name] for name in _FORWARD if config.get(name) is not None}
    if shape.get("tie_word_embeddings"):  # where the weights have a head of their own, vLLM unties it by itself
        del shape["tie_word_embeddings"]
    return shape


@dataclass(frozen=True, slots=True)
class ServerFacts:
    """The settings of a server that correctness depends on.

    Example: `ServerFacts(model="/models/tiny", dtype="float32", max_context=512, logprobs_mode="processed_logprobs",
    backend="agentgym_file", async_scheduling=False, splits_prompts=False, on_cpu=True, quantization=None,
    cache_dtype="auto", has_lora=False, max_lora_rank=None, num_workers=1)`.
    """

    model: str
    dtype: str
    max_context: int
    logprobs_mode: str
    backend: str | None
    async_scheduling: bool
    splits_prompts: bool  # chunked prefill
    on_cpu: bool
    quantization: str | None
    cache_dtype: str  # of keys and values
    has_lora: bool
    max_lora_rank: int | None  # None: adapters cannot be loaded while it runs
    num_workers: int  # GPUs that hold a part or a copy of the model

    @classmethod
    def of(cls, config: Mapping[str, Any], *, takes_adapters: bool) -> ServerFacts:
        """Reads the vllm_config of /server_info. `takes_adapters`: it has the route that loads one."""
        model, scheduler = config["model_config"], config["scheduler_config"]
        transfer, parallel = config.get("weight_transfer_config"), config.get("parallel_config") or {}
        return cls(
            model=str(model["model"]),
            dtype=str(model["dtype"]).removeprefix("torch."),
            max_context=int(model["max_model_len"]),
            logprobs_mode=str(model["logprobs_mode"]),
            backend=transfer.get("backend") if isinstance(transfer, dict) else None,
            async_scheduling=bool(scheduler.get("async_scheduling")),
            splits_prompts=bool(scheduler.get("enable_chunked_prefill")),
            on_cpu=(config.get("device_config") or {}).get("device") == "cpu",
            quantization=model.get("quantization"),
            cache_dtype=str((config.get("cache_config") or {}).get("cache_dtype", "auto")),
            has_lora=bool(config.get("lora_config")),
            max_lora_rank=int((config.get("lora_config") or {}).get("max_lora_rank", 0)) or None
            if takes_adapters
            else None,
            num_workers=int(parallel.get("world_size", 1)) * int(parallel.get("data_parallel_size", 1)),
        )

    def check(self, name: str, *, backend: str, dtype: str, max_context: int, max_lora_rank: int | None = None) -> None:
        """Raises InputError with the first thing that cannot be trained on, and its mend."""
        if self.logprobs_mode != "processed_logprobs":
            raise InputError(
                f"{name} records {self.logprobs_mode}, which are not those of the distribution that it samples from; "
                "start it with --logprobs-mode processed_logprobs"
            )
        if self.backend != backend:
            wanted = json.dumps({"backend": backend})
            raise InputError(
                f"{name} has the weight-transfer back end {self.backend!r}, and engine.weight_transfer asks for "
                f"{backend!r}; install this distribution beside vLLM and start it with --weight-transfer-config "
                f"'{wanted}'"
            )
        if backend == "agentgym_ipc" and self.num_workers != 1:
            raise InputError(
                f"{name} is spread over {self.num_workers} GPUs, and CUDA IPC carries weights within one; use "
                "engine.weight_transfer 'nccl' or 'file'"
            )
        if self.async_scheduling:
            raise InputError(f"{name} schedules asynchronously, which is not proven here; add --no-async-scheduling")
        if self.dtype != dtype:
            raise InputError(f"{name} computes in {self.dtype}, engine.dtype is {dtype}; change one of them")
        if self.quantization is not None:
            raise InputError(
                f"{name} quantizes the model ({self.quantization}), and this run's weights are served as they are "
                "published; start it with the model itself, without --quantization"
            )
        if self.cache_dtype not in ("auto", dtype):
            raise InputError(
                f"{name} keeps keys and values as {self.cache_dtype}, which gives other logprobs than the trainer's; "
                "start it with --kv-cache-dtype auto"
            )
        if self.max_context < max_context:
            raise InputError(
                f"{name} has a context of {self.max_context} tokens, this run needs {max_context}; start it with "
                f"--max-model-len {max_context}"
            )
        if self.on_cpu and self.splits_prompts:
            raise InputError(
                f"{name} prefills a prompt in parts, and ends there at a request with a seed (vLLM on a CPU); start it "
                "with --no-enable-chunked-prefill"
            )
        if max_lora_rank is not None and (self.max_lora_rank is None or self.max_lora_rank < max_lora_rank):
            raise InputError(
                f"{name} takes adapters up to rank {self.max_lora_rank or 0}, this run publishes rank {max_lora_rank}; "
                f"start it with VLLM_ALLOW_RUNTIME_LORA_UPDATING=1, --enable-lora, --max-loras 2 and --max-lora-rank "
                f">= {max_lora_rank}"
            )


def understood(name: str, error: EngineError) -> AgentGymError:
    """What a back end of ours in the server `name` meant by refusing to be introduced; `error` itself where it is
    something else."""
    if (found := re.search(r"""another model: ([^"'\\\n]+)""", str(error))) is not None:
        return InputError(f"{name} serves another model: {found[1]}; start it with this run's model")
    if "unexpected keyword" in str(error):
        return InputError(
            f"{name} has the plug-in of another version of this distribution; install this one beside its vLLM"
        )
    return error
