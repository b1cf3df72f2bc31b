"""LoRA: the adapter is the version. Must never know the version log, an anchor or a loss.

Law: the base is never written. What is trained, published, recorded, averaged and checkpointed is the adapter, under
the names and with the configuration that PEFT gives a saved adapter; whoever holds the base can serve it.

An adapter begins with B = 0: version 0 is the base, to the bit. `peft` is imported where an adapter is made, because a
run without one should not wait for it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from agentgym.errors import CheckpointError, ConfigError
from agentgym_trainer.settings import LoraSection

if TYPE_CHECKING:
    from peft import PeftModel

_ADAPTER = "default"  # PEFT's name for the only one
_CHECKPOINT = "adapter.pt"
# What PEFT writes into a configuration and what changes no weight: where the base lay, and who wrote it.
_INCIDENTAL = ("base_model_name_or_path", "revision", "peft_version", "inference_mode")


def require_targets(folder: Path, section: LoraSection) -> None:
    """Raises ConfigError where the model in `folder` has no module of a name in `trainer.lora.target_modules`, or they
    would not be modules. Builds the model without its weights: a run should hear of this before anything starts."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder, local_files_only=True))
        adapt(model, section, base_dtype="float32", compute_dtype="float32")


def adapt(model: PreTrainedModel, section: LoraSection, *, base_dtype: str, compute_dtype: str) -> PeftModel:
    """`model` with an adapter that does nothing yet; from here on only the adapter has gradients.

    `base_dtype`: that of the engine's base, whose values the base here takes on, so that both sides compute with the
    same. They are held in fp32, but for the linear layers of a forward in `compute_dtype` bfloat16, which would round
    them anyway: half the memory, the same bits. Raises ConfigError for target modules that the model has not, and
    where PEFT would adapt the experts of a mixture, whose tensors are no modules of their own.
    """
    from peft import LoraConfig, get_peft_model

    names = _check_targets(model, section)
    linear = [module for module in model.modules() if isinstance(module, nn.Linear | Conv1D)]
    if base_dtype == "bfloat16":
        _round(model)
    targets = section.target_modules
    config = LoraConfig(
        r=section.rank, lora_alpha=section.alpha, lora_dropout=section.dropout, task_type="CAUSAL_LM",
        target_modules=targets if isinstance(targets, str) else list(targets),
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in linear),
    )  # fmt: skip
    wrapped = cast("PeftModel", get_peft_model(model, config))
    if experts := sorted(wrapped.peft_config[_ADAPTER].target_parameters or ()):  # type: ignore[attr-defined]
        raise ConfigError(
            f"trainer.lora.target_modules = {targets!r} would adapt the experts' tensors ({', '.join(experts)}), which "
            f"engines here cannot merge; name linear layers, such as {names}"
        )
    if base_dtype == compute_dtype == "bfloat16":  # only now: an adapter is made in the precision of its layer
        for module in linear:
            if module is not model.get_output_embeddings():
                module.to(torch.bfloat16)
    return wrapped


def is_adapted(model: nn.Module) -> bool:
    return _ADAPTER in getattr(model, "peft_config", {})


def adapter_state(model: nn.Module) -> dict[str, Tensor]:
    """The adapter's tensors by the names that PEFT saves them under; they share the model's memory."""
    from peft import get_peft_model_state_dict

    return get_peft_model_state_dict(model, save_embedding_layers=False)


def adapter_metadata(model: nn.Module) -> dict[str, str]:
    """What a published adapter says of itself. The same for every version of a run, wherever its model lies."""
    config = cast("dict[str, Any]", cast("PeftModel", model).peft_config[_ADAPTER].to_dict())
    plain = {name: value for name, value in config.items() if name not in _INCIDENTAL}
    plain["peft_type"] = str(plain["peft_type"].value)
    plain = {name: sorted(value) if isinstance(value, set) else value for name, value in plain.items()}
    return {"format": "lora", "adapter_config": json.dumps(plain, sort_keys=True)}


def base_parameters(model: nn.Module) -> list[nn.Parameter]:
    """What every copy of an adapted model can share: nobody writes it. Empty for a model without an adapter."""
    if not is_adapted(model):
        return []
    adapter = {tensor.data_ptr() for tensor in adapter_state(model).values()}
    return [parameter for parameter in model.parameters() if parameter.data_ptr() not in adapter]


@torch.no_grad()
def merged(model: nn.Module) -> tuple[PreTrainedModel, dict[str, Tensor]]:
    """The model under the adapter and its weights with the adapter merged, by the names it had without one."""
    from peft.tuners.lora import LoraLayer

    base = cast(PreTrainedModel, cast("PeftModel", model).get_base_model())
    state = {
        name.replace(".base_layer.", "."): tensor for name, tensor in base.state_dict().items() if ".lora_" not in name
    }
    for name, module in base.named_modules():
        if isinstance(module, LoraLayer):
            weight = state[f"{name}.weight"].float()
            state[f"{name}.weight"] = weight + module.get_delta_weight(_ADAPTER)  # type: ignore[operator]
    return base, state


def checkpoint_adapter_only(accelerator: Accelerator, model: nn.Module) -> None:
    """Keeps the base out of `accelerator`'s checkpoints: every run finds it where the run began."""
    about = adapter_metadata(model)

    def save(models: list[nn.Module], weights: list[dict[str, Tensor]], folder: str) -> None:
        weights.clear()  # what Accelerate would write
        if accelerator.is_main_process:
            tensors = {name: tensor.detach().cpu() for name, tensor in adapter_state(model).items()}
            torch.save({"about": about, "tensors": tensors}, Path(folder) / _CHECKPOINT)

    def load(models: list[nn.Module], folder: str) -> None:
        models.clear()  # what Accelerate would read
        path = Path(folder) / _CHECKPOINT
        if not path.exists():
            raise CheckpointError(f"the checkpoint {folder} is of a run without [trainer.lora]; resume it without")
        saved = torch.load(path, weights_only=True, map_location="cpu")
        if saved["about"] != about:
            raise CheckpointError(f"the checkpoint {folder} holds an adapter of another [trainer.lora]; resume with it")
        with torch.no_grad():
            for name, tensor in adapter_state(model).items():
                tensor.copy_(saved["tensors"][name])

    accelerator.register_save_state_pre_hook(cast("Callable[..., None]", save))
    accelerator.register_load_state_pre_hook(cast("Callable[..., None]", load))


def _check_targets(model: PreTrainedModel, section: LoraSection) -> list[str]:
    """The last names of the model's linear layers but the output layer."""
    output = model.get_output_embeddings()
    layers = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)}
    names = sorted({name.rpartition(".")[2] for name, module in layers.items() if module is not output})
    if isinstance(section.target_modules, str):
        return names
    for target in section.target_modules:
        found = [module for name, module in layers.items() if name == target or name.endswith(f".{target}")]
        if not found:
            raise ConfigError(
                f"trainer.lora.target_modules names {target!r}, which the model has not; its linear layers are "
                f"{', '.join(names)}"
            )
        if output is not None and any(module is output for module in found):
            raise ConfigError(
                f"trainer.lora.target_modules names the output layer {target!r}, which engines serve without an "
                f"adapter; the other linear layers are {', '.join(names)}"
            )
    return names


@torch.no_grad()
def _round(model: PreTrainedModel) -> None:
    for parameter in model.parameters():
        parameter.copy_(parameter.bfloat16())
