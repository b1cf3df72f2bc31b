"""The policy as episodes see it. Law: the death of the engine is noted, since an episode turns it into data."""

from __future__ import annotations

from collections.abc import Sequence

from agentgym.errors import EngineDiedError
from agentgym.policy import Completion, Policy, SamplingParams


class Sampler:
    """A policy that remembers whether its engine died."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self.death: EngineDiedError | None = None

    async def complete(self, prompt_ids: Sequence[int], params: SamplingParams) -> Completion:
        try:
            return await self._policy.complete(prompt_ids, params)
        except EngineDiedError as error:
            self.death = error
            raise
