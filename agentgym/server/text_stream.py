"""The text of sampled tokens while they come. Must never know where tokens or text go.

Law: text that was given out is never taken back. A character is given out when all of its bytes are there, a stop
string never, and neither is a beginning of what may become one; the ids that were sampled stay what they are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

_UNFINISHED = "\ufffd"  # what decoders write for the bytes of a character that are there already

Decode = Callable[[Sequence[int]], str]


class TextStream:
    """Tokens in, text out, up to the first stop string.

    >>> stream = TextStream(decode, stop=("END",))
    >>> [stream.feed(token) for token in encode("one two END three")]
    ['one', ' two', ' ', '']
    >>> stream.stopped
    'END'
    """

    def __init__(self, decode: Decode, stop: Sequence[str] = ()) -> None:
        self.text = ""  # all that is certain, cut before the stop string
        self.stopped: str | None = None  # the stop string that was found; nothing may be fed behind it
        self._decode = decode
        self._stop = tuple(stop)
        self._longest = max(map(len, self._stop), default=0)
        self._ids: list[int] = []
        self._before = 0  # ids[before:read] are decoded again with what follows, since decoding looks to the left
        self._read = 0  # ids[:read] have become text
        self._given = 0  # characters given out

    def feed(self, token_id: int) -> str:
        """Takes one token; the text that can be given out now."""
        self._ids.append(token_id)
        known = self._decode(self._ids[self._before : self._read])
        whole = self._decode(self._ids[self._before :])
        if whole.endswith(_UNFINISHED) or not whole.startswith(known):
            return ""
        self._before, self._read = self._read, len(self._ids)
        return self._add(whole[len(known) :])

    def finish(self) -> str:
        """Ends the text; what was held back."""
        if self.stopped is not None:
            return ""
        known = self._decode(self._ids[self._before : self._read])
        whole = self._decode(self._ids[self._before :])
        self._before = self._read = len(self._ids)
        return self._add(whole[len(known) :]) + self._give(len(self.text))

    def _add(self, more: str) -> str:
        start = max(0, len(self.text) - self._longest + 1)
        self.text += more
        found = [(place + len(stop), place, stop) for stop in self._stop if (place := self.text.find(stop, start)) >= 0]
        if found:  # the one that ends first, as if characters came one by one
            _, place, self.stopped = min(found)
            self.text = self.text[:place]
            return self._give(place)
        return self._give(len(self.text) - held_back(self.text, self._stop))

    def _give(self, until: int) -> str:
        given = self.text[self._given : until]
        self._given = max(self._given, until)
        return given


class ContentStream:
    """The content beside tool calls, as far as it is certain while text comes.

    `openings` are the texts a tool call begins with; behind the first one nothing is certain until the end, and what is
    around calls is trimmed. Without any, all text is content.
    """

    def __init__(self, openings: Sequence[str]) -> None:
        self._openings = tuple(openings)
        self._text = ""
        self._given = ""
        self._opened = False

    def feed(self, text: str) -> str:
        """Takes more text; the content that can be given out now."""
        if not self._openings:
            return text
        if self._opened:
            return ""
        self._text += text
        places = [place for opening in self._openings if (place := self._text.find(opening)) >= 0]
        self._opened = bool(places)
        until = min(places) if places else len(self._text) - held_back(self._text, self._openings)
        return self._give(self._text[:until].strip())

    def finish(self, content: str) -> str:
        """The rest of `content`, which is what the whole text was parsed into."""
        return self._give(content) if self._openings else ""

    def _give(self, content: str) -> str:
        given = content[len(self._given) :]
        if given:
            self._given = content
        return given


def held_back(text: str, words: Sequence[str]) -> int:
    """How many characters at the end of `text` may be the beginning of one of `words`.

    >>> held_back("one two E", ("END",))
    1
    """
    longest = 0
    for word in words:  # from its first letter on: a look at every end of the text would cost a thousand looks a token
        place = text.find(word[0], max(0, len(text) - len(word) + 1))
        while place >= 0 and not word.startswith(text[place:]):
            place = text.find(word[0], place + 1)
        longest = max(longest, len(text) - place if place >= 0 else 0)
    return longest
