"""An episode that someone outside plays: its conversation, recorded so that every prompt continues sampled ids.

Law: what a client sends back as history is matched to what was recorded, and a recorded reply enters a prompt with
exactly the ids that were sampled, whatever form the client gave its text. Only text that no policy sampled here is
encoded. Must never know HTTP.

A client may change the form of our messages (other call ids, `null` for empty content, other blanks or key order in
the JSON of arguments): that is the same history. Anything else is a rewritten history: the prompt then continues the
deepest recorded reply that is still there, and the turn begins one more row of the trajectory where that reply was
continued already. Branches need no name: each turn is found by the whole conversation that leads to it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from hashlib import blake2b
from typing import Any

from agentgym.messages import Message, ToolCall, ToolSpec
from agentgym.policy import Completion
from agentgym.render import ChatTemplateRenderer
from agentgym.trajectory import Turn

Key = bytes  # of a conversation: its tools and its messages, in a form that a client cannot change by echoing them


class Link(StrEnum):
    """How a recorded turn hangs together with those before it."""

    OPENING = "opening"  # a conversation that begins: the first one, a sub-agent's, or one begun again from a summary
    CONTINUATION = "continuation"  # of a reply that nothing continued before
    BRANCH = "branch"  # another one from where a turn hangs already: parallel sub-agents, `n` > 1, sampling again
    REWRITE = "rewrite"  # replies in its history were edited, dropped, or never sampled here


@dataclass(frozen=True, slots=True)
class RecordedPrompt:
    """The ids to sample from, and what they continue. Made by `Recording.prompt` alone.

    Example: `RecordedPrompt((1, 7, 5, 2, 9), parent=0, foreign=False, messages=(...), key=b"...", since=2)`.
    """

    token_ids: tuple[int, ...]
    parent: int | None  # the recorded turn whose ids these begin with
    foreign: bool  # replies behind the parent, or all of them, were not recorded there
    messages: tuple[Message, ...]
    key: Key
    since: int  # messages[since:] came after the parent's reply

    @property
    def observation(self) -> tuple[Message, ...]:
        return self.messages[self.since :]


@dataclass(slots=True)
class _Recorded:
    prompt: RecordedPrompt
    completion: Completion
    reply: Message
    delivered: bool = False


class Recording:
    """One conversation or several, as they are sampled.

    >>> prompt = recording.prompt([Message("user", "1 left")], tools)
    >>> number = recording.add(prompt, completion, renderer.parse(completion.token_ids, tools))
    """

    def __init__(self, renderer: ChatTemplateRenderer) -> None:
        self._renderer = renderer
        self._turns: list[_Recorded] = []
        self._by_history: dict[Key, int] = {}  # a conversation up to and with a reply -> its turn
        self._by_reply: dict[Key, int] = {}  # a reply alone -> a turn that says it; of several, the latest delivered

    # ------------------------------------------------------------------------------------------------- questions

    @property
    def num_turns(self) -> int:
        return len(self._turns)

    @property
    def num_sampled_tokens(self) -> int:
        return sum(len(turn.completion.token_ids) for turn in self._turns)

    def live_versions(self) -> set[int]:
        return {version for turn in self._turns for version in turn.completion.policy_versions}

    def prompt(self, messages: Sequence[Message], tools: Sequence[ToolSpec]) -> RecordedPrompt:
        """The prompt that asks for the next reply to `messages`, of which the last is not an assistant's. Raises
        TemplateError."""
        keys = history_keys(messages, tools)
        replies = [place for place, message in enumerate(messages) if message.role == "assistant"]
        for place in reversed(replies):
            parent = self._by_history.get(keys[place + 1])
            if parent is not None:
                ids = self._continue(parent, messages[place + 1 :], tools)
                return RecordedPrompt(ids, parent, replies[-1] != place, tuple(messages), keys[-1], place + 1)
        for place in replies:  # a new head; what was sampled keeps its ids there too
            known = self._by_reply.get(_digest(b"", message_key(messages[place], ())))
            if known is not None and place > 0:
                head = self._renderer.render(messages[:place], tools)
                ids = self._append(head, self._ids(known), messages[place + 1 :], tools)
                return RecordedPrompt(tuple(ids), None, True, tuple(messages), keys[-1], 0)
        ids = self._renderer.render(messages, tools)
        return RecordedPrompt(tuple(ids), None, bool(replies), tuple(messages), keys[-1], 0)

    def links(self) -> tuple[Link, ...]:
        """How each recorded turn hangs together with those before it, in the order of recording."""
        links: list[Link] = []
        continued: set[int] = set()
        openings: set[Key] = set()
        for turn in self._turns:
            prompt = turn.prompt
            if prompt.foreign:
                links.append(Link.REWRITE)
            elif prompt.parent is None:
                links.append(Link.BRANCH if prompt.key in openings else Link.OPENING)
                openings.add(prompt.key)
            else:
                links.append(Link.BRANCH if prompt.parent in continued else Link.CONTINUATION)
            if prompt.parent is not None:
                continued.add(prompt.parent)
        return tuple(links)

    def opening(self) -> tuple[Message, ...]:
        return self._turns[0].prompt.messages if self._turns else ()

    def turns(self) -> tuple[Turn, ...]:
        """The turns whose replies reached the client, each followed by the first one that continues it, so that a
        conversation stays one row however its branches were interleaved."""
        kept = self._delivered()
        following: dict[int, int] = {}
        heads: list[int] = []
        for number in kept:
            parent = self._turns[number].prompt.parent
            if parent is None or parent in following:
                heads.append(number)
            else:
                following[parent] = number
        turns: list[Turn] = []
        for head in heads:
            number: int | None = head
            while number is not None:
                after = following.get(number)
                turn = self._turns[number]
                observation = () if after is None else self._turns[after].prompt.observation
                turns.append(Turn(turn.prompt.token_ids, turn.completion, turn.reply, observation, 0.0))
                number = after
        return tuple(turns)

    @property
    def num_undelivered(self) -> int:
        return len(self._turns) - len(self._delivered())

    # ---------------------------------------------------------------------------------------------------- orders

    def add(self, prompt: RecordedPrompt, completion: Completion, reply: Message) -> int:
        """Records what was sampled for `prompt`; its number is what `deliver` takes. `reply` is the message that the
        client is sent."""
        number = len(self._turns)
        self._turns.append(_Recorded(prompt, completion, reply))
        for index, key in self._indices(number):
            if key not in index or not self._turns[index[key]].delivered:
                index[key] = number
        return number

    def deliver(self, number: int) -> None:
        """The client has the reply. One that it never got is not part of the trajectory, since nothing the agent did
        can depend on it; unless it is continued, which shows that the client has it."""
        self._turns[number].delivered = True
        for index, key in self._indices(number):
            index[key] = number

    # ----------------------------------------------------------------------------------------------------- parts

    def _delivered(self) -> list[int]:
        continued = {turn.prompt.parent for turn in self._turns}
        return [number for number, turn in enumerate(self._turns) if turn.delivered or number in continued]

    def _indices(self, number: int) -> tuple[tuple[dict[Key, int], Key], ...]:
        turn = self._turns[number]
        reply = message_key(turn.reply, ())
        return (self._by_history, _digest(turn.prompt.key, reply)), (self._by_reply, _digest(b"", reply))

    def _ids(self, number: int) -> Sequence[int]:
        return self._turns[number].completion.token_ids

    def _continue(self, parent: int, rest: Sequence[Message], tools: Sequence[ToolSpec]) -> tuple[int, ...]:
        return tuple(self._append(self._turns[parent].prompt.token_ids, self._ids(parent), rest, tools))

    def _append(
        self, prompt_ids: Sequence[int], reply_ids: Sequence[int], rest: Sequence[Message], tools: Sequence[ToolSpec]
    ) -> list[int]:
        """What an episode does turn by turn: `rest` behind a reply, whose ids are never encoded again."""
        observation: list[Message] = []
        for message in rest:
            if message.role != "assistant":
                observation.append(message)
                continue
            prompt_ids = self._renderer.bridge(prompt_ids, reply_ids, observation)
            known = self._by_reply.get(_digest(b"", message_key(message, ())))
            reply_ids = self._renderer.encode_reply(message, tools) if known is None else self._ids(known)
            observation = []
        return self._renderer.bridge(prompt_ids, reply_ids, observation)


# ------------------------------------------------------------------------------------------------- what is the same


def history_keys(messages: Sequence[Message], tools: Sequence[ToolSpec]) -> list[Key]:
    """The keys of messages[:0], messages[:1], ..., messages[:]; each is made from the one before."""
    shown = [[tool.name, tool.description, _plain(tool.parameters)] for tool in tools]
    keys = [_digest(b"", json.dumps(shown, sort_keys=True))]
    calls: tuple[ToolCall, ...] = ()
    for message in messages:
        keys.append(_digest(keys[-1], message_key(message, calls)))
        if message.role == "assistant":
            calls = message.tool_calls
    return keys


def message_key(message: Message, calls: Sequence[ToolCall]) -> str:
    """What must be the same for two messages to be one. `calls` are those of the assistant message before: a result
    names one of them by its place, since ids are the client's to change."""
    if message.role == "assistant":
        # A call that could not be read is sent as the text it is.
        unread = "".join(call.arguments for call in message.tool_calls if not call.name)
        named = [[call.name, _arguments(call.arguments)] for call in message.tool_calls if call.name]
        return json.dumps(["assistant", (message.content + unread).strip(), named])
    if message.role == "tool":
        ids = [call.call_id for call in calls]
        answered = message.tool_call_id
        return json.dumps(["tool", ids.index(answered) if answered in ids else answered, message.content])
    return json.dumps([message.role, message.content])


def _arguments(text: str) -> str:
    """One form of the same JSON; what is not JSON stays the text it is."""
    try:
        return json.dumps(json.loads(text or "{}"), sort_keys=True)
    except (ValueError, RecursionError):
        return text


def _plain(value: Any) -> Any:
    """A schema as JSON has it."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _digest(before: Key, text: str) -> Key:
    return blake2b(before + text.encode("utf-8", "surrogatepass"), digest_size=16).digest()
