"""What a back end inside a vLLM worker demands of what it is told and given. Law: weights of another model, or other
bytes than were sent, are refused with what differs.

Runs in vLLM's environment, on whatever device the tensors are: imports torch only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch

_ROW = 1024  # words; as in ../weights.py, which computes the same sums with numpy
_COLUMN_FACTOR = -0x61C8864680B583EB  # 0x9E3779B97F4A7C15 as a signed word
_ROW_FACTOR = -0x40A7B892E31B1A47  # 0xBF58476D1CE4E5B9
_LENGTH_FACTOR = -0x6B2FB644ECCEEE15  # 0x94D049BB133111EB


def check_model(mine: object, wanted: Mapping[str, Any]) -> None:
    """Raises ValueError where the worker's own configuration `mine` contradicts `wanted`, what config.json says of the
    model whose weights will come."""
    for name, value in wanted.items():
        if _differs(value, own := getattr(mine, name, None)):
            said = f"another model: its {name} is {own}, and not {value}"
            raise ValueError(said.replace("'", ""))  # vLLM quotes it; what asks reads to the next quote


def _differs(wanted: Any, value: Any) -> bool:
    """Whether two values contradict each other; one that says nothing contradicts none."""
    if wanted is None or value is None:
        return False
    if isinstance(wanted, dict) and isinstance(value, dict):
        return any(_differs(wanted[key], value[key]) for key in wanted.keys() & value.keys())
    return bool(wanted != value)


def compare(name: str, tensor: torch.Tensor, checksums: Mapping[str, str], where: str = "") -> None:
    """Raises ValueError where `tensor` does not have the bytes that were sent as `name`."""
    received = checksum(tensor)
    if received != checksums.get(name):
        raise ValueError(f"checksum of {name!r}{where}: sent {checksums.get(name)}, received {received}")


class ComparedModel:
    """Takes a model's place where tensors arrive: each is compared with what was sent before the model loads it. With
    the last one, `then` is done."""

    def __init__(self, model: Any, checksums: Mapping[str, str], then: Callable[[], None]) -> None:
        self._model = model
        self._checksums = checksums
        self._then = then
        self._awaited = set(checksums)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> Any:
        """As the model's."""
        return self._model.load_weights(self._compared(weights))

    def _compared(self, weights: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in weights:
            compare(name, tensor, self._checksums)
            self._awaited.discard(name)
            yield name, tensor

    def finish(self) -> None:
        """Raises ValueError where a tensor did not come."""
        if self._awaited:
            raise ValueError(f"{min(self._awaited)!r} was announced and did not come ({len(self._awaited)} such)")
        self._then()


def checksum(tensor: torch.Tensor) -> str:
    """Two sums over the tensor's bytes that see where each word stands, at the speed of memory: 128 bits in hex."""
    data = tensor.detach().contiguous().view(-1).view(torch.uint8)
    size = data.numel()
    whole = size // (8 * _ROW) * (8 * _ROW)
    tail = torch.zeros(8 * _ROW, dtype=torch.uint8, device=data.device)
    tail[: size - whole] = data[whole:]
    rows = [_words(tail).view(1, _ROW)]
    if whole:
        rows.insert(0, _words(data[:whole]).view(-1, _ROW))
    by_column = sum((part.sum(0) for part in rows), torch.zeros(_ROW, dtype=torch.int64, device=data.device))
    by_row = torch.cat([part.sum(1) for part in rows])
    first = int((by_column * _factors(_ROW, _COLUMN_FACTOR, data.device)).sum())
    second = int((by_row * _factors(len(by_row), _ROW_FACTOR, data.device)).sum()) + size * _LENGTH_FACTOR
    return f"{first % 2**64:016x}{second % 2**64:016x}"


def _words(data: torch.Tensor) -> torch.Tensor:
    aligned = data.storage_offset() % 8 == 0 and data.data_ptr() % 8 == 0
    return (data if aligned else data.clone()).view(torch.int64)


def _factors(count: int, factor: int, device: torch.device) -> torch.Tensor:
    return (2 * torch.arange(count, dtype=torch.int64, device=device) + 1) * factor
