"""New weights for some layers of a model inside a vLLM worker, in place of those it has. Law: a layer is loaded whole
or not at all, and what is tied to a loaded one has its values, too.

Runs in vLLM's environment: imports torch and vllm only.
"""

from __future__ import annotations

# pyright: reportMissingImports=false
from collections.abc import Iterable

from torch import nn
from vllm.config import ModelConfig
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from agentgym.engine.vllm.inside.layers import layer_of


class Reload:
    """From the first tensor to the last: the model's own `load_weights` is called in between, with tensors by `names`,
    which must be all of each layer that they are of.

    Example: `reload = Reload(model, names, config); model.load_weights(tensors); reload.finish()`.
    """

    def __init__(self, model: nn.Module, names: Iterable[str], model_config: ModelConfig) -> None:
        self._model = model
        self._config = model_config
        self._modules = modules_of(model, names)
        for module in self._modules:
            initialize_layerwise_reload(module)

    def finish(self) -> None:
        for module in self._modules:
            finalize_layerwise_reload(module, self._config)
        self._repack_ties()

    def _repack_ties(self) -> None:
        """A module that is tied to a loaded one has its new values, and its own packed copy of the old ones."""
        inside = {id(module) for top in self._modules for module in top.modules()}
        fresh = {id(parameter) for top in self._modules for parameter in top.parameters()}
        for module in self._model.modules():
            own = module.parameters(recurse=False)
            method = getattr(module, "quant_method", None)
            if id(module) not in inside and method is not None and any(id(parameter) in fresh for parameter in own):
                method.process_weights_after_loading(module)


def modules_of(model: nn.Module, names: Iterable[str]) -> list[nn.Module]:
    """The smallest modules that hold `names` with all their siblings: decoder layers, and the owners of the rest.

    The whole model where a name has no module of that path; then `names` must be those of the whole model.
    """
    paths = dict.fromkeys(layer_of(name) for name in names)
    try:
        found = [model.get_submodule(path) for path in paths]
    except AttributeError:
        return [model]
    return list({id(module): module for module in found}.values())
