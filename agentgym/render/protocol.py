"""What every renderer is: the one place that speaks both messages and tokens.

Law: render(messages + reply + observation) == bridge(prompt ids, the reply's own sampled ids, observation) in text,
and bridge never re-encodes a sampled id.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from agentgym.messages import Message, ToolSpec


class Renderer(Protocol):
    """Messages <-> token ids of one tokenizer and chat template."""

    stop_token_ids: tuple[int, ...]  # a completion that ends in one of these closed its turn

    def render(self, messages: Sequence[Message], tools: Sequence[ToolSpec]) -> list[int]:
        """The prompt [P] that asks for the next assistant message. Text from outside is encoded with special tokens
        split, so it cannot forge a turn."""
        ...

    def parse(self, completion_ids: Sequence[int], tools: Sequence[ToolSpec]) -> Message:
        """The assistant message that a completion says; for routing only. A malformed tool call becomes a ToolCall
        that the environment can answer, never an exception. `tools` names the arguments where the format of the
        calls is positional."""
        ...

    def bridge(
        self, prompt_ids: Sequence[int], completion_ids: Sequence[int], observation: Sequence[Message]
    ) -> list[int]:
        """The next prompt: `prompt_ids + completion_ids + scaffold and observation`; begins with exactly the ids
        given. Where the completion was cut off before its close token, the scaffold supplies it."""
        ...
