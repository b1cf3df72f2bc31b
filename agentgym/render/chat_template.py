"""The renderer of any tokenizer with a chat template. Owns encoding by pieces and the bridge by difference.

Law: only what the template wrote is encoded with special tokens; ids that exist are never encoded again.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

from agentgym.errors import TemplateError
from agentgym.messages import Message, ToolSpec
from agentgym.render.encoding import Encoder
from agentgym.render.marks import Piece
from agentgym.render.proof import prove
from agentgym.render.template import Template, fit_template, load_template

_STUB = (Message("user", "user stub"), Message("assistant", "assistant stub"))
_STUB_REPLY = 1  # the place of the assistant's text among the stub's outside texts


def load_renderer(folder: Path, tool_format: str = "auto") -> ChatTemplateRenderer:
    """The renderer of a model folder, proved on its template before it is returned.

    Raises TemplateError, naming the cause, if the template cannot be used token-exactly; UnknownNameError for an
    unknown tool format.
    """
    name = folder.name
    encoder = Encoder.load(folder)
    template = load_template(folder, name)
    try:
        renderer = ChatTemplateRenderer(encoder, fit_template(template, tool_format))
        prove(renderer, renderer.template)
    except TemplateError as error:
        raise TemplateError(f"the chat template of {name} cannot be used: {error}") from error
    return renderer


class ChatTemplateRenderer:
    """Implements `Renderer`. Made by `load_renderer`, which proves it."""

    def __init__(self, encoder: Encoder, template: Template) -> None:
        self.encoder = encoder
        self.template = template
        self.tool_format = template.tool_format.name
        close = _after_reply(template.pieces(_STUB, (), prompt=False))
        self.stop_token_ids = self._stop_tokens(close)
        self._suffix = lru_cache(maxsize=4096)(self._encode_suffix)

    def render(self, messages: Sequence[Message], tools: Sequence[ToolSpec]) -> list[int]:
        return self._encode(self.template.pieces(messages, tools, prompt=True))

    def parse(self, completion_ids: Sequence[int], tools: Sequence[ToolSpec]) -> Message:
        ids = list(completion_ids)
        while ids and ids[-1] in self.stop_token_ids:
            ids.pop()
        content, calls = self.template.tool_format.parse(self.encoder.decode(ids), tools)
        return Message("assistant", content, calls)

    def bridge(
        self, prompt_ids: Sequence[int], completion_ids: Sequence[int], observation: Sequence[Message]
    ) -> list[int]:
        suffix = self._suffix(tuple(observation))
        closed = bool(completion_ids) and completion_ids[-1] in self.stop_token_ids
        return [*prompt_ids, *completion_ids, *(suffix[1:] if closed else suffix)]

    def encode_reply(self, reply: Message, tools: Sequence[ToolSpec]) -> list[int]:
        """The ids that a policy would have sampled to say `reply`, close token included; what demonstrations are
        made of."""
        stub = _STUB[:1]
        before = self.template.pieces(stub, tools, prompt=True)
        pieces = self.template.pieces([*stub, reply], tools, prompt=False)
        ids = self._encode(_without_prefix(pieces, before))
        last = max((i for i, token in enumerate(ids) if token in self.stop_token_ids), default=None)
        if last is None:
            raise TemplateError("the chat template does not close an assistant message")
        return ids[: last + 1]

    def _encode(self, pieces: Sequence[Piece]) -> list[int]:
        ids: list[int] = []
        for piece in pieces:
            ids += self.encoder.scaffold(piece.text) if piece.source is None else self.encoder.outside(piece.text)
        return ids

    def _encode_suffix(self, observation: tuple[Message, ...]) -> tuple[int, ...]:
        """The close of the assistant's turn, the observation, and the prompt for the next one."""
        return tuple(self._encode(_after_reply(self.template.pieces([*_STUB, *observation], (), prompt=True))))

    def _stop_tokens(self, close: Sequence[Piece]) -> tuple[int, ...]:
        first = self._encode(close)[:1]
        if not first or first[0] not in self.encoder.control_ids:
            text = "".join(piece.text for piece in close)
            raise TemplateError(f"it must close an assistant message with a special token, but it writes {text!r}")
        end = self.encoder.token_id(self.template.variables.get("eos_token", ""))
        return tuple(dict.fromkeys(first + ([end] if end is not None else [])))


def _after_reply(pieces: Sequence[Piece]) -> list[Piece]:
    """What follows the stub's assistant text."""
    places = [i for i, piece in enumerate(pieces) if piece.source == _STUB_REPLY and piece.text == _STUB[1].content]
    if len(places) != 1:
        raise TemplateError("it drops or repeats the assistant's text")
    return list(pieces[places[0] + 1 :])


def _without_prefix(pieces: Sequence[Piece], prefix: Sequence[Piece]) -> list[Piece]:
    """`pieces` behind `prefix`. Their texts are compared, because scaffold on both sides of the border is one piece."""
    rest = sum(len(piece.text) for piece in prefix)
    if not "".join(piece.text for piece in pieces).startswith("".join(piece.text for piece in prefix)):
        raise TemplateError("its generation prompt is not what it writes before an assistant message")
    left: list[Piece] = []
    for piece in pieces:
        if rest < len(piece.text):
            left.append(Piece(piece.text[rest:], piece.source))
        rest = max(0, rest - len(piece.text))
    return left
