"""An adapter is a version: merged into the base of the model folder, exactly, each time anew, while others sample."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import save_file
from torch_law import TOLERANCE, Pace
from transformers import AutoModelForCausalLM, PreTrainedModel

from agentgym.engine.gate import VersionedPolicy
from agentgym.engine.protocol import WeightUpdate
from agentgym.engine.torch_engine import TorchEngine
from agentgym.engine.torch_engine_weights import ServedWeights, load_weights, read_model
from agentgym.errors import EngineError
from agentgym.policy import SamplingParams

Tensors = dict[str, torch.Tensor]
RANK, ALPHA = 3, 6
NAME = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
MakeModel = Callable[[str], tuple[Path, PreTrainedModel]]


def adapted(folder: Path, seed: int, targets: str | list[str] = "all-linear", transposed: bool = False) -> PeftModel:
    """PEFT's own model of the folder with a random adapter."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    config = LoraConfig(
        r=RANK, lora_alpha=ALPHA, target_modules=targets, task_type="CAUSAL_LM", fan_in_fan_out=transposed
    )
    wrapped = get_peft_model(model, config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in get_peft_model_state_dict(wrapped).values():
            tensor.normal_(0, 0.15, generator=generator)
    return wrapped.eval()


def config_of(wrapped: PeftModel, **changes: Any) -> dict[str, str]:
    config = wrapped.peft_config["default"].to_dict()
    plain = {**config, "peft_type": "LORA", "target_modules": sorted(config["target_modules"]), **changes}
    return {"format": "lora", "adapter_config": json.dumps(plain)}


def publish(wrapped: PeftModel, path: Path, dtype: torch.dtype = torch.float32) -> Path:
    tensors = {name: tensor.to(dtype).contiguous() for name, tensor in get_peft_model_state_dict(wrapped).items()}
    save_file(tensors, path, metadata=config_of(wrapped))
    return path


def bits(model: PreTrainedModel) -> dict[str, np.ndarray]:
    return {name: parameter.detach().numpy().view(np.int32).copy() for name, parameter in model.named_parameters()}


def same_bits(one: Mapping[str, np.ndarray], other: Mapping[str, np.ndarray]) -> bool:
    return all((one[name] == other[name]).all() for name in one)


@torch.no_grad()
def logprobs(model: Any, ids: torch.Tensor) -> torch.Tensor:
    return model(ids).logits.log_softmax(-1)


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "gpt_neox", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_merged_adapter_is_pefts_forward(
    model_of: MakeModel, tmp_path: Path, architecture: str, dtype: torch.dtype
) -> None:
    folder, base = model_of(architecture)
    wrapped = adapted(folder, 1, transposed=architecture == "gpt2")
    path = publish(wrapped, tmp_path / "1.safetensors", dtype)
    with torch.no_grad():
        for tensor in get_peft_model_state_dict(wrapped).values():
            tensor.copy_(tensor.to(dtype))
    served = read_model(folder, torch.float32)
    ServedWeights(served, folder).load(path)
    ids = torch.arange(24)[None] % 61
    assert (logprobs(served, ids) - logprobs(base, ids)).abs().max() > 0.1  # the adapter does something
    # the merged product and the two thin ones round differently: so much and no more
    torch.testing.assert_close(logprobs(served, ids), logprobs(wrapped, ids), atol=TOLERANCE, rtol=0.0)


def test_each_adapter_meets_the_base_and_not_the_adapter_before(model_of: MakeModel, tmp_path: Path) -> None:
    folder, base = model_of("llama")
    paths = [publish(adapted(folder, seed), tmp_path / f"{seed}.safetensors") for seed in range(3)]
    few = publish(adapted(folder, 9, ["v_proj"]), tmp_path / "few.safetensors")
    alone = read_model(folder, torch.float32)
    ServedWeights(alone, folder).load(paths[0])
    served = read_model(folder, torch.float32)
    weights = ServedWeights(served, folder)
    for path in [*paths, few, *paths[::-1]]:
        weights.load(path)
    assert same_bits(bits(served), bits(alone))
    weights.load(few)  # modules without a factor are the base's
    for name, parameter in served.named_parameters():
        assert torch.equal(parameter, base.get_parameter(name)) == ("v_proj" not in name), name


def test_an_adapter_that_does_nothing_is_the_base_to_the_bit(model_of: MakeModel, tmp_path: Path) -> None:
    folder, base = model_of("llama")
    wrapped = adapted(folder, 1)
    with torch.no_grad():
        for name, tensor in get_peft_model_state_dict(wrapped).items():
            tensor.mul_(0.0 if "lora_B" in name else 1.0)
    served = read_model(folder, torch.float32)
    weights = ServedWeights(served, folder)
    weights.load(publish(adapted(folder, 2), tmp_path / "1.safetensors"))
    weights.load(publish(wrapped, tmp_path / "2.safetensors"))
    assert same_bits(bits(served), bits(base))


def test_an_adapter_after_whole_weights_is_of_the_model_folder(model_of: MakeModel, perturbed, tmp_path: Path) -> None:
    folder, base = model_of("llama")
    whole, _ = perturbed(base, 1)
    path = publish(adapted(folder, 1), tmp_path / "2.safetensors")
    alone, served = read_model(folder, torch.float32), read_model(folder, torch.float32)
    ServedWeights(alone, folder).load(path)
    weights = ServedWeights(served, folder)
    weights.load(path)
    weights.load(whole)
    assert not same_bits(bits(served), bits(alone))
    weights.load(path)
    assert same_bits(bits(served), bits(alone))


def foreign_name(tensors: Tensors) -> None:
    for half in (NAME, NAME.replace("lora_A", "lora_B")):
        tensors[half.replace("layers.0", "layers.7")] = tensors.pop(half)


def no_prefix(tensors: Tensors) -> None:
    for half in (NAME, NAME.replace("lora_A", "lora_B")):
        tensors[half.removeprefix("base_model.model.")] = tensors.pop(half)


def one_half(tensors: Tensors) -> None:
    del tensors[NAME]


def other_rank(tensors: Tensors) -> None:
    tensors[NAME] = tensors[NAME][:2].contiguous()


def other_width(tensors: Tensors) -> None:
    tensors[NAME] = tensors[NAME][:, :-1].contiguous()


def widened(tensors: Tensors) -> None:
    tensors[NAME] = tensors[NAME].double()


def magnitude(tensors: Tensors) -> None:
    tensors["base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector"] = torch.ones(32)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (foreign_name, r"another model: this one has no module for '.*layers\.7\.self_attn\.q_proj\.lora_A\.weight'"),
        (no_prefix, r"another model: this one has no module for 'model\.layers\.0\.self_attn\.q_proj\.lora_A\.weight'"),
        (one_half, r"one half of an adapter: '.*q_proj\.lora_B\.weight' without the other"),
        (other_rank, r"says that its adapter has rank 3, and holds \[2, 32\] and \[32, 3\] for '.*q_proj\.weight'"),
        (other_width, r"another model: that of '.*q_proj\.weight' fits \[32, 31\], the model has \[32, 32\]"),
        (widened, r"is torch\.float64, and adapters are merged in float32"),
        (magnitude, r"no module for '.*lora_magnitude_vector'"),
    ],
)
def test_an_adapter_that_does_not_fit_is_named_and_changes_nothing(
    model_of: MakeModel, tmp_path: Path, spoil: Callable[[Tensors], None], message: str
) -> None:
    folder, _ = model_of("llama")
    wrapped = adapted(folder, 1)
    tensors = {name: tensor.clone() for name, tensor in get_peft_model_state_dict(wrapped).items()}
    spoil(tensors)
    save_file(tensors, tmp_path / "spoilt.safetensors", metadata=config_of(wrapped))
    served = read_model(folder, torch.float32)
    weights = ServedWeights(served, folder)
    weights.load(publish(adapted(folder, 2), tmp_path / "good.safetensors"))
    before = bits(served)
    with pytest.raises(EngineError, match=message):
        weights.load(tmp_path / "spoilt.safetensors")
    assert same_bits(bits(served), before)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_dora": True}, "use_dora = True, which this engine cannot merge"),
        ({"use_rslora": True}, "use_rslora = True"),
        ({"rank_pattern": {"q_proj": 4}}, "rank_pattern"),
        ({"bias": "all"}, "bias = 'all'"),
        ({"r": 0}, "without a readable adapter_config"),
        ({"lora_alpha": "much"}, "without a readable adapter_config"),
    ],
)
def test_a_configuration_that_cannot_be_merged_is_refused(
    model_of: MakeModel, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    folder, _ = model_of("llama")
    wrapped = adapted(folder, 1)
    save_file(dict(get_peft_model_state_dict(wrapped)), tmp_path / "a.safetensors", config_of(wrapped, **changes))
    with pytest.raises(EngineError, match=message):
        ServedWeights(read_model(folder, torch.float32), folder).load(tmp_path / "a.safetensors")


def test_a_tied_weight_is_not_adapted_behind_its_twins_back(model_of: MakeModel, tmp_path: Path) -> None:
    folder, _ = model_of("qwen2")
    width = read_model(folder, torch.float32).lm_head.weight.shape
    tensors = {
        "base_model.model.lm_head.lora_A.weight": torch.ones(RANK, width[1]),
        "base_model.model.lm_head.lora_B.weight": torch.ones(width[0], RANK),
    }
    save_file(tensors, tmp_path / "a.safetensors", config_of(adapted(folder, 1)))
    with pytest.raises(EngineError, match=r"'lm_head\.weight', which the model ties to 'model\.embed_tokens\.weight'"):
        ServedWeights(read_model(folder, torch.float32), folder).load(tmp_path / "a.safetensors")


def test_who_keeps_no_base_refuses_adapters(model_of: MakeModel, tmp_path: Path) -> None:
    folder, _ = model_of("llama")
    path = publish(adapted(folder, 1), tmp_path / "1.safetensors")
    with pytest.raises(EngineError, match="holds an adapter, which only an engine that keeps the base can serve"):
        load_weights(read_model(folder, torch.float32), path)


def test_adapters_are_published_while_requests_run(model_of: MakeModel, tmp_path: Path) -> None:
    """Every token's recorded logprob is PEFT's own forward under the adapter that sampled it."""
    folder, base = model_of("llama")
    models: dict[int, Any] = {0: base, **{version: adapted(folder, version) for version in (1, 2, 3)}}
    paths = {version: publish(models[version], tmp_path / f"{version}.safetensors") for version in (1, 2, 3)}

    async def main() -> list[Any]:
        engine = TorchEngine(folder, slots=4, max_context=128)
        policy, pace = VersionedPolicy(engine), Pace(engine)
        prompts = [[seed + 1, 5, 9] for seed in range(6)]
        running = [
            asyncio.ensure_future(policy.complete(prompt, SamplingParams(max_tokens=90, seed=seed)))
            for seed, prompt in enumerate(prompts)
        ]
        for version in (1, 2, 3):
            await pace.sampled(40)
            await policy.publish(WeightUpdate(version, paths[version]))
        pace.release()
        done = await asyncio.gather(*running)
        await engine.close()
        return list(zip(prompts, done))

    versions = set()
    for prompt, completion in asyncio.run(main()):
        ids = torch.tensor([[*prompt, *completion.token_ids]])
        by_version = {version: logprobs(model, ids)[0] for version, model in models.items()}
        versions |= set(completion.policy_versions)
        for index, (token, logprob, version) in enumerate(
            zip(completion.token_ids, completion.logprobs, completion.policy_versions)
        ):
            expected = float(by_version[version][len(prompt) + index - 1, token])
            assert logprob == pytest.approx(expected, abs=TOLERANCE)
    assert versions == {0, 1, 2, 3}
