"""The OpenAI surface, first form: models and chat completions, not streamed.

Law: a parameter is honoured or refused by name; none is accepted and ignored, except labels (`user`, `metadata`) that
never change an answer. Tokens are sampled from the whole distribution, so only top_p = 1 is exact and allowed.
"""

from __future__ import annotations

import time
import uuid
from typing import Any, Literal

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict, Field

from agentgym.errors import InputError, UnknownNameError
from agentgym.messages import Message, ToolSpec
from agentgym.server.service import Reply, RolloutService

MAX_TEMPERATURE = 2.0


class ChatRequest(BaseModel):
    """OpenAI's request body. Fields that are refused unless neutral are here to be refused by name."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: str
    messages: list[dict[str, Any]] = Field(min_length=1)
    tools: list[dict[str, Any]] | None = None
    tool_choice: Literal["auto", "none"] | None = None
    temperature: float | None = Field(default=None, ge=0.0, le=MAX_TEMPERATURE)
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**64)
    logprobs: bool | None = None
    user: str | None = None
    metadata: dict[str, str] | None = None
    # ours
    return_token_ids: bool = False
    return_policy_versions: bool = False
    # only the neutral value
    n: int | None = None
    stream: bool | None = None
    stream_options: dict[str, Any] | None = None
    top_p: float | None = None
    top_logprobs: int | None = None
    stop: str | list[str] | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    response_format: dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None

    def check(self) -> None:
        """Raises InputError for a parameter that this server cannot honour."""
        neutral: dict[str, tuple[Any, ...]] = {
            "n": (1,),
            "stream": (False,),
            "stream_options": (),
            "top_p": (1.0,),
            "top_logprobs": (0,),
            "stop": ([], ""),
            "presence_penalty": (0.0,),
            "frequency_penalty": (0.0,),
            "logit_bias": ({},),
            "response_format": ({"type": "text"},),
            "parallel_tool_calls": (True,),
        }
        for name, allowed in neutral.items():
            value = getattr(self, name)
            if value is not None and value not in allowed:
                only = f"leave it out or send {allowed[0]!r}" if allowed else "leave it out"
                raise ParameterError(name, f"{name}={value!r} is not supported here; {only}")
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise ParameterError("max_tokens", "max_tokens and max_completion_tokens differ; send one of them")


class ParameterError(InputError):
    """A request parameter that is refused; `param` is its name."""

    def __init__(self, param: str, message: str) -> None:
        super().__init__(message)
        self.param = param


class UnknownModelError(UnknownNameError):
    """A model that is not served here."""


def openai_router(service: RolloutService) -> APIRouter:
    """The routes under `/v1`."""
    router = APIRouter(prefix="/v1")
    created = int(time.time())

    @router.get("/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [_model(service, created)]}

    @router.get("/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        _check_model(service, name)
        return _model(service, created)

    @router.post("/chat/completions")
    async def chat(request: ChatRequest) -> dict[str, Any]:
        _check_model(service, request.model)
        request.check()
        messages = _read_messages(request.messages)
        tools = [] if request.tool_choice == "none" else _read_tools(request.tools or [])
        reply = await service.reply(
            messages,
            tools,
            request.max_completion_tokens or request.max_tokens,
            1.0 if request.temperature is None else request.temperature,
            None if request.seed is None else request.seed % 2**64,
        )
        return _completion(service, request, reply)

    return router


def _check_model(service: RolloutService, name: str) -> None:
    if name != service.model_name:
        raise UnknownModelError(str(UnknownNameError.of("model", name, [service.model_name])))


def _model(service: RolloutService, created: int) -> dict[str, Any]:
    return {
        "id": service.model_name,
        "object": "model",
        "created": created,
        "owned_by": "agentgym",
        "max_model_len": service.max_context,
        "policy_version": service.policy.policy_version,
    }


def _read_messages(values: list[dict[str, Any]]) -> list[Message]:
    messages = []
    for index, value in enumerate(values):
        try:
            messages.append(Message.from_openai(value))
        except InputError as error:
            raise ParameterError(f"messages[{index}]", str(error)) from error
    if messages[-1].role == "assistant":
        raise ParameterError("messages", "the last message must not be the assistant's: a reply is what is asked for")
    return messages


def _read_tools(values: list[dict[str, Any]]) -> list[ToolSpec]:
    tools = []
    for index, value in enumerate(values):
        try:
            tools.append(ToolSpec.from_openai(value))
        except InputError as error:
            raise ParameterError(f"tools[{index}]", str(error)) from error
    return tools


def _completion(service: RolloutService, request: ChatRequest, reply: Reply) -> dict[str, Any]:
    completion = reply.completion
    message = _message(reply.message)
    choice: dict[str, Any] = {
        "index": 0,
        "message": message,
        "finish_reason": "tool_calls" if "tool_calls" in message else completion.finish_reason,
        "logprobs": _logprobs(service, reply) if request.logprobs else None,
    }
    if request.return_token_ids:
        choice["token_ids"] = completion.token_ids
    if request.return_policy_versions:
        choice["policy_versions"] = completion.policy_versions
        choice["kv_versions"] = completion.kv_versions
    num_prompt, num_sampled = len(reply.prompt_ids), len(completion.token_ids)
    body: dict[str, Any] = {
        "id": f"chatcmpl-{uuid.uuid4().hex}",
        "object": "chat.completion",
        "created": int(time.time()),
        "model": service.model_name,
        "choices": [choice],
        "usage": {
            "prompt_tokens": num_prompt,
            "completion_tokens": num_sampled,
            "total_tokens": num_prompt + num_sampled,
        },
    }
    if request.return_token_ids:
        body["prompt_token_ids"] = reply.prompt_ids
    return body


def _message(message: Message) -> dict[str, Any]:
    """As OpenAI's clients read it. A call that could not be read has no name to call: it is shown as what it is, text.
    Call ids are made unique, because a client's history holds the calls of many replies."""
    readable = [call for call in message.tool_calls if call.name]
    unreadable = [call.arguments for call in message.tool_calls if not call.name]
    content = "".join([message.content, *unreadable])
    value: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
    if readable:
        value["content"] = content or None
        value["tool_calls"] = [call.to_openai() | {"id": f"call_{uuid.uuid4().hex[:24]}"} for call in readable]
    return value


def _logprobs(service: RolloutService, reply: Reply) -> dict[str, Any]:
    content = []
    for token_id, logprob in zip(reply.completion.token_ids, reply.completion.logprobs, strict=True):
        text = service.renderer.encoder.decode([token_id])
        content.append({"token": text, "logprob": logprob, "bytes": list(text.encode()), "top_logprobs": []})
    return {"content": content, "refusal": None}
