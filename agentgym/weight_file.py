"""One version's weights as one safetensors file, the format that every engine reads. Must never know versions.

Law: what is read back is bit for bit what was written, or an error that names the file: a checksum stands in the
header's metadata, where other readers of the format do not mind it.

The format is written here, not by its library, because numpy has no bfloat16 and because rows of a gigabyte need no
second copy on their way to the disk.
"""

from __future__ import annotations

import json
import math
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import BinaryIO

import numpy as np

from agentgym.errors import VersionError

# The bits of bfloat16 under a dtype that no arithmetic accepts: nobody takes them for integers.
BFLOAT16 = np.dtype([("bfloat16", "<u2")])
_DTYPES = {
    "F64": np.dtype("<f8"), "F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": BFLOAT16, "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"), "I16": np.dtype("<i2"), "I8": np.dtype("i1"), "U64": np.dtype("<u8"),
    "U32": np.dtype("<u4"), "U16": np.dtype("<u2"), "U8": np.dtype("u1"), "BOOL": np.dtype("?"),
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_ALIGNMENT = 8
_CHECKSUM = "crc32"
# What a file says of itself, to every reader of the format: here, that its tensors are those of the whole model. An
# adapter says {"format": "lora", "adapter_config": "the text of PEFT's adapter_config.json"}.
WHOLE_MODEL: Mapping[str, str] = MappingProxyType({"format": "pt"})


def save_file(weights: Mapping[str, np.ndarray], path: Path, metadata: Mapping[str, str] = WHOLE_MODEL) -> None:
    """Writes `path`, which is on the disk when this returns. Raises OSError, and VersionError for a dtype that the
    format has not."""
    # wide elements first: then every tensor is aligned
    arrays = {name: np.ascontiguousarray(weights[name]).reshape(weights[name].shape) for name in weights}
    order = sorted(arrays, key=lambda name: (-arrays[name].dtype.itemsize, name))
    header: dict[str, object] = {}
    checksum, end = _sum_of(metadata), 0
    for name in order:
        array = arrays[name]
        if array.dtype not in _NAMES:
            raise VersionError(f"{name} is {array.dtype}; published weights can be {', '.join(_DTYPES)}")
        begin, end = end, end + array.nbytes
        header[name] = {"dtype": _NAMES[array.dtype], "shape": list(array.shape), "data_offsets": [begin, end]}
        checksum = zlib.crc32(_raw(array), checksum)
    header["__metadata__"] = {**metadata, _CHECKSUM: f"{checksum:08x}"}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            file.write(_raw(arrays[name]))
        file.flush()
        os.fsync(file.fileno())


def load_file(path: Path) -> dict[str, np.ndarray]:
    """The weights in `path`, writable. Raises OSError, and VersionError naming the file if it is not as written."""
    with path.open("rb") as file:
        header, _ = _read_header(file, path)
        weights, found = {}, _sum_of(_metadata(header))
        for name, (dtype, shape, _) in _by_place(header).items():
            array = np.empty(shape, dtype)
            if file.readinto(_raw(array)) != array.nbytes:
                raise VersionError(f"{path} is torn: it ends within {name}")
            found = zlib.crc32(_raw(array), found)
            weights[name] = array
    written = (header.get("__metadata__") or {}).get(_CHECKSUM)
    if written is not None and written != f"{found:08x}":
        raise VersionError(f"{path} was changed: its checksum is {found:08x}, written was {written}")
    return weights


def map_file(path: Path) -> dict[str, np.ndarray]:
    """As `load_file`, but views of the file that take no memory of this process, read-only and without its checksum."""
    with path.open("rb") as file:
        header, start = _read_header(file, path)
    places = _by_place(header)
    if not any(math.prod(shape) for _, shape, _ in places.values()):  # no bytes cannot be mapped
        return {name: np.empty(shape, dtype) for name, (dtype, shape, _) in places.items()}
    body = np.memmap(path, np.uint8, "r", start)
    return {
        name: np.asarray(body[begin : begin + math.prod(shape) * dtype.itemsize]).view(dtype).reshape(shape)
        for name, (dtype, shape, begin) in places.items()
    }


def read_metadata(path: Path) -> dict[str, str]:
    """What `save_file` was told of the weights. Raises OSError, and VersionError if it is no such file."""
    with path.open("rb") as file:
        return _metadata(_read_header(file, path)[0])


def is_whole(path: Path) -> bool:
    """Whether the file is as long as its header says. Raises OSError."""
    try:
        with path.open("rb") as file:
            _read_header(file, path)
    except VersionError:
        return False
    return True


def _read_header(file: BinaryIO, path: Path) -> tuple[dict[str, dict], int]:
    """The header and where the data begin. Raises VersionError if the file is shorter or longer than it says."""
    size = os.fstat(file.fileno()).st_size
    length = int.from_bytes(file.read(8), "little")
    if size < 8 or length > size - 8:
        raise VersionError(f"{path} is torn: it ends within its header")
    try:
        header = json.loads(file.read(length))
        parts = [part for name, part in header.items() if name != "__metadata__"]
        end = max((part["data_offsets"][1] for part in parts), default=0)
        unknown = {part["dtype"] for part in parts} - _DTYPES.keys()
    except (ValueError, KeyError, AttributeError, TypeError, IndexError) as error:
        raise VersionError(f"{path} is no safetensors file: {error}") from error
    if unknown:
        raise VersionError(f"{path} holds {', '.join(sorted(unknown))}; published weights can be {', '.join(_DTYPES)}")
    if size != 8 + length + end:
        raise VersionError(f"{path} is torn: it has {size} bytes, its header speaks of {8 + length + end}")
    return header, 8 + length


def _metadata(header: Mapping[str, dict]) -> dict[str, str]:
    return {name: text for name, text in (header.get("__metadata__") or {}).items() if name != _CHECKSUM}


def _sum_of(metadata: Mapping[str, str]) -> int:
    """Where the checksum begins: whoever changes an adapter's scale changes the weights."""
    return 0 if metadata == WHOLE_MODEL else zlib.crc32(json.dumps(metadata, sort_keys=True).encode())


def _by_place(header: Mapping[str, dict]) -> dict[str, tuple[np.dtype, tuple[int, ...], int]]:
    parts = [(part["data_offsets"][0], name, part) for name, part in header.items() if name != "__metadata__"]
    return {
        name: (_DTYPES[part["dtype"]], tuple(part["shape"]), begin)
        for begin, name, part in sorted(parts, key=lambda part: part[:2])
    }


def _raw(array: np.ndarray) -> memoryview:
    return array.reshape(-1).view(np.uint8).data
