"""What a client of Anthropic's Messages API may ask. Law: as in chat, a parameter is honoured or refused by its name,
before anything is sampled. `cache_control` alone is taken anywhere: what a cache holds changes no answer.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any, ClassVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, WithJsonSchema

from agentgym.messages import Message, ToolSpec
from agentgym.server.messages_turns import CACHE, TEXT_BLOCK_SCHEMA, TURN_SCHEMA, read_text, read_turns
from agentgym.server.openai_errors import ParameterError
from agentgym.server.openai_requests import (
    MAX_STOPS,
    SampledRequest,
    Stop,
    check_names,
    check_neutral,
    check_no_others,
    check_not_strict,
    short,
)
from agentgym.server.replies import Sampling

NO_THREADS = "thread_unsupported_request"  # upon which Anthropic's tool runner sends whole histories
_TEXT = {"type": "string"}
TOOL_SCHEMA = {
    "type": "object",
    "properties": {
        "type": {"enum": ["custom", None]},
        "name": {"type": "string", "minLength": 1},
        "description": {"anyOf": [_TEXT, {"type": "null"}]},
        "input_schema": {"type": "object"},
        "strict": {"enum": [False, None]},
        "cache_control": CACHE,
    },
    "required": ["name", "input_schema"],
}
CHOICE_SCHEMA = {
    "type": "object",
    "properties": {
        "type": {"enum": ["auto", "none", "any", "tool"]},
        "name": _TEXT,
        "disable_parallel_tool_use": {"type": "boolean"},
    },
    "required": ["type"],
}
# `eager_input_streaming` says when a call's input is sent, never what; `allowed_callers` is looked at by itself.
_TOOL_KEYS = frozenset(
    {"type", "name", "description", "input_schema", "strict", "cache_control", "eager_input_streaming"}
)


def _given(value: dict[str, Any]) -> dict[str, Any]:
    """Without the keys that say nothing."""
    return {key: part for key, part in value.items() if part is not None and part is not False}


Given = Annotated[dict[str, Any], AfterValidator(_given)]
JsonTurn = Annotated[dict[str, Any], WithJsonSchema(TURN_SCHEMA)]
JsonText = Annotated[dict[str, Any], WithJsonSchema(TEXT_BLOCK_SCHEMA)]
JsonClientTool = Annotated[dict[str, Any], WithJsonSchema(TOOL_SCHEMA)]
JsonChoice = Annotated[Given, WithJsonSchema(CHOICE_SCHEMA)]


class Metadata(BaseModel):
    """Whom a request is made for."""

    model_config = ConfigDict(extra="forbid", strict=True)

    user_id: str | None = None


class ShownRequest(BaseModel):
    """What the model is shown: all of a request but how to sample."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    NEUTRAL: ClassVar[dict[str, tuple[Any, ...]]] = {
        "tool_choice": ({"type": "auto"}, {"type": "none"}),
        "thinking": ({"type": "disabled"},),
        "output_config": ({},),
        "context_management": ({},),
        "compaction": (),
        "mcp_servers": ([],),
        "speed": ("standard",),
        "billing_policy": (),
    }
    MENDS: ClassVar[dict[str, str]] = {
        "tool_choice": "leave it out or send {'type': 'auto'}: a call is sampled, never forced or forbidden",
        "thinking": "leave it out or send {'type': 'disabled'}: the policy's replies are text and calls",
        "output_config": "leave it out: the policy has no effort to set, and is forced into no format",
        "context_management": "leave it out, and shorten `messages` yourself",
        "compaction": "leave it out, and begin again from a summary of your own",
        "fallbacks": "leave it out: one model is served",
        "mcp_servers": "leave it out, and send their tools in `tools`: they run where the caller runs them",
        "container": "leave it out: tools run where the caller runs them",
        "inference_geo": "leave it out: tokens are sampled where this server is",
        "diagnostics": "leave it out: what a cache held is not reported",
    }
    LABELS: ClassVar[tuple[str, ...]] = ("cache_control",)

    model: str = Field(description="the name that `/v1/models` lists")
    messages: Annotated[list[JsonTurn], Field(fail_fast=True)] = Field(
        min_length=1,
        description="turns of text, `tool_use` and `tool_result` blocks; the last one is not the assistant's",
    )
    system: str | Annotated[list[JsonText], Field(fail_fast=True)] | None = Field(
        None, description="text, or text blocks: a system message before `messages`"
    )
    tools: Annotated[list[JsonClientTool], Field(fail_fast=True)] | None = Field(
        None, description="client tools, shown to the model by its template; `strict` may only be false"
    )
    tool_choice: JsonChoice | None = Field(
        None, description="with `none` the tools are not shown; a forced call is not a sampled one"
    )
    cache_control: dict[str, Any] | None = None
    thinking: Given | None = None
    output_config: Given | None = None
    context_management: Given | None = None
    compaction: dict[str, Any] | None = None
    mcp_servers: list[Any] | None = None
    speed: str | None = None
    billing_policy: dict[str, Any] | None = None

    def check(self) -> None:
        """Raises ParameterError for a parameter that this server cannot honour."""
        check_neutral(self, self.NEUTRAL, self.MENDS)

    def read_messages(self) -> tuple[Message, ...]:
        """Raises ParameterError naming the turn or the block."""
        system = read_text("system", self.system or "")
        return (*((Message("system", system),) if system else ()), *read_turns(self.messages))

    def read_tools(self) -> tuple[ToolSpec, ...]:
        """Those that are shown to the model. Raises ParameterError naming the tool."""
        tools = [_tool(f"tools[{index}]", value) for index, value in enumerate(self.tools or ())]
        check_names(tools)
        return () if (self.tool_choice or {}).get("type") == "none" else tuple(tools)


class CountRequest(ShownRequest):
    """The body of `POST /v1/messages/count_tokens`."""


class MessagesRequest(SampledRequest, ShownRequest):
    """The body of `POST /v1/messages`."""

    NEUTRAL = (
        SampledRequest.NEUTRAL
        | ShownRequest.NEUTRAL
        | {
            "service_tier": ("auto", "standard_only"),
            "container": (),
            "inference_geo": (),
            "diagnostics": (),
            "thread": (False,),
            "fallbacks": ([],),
            "fallback_credit_token": (),
        }
    )
    MENDS = ShownRequest.MENDS
    LABELS: ClassVar[tuple[str, ...]] = ("metadata", "cache_control")

    max_tokens: int = Field(
        ge=1, description="tokens to sample at most; what the context has no room for is not refused"
    )
    stop_sequences: list[Stop] | None = Field(
        None,
        max_length=MAX_STOPS,
        description=f"up to {MAX_STOPS} strings; the text ends before the first one, the tokens behind it",
    )
    metadata: Metadata | None = None
    service_tier: str | None = None
    container: str | dict[str, Any] | None = None
    inference_geo: str | None = None
    diagnostics: dict[str, Any] | None = None
    thread: bool | dict[str, Any] | None = None
    fallbacks: list[Any] | str | None = None
    fallback_credit_token: str | dict[str, Any] | None = None

    def check(self) -> None:
        """As SampledRequest.check."""
        if self.thread:
            mend = "nothing is stored: send the whole history in `messages`; a session records what is asked"
            raise ParameterError("thread", f"thread={short(self.thread)} is not supported here; {mend}", NO_THREADS)
        super().check()

    def sampling(self) -> Sampling:
        """As SampledRequest.sampling. `max_tokens` must be said here, and agents say one that no small model has room
        for: it is the most that they want, and not how much."""
        return replace(super().sampling(), cut=True)

    def _most(self) -> int | None:
        return self.max_tokens

    def _stops(self) -> tuple[str, ...]:
        return tuple(self.stop_sequences or ())


def _tool(place: str, value: dict[str, Any]) -> ToolSpec:
    kind, name, schema = value.get("type"), value.get("name"), value.get("input_schema")
    if kind not in (None, "custom"):
        mend = "send it as a client tool, by name, description and input_schema: it runs where the caller runs it"
        raise ParameterError(place, f"{place}: a tool of type {short(kind)} is not supported here; {mend}")
    if not isinstance(name, str) or not name:
        raise ParameterError(place, f"{place}.name must be text that is not empty, got {short(name)}")
    description = value.get("description") or ""
    if not isinstance(description, str):
        raise ParameterError(place, f"{place}.description must be text, got {short(description)}")
    if not isinstance(schema, dict) or not isinstance(schema.get("properties", {}), dict):
        raise ParameterError(
            place, f"{place}.input_schema must be the JSON schema of an object, got {short(value.get('input_schema'))}"
        )
    check_not_strict(place, value)
    direct = value.get("allowed_callers") == ["direct"]
    check_no_others(place, value, _TOOL_KEYS | {"allowed_callers"} if direct else _TOOL_KEYS)
    return ToolSpec(name, description, schema or {"type": "object", "properties": {}})
