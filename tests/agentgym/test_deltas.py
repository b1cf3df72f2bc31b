"""The codec: every bit pattern, every pattern of change, both ways; nothing that was not written is believed."""

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentgym import deltas
from agentgym.deltas import Patch, bits_of, changed_fraction, decode, difference, encode, flip
from agentgym.errors import VersionError
from agentgym.weight_file import BFLOAT16, load_file, map_file, save_file

WORDS = {1: np.int8, 2: BFLOAT16, 4: np.float32, 8: np.float64}
# what arithmetic would not carry through: both zeros, a quiet and a signalling NaN with payloads, denormals, infinity
SPECIAL = {
    1: [0, 0x80, 0xFF],
    2: [0, 0x8000, 0x7FC1, 0x7F81, 0x0001, 0xFF80],
    4: [0, 0x80000000, 0x7FC00123, 0x7F800001, 1, 0xFF800000],
    8: [0, 1 << 63, 0x7FF8000000000123, 0x7FF0000000000001, 1, 0xFFF << 52],
}


@st.composite
def a_model(draw):
    """Names, shapes (scalars and empty ones too) and element sizes."""
    shapes = st.lists(st.integers(0, 5), max_size=3).map(tuple)
    return draw(
        st.dictionaries(st.text("abé.", max_size=3), st.tuples(shapes, st.sampled_from([1, 2, 4, 8])), max_size=4)
    )


@st.composite
def a_history(draw):
    """Versions of one model, each changed from the one before in a few places, in none or in all."""
    model = draw(a_model())
    bits = {width: st.sampled_from(SPECIAL[width]) | st.integers(0, 2 ** (8 * width) - 1) for width in WORDS}
    history = []
    for _ in range(draw(st.integers(1, 5))):
        weights = {}
        for name, (shape, width) in model.items():
            if history and draw(st.booleans()):
                array = history[-1][name].copy()
                if array.size and draw(st.booleans()):
                    bits_of(array)[draw(st.integers(0, array.size - 1))] = draw(bits[width])
            else:
                words = draw(st.lists(bits[width], min_size=math.prod(shape), max_size=math.prod(shape)))
                array = np.array(words, f"<u{width}").view(WORDS[width]).reshape(shape)
            weights[name] = array
        history.append(weights)
    return history


def same_bits(one, other) -> bool:
    return one.keys() == other.keys() and all(
        one[name].shape == other[name].shape
        and one[name].dtype == other[name].dtype
        and bits_of(one[name]).tolist() == bits_of(other[name]).tolist()
        for name in one
    )


def check_chain(history) -> None:
    chain = [encode(difference(old, new)) for old, new in pairwise(history)]
    current = {name: array.copy() for name, array in history[0].items()}
    for data, expected in zip(chain, history[1:]):
        flip(current, decode(data))
        assert same_bits(current, expected)
    for data, expected in zip(reversed(chain), reversed(history[:-1])):
        flip(current, decode(data))
        assert same_bits(current, expected)


@given(a_history())
def test_a_chain_leads_forth_and_back_bit_for_bit(history):
    check_chain(history)


@given(a_history())
@settings(max_examples=30)
def test_a_weight_file_gives_back_every_bit(tmp_path_factory, history):
    path = tmp_path_factory.mktemp("weights") / "w.safetensors"
    for weights in history:
        save_file(weights, path)
        assert same_bits(load_file(path), weights)
        assert same_bits(map_file(path), weights)


@given(st.lists(st.integers(0, 3000), unique=True).map(sorted))
def test_gaps_of_every_length(places):
    indices = np.array(places, np.int64)
    assert deltas._unpack_gaps(deltas._pack_gaps(indices)).tolist() == places


@pytest.mark.parametrize("gap", [0, 1, 254, 255, 256, 509, 510, 511, 100_000])
def test_gaps_about_the_bounds_of_a_byte(gap):
    old, new = np.zeros(gap + 3, np.float32), np.zeros(gap + 3, np.float32)
    new[[gap, gap + 2]] = 1.0
    check_chain([{"w": old}, {"w": new}])


def test_a_change_beyond_one_chunk_is_found(monkeypatch):
    monkeypatch.setattr(deltas, "_CHUNK", 4)
    rng = np.random.default_rng(0)
    check_chain([{"w": rng.integers(0, 3, 19).astype(np.float32)} for _ in range(3)])


@pytest.mark.parametrize(
    ("name", "mutant"),
    [
        ("_GO_ON", 254),  # packed with one escape, unpacked with another
        ("_compare", lambda old, new: Patch(np.flatnonzero(old != new), (new - old)[old != new])),  # not an involution
        (
            "_compare",
            lambda old, new: (lambda at: Patch(at, (old ^ new)[at]))(np.flatnonzero(old.view("i2") > new.view("i2"))),
        ),
    ],
    ids=["escape", "difference", "one_way"],
)
def test_mutants_are_refused(monkeypatch, name, mutant):
    rng = np.random.default_rng(1)
    history = [{"w": rng.integers(0, 4, 900).astype("<u2").view(BFLOAT16)} for _ in range(3)]
    history[1]["w"][5:] = history[0]["w"][5:]  # a long gap
    history[1]["w"][800] = np.array(77, "<u2").view(BFLOAT16)
    check_chain(history)
    if name == "_GO_ON":
        pack = deltas._pack_gaps
        monkeypatch.setattr(deltas, "_pack_gaps", lambda indices: np.minimum(pack(indices), mutant).astype(np.uint8))
    else:
        monkeypatch.setattr(deltas, name, mutant)
    with pytest.raises((AssertionError, IndexError, ValueError)):
        check_chain(history)


def test_minus_zero_is_a_change_and_a_nan_is_not():
    old = {"w": np.array([0.0, math.nan], np.float32)}
    new = {"w": np.array([-0.0, math.nan], np.float32)}
    assert changed_fraction(old, new) == 0.5


@given(st.data())
def test_a_torn_or_changed_delta_is_refused(data):
    old = {"w": np.arange(50, dtype=np.float32)}
    written = encode(difference(old, {"w": np.roll(old["w"], 1)}))
    cut = data.draw(st.integers(0, len(written) - 1))
    with pytest.raises(VersionError):
        decode(written[:cut])
    flipped = bytearray(written)
    flipped[cut] ^= 1 << data.draw(st.integers(0, 7))
    with pytest.raises(VersionError):
        decode(bytes(flipped))
    with pytest.raises(VersionError):
        decode(written + b"x")


@pytest.mark.parametrize(
    "other", [{}, {"v": np.zeros(2, np.float32)}, {"w": np.zeros(3, np.float32)}, {"w": np.zeros(2, np.int32)}]
)
def test_another_model_is_refused(other):
    with pytest.raises(VersionError, match="one model"):
        difference({"w": np.zeros(2, np.float32)}, other)


def test_sparse_changes_are_small_and_the_fraction_is_true():
    rng = np.random.default_rng(0)
    old = rng.standard_normal(200_000).astype(np.float32)
    words = (old.view(np.uint32) >> 16).astype(np.uint16)
    new = words.copy()
    changed = rng.choice(len(new), 2000, replace=False)
    new[changed] ^= 1
    before, after = {"w": words.view(BFLOAT16)}, {"w": new.view(BFLOAT16)}
    assert changed_fraction(before, after) == 0.01
    assert len(encode(difference(before, after))) < 2 * 2000
    assert changed_fraction({}, {}) == 0.0
