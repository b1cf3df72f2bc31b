"""A chat template as pieces of scaffold and outside text. Owns what a template can and cannot take: tools, tool
calls, the tool role, the system role. Must never know a token id.

Law: nothing is dropped. What a template has no place for is written as text: tools into the system text, calls into
the assistant's, results into the user's.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from agentgym.errors import TemplateError
from agentgym.messages import Message, ToolCall, ToolSpec
from agentgym.render.marks import Marks, Piece
from agentgym.render.tool_formats import FORMATS, ToolFormat, Wrap, tool_format

_PROBE = ToolSpec(
    "probe_tool", "Probes.", {"type": "object", "properties": {"word": {"type": "string"}}, "required": ["word"]}
)
_SCHEMA_TYPES = frozenset({"object", "array", "string", "integer", "number", "boolean", "null"})


@dataclass(frozen=True, slots=True)
class Template:
    """One chat template, its special tokens, and what it was found to support."""

    source: str
    variables: Mapping[str, Any]  # bos_token, eos_token, ...
    tool_format: ToolFormat = FORMATS["hermes"]
    native_tools: bool = False
    system_role: bool = True

    def pieces(self, messages: Sequence[Message], tools: Sequence[ToolSpec], prompt: bool) -> list[Piece]:
        """The conversation rendered; with `prompt`, up to where the next assistant message begins. Raises
        TemplateError where the template refuses the conversation."""
        outside: list[str] = [self.source]
        self._adapt(messages, tools, lambda text: outside.append(text) or text)
        marks = Marks(outside)
        return marks.split(self._apply(*self._adapt(messages, tools, marks.wrap), prompt))

    def text(self, messages: Sequence[Message], tools: Sequence[ToolSpec], prompt: bool) -> str:
        """The conversation as the template sees it without any marks."""
        return self._apply(*self._adapt(messages, tools, lambda text: text), prompt)

    def _apply(self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None, prompt: bool) -> str:
        import jinja2
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            rendered, _ = render_jinja_template(
                conversations=[messages],
                tools=tools,  # type: ignore[arg-type]
                chat_template=self.source,
                add_generation_prompt=prompt,
                **self.variables,
            )
        except (jinja2.TemplateError, TypeError, ValueError, KeyError, AttributeError) as error:
            raise TemplateError(f"the chat template refuses the conversation: {error}") from error
        return rendered[0]

    # -------------------------------------------------------------------------------- messages for the template

    def _adapt(
        self, messages: Sequence[Message], tools: Sequence[ToolSpec], wrap: Wrap
    ) -> tuple[list[dict[str, Any]], list[dict[str, Any]] | None]:
        if self.native_tools:
            values = [self._native(message, tools, wrap) for message in messages]
            shown = [_wrap_schema(tool.to_openai(), wrap) for tool in tools] or None
        else:
            values = self._as_text(messages, tools, wrap)
            shown = None
        return (values if self.system_role else _system_into_user(values)), shown

    def _native(self, message: Message, tools: Sequence[ToolSpec], wrap: Wrap) -> dict[str, Any]:
        value: dict[str, Any] = {"role": message.role, "content": wrap(message.content)}
        if message.tool_calls:
            value["tool_calls"] = [self._native_call(call, tools, wrap) for call in message.tool_calls]
        if message.tool_call_id is not None:
            value["tool_call_id"] = wrap(message.tool_call_id)
        return value

    def _native_call(self, call: ToolCall, tools: Sequence[ToolSpec], wrap: Wrap) -> dict[str, Any]:
        arguments = _wrap_json(self.tool_format.arrange(call, tools), wrap)
        function = {"name": wrap(call.name), "arguments": arguments}
        return {"id": wrap(call.call_id), "type": "function", "function": function}

    def _as_text(self, messages: Sequence[Message], tools: Sequence[ToolSpec], wrap: Wrap) -> list[dict[str, Any]]:
        values: list[dict[str, Any]] = []
        results_before = False
        for message in messages:
            content = wrap(message.content)
            if message.role == "tool":
                content = self.tool_format.write_result(content)
                if results_before:  # results of parallel calls are one user message
                    values[-1]["content"] += "\n" + content
                    continue
            calls = [self.tool_format.write_call(call, tools, wrap) for call in message.tool_calls]
            content = "\n".join(part for part in (content, *calls) if part)
            values.append({"role": "user" if message.role == "tool" else message.role, "content": content})
            results_before = message.role == "tool"
        if tools:
            description = self.tool_format.describe(tools, wrap)
            if values and values[0]["role"] == "system":
                values[0]["content"] = "\n\n".join(part for part in (values[0]["content"], description) if part)
            else:
                values.insert(0, {"role": "system", "content": description})
        return values


def _system_into_user(values: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """System text at the head of the next user message, for templates without a system role."""
    merged: list[dict[str, Any]] = []
    waiting: list[str] = []
    for value in values:
        if value["role"] == "system":
            waiting.append(value["content"])
        elif waiting and value["role"] == "user":
            merged.append(value | {"content": "\n\n".join(part for part in (*waiting, value["content"]) if part)})
            waiting = []
        else:
            if waiting:
                merged.append({"role": "user", "content": "\n\n".join(waiting)})
                waiting = []
            merged.append(value)
    return merged + ([{"role": "user", "content": "\n\n".join(waiting)}] if waiting else [])


def _wrap_json(value: Any, wrap: Wrap) -> Any:
    """Every string of a JSON value wrapped, keys too."""
    if isinstance(value, str):
        return wrap(value)
    if isinstance(value, list):
        return [_wrap_json(item, wrap) for item in value]
    if isinstance(value, dict):
        return {wrap(key): _wrap_json(item, wrap) for key, item in value.items()}
    return value


def _wrap_schema(value: Any, wrap: Wrap, inside_properties: bool = False) -> Any:
    """A tool with everything wrapped that its author chose; templates look at the rest (`type`, `properties`)."""
    if isinstance(value, str):
        return wrap(value)
    if isinstance(value, list | tuple):
        return [_wrap_schema(item, wrap) for item in value]
    if not isinstance(value, Mapping):
        return value
    wrapped = {}
    for key, item in value.items():
        if inside_properties:
            wrapped[wrap(key)] = _wrap_schema(item, wrap)
        elif key == "type" and (item == "function" or (isinstance(item, str) and item in _SCHEMA_TYPES)):
            wrapped[key] = item
        else:
            known = key if key.isidentifier() or key.lstrip("$").isidentifier() else wrap(key)
            wrapped[known] = _wrap_schema(item, wrap, inside_properties=key == "properties")
    return wrapped


# ------------------------------------------------------------------------------------------ what a template supports


def load_template(folder: Path, name: str) -> Template:
    """The template of a model folder and its special tokens. Raises TemplateError if there is none."""
    config = _json(folder / "tokenizer_config.json")
    source = _template_source(folder, config)
    if source is None:
        raise TemplateError(
            f"the tokenizer of {name} has no chat template; put one into {folder / 'chat_template.jinja'} "
            "or use an instruction-tuned model"
        )
    variables = {}
    for key, value in (_json(folder / "special_tokens_map.json") | config).items():
        if key.endswith("_token") and value:
            variables[key] = value["content"] if isinstance(value, dict) else value
    return Template(source, {key: value for key, value in variables.items() if isinstance(value, str)})


def fit_template(template: Template, format_name: str) -> Template:
    """`template` with what it was found to support, writing calls in the format of that name (`auto`: the format
    that the template writes itself, else hermes). Raises UnknownNameError."""
    wanted = list(FORMATS.values()) if format_name == "auto" else [tool_format(format_name)]
    system_role = _accepts(template, [Message("system", "Be brief."), Message("user", "Hello")])
    for one in wanted:
        native = replace(template, tool_format=one, native_tools=True, system_role=system_role)
        if _writes_tools(native):
            return native
    return replace(template, tool_format=wanted[0], native_tools=False, system_role=system_role)


def _accepts(template: Template, messages: list[Message]) -> bool:
    try:
        pieces = template.pieces(messages, (), True)
    except TemplateError:
        return False
    return {piece.source for piece in pieces if piece.source is not None} == set(range(len(messages)))


def _writes_tools(template: Template) -> bool:
    """True if the template shows the tools, writes calls that this format reads back, and takes results."""
    call = ToolCall("call_0", _PROBE.name, json.dumps({"word": "probe_value"}))
    answered = [
        Message("user", "Hello"), Message("assistant", "", (call,)), Message("tool", "probe_result", (), "call_0"),
    ]  # fmt: skip
    content_first = [Message("user", "Hello"), Message("assistant", "probe_text"), Message("tool", "probe_result")]
    try:
        before = template.text(answered[:1], [_PROBE], True)
        shown = template.text(answered, [_PROBE], True)
        bare = template.text(content_first, (), True)
    except TemplateError:
        return False
    if _PROBE.name not in before or not shown.startswith(before):
        return False
    if "probe_result" not in shown or "probe_text" not in bare or "probe_result" not in bare:
        return False
    _, calls = template.tool_format.parse(shown[len(before) : shown.index("probe_result")], [_PROBE])
    # What follows the call (its close and the next role) is not the format's to know, so only the call is compared.
    return bool(calls) and calls[0].name == _PROBE.name and "probe_value" in calls[0].arguments


def _template_source(folder: Path, config: Mapping[str, Any]) -> str | None:
    file = folder / "chat_template.jinja"
    if file.exists():
        return file.read_text(encoding="utf-8")
    value = config.get("chat_template")
    if isinstance(value, list):  # several by name; the one that knows tools knows the rest too
        named = {entry["name"]: entry["template"] for entry in value}
        value = named.get("tool_use") or named.get("default")
    return value if isinstance(value, str) and value else None


def _json(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    except (OSError, ValueError) as error:
        raise TemplateError(f"{file} cannot be read: {error}") from error
