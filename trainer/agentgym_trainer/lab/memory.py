"""What an anchor holds in memory beside the model in training. Law: it is counted from what can be reached, not from
what anybody says of it; tensors that share a storage count once, the model's own not at all.

What a scorer holds in another process cannot be reached from here.
"""

from __future__ import annotations

import gc
import types
from typing import Any

import numpy as np
import torch
from torch import nn

_OPAQUE = (types.ModuleType, type, types.BuiltinFunctionType, str, bytes, int, float)


def model_bytes(model: nn.Module) -> int:
    """Parameters and buffers of the model, tied ones once."""
    return sum(_storages([*model.parameters(), *model.buffers()]).values())


def extra_bytes(holder: Any, model: nn.Module) -> int:
    """Bytes of tensors and arrays that `holder` keeps, without those of `model` and their gradients."""
    own = [*model.parameters(), *model.buffers()]
    own += [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    known = _storages(own)
    seen = {id(module) for module in model.modules()}
    found: dict[int, int] = {}
    waiting = [holder]
    while waiting:
        thing = waiting.pop()
        if id(thing) in seen or isinstance(thing, _OPAQUE):
            continue
        seen.add(id(thing))
        if isinstance(thing, torch.Tensor):
            found |= _storages([thing])
        elif isinstance(thing, np.ndarray):
            base = thing if not isinstance(thing.base, np.ndarray) else thing.base
            found[id(base)] = base.nbytes
        elif isinstance(thing, types.FunctionType):  # its globals are a module's, not its own
            waiting += [cell.cell_contents for cell in thing.__closure__ or ()]
        else:
            waiting += gc.get_referents(thing)
    return sum(size for place, size in found.items() if place not in known)


def _storages(tensors: list[torch.Tensor]) -> dict[int, int]:
    storages = [tensor.untyped_storage() for tensor in tensors]
    return {storage.data_ptr(): storage.nbytes() for storage in storages}
