"""What a client of OpenAI's Responses API may ask. Law: as in chat, a parameter is honoured or refused by its name,
before anything is sampled. Nothing is stored: a request brings its whole history, and an answer says `store: false`.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, WithJsonSchema

from agentgym.messages import Message, ToolSpec
from agentgym.server.openai_errors import ParameterError
from agentgym.server.openai_requests import (
    OpenAiRequest,
    check_names,
    check_no_others,
    check_not_strict,
    check_streams,
    named,
    short,
)
from agentgym.server.responses_items import ITEM_SCHEMA, read_items

LOGPROBS = "message.output_text.logprobs"
_TEXT = {"type": "string"}
TOOL_SCHEMA = {
    "type": "object",
    "properties": {
        "type": {"const": "function"},
        "name": {"type": "string", "minLength": 1},
        "description": {"anyOf": [_TEXT, {"type": "null"}]},
        "parameters": {"anyOf": [{"type": "object"}, {"type": "null"}]},
        "strict": {"enum": [False, None]},
    },
    "required": ["type", "name"],
}
_TOOL_KEYS = frozenset({"type", "name", "description", "parameters", "strict"})


def _given(value: dict[str, Any]) -> dict[str, Any]:
    """Without the keys that say nothing."""
    return {key: part for key, part in value.items() if part is not None}


Given = Annotated[dict[str, Any], AfterValidator(_given)]
JsonItem = Annotated[dict[str, Any], WithJsonSchema(ITEM_SCHEMA)]
JsonFlatTool = Annotated[dict[str, Any], WithJsonSchema(TOOL_SCHEMA)]


class ResponseStreamOptions(BaseModel):
    """What a stream may be asked besides events: not to pad them."""

    model_config = ConfigDict(extra="forbid", strict=True)

    include_obfuscation: Literal[False] | None = None


class ResponsesRequest(OpenAiRequest):
    """The body of `POST /v1/responses`."""

    PROMPT = "input"
    LENGTH = "max_output_tokens"
    NEUTRAL = OpenAiRequest.NEUTRAL | {
        "tool_choice": ("auto", "none"),
        "top_logprobs": (0,),
        "text": ({"format": {"type": "text"}}, {}),
        "parallel_tool_calls": (True,),
        "store": (False,),
        "background": (False,),
        "truncation": ("disabled",),
        "service_tier": ("auto", "default"),
        "reasoning": ({}, {"effort": "none"}),
        "previous_response_id": (),
        "conversation": (),
        "prompt": (),
        "max_tool_calls": (),
        "context_management": (),
    }
    MENDS: ClassVar[dict[str, str]] = {
        "store": "leave it out or send False: nothing is stored",
        "background": "leave it out, and stream",
        "truncation": "send an input that fits, or begin the conversation again from a summary",
        "reasoning": "leave it out: the policy has no effort to set",
        "previous_response_id": "nothing is stored: send the whole history in `input`",
        "conversation": "nothing is stored: send the whole history in `input`; a session records what is asked",
        "prompt": "nothing is stored: send `instructions` and `input`",
        "max_tool_calls": "leave it out: it bounds built-in tools, and there are none",
        "context_management": "leave it out, and shorten `input` yourself",
    }
    LABELS = ("user", "metadata", "safety_identifier", "prompt_cache_key", "prompt_cache_retention")

    input: str | Annotated[list[JsonItem], Field(fail_fast=True)] = Field(
        description="text, or items: messages of text, `function_call`, `function_call_output`; "
        "the last one is not the assistant's",
    )
    instructions: str | None = Field(None, description="a system message before `input`")
    tools: Annotated[list[JsonFlatTool], Field(fail_fast=True)] | None = Field(
        None, description="function tools, shown to the model by its template; `strict` may only be false"
    )
    tool_choice: Literal["auto", "none", "required"] | dict[str, Any] | None = Field(
        None, description="with `none` the tools are not shown; a forced call is not a sampled one"
    )
    max_output_tokens: int | None = Field(None, ge=1, description="tokens to sample at most")
    stream_options: ResponseStreamOptions | None = Field(
        None, description="`include_obfuscation: false`; with `stream` only"
    )
    include: list[Literal["message.output_text.logprobs"]] | None = Field(
        None, description=f"`{LOGPROBS}`: the logprob of each sampled token, as it was sampled"
    )
    metadata: dict[str, str] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    top_logprobs: int | None = None
    text: Given | None = None
    parallel_tool_calls: bool | None = None
    store: bool | None = None
    background: bool | None = None
    truncation: str | None = None
    service_tier: str | None = None
    reasoning: Given | None = None
    previous_response_id: str | None = None
    conversation: str | dict[str, Any] | None = None
    prompt: dict[str, Any] | None = None
    max_tool_calls: int | None = None
    context_management: list[Any] | None = None

    @property
    def wants_logprobs(self) -> bool:
        return bool(self.include)

    def check(self) -> None:
        """As SampledRequest.check."""
        super().check()
        check_streams(self.stream, self.stream_options)

    def _most(self) -> int | None:
        return self.max_output_tokens

    def read_messages(self) -> tuple[Message, ...]:
        """Raises ParameterError naming the item."""
        before = () if self.instructions is None else (Message("system", self.instructions),)
        asked = (Message("user", self.input),) if isinstance(self.input, str) else read_items(self.input)
        return (*before, *asked)

    def read_tools(self) -> tuple[ToolSpec, ...]:
        """All tools, shown or not. Raises ParameterError naming the tool."""
        tools = [_tool(f"tools[{index}]", value) for index, value in enumerate(self.tools or ())]
        check_names(tools)
        return tuple(tools)


def _tool(place: str, value: dict[str, Any]) -> ToolSpec:
    kind, name = value.get("type"), value.get("name")
    if kind != "function":
        mend = "a tool is of type function, and runs where its caller runs it"
        raise ParameterError(place, f"{place}: a tool of type {short(kind)} is not supported here; {mend}")
    if not isinstance(name, str) or not name:
        raise ParameterError(place, f"{place}.name must be text that is not empty, got {short(name)}")
    check_not_strict(place, value)
    check_no_others(place, value, _TOOL_KEYS)
    function = {"name": name, "description": value.get("description"), "parameters": value.get("parameters")}
    return named(place, ToolSpec.from_openai, {"type": "function", "function": function})
