"""The uniform numbers of one request. Law: the number that samples a token is a function of the request's seed and of
the token's position in the context, and of nothing else.

So a request gives the same tokens alone and in a batch, a request resumed behind its partial tokens goes on in its
stream instead of starting it again, and two turns of an episode never share a number.
"""

from __future__ import annotations

import numpy as np

_WORD = 2**64
_STEP = 0x9E3779B97F4A7C15  # SplitMix64: a counter in steps of the golden ratio, and a mix of its bits
_MIX = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1))
_BITS = 23  # numbers lie on a grid so coarse that u * total < total holds in fp32 too


def uniforms(seed: int, position: int, count: int) -> np.ndarray:
    """The numbers in [0, 1) for the tokens at `position`, `position + 1`, ... of the context: float32 [count].

    >>> bool((uniforms(7, 0, 10)[4:] == uniforms(7, 4, 6)).all())
    True
    """
    first = _start(seed) + (position + 1) * _STEP
    words = np.arange(count, dtype=np.uint64) * np.uint64(_STEP) + np.uint64(first % _WORD)
    for shift, factor in _MIX:
        words ^= words >> np.uint64(shift)
        words *= np.uint64(factor)
    return (words >> np.uint64(64 - _BITS)).astype(np.float32) * np.float32(2.0**-_BITS)


def _start(seed: int) -> int:
    """Where a seed's counter starts: mixed, so that neighbouring seeds are far apart."""
    word = (seed * _STEP) % _WORD
    for shift, factor in _MIX:
        word ^= word >> shift
        word = word * factor % _WORD
    return word
