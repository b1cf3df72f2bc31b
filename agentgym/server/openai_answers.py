"""Replies in OpenAI's words: whole, and in the parts of a stream. Must never know HTTP.

Law: the parts of a stream, put together as the official client does, are the whole answer; the ids in `token_ids` are
the sampled ones, never ids of the text.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from agentgym.messages import ToolCall
from agentgym.server.openai_requests import ChatRequest, ChoicesRequest, CompletionRequest, SampledRequest
from agentgym.server.replies import Reply, TokenEvent
from agentgym.server.text_stream import ContentStream

Decode = Callable[[Sequence[int]], str]


@dataclass(frozen=True, slots=True)
class Part:
    """Some tokens of one reply, four parallel sequences, and the text that became certain with them.

    Example: `Part((5, 9), (-0.1, -1.2), (3, 3), (3, 3), " up")`.
    """

    token_ids: Sequence[int]
    logprobs: Sequence[float]
    policy_versions: Sequence[int]
    kv_versions: Sequence[int]
    text: str

    @classmethod
    def joined(cls, events: Sequence[TokenEvent]) -> Part:
        """Events that came since the last part was sent."""
        return cls(
            [token for event in events for token in event.token_ids],
            [logprob for event in events for logprob in event.logprobs],
            [event.policy_version for event in events for _ in event.token_ids],
            [event.kv_version for event in events for _ in event.token_ids],
            "".join(event.text for event in events),
        )

    @classmethod
    def of(cls, reply: Reply) -> Part:
        """A whole reply."""
        done = reply.completion
        return cls(done.token_ids, done.logprobs, done.policy_versions, done.kv_versions, reply.text)


class Answer(Protocol):
    """How one kind of answer is written."""

    END: ClassVar[bytes]  # what a stream that did not fail ends with, behind its last chunk
    ALIVE: ClassVar[bytes]  # what says in quiet times that the connection lives

    def whole(self, replies: Sequence[Reply]) -> dict[str, Any]: ...

    def opening(self, prompt_ids: Sequence[int], count: int) -> Iterator[dict[str, Any]]:
        """The chunks before the first token."""
        ...

    def chunks(self, index: int, part: Part) -> Iterator[dict[str, Any]]:
        """The chunks of some tokens; none if there is nothing to say yet."""
        ...

    def closing(self, index: int, reply: Reply) -> Iterator[dict[str, Any]]:
        """The chunks behind the last token of a reply."""
        ...

    def usage(self, replies: Sequence[Reply]) -> dict[str, Any]:
        """The chunk that says how many tokens it all took, for whom asks for it."""
        ...

    def failure(self, status: int, error: dict[str, Any]) -> dict[str, Any]:
        """The last chunk of a stream that failed, from OpenAI's error object and the status it would have."""
        ...


def usage(replies: Sequence[Reply]) -> dict[str, int]:
    """The prompt counts once, however many replies it got."""
    prompt = len(replies[0].prompt_ids)
    sampled = sum(len(reply.completion.token_ids) for reply in replies)
    return {"prompt_tokens": prompt, "completion_tokens": sampled, "total_tokens": prompt + sampled}


def our_fields(request: SampledRequest, part: Part) -> dict[str, Any]:
    """What is said of each token beside what OpenAI says, as far as it was asked for."""
    ours: dict[str, Any] = {}
    if request.return_token_ids:
        ours["token_ids"] = part.token_ids
    if request.return_policy_versions:
        ours |= {"policy_versions": part.policy_versions, "kv_versions": part.kv_versions}
    return ours


COMMENT = b": sampling\n\n"


class _Answer:
    """What both kinds share: the envelope, and our own fields."""

    END: ClassVar[bytes] = b"data: [DONE]\n\n"
    ALIVE: ClassVar[bytes] = COMMENT

    def __init__(self, request: ChoicesRequest, prefix: str, kind: str, chunk_kind: str) -> None:
        self._request = request
        self._kind = kind
        self._chunk_kind = chunk_kind
        self._head = {"id": f"{prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": request.model}

    def _body(self, replies: Sequence[Reply], choices: list[dict[str, Any]]) -> dict[str, Any]:
        body = self._head | {"object": self._kind, "choices": choices, "usage": usage(replies)}
        if self._request.return_token_ids:
            body["prompt_token_ids"] = replies[0].prompt_ids
        return body

    def _chunk(self, *choices: dict[str, Any]) -> dict[str, Any]:
        chunk = self._head | {"object": self._chunk_kind, "choices": choices}
        return chunk | {"usage": None} if self._request.wants_usage else chunk

    def usage(self, replies: Sequence[Reply]) -> dict[str, Any]:
        return self._chunk() | {"usage": usage(replies)}

    def failure(self, status: int, error: dict[str, Any]) -> dict[str, Any]:
        return {"error": error}

    def _ours(self, part: Part) -> dict[str, Any]:
        return our_fields(self._request, part)

    def _says_tokens(self, part: Part, logprobs: bool) -> bool:
        wanted = logprobs or self._request.return_token_ids or self._request.return_policy_versions
        return wanted and bool(part.token_ids)


class ChatAnswer(_Answer):
    """`chat.completion` and its chunks; `content` tells content from calls, one for each reply."""

    def __init__(self, request: ChatRequest, decode: Decode, content: Callable[[], ContentStream]) -> None:
        super().__init__(request, "chatcmpl", "chat.completion", "chat.completion.chunk")
        self._logprobs = bool(request.logprobs)
        self._decode = decode
        self._contents = [content() for _ in range(request.n or 1)]

    def whole(self, replies: Sequence[Reply]) -> dict[str, Any]:
        choices = []
        for index, reply in enumerate(replies):
            message: dict[str, Any] = {"role": "assistant", "content": reply.message.content, "refusal": None}
            if reply.message.tool_calls:
                message["content"] = reply.message.content or None
                message["tool_calls"] = [call.to_openai() for call in reply.message.tool_calls]
            part = Part.of(reply)
            choice = {
                "index": index,
                "message": message,
                "finish_reason": _finish_reason(reply),
                "logprobs": chat_logprobs(self._decode, part) if self._logprobs else None,
            }
            choices.append(choice | self._ours(part))
        return self._body(replies, choices)

    def opening(self, prompt_ids: Sequence[int], count: int) -> Iterator[dict[str, Any]]:
        for index in range(count):
            chunk = self._chunk(self._delta(index, {"role": "assistant", "content": "", "refusal": None}))
            if index == 0 and self._request.return_token_ids:
                chunk["prompt_token_ids"] = prompt_ids
            yield chunk

    def chunks(self, index: int, part: Part) -> Iterator[dict[str, Any]]:
        text = self._contents[index].feed(part.text)
        if not text and not self._says_tokens(part, self._logprobs):
            return
        choice = self._delta(index, {"content": text} if text else {}) | self._ours(part)
        if self._logprobs:
            choice["logprobs"] = chat_logprobs(self._decode, part)
        yield self._chunk(choice)

    def closing(self, index: int, reply: Reply) -> Iterator[dict[str, Any]]:
        rest = self._contents[index].finish(reply.message.content)
        if rest:
            yield self._chunk(self._delta(index, {"content": rest}))
        for number, call in enumerate(reply.message.tool_calls):
            yield self._chunk(self._delta(index, {"tool_calls": [_opened(number, call)]}))
            arguments = {"index": number, "function": {"arguments": call.arguments}}
            yield self._chunk(self._delta(index, {"tool_calls": [arguments]}))
        yield self._chunk(self._delta(index, {}) | {"finish_reason": _finish_reason(reply)})

    def _delta(self, index: int, delta: dict[str, Any]) -> dict[str, Any]:
        return {"index": index, "delta": delta, "finish_reason": None, "logprobs": None}


def _opened(number: int, call: ToolCall) -> dict[str, Any]:
    function = {"name": call.name, "arguments": ""}
    return {"index": number, "id": call.call_id, "type": "function", "function": function}


def _finish_reason(reply: Reply) -> str:
    return "tool_calls" if reply.message.tool_calls else reply.finish_reason


def chat_logprobs(decode: Decode, part: Part) -> dict[str, Any]:
    """One entry for each sampled token."""
    return {"content": token_logprobs(decode, part), "refusal": None}


def token_logprobs(decode: Decode, part: Part) -> list[dict[str, Any]]:
    """One entry for each sampled token. `bytes` is null for a token that is only a part of a character."""
    entries = []
    for token_id, logprob in zip(part.token_ids, part.logprobs, strict=True):
        text = decode([token_id])
        octets = None if "\ufffd" in text else list(text.encode())
        entries.append({"token": text, "logprob": logprob, "bytes": octets, "top_logprobs": []})
    return entries


class CompletionAnswer(_Answer):
    """`text_completion`, whole or in chunks of the same kind."""

    def __init__(self, request: CompletionRequest, decode: Decode) -> None:
        super().__init__(request, "cmpl", "text_completion", "text_completion")
        self._logprobs = request.logprobs is not None
        self._decode = decode
        self._offsets = [0] * (request.n or 1)

    def whole(self, replies: Sequence[Reply]) -> dict[str, Any]:
        choices = []
        for index, reply in enumerate(replies):
            part = Part.of(reply)
            choices.append(self._choice(index, reply.text, reply.finish_reason, part) | self._ours(part))
        return self._body(replies, choices)

    def opening(self, prompt_ids: Sequence[int], count: int) -> Iterator[dict[str, Any]]:
        if self._request.return_token_ids:
            yield self._chunk() | {"prompt_token_ids": prompt_ids}

    def chunks(self, index: int, part: Part) -> Iterator[dict[str, Any]]:
        if part.text or self._says_tokens(part, self._logprobs):
            yield self._chunk(self._choice(index, part.text, None, part) | self._ours(part))

    def closing(self, index: int, reply: Reply) -> Iterator[dict[str, Any]]:
        nothing = Part((), (), (), (), "")
        yield self._chunk(self._choice(index, "", reply.finish_reason, nothing))

    def _choice(self, index: int, text: str, reason: str | None, part: Part) -> dict[str, Any]:
        logprobs = self._token_logprobs(index, part) if self._logprobs else None
        return {"index": index, "text": text, "finish_reason": reason, "logprobs": logprobs}

    def _token_logprobs(self, index: int, part: Part) -> dict[str, Any]:
        tokens = [self._decode([token_id]) for token_id in part.token_ids]
        offsets = []
        for token in tokens:  # of the tokens one by one, which is not always where the text has them
            offsets.append(self._offsets[index])
            self._offsets[index] += len(token)
        return {"tokens": tokens, "token_logprobs": part.logprobs, "top_logprobs": None, "text_offset": offsets}
