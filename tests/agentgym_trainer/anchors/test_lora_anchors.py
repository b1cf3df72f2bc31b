"""Anchors of an adapted model: each token by its own version's adapter, over one base that nobody writes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import LlamaForCausalLM

from agentgym.versions import VersionLog, VersionReader
from agentgym_trainer.anchors import make_anchor, scoring
from agentgym_trainer.anchors.ewma import EwmaAnchor, average_in, decay_of
from agentgym_trainer.anchors.scoring import ScoringModel, frozen_copy
from agentgym_trainer.batch import MicroBatch, Row, build_micro_batches
from agentgym_trainer.logprobs import token_logprobs
from agentgym_trainer.lora import adapt, adapter_state, merged
from agentgym_trainer.publish import as_published, published_metadata, published_weights
from agentgym_trainer.settings import LoraSection

MakeModel = Callable[..., LlamaForCausalLM]
LENGTHS = (9, 30, 4, 17, 2, 12)
NEWEST = 4


def adapted(model: LlamaForCausalLM) -> PeftModel:
    with torch.random.fork_rng():
        torch.manual_seed(7)
        return adapt(model, LoraSection(rank=2, alpha=6), base_dtype="float32", compute_dtype="float32").eval()


@torch.no_grad()
def step(wrapped: PeftModel, seed: int, size: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    for tensor in adapter_state(wrapped).values():
        tensor.add_(size * torch.randn(tensor.shape, generator=generator))


def base_of(wrapped: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value for name, value in wrapped.named_parameters() if "lora_" not in name}


class Run:
    """A trainer at version NEWEST, the log of its versions, and plain models with each of them merged."""

    def __init__(self, make_model: MakeModel, folder: Path, dtype: str, size: float) -> None:
        self.model = adapted(make_model())
        if size < 0.01:  # next to B = 0 no step is small
            step(self.model, 0, 0.2)
        self.log = VersionLog(folder)
        self.merged: dict[int, LlamaForCausalLM] = {}
        self.base = {name: value.detach().clone() for name, value in base_of(self.model).items()}
        for number in range(NEWEST + 1):
            if number:
                step(self.model, number, size)
            version = self.log.append(published_weights(self.model, dtype), published_metadata(self.model))
            self.log.hold("test", self.log.versions)
            with as_published(self.model, dtype):
                _, weights = merged(self.model)
            self.merged[version] = make_model()
            self.merged[version].load_state_dict(weights)
        self.reader = VersionReader(folder, published_metadata(self.model))

    @torch.no_grad()
    def brute_force(self, batch: MicroBatch) -> torch.Tensor:
        """Whole-batch forwards of every version's own model, then a choice by token."""
        by_version = torch.stack([token_logprobs(model, batch, 0.8).logprobs for model in self.merged.values()])
        return by_version.gather(0, batch.policy_versions.clamp(min=0)[None])[0]


def check_exact(run: Run, make_rows: Callable[..., list[Row]], dtype: str, reuse: bool) -> None:
    anchor = make_anchor("snapshot", run.model, run.reader, temperature=0.8, max_staleness=4)
    for max_tokens in (20, 1000):
        batches = build_micro_batches(make_rows(LENGTHS), max_tokens=max_tokens)
        with as_published(run.model, dtype):
            proximals = anchor.proximal(batches, trainer_version=NEWEST, reuse_policy=reuse)
            policies = [token_logprobs(run.model, batch, 0.8).logprobs for batch in batches]
        for batch, proximal, policy in zip(batches, proximals, policies, strict=True):
            # B @ A merged and two thin products round differently: so much and no more
            torch.testing.assert_close(proximal.resolve(policy), run.brute_force(batch), atol=1e-5, rtol=0.0)


@pytest.mark.parametrize("reuse", [True, False])
@pytest.mark.parametrize(("dtype", "size"), [("float32", 0.1), ("bfloat16", 0.2), ("bfloat16", 1e-4)])
def test_each_token_is_scored_by_the_adapter_that_sampled_it(
    make_model: MakeModel, make_rows: Callable[..., list[Row]], tmp_path: Path, dtype: str, size: float, reuse: bool
) -> None:
    run = Run(make_model, tmp_path, dtype, size)
    assert (run.log.num_full_copies < NEWEST + 1) == (size == 1e-4)  # small steps in bf16 go along deltas
    check_exact(run, make_rows, dtype, reuse)
    assert all(torch.equal(value, run.base[name]) for name, value in base_of(run.model).items())


def test_mutant_whose_versions_share_the_adapter_too_is_refused(
    make_model: MakeModel, make_rows: Callable[..., list[Row]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(make_model, tmp_path, "float32", 0.1)
    monkeypatch.setattr(scoring, "base_parameters", lambda model: list(model.parameters()))
    with pytest.raises(AssertionError):
        check_exact(run, make_rows, "float32", False)


def test_the_scoring_copy_holds_no_second_base(make_model: MakeModel, tmp_path: Path) -> None:
    run = Run(make_model, tmp_path, "float32", 0.1)
    model = ScoringModel(run.model, 1.0)
    model.bring(run.reader, 2)
    for name, value in base_of(model.module).items():
        assert value is run.model.get_parameter(name)
    mine, theirs = (adapter_state(module) for module in (model.module, run.model))
    assert all(mine[name].data_ptr() != theirs[name].data_ptr() for name in mine)
    found = run.reader.read(2)
    assert all(np.array_equal(mine[name].numpy(), found[name]) for name in mine)
    assert not any(value.requires_grad for value in model.module.parameters())
    assert all(value.requires_grad == ("lora_" in name) for name, value in run.model.named_parameters())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_adapters_are_switched_in_place_to_the_bits_that_a_load_would_bring(
    make_model: MakeModel, tmp_path: Path, dtype: str
) -> None:
    run = Run(make_model, tmp_path, dtype, 1e-4)
    walked = ScoringModel(run.model, 1.0)
    for version in (4, 3, 2, 1, 0, 3):
        walked.bring(run.reader, version)
        jumped = ScoringModel(run.model, 1.0)
        jumped.load(run.log.read(version), version)
        expected = adapter_state(jumped.module)
        assert all(torch.equal(value, expected[name]) for name, value in adapter_state(walked.module).items())


@pytest.mark.parametrize("name", ["auto", "snapshot", "resident"])
def test_the_newest_adapter_needs_no_second_forward(
    make_model: MakeModel, make_rows: Callable[..., list[Row]], tmp_path: Path, name: str
) -> None:
    run = Run(make_model, tmp_path, "float32", 0.1)
    anchor = make_anchor(name, run.model, run.reader, temperature=0.8, max_staleness=4)
    (batch,) = build_micro_batches(make_rows(LENGTHS, span=0), max_tokens=1000)
    (proximal,) = anchor.proximal([batch], trainer_version=NEWEST, reuse_policy=True)
    policy = token_logprobs(run.model, batch, 0.8).logprobs
    assert torch.equal(proximal.resolve(policy), policy)


def test_auto_falls_back_for_a_version_of_another_adapter(
    make_model: MakeModel, make_rows: Callable[..., list[Row]], tmp_path: Path
) -> None:
    run = Run(make_model, tmp_path, "float32", 0.1)
    batches = build_micro_batches(make_rows(LENGTHS), max_tokens=1000)
    stale = sum(int((batch.loss_mask & (batch.policy_versions < NEWEST)).sum()) for batch in batches)
    reader = VersionReader(tmp_path, {**published_metadata(run.model), "adapter_config": "{}"})
    anchor = make_anchor("auto", run.model, reader, temperature=0.8, max_staleness=4)
    anchor.proximal(batches, trainer_version=NEWEST, reuse_policy=True)
    assert anchor.metrics()["anchor/num_fallbacks"] == stale > 0


def test_the_average_is_the_adapters_and_the_base_keeps_its_bits(make_model: MakeModel) -> None:
    model = adapted(make_model())
    step(model, 0, 0.2)
    base = {name: value.detach().clone() for name, value in base_of(model).items()}
    anchor = EwmaAnchor(model, 1.0, max_staleness=8)
    expected = {name: value.clone() for name, value in adapter_state(model).items()}
    weight, beta = 1.0, decay_of(3.0, 8)
    for version in range(1, 12):
        step(model, version, 0.05)
        anchor.published(version, active_fraction=1.0, mean_lag=3.0)
        for name, value in adapter_state(model).items():
            average_in(expected[name], value, weight, beta)
        weight = beta * weight + 1.0
    state = anchor.state_dict()
    assert state["average"].keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in state["average"].items())
    assert all(torch.equal(value, base[name]) for name, value in base_of(model).items())

    restored = EwmaAnchor(model, 1.0, max_staleness=8)
    restored.load_state_dict(state)
    assert all(torch.equal(value, expected[name]) for name, value in restored.state_dict()["average"].items())
    anchor.published(12, active_fraction=0.0, mean_lag=3.0)  # a reset
    for name, value in adapter_state(model).items():
        assert torch.equal(anchor.state_dict()["average"][name], value)


def test_the_average_leaves_a_narrow_base_narrow(make_model: MakeModel) -> None:
    model = adapt(make_model(), LoraSection(rank=2), base_dtype="bfloat16", compute_dtype="bfloat16")
    before = {name: value.dtype for name, value in model.named_parameters()}
    anchor = EwmaAnchor(model, 1.0, max_staleness=8)
    assert {name: value.dtype for name, value in model.named_parameters()} == before
    assert torch.bfloat16 in before.values()
    assert {value.dtype for value in anchor.state_dict()["average"].values()} == {torch.float32}


def test_a_model_without_an_adapter_is_copied_whole(make_model: MakeModel) -> None:
    model: Any = make_model()
    copied = frozen_copy(model)
    assert not {p.data_ptr() for p in copied.parameters()} & {p.data_ptr() for p in model.parameters()}
