"""Which inference engine a configuration means. Nothing heavy is imported until one is started."""

from __future__ import annotations

import asyncio
from pathlib import Path

from agentgym.engine.protocol import Engine
from agentgym.server.settings import ServiceConfig


async def start_engine(config: ServiceConfig, model_folder: Path) -> Engine:
    """Starts the configured engine on `model_folder`; it serves version 0.

    Raises InputError and its kin, and EngineError.
    """
    section = config.engine
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
