"""What OpenAI's clients may ask. Law: a parameter is honoured or refused by its name, before anything is sampled; none
is accepted and ignored, except labels, which never change an answer.

Tokens are sampled from the whole distribution, so that their logprobs are those of what was sampled from: top_p = 1
alone is exact, and so are no penalties.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, WithJsonSchema

from agentgym.errors import InputError
from agentgym.messages import Message, ToolSpec
from agentgym.server.openai_errors import ParameterError
from agentgym.server.replies import Sampling

T = TypeVar("T")
MAX_TEMPERATURE = 2.0
MIN_TEMPERATURE = 0.01  # below it logits / temperature overflow; 0 itself is greedy
MAX_N = 128
MAX_STOPS = 16
MAX_STOP_CHARACTERS = 1000
DEFAULT_COMPLETION_TOKENS = 16  # OpenAI's

_TEXT = {"type": "string"}
_PART = {
    "type": "object",
    "properties": {"type": {"const": "text"}, "text": _TEXT},
    "required": ["type", "text"],
    "additionalProperties": False,
}
_CONTENT = {"anyOf": [_TEXT, {"type": "array", "items": _PART}, {"type": "null"}]}
_FUNCTION_CALL = {
    "type": "object",
    "properties": {"name": _TEXT, "arguments": _TEXT},
    "required": ["name", "arguments"],
}
_CALL = {
    "type": "object",
    "properties": {"id": _TEXT, "type": {"const": "function"}, "function": _FUNCTION_CALL},
    "required": ["id", "type", "function"],
}
MESSAGE_SCHEMA = {
    "type": "object",
    "properties": {
        "role": {"enum": ["system", "developer", "user", "assistant", "tool"]},
        "content": _CONTENT,
        "tool_calls": {"type": "array", "items": _CALL},
        "tool_call_id": _TEXT,
        "name": _TEXT,
    },
    "required": ["role", "content"],
}
TOOL_SCHEMA = {
    "type": "object",
    "properties": {
        "type": {"const": "function"},
        "function": {
            "type": "object",
            "properties": {
                "name": {"type": "string", "minLength": 1},
                "description": _TEXT,
                "parameters": {"type": "object"},
                "strict": {"enum": [False, None]},
            },
            "required": ["name"],
        },
    },
    "required": ["type", "function"],
}
MESSAGE_KEYS = frozenset({"role", "content", "tool_calls", "tool_call_id"})
MESSAGE_LABELS = frozenset({"name", "annotations", "provider_specific_fields"})  # said by clients, shown to no model

JsonMessage = Annotated[dict[str, Any], WithJsonSchema(MESSAGE_SCHEMA)]
JsonTool = Annotated[dict[str, Any], WithJsonSchema(TOOL_SCHEMA)]
Seed = Annotated[int, Field(ge=-(2**63), lt=2**64)]
TokenId = Annotated[int, Field(ge=0)]
Stop = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARACTERS)]
TokenIds = Annotated[list[TokenId], Field(fail_fast=True)]  # one wrong id is enough of an answer to a million of them


class StreamOptions(BaseModel):
    """What a stream says besides tokens."""

    model_config = ConfigDict(extra="forbid", strict=True)

    include_usage: bool = False
    include_obfuscation: Literal[False] | None = None


class SampledRequest(BaseModel):
    """What all requests share that sample, in every dialect. `NEUTRAL` names the parameters that are taken with these
    values only, which is the same as leaving them out, and `MENDS` says of some what to do instead of them."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    NEUTRAL: ClassVar[dict[str, tuple[Any, ...]]] = {
        "top_p": (1.0,),
        "top_k": (-1, 0),
    }
    MENDS: ClassVar[dict[str, str]] = {}
    LABELS: ClassVar[tuple[str, ...]] = ()
    PROMPT: ClassVar[str] = "messages"  # the parameter that a prompt is made of
    LENGTH: ClassVar[str] = "max_tokens"  # the one that says how many tokens to sample

    model: str = Field(description="the name that `/v1/models` lists")
    temperature: float | None = Field(
        None,
        ge=0.0,
        le=MAX_TEMPERATURE,
        description=f"0 (greedy), or {MIN_TEMPERATURE} to {MAX_TEMPERATURE:g}; default 1",
    )
    seed: Seed | None = Field(None, description="the same seed under the same version draws the same tokens")
    stop_token_ids: TokenIds | None = Field(
        None, max_length=MAX_STOPS, description=f"up to {MAX_STOPS} ids that end a reply, besides the template's own"
    )
    stream: bool | None = Field(None, description="server-sent events")
    timeout_s: float | None = Field(None, gt=0.0, description="ours: seconds for the whole answer; status 504 behind")
    return_token_ids: bool = Field(False, description="ours: the ids of the prompt and of each sampled token")
    return_policy_versions: bool = Field(False, description="ours: `policy_versions` and `kv_versions` of each token")
    top_p: float | None = None
    top_k: int | None = None

    def check(self) -> None:
        """Raises ParameterError for a parameter that this server cannot honour."""
        check_neutral(self, self.NEUTRAL, self.MENDS)
        if self.temperature is not None and 0.0 < self.temperature < MIN_TEMPERATURE:
            raise ParameterError("temperature", f"temperature must be 0 or >= {MIN_TEMPERATURE}")

    def sampling(self) -> Sampling:
        """How to sample, said in our own words."""
        return Sampling(
            n=self._num_replies(),
            max_tokens=self._most(),
            temperature=1.0 if self.temperature is None else self.temperature,
            seed=None if self.seed is None else self.seed % 2**64,
            stop=self._stops(),
            stop_token_ids=tuple(self.stop_token_ids or ()),
            timeout_s=self.timeout_s,
        )

    def _num_replies(self) -> int:
        return 1

    def _most(self) -> int | None:
        """How many tokens to sample at most; None: as many as fit."""
        raise NotImplementedError

    def _stops(self) -> tuple[str, ...]:
        """The strings that end a reply's text."""
        raise NotImplementedError

    @property
    def wants_usage(self) -> bool:
        """Whether a stream is to say how many tokens it took in a chunk of its own."""
        return False


class OpenAiRequest(SampledRequest):
    """What all of OpenAI's share."""

    NEUTRAL = SampledRequest.NEUTRAL | {
        "min_p": (0.0,),
        "presence_penalty": (0.0,),
        "frequency_penalty": (0.0,),
        "repetition_penalty": (1.0,),
        "logit_bias": ({},),
    }
    LABELS = ("user",)

    stop: Stop | list[Stop] | None = Field(
        None, description=f"up to {MAX_STOPS} strings; the text ends before the first one, the tokens behind it"
    )
    user: str | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[str, float] | None = None

    def check(self) -> None:
        super().check()
        if isinstance(self.stop, list) and len(self.stop) > MAX_STOPS:
            raise ParameterError("stop", f"stop may hold at most {MAX_STOPS} strings, got {len(self.stop)}")

    def _stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


class ChoicesRequest(OpenAiRequest):
    """What chat and plain completions share: they are answered with choices."""

    max_tokens: int | None = Field(None, ge=1, description="tokens to sample at most")
    n: int | None = Field(None, ge=1, le=MAX_N, description=f"replies, up to {MAX_N}; each has a seed of its own")
    stream_options: StreamOptions | None = Field(None, description="`include_usage`; with `stream` only")

    def check(self) -> None:
        super().check()
        check_streams(self.stream, self.stream_options)

    def _num_replies(self) -> int:
        return self.n or 1

    def _most(self) -> int | None:
        return self.max_tokens

    @property
    def wants_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage


class ChatRequest(ChoicesRequest):
    """The body of `POST /v1/chat/completions`."""

    NEUTRAL = OpenAiRequest.NEUTRAL | {
        "tool_choice": ("auto", "none"),
        "top_logprobs": (0,),
        "response_format": ({"type": "text"},),
        "parallel_tool_calls": (True,),
        "modalities": (["text"],),
        "store": (False,),
        "service_tier": ("auto", "default"),
    }
    LABELS = ("user", "metadata", "safety_identifier", "prompt_cache_key")

    messages: Annotated[list[JsonMessage], Field(fail_fast=True)] = Field(
        min_length=1, description="text only; the last one is not the assistant's; `name` is a label"
    )
    tools: Annotated[list[JsonTool], Field(fail_fast=True)] | None = Field(
        None, description="function tools, shown to the model by its template; `strict` may only be false"
    )
    tool_choice: Literal["auto", "none", "required"] | dict[str, Any] | None = Field(
        None,
        description="with `none` the tools are not shown; a forced call is not a sampled one",
    )
    max_completion_tokens: int | None = Field(None, ge=1, description="another name of `max_tokens`")
    logprobs: bool | None = Field(None, description="the logprob of each sampled token, as it was sampled")
    metadata: dict[str, str] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    top_logprobs: int | None = None
    response_format: dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    modalities: list[str] | None = None
    store: bool | None = None
    service_tier: str | None = None

    def check(self) -> None:
        super().check()
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise ParameterError("max_tokens", "max_tokens and max_completion_tokens differ; send one of them")

    def _most(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    def read_messages(self) -> tuple[Message, ...]:
        """Raises ParameterError naming the message."""
        messages = []
        for index, value in enumerate(self.messages):
            place = f"messages[{index}]"
            check_no_others(place, value, MESSAGE_KEYS | MESSAGE_LABELS)
            messages.append(named(place, Message.from_openai, value))
        if messages[-1].role == "assistant":
            raise ParameterError(
                "messages", "the last message must not be the assistant's: a reply is what messages ask for"
            )
        return tuple(messages)

    def read_tools(self) -> tuple[ToolSpec, ...]:
        """Those that are shown to the model. Raises ParameterError naming the tool."""
        tools = [named(f"tools[{index}]", ToolSpec.from_openai, value) for index, value in enumerate(self.tools or ())]
        for index, value in enumerate(self.tools or ()):
            check_not_strict(f"tools[{index}].function", value["function"])
        check_names(tools)
        return () if self.tool_choice == "none" else tuple(tools)


class CompletionRequest(ChoicesRequest):
    """The body of `POST /v1/completions`."""

    PROMPT = "prompt"
    NEUTRAL = OpenAiRequest.NEUTRAL | {"echo": (False,), "best_of": (1,), "suffix": ("",), "logprobs": (0,)}

    prompt: (
        str | TokenIds | Annotated[list[str], Field(fail_fast=True)] | Annotated[list[TokenIds], Field(fail_fast=True)]
    ) = Field(description="token ids, or text (encoded with special tokens split); one prompt")
    logprobs: int | None = Field(None, description="0: the logprob of each sampled token, as it was sampled")
    echo: bool | None = None
    best_of: int | None = None
    suffix: str | None = None

    def _most(self) -> int | None:
        return self.max_tokens or DEFAULT_COMPLETION_TOKENS

    def read_prompt(self) -> str | list[int]:
        """The one prompt. Raises ParameterError."""
        prompt = self.prompt
        if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int):
            if len(prompt) > 1:
                raise ParameterError("prompt", f"prompt must be one prompt, got {len(prompt)}; send one request each")
            prompt = prompt[0]
        if not prompt:
            raise ParameterError("prompt", "prompt must have at least one token")
        return prompt  # pyright: ignore[reportReturnType]


def check_neutral(body: BaseModel, neutral: Mapping[str, tuple[Any, ...]], mends: Mapping[str, str]) -> None:
    """Raises ParameterError for a parameter of `neutral` with another value than those there."""
    for name, allowed in neutral.items():
        value = getattr(body, name)
        if value is not None and value not in allowed:
            mend = mends.get(name, f"leave it out or send {allowed[0]!r}" if allowed else "leave it out")
            raise ParameterError(name, f"{name}={short(value)} is not supported here; {mend}")


def check_vocabulary(param: str, token_ids: list[int], vocab_size: int) -> None:
    """Raises ParameterError for an id that no token has."""
    for token_id in token_ids:
        if token_id >= vocab_size:
            raise ParameterError(param, f"{param}: {token_id} is not in the vocabulary of {vocab_size} tokens")


def check_streams(stream: bool | None, stream_options: BaseModel | None) -> None:
    """Raises ParameterError for options of a stream where none was asked for."""
    if stream_options is not None and not stream:
        raise ParameterError("stream_options", "stream_options needs stream=true")


def check_names(tools: Sequence[ToolSpec]) -> None:
    """Raises ParameterError for a name that two tools have."""
    names: set[str] = set()
    for index, tool in enumerate(tools):
        if tool.name in names:
            raise ParameterError(f"tools[{index}]", f"tools[{index}] has the name of another tool, {short(tool.name)}")
        names.add(tool.name)


def check_not_strict(place: str, function: Mapping[str, Any]) -> None:
    """Raises ParameterError for a tool whose calls are to be forced into its schema."""
    if function.get("strict"):
        mend = "send strict=false: a call is sampled, never forced into a schema"
        raise ParameterError(place, f"{place}.strict={short(function['strict'])} is not supported here; {mend}")


def check_no_others(place: str, value: Mapping[str, Any], known: Container[str]) -> None:
    """Raises ParameterError for a key that says something and is not known."""
    for key, part in value.items():
        if key not in known and part:
            name = f"{place}.{key[:100] or '(empty)'}"
            raise ParameterError(name, f"unknown parameter '{name}'")


def read_word(place: str, value: Mapping[str, Any], key: str) -> str:
    """The text under `key`. Raises ParameterError for what is none, and for an empty one."""
    word = value.get(key)
    if not isinstance(word, str) or not word:
        raise ParameterError(place, f"{place}.{key} must be text that is not empty, got {short(word)}")
    return word


def named(place: str, read: Callable[[dict[str, Any]], T], value: dict[str, Any]) -> T:
    """What `read` makes of it. Raises ParameterError naming the place."""
    try:
        return read(value)
    except InputError as error:
        raise ParameterError(place, f"{place}: {error}") from error


def short(value: Any) -> str:
    """A value as a message may show it."""
    text = repr(value)
    return text if len(text) <= 100 else text[:100] + "..."
