"""New weights for a model, made beside it while it samples, so that a pause only swaps references. Must never know
where the weights come from.

Law: until `swap`, no module of the model has changed; after it, each loaded one is as vLLM's own reload leaves it, but
for where its tensors lie.

That is for the CPU build run eagerly: it repacks a layer into an object of its own, which every call looks up anew, and
repacking takes most of a reload. Accelerators keep the addresses of weights in captured graphs, and reload in place.
Runs in vLLM's environment: imports torch and vllm only.
"""

from __future__ import annotations

# pyright: reportMissingImports=false
from collections.abc import Iterable, Mapping
from types import MethodType

import torch
from torch import Tensor, nn
from vllm.config import ModelConfig
from vllm.model_executor.layers.attention import is_deferred_attention_layer
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.model_executor.model_loader.reload.layerwise import LAYERWISE_INFO, get_layerwise_info
from vllm.model_executor.model_loader.reload.meta import to_meta_tensor
from vllm.model_executor.model_loader.reload.types import LayerReloadingInfo

_PLAIN = (type(None), UnquantizedLinearMethod, UnquantizedEmbeddingMethod)
_OWN = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")


class Beside:
    """Modules with new weights, each the twin of one of the model's."""

    def __init__(self, twins: Mapping[nn.Module, nn.Module]) -> None:
        self._twins = twins
        self._before: list[dict[str, object]] = []

    @classmethod
    @torch.no_grad()
    def make(
        cls, model: nn.Module, loaded: Iterable[nn.Module], tensors: Mapping[str, Tensor], model_config: ModelConfig
    ) -> Beside | None:
        """The modules within `loaded`, with the weights `tensors`, which must be all of theirs; None where they are of
        kinds that only vLLM's own reload knows (quantized, or wrapped for adapters). Raises ValueError where `tensors`
        leave a module without weights."""
        modules = dict.fromkeys(module for top in loaded for module in top.modules() if _holds_weights(module))
        if not all(_is_plain(module) for module in modules):
            return None
        twins = {module: _twin(module) for module in modules}
        for module, twin in twins.items():
            _expect_weights(module, twin)
        _tree(model, twins).load_weights(tensors.items())  # type: ignore[operator]
        for module, twin in twins.items():
            info = get_layerwise_info(twin)
            if info.can_load() and not info.load_numel:  # padding lets others wait for more than there is
                raise ValueError(f"the weights sent leave a {type(module).__name__} of the model without its own")
            finalize_layerwise_reload(twin, model_config)
        return cls(twins | _tied(model, twins))

    def swap(self) -> None:
        """Gives the model the new weights, by references alone."""
        for module, twin in self._twins.items():
            for tensor in (*twin._parameters.values(), *twin._buffers.values()):
                _rebind(tensor, twin, module)
            self._before.append(dict(module.__dict__))
            module.__dict__.update(twin.__dict__)
            twin.__dict__.clear()

    def drop_old(self) -> None:
        """Frees what the model had before, which takes a while."""
        self._before.clear()


def _holds_weights(module: nn.Module) -> bool:
    return any(parameter is not None for parameter in module._parameters.values())


def _is_plain(module: nn.Module) -> bool:
    """A leaf that is loaded by its method, if it has one, and by nothing else."""
    processes_itself = is_deferred_attention_layer(module) or hasattr(module, "process_weights_after_loading")
    return type(getattr(module, "quant_method", None)) in _PLAIN and not processes_itself and not module._modules


def _twin(module: nn.Module) -> nn.Module:
    """A module that shares everything with `module` but what holds tensors and children."""
    twin = object.__new__(type(module))
    twin.__dict__.update(module.__dict__)
    twin.__dict__.update({name: type(module.__dict__[name])(module.__dict__[name]) for name in _OWN})
    return twin


def _expect_weights(module: nn.Module, twin: nn.Module) -> None:
    """Makes `twin` wait for weights as vLLM does with a module, which keeps its own."""
    recorded = get_layerwise_info(module)
    parameters, buffers = (
        {name: to_meta_tensor(tensor) for name, tensor in part.items()} for part in recorded.restore_metadata
    )
    info = LayerReloadingInfo(restore_metadata=(parameters, buffers), restore_device=recorded.restore_device)
    LAYERWISE_INFO[twin] = info
    initialize_layerwise_reload(twin)
    info.kernel_tensors = None  # the new values stay where they are; they are not copied over those in use


def _tree(module: nn.Module, twins: Mapping[nn.Module, nn.Module]) -> nn.Module:
    """`module` with its twins in their places; what holds none is itself."""
    if module in twins:
        return twins[module]
    children = {name: child and _tree(child, twins) for name, child in module._modules.items()}
    if all(children[name] is child for name, child in module._modules.items()):
        return module
    copied = _twin(module)
    copied._modules.update(children)
    return copied


def _tied(model: nn.Module, twins: Mapping[nn.Module, nn.Module]) -> dict[nn.Module, nn.Module]:
    """Twins of modules that share a parameter with a loaded one: they have its new values, packed for themselves."""
    fresh = {
        id(parameter): twin._parameters[name]
        for module, twin in twins.items()
        for name, parameter in module._parameters.items()
        if parameter is not None
    }
    tied: dict[nn.Module, nn.Module] = {}
    for module in model.modules():
        shared = {name: fresh[id(own)] for name, own in module._parameters.items() if id(own) in fresh}
        if shared and module not in twins:
            tied[module] = twin = _twin(module)
            twin._parameters.update(shared)
            if (method := getattr(module, "quant_method", None)) is not None:
                method.process_weights_after_loading(twin)
    return tied


def _rebind(tensor: Tensor | None, twin: nn.Module, module: nn.Module) -> None:
    """A tensor's loader is a method of its module's; of the twin's it would keep that and all that it holds."""
    for key, value in list(vars(tensor).items()) if tensor is not None else ():
        if isinstance(value, MethodType) and value.__self__ is twin:
            setattr(tensor, key, value.__func__.__get__(module))
