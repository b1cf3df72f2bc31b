"""What of a published file a vLLM server needs to load. Law: whole layers, and only those that changed; what is sent is
described by checksums of its bytes.

Files are mapped and read once, before sampling is paused. Must never know torch, vLLM or HTTP.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from agentgym.engine.vllm.inside.layers import layer_of
from agentgym.errors import EngineError

_ROW = 1024  # words; as in inside/received.py, which computes the same sums with torch
_COLUMN_FACTOR = np.uint64(0x9E3779B97F4A7C15)
_ROW_FACTOR = np.uint64(0xBF58476D1CE4E5B9)
_LENGTH_FACTOR = 0x94D049BB133111EB
_HEADER_BYTES = 8
_LONGEST_HEADER = 100 * 2**20


@dataclass(frozen=True, slots=True)
class PublishedTensors:
    """A safetensors file as its checksums.

    Example: `PublishedTensors(Path("000003.safetensors"), {"model.norm.weight": "9f..."}, {"model.norm.weight": 256},
    None)`.
    """

    path: Path
    checksums: Mapping[str, str]
    sizes: Mapping[str, int]  # bytes
    adapter_config: str | None  # PEFT's adapter_config.json, where the file holds an adapter and not a model

    @classmethod
    def read(cls, path: Path) -> PublishedTensors:
        """Reads every byte of `path`. Raises EngineError for what is not a whole safetensors file."""
        try:
            header, metadata, data = _map(path)
        except (OSError, ValueError) as error:
            raise EngineError(f"{path} is not a readable safetensors file: {error}") from error
        checksums, sizes = {}, {}
        for name, entry in header.items():
            start, end = _offsets(path, name, entry, len(data))
            checksums[name] = checksum(data[start:end])
            sizes[name] = end - start
        return cls(path, checksums, sizes, _adapter_config(path, metadata))

    def changed(self, loaded: Mapping[str, str] | None) -> dict[str, str]:
        """The checksums of the layers of which a tensor differs from what is `loaded`; of all where that is unknown.

        A layer that changed comes whole, for an engine rebuilds it as a whole.
        """
        if loaded is None or loaded.keys() != self.checksums.keys():
            return dict(self.checksums)
        layers = {layer_of(name) for name, value in self.checksums.items() if loaded[name] != value}
        return {name: value for name, value in self.checksums.items() if layer_of(name) in layers}


def checksum(data: np.ndarray) -> str:
    """Two sums over bytes (uint8 [N]) that see where each word stands, at the speed of memory: 128 bits in hex."""
    size = len(data)
    whole = size // (8 * _ROW) * (8 * _ROW)
    tail = np.zeros(8 * _ROW, np.uint8)
    tail[: size - whole] = data[whole:]
    rows = tail.view(np.uint64).reshape(1, _ROW)
    by_column, by_row = rows.sum(0), rows.sum(1)
    if whole:
        rows = data[:whole].view(np.uint64).reshape(-1, _ROW)
        by_column = by_column + rows.sum(0)
        by_row = np.concatenate([rows.sum(1), by_row])
    first = int((by_column * _factors(_ROW, _COLUMN_FACTOR)).sum())
    second = int((by_row * _factors(len(by_row), _ROW_FACTOR)).sum()) + size * _LENGTH_FACTOR
    return f"{first:016x}{second % 2**64:016x}"


def _factors(count: int, factor: np.uint64) -> np.ndarray:
    return (np.uint64(2) * np.arange(count, dtype=np.uint64) + np.uint64(1)) * factor


def _adapter_config(path: Path, metadata: Mapping[str, Any]) -> str | None:
    """What weight_file.py says of the file: `{"format": "lora", "adapter_config": ...}` for an adapter."""
    if metadata.get("format") != "lora":
        return None
    config = metadata.get("adapter_config")
    if not isinstance(config, str):
        raise EngineError(f"{path} says that it is an adapter, and has no adapter_config in its metadata")
    return config


def _map(path: Path) -> tuple[dict[str, Any], dict[str, Any], np.ndarray]:
    raw = np.memmap(path, np.uint8, "r")
    length = int.from_bytes(raw[:_HEADER_BYTES].tobytes(), "little")
    if not 2 <= length <= min(_LONGEST_HEADER, len(raw) - _HEADER_BYTES):
        raise ValueError(f"its header says that it is {length} bytes long")
    header = json.loads(raw[_HEADER_BYTES : _HEADER_BYTES + length].tobytes())
    if not isinstance(header, dict):
        raise ValueError("its header is no JSON object")
    metadata = header.pop("__metadata__", None)
    return header, metadata if isinstance(metadata, dict) else {}, raw[_HEADER_BYTES + length :]


def _offsets(path: Path, name: str, entry: Any, size: int) -> tuple[int, int]:
    try:
        start, end = (int(value) for value in entry["data_offsets"])
    except (KeyError, TypeError, ValueError) as error:
        raise EngineError(f"{path} describes {name!r} wrongly: {error!r}") from error
    if not 0 <= start <= end <= size:
        raise EngineError(f"{path} is cut off: {name!r} ends at byte {end} of {size}")
    return start, end
