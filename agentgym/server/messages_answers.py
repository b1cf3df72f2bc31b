"""Replies as Anthropic's Messages API says them: whole, and in the typed events of a stream. Must never know HTTP.

Law: the events of a stream, put together as the official client does, are the whole answer. A reply is a block of text
and a block for each of its calls; there is no text where calls are all that was said. Our own fields stand in the
message, of a stream in its message_delta, and the prompt's ids in its message_start.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import msgspec

from agentgym.messages import ToolCall
from agentgym.server.messages_errors import error_answer
from agentgym.server.messages_inputs import input_of
from agentgym.server.messages_requests import MessagesRequest
from agentgym.server.openai_answers import Part, our_fields
from agentgym.server.replies import Reply
from agentgym.server.text_stream import ContentStream


class MessagesAnswer:
    """A `message` object and its events; `content` tells content from calls, `max_context` is the model's [tokens]."""

    END: ClassVar[bytes] = b""
    ALIVE: ClassVar[bytes] = b'event: ping\ndata: {"type":"ping"}\n\n'

    def __init__(self, request: MessagesRequest, content: ContentStream, max_context: int) -> None:
        self._request = request
        self._content = content
        self._max_context = max_context
        self._begun = False  # whether a stream has begun the text
        self._head = {
            "id": f"msg_{uuid.uuid4().hex}",
            "type": "message",
            "role": "assistant",
            "model": request.model,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
        }

    def whole(self, replies: Sequence[Reply]) -> dict[str, Any]:
        (reply,) = replies
        message = reply.message
        blocks = [_used(call) | {"input": _raw(input_of(call.arguments))} for call in message.tool_calls]
        if message.content or not blocks:  # one that says nothing is an empty text, so that a history shows it
            blocks.insert(0, {"type": "text", "text": message.content})
        usage = _usage(len(reply.prompt_ids), len(reply.completion.token_ids))
        body = self._head | {"content": blocks, "usage": usage} | self._stop(reply)
        if self._request.return_token_ids:
            body["prompt_token_ids"] = reply.prompt_ids
        return body | our_fields(self._request, Part.of(reply))

    # ---------------------------------------------------------------------------------------------------- a stream

    def opening(self, prompt_ids: Sequence[int], count: int) -> Iterator[dict[str, Any]]:
        message = self._head | {"usage": _usage(len(prompt_ids), 0)}
        if self._request.return_token_ids:
            message["prompt_token_ids"] = prompt_ids
        yield {"type": "message_start", "message": message}
        yield {"type": "ping"}

    def chunks(self, index: int, part: Part) -> Iterator[dict[str, Any]]:
        yield from self._more(self._content.feed(part.text))

    def closing(self, index: int, reply: Reply) -> Iterator[dict[str, Any]]:
        calls = reply.message.tool_calls
        yield from self._more(self._content.finish(reply.message.content))
        if not calls:
            yield from self._begin()
        if self._begun:
            yield {"type": "content_block_stop", "index": 0}
        for place, call in enumerate(calls, start=int(self._begun)):
            yield {"type": "content_block_start", "index": place, "content_block": _used(call) | {"input": {}}}
            delta = {"type": "input_json_delta", "partial_json": input_of(call.arguments)}
            yield {"type": "content_block_delta", "index": place, "delta": delta}
            yield {"type": "content_block_stop", "index": place}
        usage = _usage(len(reply.prompt_ids), len(reply.completion.token_ids))
        ended = {"type": "message_delta", "delta": self._stop(reply), "usage": usage}
        yield ended | our_fields(self._request, Part.of(reply))
        yield {"type": "message_stop"}

    def usage(self, replies: Sequence[Reply]) -> dict[str, Any]:
        raise NotImplementedError("message_delta says it")

    def failure(self, status: int, error: dict[str, Any]) -> dict[str, Any]:
        return error_answer(status, error["message"], error["code"])

    # ------------------------------------------------------------------------------------------------------- parts

    def _begin(self) -> Iterator[dict[str, Any]]:
        if not self._begun:
            self._begun = True
            yield {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}}

    def _more(self, text: str) -> Iterator[dict[str, Any]]:
        if text:
            yield from self._begin()
            yield {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": text}}

    def _stop(self, reply: Reply) -> dict[str, Any]:
        """Why the reply ended. Calls come first, as in chat: an agent that is told of them has to answer them."""
        sampled = len(reply.completion.token_ids)
        if reply.message.tool_calls:
            reason = "tool_use"
        elif reply.stopped is not None:
            reason = "stop_sequence"
        elif reply.finish_reason != "length":
            reason = "end_turn"
        elif sampled < self._request.max_tokens and len(reply.prompt_ids) + sampled >= self._max_context:
            reason = "model_context_window_exceeded"
        else:  # as many as were asked for, or as a session has left
            reason = "max_tokens"
        return {"stop_reason": reason, "stop_sequence": reply.stopped if reason == "stop_sequence" else None}


def _used(call: ToolCall) -> dict[str, Any]:
    return {"type": "tool_use", "id": call.call_id, "name": call.name}


def _raw(text: str) -> msgspec.Raw:
    """JSON that is written as it is: numbers keep the form that the policy gave them."""
    return msgspec.Raw(text.encode())


def _usage(prompt: int, sampled: int) -> dict[str, int]:
    """What a cache held is not counted: all of the prompt is `input_tokens`."""
    none = {"cache_creation_input_tokens": 0, "cache_read_input_tokens": 0}
    return {"input_tokens": prompt, "output_tokens": sampled} | none
