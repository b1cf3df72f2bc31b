"""Text while it comes: it is the text of all tokens, cut at the right place, whatever the tokens are."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from agentgym.render.tool_formats import FORMATS
from agentgym.server.text_stream import ContentStream, TextStream, held_back


def byte_tokenizer() -> Tokenizer:
    """One token a byte: a character takes up to four of them."""
    from tokenizers.pre_tokenizers import ByteLevel

    tokenizer = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(sorted(ByteLevel.alphabet()))}, merges=[]))
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def word_tokenizer() -> Tokenizer:
    """Words, and a blank between any two of them, as the tiny models have."""
    return Tokenizer(models.WordLevel({f"w{i}": i for i in range(256)}, unk_token="w0"))


TOKENIZERS = {"bytes": byte_tokenizer(), "words": word_tokenizer()}
ids = st.lists(st.integers(0, 255), max_size=40)


def in_bytes(text: str) -> list[int]:
    from tokenizers.pre_tokenizers import ByteLevel

    (pieces,) = [ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(text)] if text else [[]]
    return [TOKENIZERS["bytes"].token_to_id(char) for piece, _ in pieces for char in piece]


def streamed(stream: TextStream, tokens: list[int]) -> list[str]:
    parts = []
    for token in tokens:
        parts.append(stream.feed(token))
        if stream.stopped is not None:
            return parts
    return [*parts, stream.finish()]


@pytest.mark.parametrize("kind", TOKENIZERS)
@given(tokens=ids)
def test_the_parts_are_the_whole(kind: str, tokens: list[int]) -> None:
    decode = TOKENIZERS[kind].decode
    stream = TextStream(decode)
    assert "".join(streamed(stream, tokens)) == stream.text == decode(tokens)


@given(text=st.text(max_size=30))
def test_no_character_is_given_out_in_parts(text: str) -> None:
    text = text.encode("utf-8", "replace").decode()
    parts = streamed(TextStream(TOKENIZERS["bytes"].decode), in_bytes(text))
    assert "".join(parts) == text
    if "\ufffd" not in text:
        assert not any("\ufffd" in part for part in parts)


@given(
    text=st.text(alphabet="abc é漢", max_size=30),
    stops=st.lists(st.text(alphabet="abc é漢", min_size=1, max_size=4), min_size=1, max_size=3),
)
def test_a_stop_string_cuts_where_it_ends_first(text: str, stops: list[str]) -> None:
    stream = TextStream(TOKENIZERS["bytes"].decode, stops)
    tokens = in_bytes(text)
    parts = streamed(stream, tokens)
    ends = [(place + len(stop), place) for stop in stops if (place := text.find(stop)) >= 0]
    expected = text[: min(ends)[1]] if ends else text
    assert "".join(parts) == stream.text == expected
    assert (stream.stopped is not None) == bool(ends)
    if ends:  # it ends with the very token that completes the stop string
        assert len(parts) == len(text[: min(ends)[0]].encode())


def test_a_beginning_of_a_stop_string_waits_for_its_end() -> None:
    stream = TextStream(TOKENIZERS["bytes"].decode, ("END",))
    assert [stream.feed(token) for token in in_bytes("a ENDE"[:5])] == ["a", " ", "", "", ""]
    assert (stream.text, stream.stopped, stream.finish()) == ("a ", "END", "")
    other = TextStream(TOKENIZERS["bytes"].decode, ("END",))
    assert [other.feed(token) for token in in_bytes("ENx")] == ["", "", "ENx"]
    unfinished = TextStream(TOKENIZERS["bytes"].decode, ("END",))
    assert [unfinished.feed(token) for token in in_bytes("EN")] == ["", ""]
    assert unfinished.finish() == "EN"


REPLIES = (
    "just text",
    "  blanks around \n",
    '<tool_call>{"name": "move", "arguments": {"dir": "up"}}</tool_call>',
    'I go. <tool_call>{"name": "move", "arguments": {}}</tool_call> Done <b>',
    "a < b <tool_cal is no call",
    "  <tool_call>broken",
    "<call> move up",
    "text <call> move <call> look far",
    "",
)


@pytest.mark.parametrize("form", sorted(FORMATS))
@given(data=st.data())
def test_content_given_out_is_the_beginning_of_what_is_parsed(form: str, data: st.DataObject) -> None:
    text = data.draw(st.sampled_from(REPLIES) | st.text(alphabet='<tool_call>/{}" a\n', max_size=40))
    stream = ContentStream((FORMATS[form].opening,))
    given_out = ""
    rest = text
    while rest:
        size = data.draw(st.integers(1, 5))
        given_out += stream.feed(rest[:size])
        rest = rest[size:]
    content, calls = FORMATS[form].parse(text, ())
    content += "".join(call.arguments for call in calls if not call.name)
    assert content.startswith(given_out)
    assert given_out + stream.finish(content) == content


def test_without_tools_all_text_is_content() -> None:
    stream = ContentStream(())
    assert stream.feed("  <tool_call> ") == "  <tool_call> "
    assert stream.finish("") == ""


@pytest.mark.parametrize(("text", "held"), [("x", 0), ("x <", 1), ("x <cal", 4), ("<call>", 0), ("", 0)])
def test_what_is_held_back(text: str, held: int) -> None:
    assert held_back(text, ("<call>",)) == held


@given(text=st.text("abc", max_size=12), words=st.lists(st.text("abc", min_size=1, max_size=5), max_size=3))
def test_what_is_held_back_is_the_longest_end_that_may_become_a_word(text: str, words: list[str]) -> None:
    ends = [text[-n:] for n in range(1, len(text) + 1)]
    assert held_back(text, words) == max(
        (len(end) for end in ends if any(word != end and word.startswith(end) for word in words)), default=0
    )


class Counted(str):
    """A stop string that counts how often it is compared."""

    looks = 0

    def startswith(self, *args: object) -> bool:
        Counted.looks += 1
        return super().startswith(*args)  # type: ignore[arg-type]


def test_a_long_stop_string_costs_few_looks() -> None:
    held_back("the quick brown fox " * 100, (Counted("a" * 1000), Counted("quiz" * 250)))
    assert 0 < Counted.looks < 200, "not one for each length that it may have, at every token"
