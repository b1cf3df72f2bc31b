"""The adapter is the version: what is trained, published, recorded and kept of an adapted model is the adapter."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gradient_worker import VERSION, ragged_trajectories, small_model
from peft import LoraConfig, PeftModel, get_peft_model_state_dict, load_peft_weights
from safetensors import safe_open
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

from agentgym.config import parse_config
from agentgym.errors import CheckpointError, ConfigError, VersionError
from agentgym.versions import VersionLog, VersionReader
from agentgym_trainer.batch import MicroBatch, build_micro_batches
from agentgym_trainer.checkpoint import Progress, list_checkpoints, load_checkpoint, save_checkpoint
from agentgym_trainer.learner import Learner, load_model, make_accelerator
from agentgym_trainer.logprobs import token_logprobs
from agentgym_trainer.lora import adapt, adapter_state, require_targets
from agentgym_trainer.publish import as_published, published_metadata, published_weights, save_model
from agentgym_trainer.settings import LoraSection, TrainConfig

MakeModel = Callable[..., LlamaForCausalLM]
LORA = {"rank": 2, "alpha": 6}


def config_of(**trainer: Any) -> TrainConfig:
    # The behavior logprobs of the rows here are invented, and the alarm would say so.
    settings = {"lora": LORA, "learning_rate": 1e-2, "on_discrepancy": "ignore", **trainer}
    rollout = {"max_staleness": 8}
    return parse_config(TrainConfig, {"env": {"id": "maze"}, "rollout": rollout, "trainer": settings})


def adapted(model: LlamaForCausalLM, seed: int | None = 0, **section: Any) -> PeftModel:
    """`model` with an adapter; with a seed, one that does something."""
    with torch.random.fork_rng():
        torch.manual_seed(7)
        wrapped = adapt(model, LoraSection(**LORA | section), base_dtype="float32", compute_dtype="float32")
    if seed is not None:
        step(wrapped, seed)
    return wrapped


@torch.no_grad()
def step(wrapped: PeftModel, seed: int, size: float = 0.2) -> None:
    generator = torch.Generator().manual_seed(seed)
    for tensor in adapter_state(wrapped).values():
        tensor.add_(size * torch.randn(tensor.shape, generator=generator))


def base_of(wrapped: PeftModel) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in wrapped.named_parameters() if "lora_" not in name}


@pytest.fixture
def batch(make_rows: Callable[..., Any]) -> MicroBatch:
    (found,) = build_micro_batches(make_rows((9, 30, 4)), max_tokens=1000)
    return found


# ------------------------------------------------------------------------------------------------------- the model


def test_a_new_adapter_changes_no_bit_and_is_all_that_is_trained(make_model: MakeModel, batch: MicroBatch) -> None:
    wrapped = adapted(make_model(), seed=None)
    assert torch.equal(token_logprobs(wrapped, batch).logprobs, token_logprobs(make_model(), batch).logprobs)
    trained = {name for name, parameter in wrapped.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, _ in wrapped.named_parameters() if "lora_" in name}
    assert len(trained) == 2 * 7 * 2  # A and B of seven linear layers in each of two; not of the output layer
    assert len(adapter_state(wrapped)) == len(trained)


def test_the_learner_steps_the_adapter_and_nothing_else() -> None:
    config = config_of(anchor="behavior", weight_decay=0.1)
    learner = Learner(make_accelerator(config), adapted(small_model()), config, None)
    before, state = base_of(learner.module), {n: t.clone() for n, t in adapter_state(learner.module).items()}
    assert sum(len(group["params"]) for group in learner._optimizer.param_groups) == len(state)
    learner.learn(ragged_trajectories(), VERSION)
    for name, value in base_of(learner.module).items():
        assert torch.equal(value, before[name]), name
    assert all(not torch.equal(value, state[name]) for name, value in adapter_state(learner.module).items())
    assert published_weights(learner.module).keys() == state.keys()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_reach_the_adapter_with_checkpointing_too(
    make_model: MakeModel, batch: MicroBatch, tmp_path: Path, checkpointing: bool
) -> None:
    make_model().save_pretrained(tmp_path)
    torch.manual_seed(0)
    model = load_model(tmp_path, config_of(gradient_checkpointing=checkpointing))
    step(model, 1)
    token_logprobs(model, batch).logprobs.sum().backward()
    gradients = {name: value.grad for name, value in model.named_parameters() if value.requires_grad}
    assert all(gradient is not None and bool(gradient.any()) for gradient in gradients.values())
    torch.manual_seed(0)
    plain = load_model(tmp_path, config_of())
    step(plain, 1)
    token_logprobs(plain, batch).logprobs.sum().backward()
    for name, value in plain.named_parameters():
        if value.requires_grad:
            torch.testing.assert_close(gradients[name], value.grad)


@pytest.mark.parametrize("tied", [False, True])
def test_a_bfloat16_base_is_that_of_the_engine_and_may_be_held_narrow(
    make_model: MakeModel, batch: MicroBatch, tied: bool
) -> None:
    section = LoraSection(**LORA)
    expected = {name: value.bfloat16().float() for name, value in make_model(tied=tied).named_parameters()}
    models = {}
    for compute_dtype in ("float32", "bfloat16"):
        with torch.random.fork_rng():
            torch.manual_seed(7)
            models[compute_dtype] = adapt(
                make_model(tied=tied), section, base_dtype="bfloat16", compute_dtype=compute_dtype
            )
        step(models[compute_dtype], 1)
        found = {name: value.float() for name, value in models[compute_dtype].get_base_model().named_parameters()}
        for name, value in expected.items():
            inner = name if name in found else name.replace(".weight", ".base_layer.weight")
            assert torch.equal(found[inner], value), name
    narrow = {name for name, value in models["bfloat16"].named_parameters() if value.dtype == torch.bfloat16}
    assert len(narrow) == 14
    assert all("proj.base_layer" in name for name in narrow)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        first, second = (token_logprobs(model, batch).logprobs for model in models.values())
    assert torch.equal(first, second)


# --------------------------------------------------------------------------------------------------- what is published


def test_a_publication_is_an_adapter_that_peft_loads(make_model: MakeModel, batch: MicroBatch, tmp_path: Path) -> None:
    make_model().save_pretrained(tmp_path / "base")
    wrapped = adapted(make_model())
    log = VersionLog(tmp_path / "versions")
    log.append(published_weights(wrapped), published_metadata(wrapped))
    with safe_open(log.path(0), "pt") as file:
        said = file.metadata()
        names = set(file.keys())
    assert said["format"] == "lora"
    wrapped.save_pretrained(tmp_path / "saved")
    assert names == set(load_peft_weights(str(tmp_path / "saved")))
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text(said["adapter_config"])
    (folder / "adapter_model.safetensors").write_bytes(log.path(0).read_bytes())
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), str(folder))
    assert torch.equal(token_logprobs(loaded, batch).logprobs, token_logprobs(wrapped, batch).logprobs)


def test_what_a_publication_says_is_the_same_wherever_the_model_lies(make_model: MakeModel, tmp_path: Path) -> None:
    said = []
    for place in ("here", "there"):
        make_model().save_pretrained(tmp_path / place)
        said.append(published_metadata(load_model(tmp_path / place, config_of())))
    assert said[0] == said[1]
    assert str(tmp_path) not in said[0]["adapter_config"]
    assert LoraConfig(**json.loads(said[0]["adapter_config"])).lora_alpha == 6


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_log_gives_back_every_adapter_to_the_bit(make_model: MakeModel, tmp_path: Path, dtype: str) -> None:
    wrapped = adapted(make_model())
    log, published = VersionLog(tmp_path), {}
    for number in range(5):
        version = log.append(published_weights(wrapped, dtype), published_metadata(wrapped))
        published[version] = published_weights(wrapped, dtype)
        log.hold("test", published)
        step(wrapped, number, size=1e-4)
    assert log.num_full_copies == (2 if dtype == "bfloat16" else 5)  # the others are deltas; fp32 moves everywhere
    reader = VersionReader(tmp_path, published_metadata(wrapped))
    for version, weights in published.items():
        found = reader.read(version)
        assert found.keys() == weights.keys()
        assert all((found[name] == weights[name]).all() for name in weights)


def test_versions_of_another_adapter_are_refused_and_joined_by_no_delta(make_model: MakeModel, tmp_path: Path) -> None:
    """Of the same names and shapes, hence the same to everybody who looks at tensors only."""
    wrapped, other = adapted(make_model()), adapted(make_model(), alpha=7)
    log = VersionLog(tmp_path)
    for model in (wrapped, other):
        log.append(published_weights(model), published_metadata(model))
        log.hold("test", log.versions)
    assert log.steps(0, 1) is None
    VersionReader(tmp_path).read(0)
    reader = VersionReader(tmp_path, published_metadata(other))
    reader.read(1)
    with pytest.raises(VersionError, match=r"policy version 0 .* is of another model, or adapter"):
        reader.read(0)


def test_a_changed_scale_is_a_changed_file(make_model: MakeModel, tmp_path: Path) -> None:
    wrapped = adapted(make_model())
    log = VersionLog(tmp_path)
    log.append(published_weights(wrapped), published_metadata(wrapped))
    written = log.path(0).read_bytes()
    log.path(0).write_bytes(written.replace(b'\\"lora_alpha\\": 6', b'\\"lora_alpha\\": 7'))
    assert log.path(0).read_bytes() != written
    with pytest.raises(VersionError, match="was changed: its checksum"):
        log.read(0)


def test_the_forward_sees_the_published_adapter_and_the_base_stays(make_model: MakeModel) -> None:
    wrapped = adapted(make_model())
    base, masters = base_of(wrapped), {name: value.clone() for name, value in adapter_state(wrapped).items()}
    with as_published(wrapped, "bfloat16"):
        for name, value in adapter_state(wrapped).items():
            assert torch.equal(value, masters[name].bfloat16().float())
        assert all(torch.equal(value, base[name]) for name, value in base_of(wrapped).items())
    assert all(torch.equal(value, masters[name]) for name, value in adapter_state(wrapped).items())


class Rounded:
    """The trainer's own adapter as it was published, for every version."""

    def __init__(self, model: PeftModel, dtype: str) -> None:
        self.weights = published_weights(model, dtype)

    def read(self, version: int) -> dict[str, np.ndarray]:
        return self.weights


@pytest.mark.parametrize("updates", [1, 2])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("anchor", ["auto", "snapshot", "resident", "ewma"])
def test_the_staleness_ratio_of_an_unchanged_adapter_is_one(anchor: str, dtype: str, updates: int) -> None:
    config = config_of(anchor=anchor, publish_dtype=dtype, updates_per_batch=updates, learning_rate=1e-12)
    model = adapted(small_model())
    learner = Learner(make_accelerator(config), model, config, Rounded(model, dtype))
    figures = learner.learn(ragged_trajectories(), VERSION)
    assert figures["staleness/lag0/max_abs_log_ratio"] == 0.0 or updates == 2 or anchor == "ewma"
    assert figures["staleness/max_abs_log_ratio"] < 2e-6


# ------------------------------------------------------------------------------------------------------- what is kept


def learner_of(seed: int, **trainer: Any) -> tuple[Any, Learner]:
    config = config_of(anchor="ewma", schedule="linear", steps=9, **trainer)
    accelerator = make_accelerator(config)
    torch.manual_seed(seed)
    model: Any = small_model()
    if config.trainer.lora is not None:
        model = adapted(model, seed, rank=config.trainer.lora.rank, alpha=config.trainer.lora.alpha)
    return accelerator, Learner(accelerator, model, config, None)


def test_a_checkpoint_holds_the_adapter_only_and_restores_the_next_step_bit_for_bit(tmp_path: Path) -> None:
    accelerator, first = learner_of(1)
    first.learn(ragged_trajectories(), VERSION)
    save_checkpoint(accelerator, tmp_path, Progress(1, 4, {}, 2.5), first.state(), keep=2)
    first.learn(ragged_trajectories(), VERSION + 1)
    expected, base = published_weights(first.module), base_of(first.module)

    folder = list_checkpoints(tmp_path)[-1]
    held = torch.load(folder / "adapter.pt", weights_only=True)["tensors"]
    assert held.keys() == expected.keys()
    assert not list(folder.glob("pytorch_model*")) + list(folder.glob("model*"))
    assert torch.load(folder / "anchor.pt", weights_only=True)["average"].keys() == expected.keys()

    other, second = learner_of(2)
    _, anchor_state = load_checkpoint(other, folder)
    second.load_state(anchor_state)
    second.learn(ragged_trajectories(), VERSION + 1)
    for name, weights in published_weights(second.module).items():
        assert (weights == expected[name]).all(), name
    assert all(torch.equal(value, base[name]) for name, value in base_of(second.module).items())


@pytest.mark.parametrize(
    ("then", "message"),
    [
        ({"lora": {"rank": 2, "alpha": 7}}, "holds an adapter of another"),
        ({"lora": {"rank": 3, "alpha": 6}}, "holds an adapter of another"),
        ({"lora": None}, "cannot be read"),
    ],
)
def test_a_checkpoint_of_another_adapter_is_refused(tmp_path: Path, then: dict[str, Any], message: str) -> None:
    accelerator, first = learner_of(1)
    save_checkpoint(accelerator, tmp_path, Progress(1, 4, {}, 2.5), first.state(), keep=2)
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(learner_of(1, **then)[0], list_checkpoints(tmp_path)[-1])


def test_a_checkpoint_without_an_adapter_is_refused(tmp_path: Path) -> None:
    accelerator, first = learner_of(1, lora=None)
    save_checkpoint(accelerator, tmp_path, Progress(1, 4, {}, 2.5), first.state(), keep=2)
    with pytest.raises(CheckpointError, match=r"is of a run without \[trainer.lora\]"):
        load_checkpoint(learner_of(1)[0], list_checkpoints(tmp_path)[-1])


@pytest.mark.parametrize("tied", [False, True])
def test_the_trained_model_is_left_merged_and_as_an_adapter(
    make_model: MakeModel, batch: MicroBatch, tmp_path: Path, tied: bool
) -> None:
    make_model(tied=tied).save_pretrained(tmp_path / "source")
    (tmp_path / "source" / "chat_template.jinja").write_text("{{ messages }}")
    wrapped = adapted(make_model(tied=tied))
    before = base_of(wrapped)
    for _ in range(2):  # the second takes the place of the first
        save_model(wrapped, tmp_path / "source", tmp_path / "run" / "model")
    assert all(torch.equal(value, before[name]) for name, value in base_of(wrapped).items())
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["adapter", "model"]
    assert (tmp_path / "run" / "model" / "chat_template.jinja").is_file()
    expected = token_logprobs(wrapped, batch).logprobs
    merged, info = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    torch.testing.assert_close(token_logprobs(merged, batch).logprobs, expected, atol=1e-5, rtol=0.0)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "source")
    loaded = PeftModel.from_pretrained(base, str(tmp_path / "run" / "adapter"))
    assert torch.equal(token_logprobs(loaded, batch).logprobs, expected)


def test_gpt2s_transposed_layers_are_merged_too(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=23, n_embd=16, n_layer=1, n_head=2, n_positions=32))
    model.save_pretrained(tmp_path / "source")
    wrapped: Any = adapted(model)  # type: ignore[arg-type]
    assert json.loads(published_metadata(wrapped)["adapter_config"])["fan_in_fan_out"] is True
    save_model(wrapped, tmp_path / "source", tmp_path / "model")
    ids = torch.arange(12)[None]
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    torch.testing.assert_close(merged(ids).logits, wrapped.eval()(ids).logits, atol=1e-5, rtol=0.0)


def test_a_disk_that_refuses_leaves_the_model_before(
    make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_model().save_pretrained(tmp_path / "source")
    save_model(adapted(make_model(), 1), tmp_path / "source", tmp_path / "run" / "model")
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*.safetensors")}

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(PeftModel, "save_pretrained", full)
    with pytest.raises(CheckpointError, match=r"the trained model cannot be written to .*model"):
        save_model(adapted(make_model(), 2), tmp_path / "source", tmp_path / "run" / "model")
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*.safetensors")} == before
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["adapter", "model"]


def test_named_targets_are_all_that_is_adapted(make_model: MakeModel, tmp_path: Path) -> None:
    make_model().save_pretrained(tmp_path)
    require_targets(tmp_path, LoraSection(rank=2, target_modules=("q_proj", "layers.1.mlp.up_proj")))
    wrapped = adapted(make_model(), target_modules=("q_proj", "layers.1.mlp.up_proj"))
    modules = {name.partition(".lora_")[0].removeprefix("base_model.model.model.") for name in adapter_state(wrapped)}
    assert modules == {"layers.0.self_attn.q_proj", "layers.1.self_attn.q_proj", "layers.1.mlp.up_proj"}


def mixture(folder: Path) -> Path:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    MixtralForCausalLM(
        MixtralConfig(vocab_size=23, num_key_value_heads=2, num_local_experts=2, **sizes)
    ).save_pretrained(folder)
    return folder


def test_named_layers_of_a_mixture_of_experts_are_adapted_and_published(tmp_path: Path) -> None:
    config = config_of(lora={**LORA, "target_modules": ["q_proj"]})
    model = load_model(mixture(tmp_path / "model"), config)
    said = json.loads(published_metadata(model)["adapter_config"])
    assert said["target_modules"] == ["q_proj"]
    log = VersionLog(tmp_path / "versions")
    publication = Learner(make_accelerator(config), model, config, log).published()
    log.append(publication.weights, publication.metadata)
    read = VersionReader(tmp_path / "versions", published_metadata(model)).read(0)
    assert {name.split(".")[-3] for name in read} == {"q_proj"}


@pytest.mark.filterwarnings("ignore:The following .*_pattern keys did not match:RuntimeWarning")  # PEFT's own
def test_an_adapter_of_experts_is_refused_before_anything_starts(tmp_path: Path) -> None:
    message = r"'all-linear' would adapt the experts' tensors \(.*down_proj.*\), .* such as \['k_proj', .*'q_proj'"
    with pytest.raises(ConfigError, match=message):
        require_targets(mixture(tmp_path), LoraSection(rank=2))


def test_the_names_are_pefts(make_model: MakeModel) -> None:
    wrapped = adapted(make_model())
    assert adapter_state(wrapped).keys() == get_peft_model_state_dict(wrapped).keys()
    assert "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight" in adapter_state(wrapped)
