"""The benchmark's chain leads back to its first version, and a delta is not larger than what it is compared with."""

from __future__ import annotations

from benchmarks import version_log

KEYS = {"lr", "bytes_per_version_fraction", "chain8_fraction", "switch_ms", "memcpy_ms", "changed_fraction"}


def test_figures_have_the_shape_that_is_quoted() -> None:
    figures = version_log.run(quick=True)
    assert figures.keys() >= KEYS
    changed, sizes, bare = (
        figures[name] for name in ("changed_fraction", "chain8_fraction", "uncompressed_chain8_fraction")
    )
    assert isinstance(changed, list)
    assert isinstance(sizes, list)
    assert isinstance(bare, list)
    assert 0.0 < changed[0] < changed[1] < 1.0  # a larger step moves more weights to another bf16 number
    assert all(0.0 < size < plain for size, plain in zip(sizes, bare, strict=True))
