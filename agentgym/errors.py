"""One tree of errors. Law: every failure of ours names the value and the mend, and says by its class whose turn it is.

`InputError` is the person's turn (exit code 2, raised before any work starts); everything else is a failure at
work (exit code 1). Each class also inherits the standard library error that it replaces, so that callers who know
nothing of us can still catch it.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class AgentGymError(Exception):
    """Root of the tree. `exit_code` is what the command line ends with."""

    exit_code = 1

    def __str__(self) -> str:  # KeyError and OSError would print something else than the message
        return str(self.args[0]) if self.args else type(self).__name__


# ---------------------------------------------------------------------------------------------- the person's turn


class InputError(AgentGymError, ValueError):
    """Bad input, found before any work started."""

    exit_code = 2


class ConfigError(InputError):
    """A configuration that cannot run: names the dotted path, the value and the mend."""


class UnknownNameError(InputError, LookupError):
    """A name (environment, model, anchor, ...) that nothing is registered under.

    >>> raise UnknownNameError.of("environment", "mase", ["maze", "guess_number"])
    UnknownNameError: unknown environment 'mase'; did you mean 'maze'? (known: guess_number, maze)
    """

    @classmethod
    def of(cls, kind: str, name: str, known: Iterable[str]) -> UnknownNameError:
        """Builds the one message for a name that is not in `known`, with the nearest known one."""
        names = sorted(known)
        near = difflib.get_close_matches(name, names, n=1, cutoff=0.4)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        return cls(f"unknown {kind} {name!r}{hint} (known: {', '.join(names) or 'none'})")


class TemplateError(InputError):
    """A chat template that cannot be used token-exactly; names the cause."""


class UnavailableError(InputError, OSError):
    """A component that was asked for is not on this machine (a Docker daemon, bubblewrap, a package, bf16)."""


# ------------------------------------------------------------------------------------------------ failures at work


class ToolError(AgentGymError, ValueError):
    """Raised by a tool to tell the *model* something; becomes a tool message and never ends an episode."""


class EnvError(AgentGymError, RuntimeError):
    """An environment broke its contract (stepped before reset, no score at the end, ...)."""


class SandboxError(AgentGymError, RuntimeError):
    """Something failed in or around a sandbox; names the box, the command and the cause."""


class SandboxTimeoutError(SandboxError, TimeoutError):
    """The deadline of one call passed and its process group was killed."""


class SandboxDiedError(SandboxError, ConnectionError):
    """The box, or the daemon behind it, is gone."""


class SandboxLimitError(SandboxError, MemoryError):
    """The box hit a limit that ends the call (memory, disk)."""


class ArchiveError(SandboxError, ValueError):
    """An archive that is not written to any disk: it holds a link, a device, a path that leaves its folder, or too
    much; names the entry."""


class ImageError(SandboxError):
    """An image that cannot be built; shows the last lines of the build."""


class EngineError(AgentGymError, RuntimeError):
    """The inference engine failed."""


class EngineDiedError(EngineError, ConnectionError):
    """The engine process or server is gone."""


class PromptTooLongError(EngineError, ValueError):
    """Prompt and completion do not fit the engine's context."""


class VersionError(AgentGymError, LookupError):
    """A policy version that is not in the log, out of order, or used twice."""


class ServiceError(AgentGymError, ConnectionError):
    """The rollout service cannot be reached, ended, or refused a request."""


class NotNowError(ServiceError):
    """The service takes no more at the moment; says what it waits for. The same request succeeds later."""


class TrainingError(AgentGymError, RuntimeError):
    """Training cannot go on (non-finite gradient, no valid group, ...)."""


class MixedModelsError(TrainingError):
    """Trajectories of another model than the one in training, or of several."""


class BadLogprobsError(TrainingError):
    """An engine gave more loss tokens without a finite logprob than may be dropped."""


class CheckpointError(AgentGymError, OSError):
    """A checkpoint or another file of the run cannot be written or read."""
