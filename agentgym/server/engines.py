"""Which inference engine a configuration means. Nothing heavy is imported until one is started."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from agentgym.engine.protocol import Engine
from agentgym.server.settings import EngineSection, ServiceConfig


async def start_engine(config: ServiceConfig, model_folder: Path) -> Engine:
    """Starts the configured engine on `model_folder`; it serves version 0.

    Raises InputError and its kin, and EngineError.
    """
    section = config.engine
    if section.kind == "vllm":
        return await _vllm(section, model_folder, config.max_context)
    if section.in_process:
        from agentgym.engine.torch_engine import TorchEngine

        return await asyncio.to_thread(
            TorchEngine, model_folder, slots=section.slots, max_context=config.max_context, threads=section.threads,
            dtype=section.dtype,
        )  # fmt: skip
    from agentgym.engine.process import ProcessEngine

    return await ProcessEngine.start(
        model_folder, slots=section.slots, max_context=config.max_context, threads=section.threads, dtype=section.dtype
    )


async def _vllm(section: EngineSection, model_folder: Path, max_context: int) -> Engine:
    from agentgym.engine.vllm.carrier import SenderOptions
    from agentgym.engine.vllm.engine import VllmEngine
    from agentgym.engine.vllm.server import VllmServerOptions

    python = section.vllm_python or Path(sys.executable)
    senders = None
    if section.weight_transfer != "file":
        senders = SenderOptions(python.absolute(), section.weight_transfer, section.senders_gpus())
    if section.vllm_urls:
        return await VllmEngine.connect(
            model_folder, section.vllm_urls, max_context=max_context, dtype=section.dtype,
            max_lora_rank=section.max_lora_rank, senders=senders,
        )  # fmt: skip
    options = VllmServerOptions(
        python=python,
        max_context=max_context,
        slots=section.slots,
        threads=section.threads,
        dtype=section.dtype,
        kv_cache_gb=section.vllm_kv_cache_gb,
        start_s=section.vllm_start_s,
        max_lora_rank=section.max_lora_rank,
        extra_args=section.vllm_args,
    )
    return await VllmEngine.start(
        model_folder, options, replicas=section.replicas, devices=section.vllm_devices, senders=senders
    )
