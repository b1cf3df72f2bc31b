"""The uniform numbers of one request. Law: the number that samples a token is a function of the request's seed and of
the token's position in the context, and of nothing else.

So a request gives the same tokens alone and in a batch, a request resumed behind its partial tokens goes on in its
stream instead of starting it again, and two turns of an episode never share a number.
"""

from __future__ import annotations

import numpy as np

_DRAWS_PER_COUNT = 4  # Philox makes four 64-bit numbers from one value of its counter
_GRID = 2.0**23  # numbers are cut to this grid, so that u * total < total holds in fp32 too
_KEY_BITS = 64


def uniforms(seed: int, position: int, count: int) -> np.ndarray:
    """The numbers in [0, 1) for the tokens at `position`, `position + 1`, ... of the context: float32 [count].

    >>> bool((uniforms(7, 0, 10)[4:] == uniforms(7, 4, 6)).all())
    True
    """
    skip = position % _DRAWS_PER_COUNT
    bits = np.random.Philox(key=seed % 2**_KEY_BITS, counter=position // _DRAWS_PER_COUNT)
    draws = np.random.Generator(bits).random(skip + count)[skip:]
    return (np.floor(draws * _GRID) / _GRID).astype(np.float32)
