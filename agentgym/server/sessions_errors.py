"""What a session refuses. Must never know HTTP: which status each of them is, the surface says."""

from __future__ import annotations

from agentgym.errors import InputError


class UnknownSessionError(InputError, LookupError):
    """There is no such session, or none that the asker may see."""


class SessionEndedError(InputError):
    """A session that has ended takes no more requests and no second ending."""


class SessionBusyError(InputError):
    """A session whose agent is still being answered does not end with a score."""


class SessionLimitError(InputError):
    """A session has used up its turns or tokens."""


class UntrainableError(InputError):
    """A request whose tokens a training session could not use; `param` is the parameter's name."""

    def __init__(self, param: str, message: str) -> None:
        super().__init__(message)
        self.param = param
