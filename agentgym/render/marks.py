"""Keeps text from outside apart from scaffold while a template has both in its hands.

Law: what lies between two marks is text from outside, whatever it says; everything else is scaffold. The template
sees each text wrapped in two marks that occur in none of the texts, and so it may trim, quote or reorder them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from agentgym.errors import TemplateError

_LIKE_A_MARK = re.compile(r"zq(\d{1,9})x")


@dataclass(frozen=True, slots=True)
class Piece:
    """A stretch of rendered text.

    Example: `Piece("<|im_start|>user\\n", None)` is scaffold, and `Piece("hello", 0)` is the outside text number 0.
    """

    text: str
    source: int | None


class Marks:
    """Wraps texts, and splits what a template made of them.

    >>> marks = Marks(["hello"])
    >>> marks.split("<s> " + marks.wrap("hello"))
    [Piece(text='<s> ', source=None), Piece(text='hello', source=0)]
    """

    def __init__(self, texts: Iterable[str]) -> None:
        taken = {int(match.group(1)) for text in texts for match in _LIKE_A_MARK.finditer(text)}
        number = next(n for n in range(len(taken) + 1) if n not in taken)
        self._mark = (
            f"zq{number}x"  # letters and digits only: survives trimming and JSON quoting; begins unlike it ends
        )
        self._pattern = re.compile(rf"{self._mark}(?:o(\d+)y|c)")
        self._wrapped = 0

    def wrap(self, text: str) -> str:
        """Empty text stays empty, because templates ask whether there is any."""
        if not text:
            return text
        self._wrapped += 1
        return f"{self._mark}o{self._wrapped - 1}y{text}{self._mark}c"

    def split(self, rendered: str) -> list[Piece]:
        """Raises TemplateError where the template cut a text apart."""
        pieces: list[Piece] = []
        position, source = 0, None
        for match in self._pattern.finditer(rendered):
            opens = match.group(1) is not None
            if opens == (source is not None):
                raise TemplateError("the chat template cuts or rewrites the text of a message")
            pieces.append(Piece(rendered[position : match.start()], source))
            position, source = match.end(), int(match.group(1)) if opens else None
        if source is not None:
            raise TemplateError("the chat template cuts off the end of a message")
        pieces.append(Piece(rendered[position:], None))
        return [piece for piece in pieces if piece.text]
