"""Marks keep outside text apart from scaffold whatever it says."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentgym.errors import TemplateError
from agentgym.render.marks import Marks, Piece

texts = st.lists(
    st.one_of(st.sampled_from(["zq0x", "zq0xc", "zq0xo0y", "zq1x", "zq", "0x", "c", "o1y"]), st.text(max_size=5)),
    max_size=5,
).map("".join)


@given(said=st.lists(texts, max_size=5), scaffold=st.sampled_from(["", "z", "zq", "<s>", "0x"]))
def test_split_gives_back_every_text_as_it_was(said: list[str], scaffold: str) -> None:
    marks = Marks([*said, scaffold])

    pieces = marks.split("".join(scaffold + marks.wrap(text) for text in said) + scaffold)

    assert [piece.text for piece in pieces if piece.source is not None] == [text for text in said if text]
    assert "".join(piece.text for piece in pieces if piece.source is None) == scaffold * (len(said) + 1)


def test_texts_keep_their_numbers_where_a_template_reorders_them() -> None:
    marks = Marks([])
    first, second = marks.wrap("one"), marks.wrap("two")

    assert marks.split(f"{second}-{first}") == [Piece("two", 1), Piece("-", None), Piece("one", 0)]


@pytest.mark.parametrize("cut", [slice(3, None), slice(None, -3)])
def test_text_that_was_cut_is_refused(cut: slice) -> None:
    marks = Marks([])

    with pytest.raises(TemplateError, match="cuts"):
        marks.split(marks.wrap("hello")[cut])


def test_many_texts_like_marks_cost_little() -> None:
    hostile = "".join(f"zq{i}x" for i in range(100_000)) + "zq" + "9" * 5000 + "x"
    marks = Marks([hostile])

    assert marks.split(marks.wrap(hostile)) == [Piece(hostile, 0)]
