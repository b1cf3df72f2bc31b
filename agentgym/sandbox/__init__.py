"""Boxes in which a model's commands and code run: hardened by default, one interface, three tiers.

Example: `with open_sandbox("auto") as box: PythonInterpreter(box).run("1 + 1").text == "2"`.
"""

from agentgym.sandbox.archive import Archive, ArchivedFile, ArchiveLimits
from agentgym.sandbox.choose import choose_tier, open_sandbox
from agentgym.sandbox.interpreter import PythonInterpreter, PythonResult
from agentgym.sandbox.shell import ShellResult, ShellSession
from agentgym.sandbox.spec import BASE_IMAGE, Answer, ExecResult, Sandbox, SandboxSpec, Tier

__all__ = [
    "BASE_IMAGE",
    "Answer",
    "Archive",
    "ArchiveLimits",
    "ArchivedFile",
    "ExecResult",
    "PythonInterpreter",
    "PythonResult",
    "Sandbox",
    "SandboxSpec",
    "ShellResult",
    "ShellSession",
    "Tier",
    "choose_tier",
    "open_sandbox",
]
