"""The codec of the version log: the difference of two versions as bytes. Must never know a file, or what a bit means.

Law: lossless for every bit pattern (XOR of the stored bits, never arithmetic), and its own inverse: the delta between
two versions flips either of them into the other.

Optimizer steps leave most bf16 weights as they were, so a delta lists what changed: the gaps between changed elements,
a byte each (255 says "255 unchanged, go on"), and the XOR of their bits, mostly ones at the low end. The gaps of
scattered changes are noise to a compressor, the bits are not: they alone go through one. A compressor over the whole
XOR takes longer and leaves more (benchmarks/version_log.py).
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from agentgym.errors import VersionError

# Beyond this share of changed elements a delta is no bargain: where all weights move, XOR bits are noise.
MAX_CHANGED = 0.3
_GO_ON = 255  # a gap byte that is not yet the end of its gap
_CHUNK = 1 << 18  # elements compared at once: what lies between stays in the cache
_FRAME = struct.Struct("<4sIQQQ")  # magic, CRC-32 of all that follows; bytes of the table, the gaps, the bits
_MAGIC = b"AGd1"


@dataclass(frozen=True, slots=True)
class Patch:
    """What differs in one tensor.

    Example: elements 3 and 9 of a bf16 tensor moved by one unit: `Patch(array([3, 9]), array([1, 1], uint16))`.
    """

    indices: np.ndarray  # [n] int64, ascending, into the flattened tensor
    bits: np.ndarray  # [n] unsigned, as wide as the tensor's elements


# Two versions' difference by tensor name; tensors without one are left out.
Delta = Mapping[str, Patch]


def bits_of(array: np.ndarray) -> np.ndarray:
    """A flat view of a contiguous array's bits. Raises VersionError where there is no such view."""
    if not array.flags.c_contiguous or array.dtype.itemsize not in (1, 2, 4, 8):
        raise VersionError(f"weights must be contiguous with elements of 1, 2, 4 or 8 bytes, got {array.dtype}")
    return array.reshape(-1).view(f"<u{array.dtype.itemsize}")


def difference(old: Mapping[str, np.ndarray], new: Mapping[str, np.ndarray]) -> Delta:
    """The delta between two versions of one model. Raises VersionError if they are not of one model."""
    if not same_model(old, new):
        raise VersionError("two versions of one model must hold the same names, shapes and dtypes")
    patches = {}
    for name in new:
        patch = _compare(bits_of(old[name]), bits_of(new[name]))
        if len(patch.indices):
            patches[name] = patch
    return patches


def changed_fraction(old: Mapping[str, np.ndarray], new: Mapping[str, np.ndarray]) -> float:
    """The share of elements whose bits differ. Counted apart, since where all differ a list of them would be several
    times the weights."""
    changed = sum(
        int(np.count_nonzero(before != after))
        for name in new
        for before, after, _ in _chunks(bits_of(old[name]), bits_of(new[name]))
    )
    return changed / max(1, sum(array.size for array in new.values()))


def same_model(old: Mapping[str, np.ndarray], new: Mapping[str, np.ndarray]) -> bool:
    return old.keys() == new.keys() and all(
        old[name].shape == new[name].shape and old[name].dtype == new[name].dtype for name in new
    )


def flip(weights: Mapping[str, np.ndarray], delta: Delta) -> None:
    """Turns one of the delta's two versions into the other, in place."""
    for name, patch in delta.items():
        bits_of(weights[name])[patch.indices] ^= patch.bits


def encode(delta: Delta) -> bytes:
    all_gaps, all_planes, table = [], [], {}
    for name, patch in delta.items():
        gaps = _pack_gaps(patch.indices)
        table[name] = [len(patch.indices), len(gaps), patch.bits.dtype.itemsize]
        # in byte planes: the high bytes of most XORs are zero, and side by side they cost next to nothing
        planes = patch.bits.astype(f"<u{patch.bits.dtype.itemsize}").view(np.uint8).reshape(len(patch.bits), -1).T
        all_gaps.append(gaps.tobytes())
        all_planes.append(planes.tobytes())
    head = json.dumps(table).encode()
    parts = head, b"".join(all_gaps), zlib.compress(b"".join(all_planes), level=1)
    body = b"".join(parts)
    return _FRAME.pack(_MAGIC, zlib.crc32(body), *map(len, parts)) + body


def decode(data: bytes) -> Delta:
    """Raises VersionError for bytes that `encode` did not write: torn, flipped, or something else altogether."""
    if len(data) < _FRAME.size:
        raise VersionError(f"a delta has at least {_FRAME.size} bytes, this one {len(data)}")
    magic, checksum, *sizes = _FRAME.unpack_from(data)
    body = memoryview(data)[_FRAME.size :]
    if magic != _MAGIC or len(body) != sum(sizes) or zlib.crc32(body) != checksum:
        raise VersionError("its checksum does not fit: it is torn, or was changed")
    table_end, gaps_end = sizes[0], sizes[0] + sizes[1]
    table = json.loads(bytes(body[:table_end]))
    all_gaps = np.frombuffer(body[table_end:gaps_end], np.uint8)
    all_planes = np.frombuffer(zlib.decompress(body[gaps_end:]), np.uint8)
    patches, gap, plane = {}, 0, 0
    for name, (num_changed, num_gaps, width) in table.items():
        gaps, gap = all_gaps[gap : gap + num_gaps], gap + num_gaps
        planes, plane = all_planes[plane : plane + num_changed * width], plane + num_changed * width
        bits = np.ascontiguousarray(planes.reshape(width, num_changed).T).view(f"<u{width}").reshape(-1)
        patches[name] = Patch(_unpack_gaps(gaps), bits)
    return patches


def _compare(old: np.ndarray, new: np.ndarray) -> Patch:
    indices, bits = [], []
    for before, after, start in _chunks(old, new):
        changed = np.flatnonzero(before != after)  # of truth values: several times the speed of numbers
        indices.append(changed + start)
        bits.append(before[changed] ^ after[changed])
    if not indices:
        return Patch(np.zeros(0, np.int64), old[:0].copy())
    return Patch(np.concatenate(indices), np.concatenate(bits))


def _chunks(old: np.ndarray, new: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray, int]]:
    for start in range(0, len(old), _CHUNK):
        yield old[start : start + _CHUNK], new[start : start + _CHUNK], start


def _pack_gaps(indices: np.ndarray) -> np.ndarray:
    """Unchanged elements before each changed one, in bytes: as often 255 as it fits, then the rest."""
    gaps = np.diff(indices, prepend=-1) - 1
    go_on, rest = np.divmod(gaps, _GO_ON)
    packed = np.full(len(gaps) + int(go_on.sum()), _GO_ON, np.uint8)
    packed[np.cumsum(go_on + 1) - 1] = rest
    return packed


def _unpack_gaps(packed: np.ndarray) -> np.ndarray:
    ends = np.flatnonzero(packed != _GO_ON)
    return np.cumsum(packed, dtype=np.int64)[ends] + np.arange(len(ends))
