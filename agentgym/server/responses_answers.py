"""Replies as OpenAI's Responses API says them: whole, and in the typed events of a stream. Must never know HTTP.

Law: the events of a stream, put together as the official client does, are the whole answer, and the last one holds it;
events are numbered from 0 without a gap. A reply is a message item and an item for each of its calls. There is no
message where calls are all that was said, unless logprobs were asked for, which a message alone can hold.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import msgspec

from agentgym.messages import ToolCall, ToolSpec
from agentgym.server.openai_answers import COMMENT, Decode, Part, our_fields, token_logprobs
from agentgym.server.replies import Reply
from agentgym.server.responses_requests import ResponsesRequest
from agentgym.server.text_stream import ContentStream


class ResponseAnswer:
    """A `response` object and its events; `content` tells content from calls."""

    END: ClassVar[bytes] = b""
    ALIVE: ClassVar[bytes] = COMMENT

    def __init__(
        self, request: ResponsesRequest, tools: Sequence[ToolSpec], decode: Decode, content: ContentStream
    ) -> None:
        self._request = request
        self._decode = decode
        self._content = content
        self._key = uuid.uuid4().hex
        self._number = 0  # of the next event
        self._begun = False  # whether a stream has begun the message
        self._logprobs: list[dict[str, Any]] = []  # those that a stream has said
        self._head = self._envelope(tools)

    # ------------------------------------------------------------------------------------------------------- whole

    def whole(self, replies: Sequence[Reply]) -> dict[str, Any]:
        (reply,) = replies
        part = Part.of(reply)
        cut = reply.finish_reason == "length"
        body = self._head | {
            "status": "incomplete" if cut else "completed",
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "output": self._output(reply, self._tokens(part)),
            "usage": _usage(reply),
        }
        if self._request.return_token_ids:
            body["prompt_token_ids"] = reply.prompt_ids
        return body | our_fields(self._request, part)

    # ---------------------------------------------------------------------------------------------------- a stream

    def opening(self, prompt_ids: Sequence[int], count: int) -> Iterator[dict[str, Any]]:
        for kind in ("response.created", "response.in_progress"):
            yield self._event(kind, response=self._head)

    def chunks(self, index: int, part: Part) -> Iterator[dict[str, Any]]:
        yield from self._more(self._content.feed(part.text), self._tokens(part))

    def closing(self, index: int, reply: Reply) -> Iterator[dict[str, Any]]:
        yield from self._more(self._content.finish(reply.message.content), [])
        for place, item in enumerate(self._output(reply, self._logprobs)):
            if item["type"] == "message":
                yield from self._end_message(item)
            else:
                yield from self._call(place, item)
        whole = self.whole([reply])
        yield self._event(f"response.{whole['status']}", response=whole)

    def usage(self, replies: Sequence[Reply]) -> dict[str, Any]:
        raise NotImplementedError("the last event says it")

    def failure(self, status: int, error: dict[str, Any]) -> dict[str, Any]:
        return self._event("error", code=error["code"], message=error["message"], param=error["param"])

    # ------------------------------------------------------------------------------------------------------- parts

    def _envelope(self, tools: Sequence[ToolSpec]) -> dict[str, Any]:
        """What every `response` object says, before anything is sampled."""
        request = self._request
        # Encoded here, once: a schema that nests too deeply is a refusal, not the end of a stream.
        shown = msgspec.Raw(msgspec.json.encode([_shown(tool) for tool in tools]))
        return {
            "id": f"resp_{self._key}",
            "object": "response",
            "created_at": int(time.time()),
            "model": request.model,
            "status": "in_progress",
            "background": False,
            "error": None,
            "incomplete_details": None,
            "instructions": request.instructions,
            "max_output_tokens": request.max_output_tokens,
            "max_tool_calls": None,
            "metadata": request.metadata or {},
            "output": [],
            "parallel_tool_calls": True,
            "previous_response_id": None,
            "prompt_cache_key": request.prompt_cache_key,
            "reasoning": {"effort": None, "summary": None},
            "safety_identifier": request.safety_identifier,
            "service_tier": "default",
            "store": False,
            "temperature": 1.0 if request.temperature is None else request.temperature,
            "text": {"format": {"type": "text"}},
            "tool_choice": request.tool_choice or "auto",
            "tools": shown,
            "top_logprobs": 0,
            "top_p": 1.0,
            "truncation": "disabled",
            "usage": None,
            "user": request.user,
        }

    def _output(self, reply: Reply, logprobs: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The items of a reply. One without a text or a call is an empty message, so that a history shows it."""
        calls = [self._called(place, call) for place, call in enumerate(reply.message.tool_calls)]
        if calls and not reply.message.content and not self._request.wants_logprobs:
            return calls
        cut = reply.finish_reason == "length" and not calls
        text = _text(reply.message.content, logprobs)
        return [self._message("incomplete" if cut else "completed", [text]), *calls]

    def _message(self, status: str, content: list[dict[str, Any]]) -> dict[str, Any]:
        name = f"msg_{self._key}"
        return {"type": "message", "id": name, "role": "assistant", "status": status, "content": content}

    def _called(self, number: int, call: ToolCall) -> dict[str, Any]:
        name = f"fc_{self._key}_{number}"
        named = {"type": "function_call", "id": name, "call_id": call.call_id, "name": call.name}
        return named | {"arguments": call.arguments, "status": "completed"}

    def _tokens(self, part: Part) -> list[dict[str, Any]]:
        """Every sampled token, those of calls and the one that closed the reply too, if they were asked for. OpenAI's
        schema has no null for `bytes`: it is empty for a token that is only a part of a character."""
        entries = token_logprobs(self._decode, part) if self._request.wants_logprobs else []
        return [entry | {"bytes": entry["bytes"] or []} for entry in entries]

    def _more(self, text: str, logprobs: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        if text or logprobs:
            yield from self._begin_message()
            self._logprobs += logprobs
            yield self._of_text("response.output_text.delta", delta=text, logprobs=logprobs)

    def _begin_message(self) -> Iterator[dict[str, Any]]:
        if not self._begun:
            self._begun = True
            begun = self._message("in_progress", [])
            yield self._event("response.output_item.added", output_index=0, item=begun)
            yield self._of_text("response.content_part.added", part=_text("", []))

    def _end_message(self, item: dict[str, Any]) -> Iterator[dict[str, Any]]:
        yield from self._begin_message()
        (part,) = item["content"]
        yield self._of_text("response.output_text.done", text=part["text"], logprobs=part["logprobs"])
        yield self._of_text("response.content_part.done", part=part)
        yield self._event("response.output_item.done", output_index=0, item=item)

    def _call(self, place: int, item: dict[str, Any]) -> Iterator[dict[str, Any]]:
        begun = item | {"arguments": "", "status": "in_progress"}
        yield self._event("response.output_item.added", output_index=place, item=begun)
        where = {"item_id": item["id"], "output_index": place}
        yield self._event("response.function_call_arguments.delta", **where, delta=item["arguments"])
        done = where | {"name": item["name"], "arguments": item["arguments"]}
        yield self._event("response.function_call_arguments.done", **done)
        yield self._event("response.output_item.done", output_index=place, item=item)

    def _of_text(self, kind: str, **said: Any) -> dict[str, Any]:
        return self._event(kind, item_id=f"msg_{self._key}", output_index=0, content_index=0, **said)

    def _event(self, kind: str, **said: Any) -> dict[str, Any]:
        number = self._number
        self._number += 1
        return {"type": kind, "sequence_number": number} | said


def _text(text: str, logprobs: list[dict[str, Any]]) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}


def _shown(tool: ToolSpec) -> dict[str, Any]:
    return {
        "type": "function",
        "name": tool.name,
        "description": tool.description,
        "parameters": tool.parameters,
        "strict": False,
    }


def _usage(reply: Reply) -> dict[str, Any]:
    """What a cache held is not counted, and no token is set apart as reasoning."""
    prompt, sampled = len(reply.prompt_ids), len(reply.completion.token_ids)
    return {
        "input_tokens": prompt,
        "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
        "output_tokens": sampled,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": prompt + sampled,
    }
