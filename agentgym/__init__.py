"""agentgym: a gym of multi-turn, tool-using environments for language models, with the trainer built in.

    import agentgym as ag

Law: importing this package imports none of its rooms; a name is fetched from its room when it is first used, so that
the import stays quick and needs neither torch nor Docker.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from agentgym.env import AgentEnv, ToolEnv
    from agentgym.errors import AgentGymError, ConfigError, EnvError, InputError, ToolError
    from agentgym.messages import Message, ToolCall, ToolSpec, call
    from agentgym.registry import load_plugins, lookup, make, register
    from agentgym.rewards import Score
    from agentgym.tools import Range, tool

__version__ = "0.1.0"

__all__ = [
    "AgentEnv",
    "AgentGymError",
    "ConfigError",
    "EnvError",
    "InputError",
    "Message",
    "Range",
    "Score",
    "ToolCall",
    "ToolEnv",
    "ToolError",
    "ToolSpec",
    "__version__",
    "call",
    "load_plugins",
    "lookup",
    "make",
    "register",
    "tool",
]

_ROOMS = {
    "agentgym.env": ("AgentEnv", "ToolEnv"),
    "agentgym.errors": ("AgentGymError", "ConfigError", "EnvError", "InputError", "ToolError"),
    "agentgym.messages": ("Message", "ToolCall", "ToolSpec", "call"),
    "agentgym.registry": ("load_plugins", "lookup", "make", "register"),
    "agentgym.rewards": ("Score",),
    "agentgym.tools": ("Range", "tool"),
}
_ROOM_OF = {name: room for room, names in _ROOMS.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _ROOM_OF:
        raise AttributeError(f"module 'agentgym' has no attribute {name!r}")
    value = getattr(importlib.import_module(_ROOM_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
