"""The exact anchor: each token by its own version's weights, nothing forwarded in vain, nothing missing in silence."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import nn
from transformers import LlamaForCausalLM

from agentgym.errors import TrainingError, UnknownNameError, VersionError
from agentgym.versions import VersionLog, VersionReader
from agentgym_trainer.anchors import ANCHORS, RECORDED, make_anchor, snapshot
from agentgym_trainer.anchors.protocol import Anchor
from agentgym_trainer.anchors.scoring import frozen_copy
from agentgym_trainer.batch import MicroBatch, Row, build_micro_batches
from agentgym_trainer.logprobs import token_logprobs
from agentgym_trainer.publish import as_published, published_weights

MakeModel = Callable[..., LlamaForCausalLM]
MakeRows = Callable[..., list[Row]]
LENGTHS = (9, 30, 4, 17, 2, 12)
NEWEST = 4  # the trainer's own version; rows hold tokens of versions 1 to 4


def numpy_weights(model: LlamaForCausalLM) -> dict[str, np.ndarray]:
    return {name: parameter.detach().numpy().copy() for name, parameter in model.named_parameters()}


class Published:
    """A version source in memory that notes what is read; a gone version is in `models` and not in `held`."""

    def __init__(self, models: Mapping[int, LlamaForCausalLM], held: set[int]) -> None:
        self.models = models
        self.held = held
        self.reads: list[int] = []

    def read(self, version: int) -> Mapping[str, np.ndarray]:
        self.reads.append(version)
        if version not in self.held:
            raise VersionError(f"policy version {version} is not in the log")
        return numpy_weights(self.models[version])


@pytest.fixture
def models(make_model: MakeModel) -> dict[int, LlamaForCausalLM]:
    """Five versions that differ; version 4 is the trainer's present weights."""
    return {version: make_model(version) for version in range(NEWEST + 1)}


def anchor_of(name: str, models: Mapping[int, LlamaForCausalLM], held: set[int]) -> tuple[Anchor, Published]:
    source = Published(models, held)
    return make_anchor(name, models[NEWEST], source, temperature=0.8, max_staleness=4), source


@torch.no_grad()
def exact(models: Mapping[int, LlamaForCausalLM], batch: MicroBatch) -> torch.Tensor:
    """Whole-batch forwards of every version, then a choice by token."""
    by_version = torch.stack([token_logprobs(model, batch, 0.8).logprobs for model in models.values()])
    return by_version.gather(0, batch.policy_versions.clamp(min=0)[None])[0]


def check_exact(anchor: Anchor, models: Mapping[int, LlamaForCausalLM], batches: list[MicroBatch], reuse: bool) -> None:
    proximals = anchor.proximal(batches, trainer_version=NEWEST, reuse_policy=reuse)
    for batch, proximal in zip(batches, proximals, strict=True):
        policy = token_logprobs(models[NEWEST], batch, 0.8).logprobs
        resolved = proximal.resolve(policy)
        assert not resolved.requires_grad
        torch.testing.assert_close(resolved, exact(models, batch), atol=1e-5, rtol=0.0)


@pytest.mark.parametrize("max_tokens", [20, 1000])
@pytest.mark.parametrize("reuse", [True, False])
def test_each_token_is_scored_by_its_own_version(
    models: dict[int, LlamaForCausalLM], make_rows: MakeRows, reuse: bool, max_tokens: int
) -> None:
    anchor, source = anchor_of("snapshot", models, {0, 1, 2, 3})
    check_exact(anchor, models, build_micro_batches(make_rows(LENGTHS), max_tokens=max_tokens), reuse)
    # newest first, one load a version; the trainer's own is not loaded, one without tokens neither
    assert source.reads == [3, 2, 1]
    # the next batch begins at the end where the copy was left: version 1 is there still
    check_exact(anchor, models, build_micro_batches(make_rows(LENGTHS), max_tokens=max_tokens), reuse)
    assert source.reads == [3, 2, 1, 2, 3]
    check_exact(anchor, models, build_micro_batches(make_rows(LENGTHS), max_tokens=max_tokens), reuse)
    assert source.reads == [3, 2, 1, 2, 3, 2, 1]


def test_reused_tokens_are_left_to_the_policy_forward(models: dict[int, LlamaForCausalLM], make_rows: MakeRows) -> None:
    anchor, source = anchor_of("snapshot", models, set())
    batches = build_micro_batches(make_rows(LENGTHS, span=0), max_tokens=1000)
    (proximal,) = anchor.proximal(batches, trainer_version=NEWEST, reuse_policy=True)
    assert proximal.from_policy is not None
    assert torch.equal(proximal.from_policy, batches[0].loss_mask)
    policy = token_logprobs(models[NEWEST], batches[0], 0.8).logprobs
    assert torch.equal(proximal.resolve(policy), policy)  # r_s is exactly 1 at lag 0
    assert source.reads == []
    assert anchor.metrics()["anchor/num_scored_tokens"] == 0


def test_only_rows_with_the_version_and_only_up_to_its_last_token(
    models: dict[int, LlamaForCausalLM], make_rows: MakeRows
) -> None:
    anchor, _ = anchor_of("snapshot", models, {1, 2, 3})
    (batch,) = build_micro_batches(make_rows(LENGTHS), max_tokens=10_000)
    expected = 0
    for version in (1, 2, 3):
        where = (batch.loss_mask & (batch.policy_versions == version)).nonzero()
        expected += len(where[:, 0].unique()) * (int(where[:, 1].max()) + 1)
    anchor.proximal([batch], trainer_version=NEWEST, reuse_policy=True)
    assert anchor.metrics()["anchor/num_scored_tokens"] == expected < 3 * batch.num_tokens


def test_mutant_that_scores_all_with_the_oldest_version_is_refused(
    models: dict[int, LlamaForCausalLM], make_rows: MakeRows, monkeypatch: pytest.MonkeyPatch
) -> None:
    anchor, _ = anchor_of("snapshot", models, {1, 2, 3})
    load = snapshot.ScoringModel.load
    monkeypatch.setattr(snapshot.ScoringModel, "load", lambda self, weights, v: load(self, numpy_weights(models[1]), v))
    with pytest.raises(AssertionError):
        check_exact(anchor, models, build_micro_batches(make_rows(LENGTHS), max_tokens=1000), True)


def test_a_missing_version_is_an_error_for_snapshot(models: dict[int, LlamaForCausalLM], make_rows: MakeRows) -> None:
    anchor, _ = anchor_of("snapshot", models, {1, 3})
    with pytest.raises(VersionError, match="policy version 2 is not in the log"):
        anchor.proximal(
            build_micro_batches(make_rows(LENGTHS), max_tokens=64), trainer_version=NEWEST, reuse_policy=True
        )


def test_a_missing_version_is_a_counted_fallback_for_auto(
    models: dict[int, LlamaForCausalLM], make_rows: MakeRows
) -> None:
    anchor, _ = anchor_of("auto", models, {1, 3})
    batches = build_micro_batches(make_rows(LENGTHS), max_tokens=64)
    proximals = anchor.proximal(batches, trainer_version=NEWEST, reuse_policy=True)
    num_gone = sum(int((b.loss_mask & (b.policy_versions == 2)).sum()) for b in batches)
    num_all = sum(int(b.loss_mask.sum()) for b in batches)
    assert num_gone > 0
    assert anchor.metrics()["anchor/num_fallbacks"] == num_gone
    assert anchor.metrics()["anchor/num_exact"] == num_all - num_gone
    for batch, proximal in zip(batches, proximals):
        policy = token_logprobs(models[NEWEST], batch, 0.8).logprobs.detach()
        expected = torch.where(batch.policy_versions == 2, policy, exact(models, batch))  # ewma of one version: itself
        torch.testing.assert_close(proximal.resolve(policy), expected, atol=1e-5, rtol=0.0)


def test_the_fallback_follows_publications_and_checkpoints(models: dict[int, LlamaForCausalLM]) -> None:
    anchor, _ = anchor_of("auto", models, set())
    anchor.published(5, active_fraction=0.1, mean_lag=1.0)
    assert anchor.metrics()["anchor/ewma_resets"] == 1.0
    again, _ = anchor_of("auto", models, set())
    again.load_state_dict(anchor.state_dict())
    assert again.metrics()["anchor/ewma_resets"] == 1.0


def test_tokens_over_stale_kv_are_not_called_exact(models: dict[int, LlamaForCausalLM], make_rows: MakeRows) -> None:
    anchor, _ = anchor_of("snapshot", models, {1, 2, 3})
    batches = build_micro_batches(make_rows(LENGTHS), max_tokens=1000)
    where = tuple(batches[0].loss_mask.nonzero()[0].tolist())
    batches[0].kv_versions[where] -= 1
    anchor.proximal(batches, trainer_version=NEWEST, reuse_policy=True)
    assert anchor.metrics()["anchor/num_exact"] == int(batches[0].loss_mask.sum()) - 1


def test_tied_weights_from_a_real_version_log(make_model: MakeModel, make_rows: MakeRows, tmp_path: Path) -> None:
    log = VersionLog(tmp_path)
    models = {version: make_model(version, tied=True) for version in range(NEWEST + 1)}
    for model in models.values():
        log.hold("test", log.versions)
        log.append(numpy_weights(model))
    anchor = make_anchor("snapshot", models[NEWEST], log, temperature=0.8, max_staleness=4)
    check_exact(anchor, models, build_micro_batches(make_rows(LENGTHS), max_tokens=64), True)


# ------------------------------------------------------------------------------------- one copy that is switched


class Watched(VersionReader):
    """A log that notes which versions were read whole."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.reads: list[int] = []

    def read(self, version: int) -> dict[str, np.ndarray]:
        self.reads.append(version)
        return super().read(version)


def small_steps(model: LlamaForCausalLM, folder: Path, dtype: str) -> dict[int, LlamaForCausalLM]:
    """Versions 0 to NEWEST in a log, each a few weights away from the one before; and what they compute with."""
    log = VersionLog(folder)
    generator = torch.Generator().manual_seed(0)
    models = {}
    for version in range(NEWEST + 1):
        with torch.no_grad():
            for parameter in model.parameters() if version else ():
                parameter += 0.3 * (torch.rand(parameter.shape, generator=generator) < 0.05)
        log.hold("test", log.versions)
        log.append(published_weights(model, dtype))
        with as_published(model, dtype):
            models[version] = copy.deepcopy(model)
    return models


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tied", [True, False])
def test_versions_are_switched_in_place_to_the_very_bits(
    make_model: MakeModel, make_rows: MakeRows, tmp_path: Path, dtype: str, tied: bool
) -> None:
    models = small_steps(make_model(0, tied=tied), tmp_path, dtype)
    source = Watched(tmp_path)
    anchor = make_anchor("snapshot", models[NEWEST], source, temperature=0.8, max_staleness=4)
    for max_tokens in (20, 1000):
        check_exact(anchor, models, build_micro_batches(make_rows(LENGTHS), max_tokens=max_tokens), True)
    assert source.reads == [3]  # one full copy, then along the deltas: 2, 1, and forth again
    scoring = snapshot.ScoringModel(models[NEWEST], 1.0)
    for version in (4, 0, 3, 1, 2):
        scoring.bring(source, version)
        assert scoring._scratch is not None
        for name, parameter in scoring._scratch.named_parameters():
            assert torch.equal(parameter.view(torch.int32), models[version].get_parameter(name).view(torch.int32))
    assert source.reads == [3, 4]


def test_a_version_that_was_dropped_under_the_copy_is_followed_by_a_full_one(
    make_model: MakeModel, tmp_path: Path
) -> None:
    models = small_steps(make_model(0), tmp_path, "bfloat16")
    source = Watched(tmp_path)
    scoring = snapshot.ScoringModel(models[NEWEST], 1.0)
    scoring.bring(source, 1)
    VersionLog(tmp_path).hold("test", [3])
    scoring.bring(source, 3)
    assert source.reads == [1, 3]
    assert scoring._scratch is not None
    assert torch.equal(scoring._scratch.lm_head.weight, models[3].lm_head.weight)


def test_an_error_on_the_way_leaves_no_version_behind(make_model: MakeModel, tmp_path: Path) -> None:
    models = small_steps(make_model(0), tmp_path, "bfloat16")
    source = Watched(tmp_path)
    scoring = snapshot.ScoringModel(models[NEWEST], 1.0)
    scoring.bring(source, 3)
    corrupt = tmp_path / "00000001-00000002.delta"
    corrupt.write_bytes(corrupt.read_bytes()[:-1])
    with pytest.raises(VersionError, match=r"00000001-00000002\.delta is corrupt"):
        scoring.bring(source, 1)
    scoring.bring(source, 2)
    assert source.reads == [3, 2]
    assert scoring._scratch is not None
    assert torch.equal(scoring._scratch.lm_head.weight, models[2].lm_head.weight)


def test_mutant_that_leaves_the_copy_where_it_was_is_refused(
    make_model: MakeModel, make_rows: MakeRows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(snapshot.ScoringModel, "_switch", lambda self, delta: None)
    with pytest.raises(AssertionError):
        test_versions_are_switched_in_place_to_the_very_bits(make_model, make_rows, tmp_path, "bfloat16", False)


def test_a_copy_of_another_format_is_loaded_each_time(make_model: MakeModel, tmp_path: Path) -> None:
    models = small_steps(make_model(0), tmp_path, "bfloat16")
    source = Watched(tmp_path)
    scoring = snapshot.ScoringModel(models[NEWEST].double(), 1.0)
    for version in (3, 2, 1):
        scoring.bring(source, version)
    assert source.reads == [3, 2, 1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda weights: weights.pop("lm_head.weight"), "version 7 lacks 'lm_head.weight'"),
        (lambda weights: weights.update(more=np.zeros(1)), "holds 'more', which the model has not"),
        (lambda weights: weights.update({"lm_head.weight": np.zeros((2, 2))}), "'lm_head.weight' is"),
    ],
    ids=["missing", "unknown", "misshaped"],
)
def test_weights_of_another_model_are_refused(
    make_model: MakeModel, change: Callable[[dict[str, np.ndarray]], object], message: str
) -> None:
    weights = numpy_weights(make_model())
    change(weights)
    with pytest.raises(VersionError, match=message):
        snapshot.ScoringModel(make_model(), 1.0).load(weights, 7)


def test_broken_weights_are_an_error(models: dict[int, LlamaForCausalLM], make_rows: MakeRows) -> None:
    with torch.no_grad():
        models[2].lm_head.weight.fill_(float("nan"))
    anchor, _ = anchor_of("snapshot", models, {1, 2, 3})
    with pytest.raises(TrainingError, match="non-finite logprob with the weights of version 2"):
        anchor.proximal(
            build_micro_batches(make_rows(LENGTHS), max_tokens=64), trainer_version=NEWEST, reuse_policy=True
        )


def test_a_copy_never_calls_the_originals_forward(make_model: MakeModel, make_rows: MakeRows) -> None:
    """Mixed-precision wrappers put a forward on the instance; a copied closure would score with the wrong weights."""
    model, other = make_model(0), make_model(1)
    inner = model.forward
    model.forward = lambda **inputs: inner(**inputs)  # type: ignore[method-assign]
    copied = frozen_copy(model)
    copied.load_state_dict(other.state_dict())
    (batch,) = build_micro_batches(make_rows([9]), max_tokens=64)
    assert torch.equal(token_logprobs(copied, batch).logprobs, token_logprobs(other, batch).logprobs)
    assert not any(parameter.requires_grad for parameter in copied.parameters())


@pytest.fixture
def mixed_precision() -> Iterator[Accelerator]:
    AcceleratorState._reset_state(reset_partial_state=True)
    yield Accelerator(cpu=True, mixed_precision="bf16")
    AcceleratorState._reset_state(reset_partial_state=True)


def test_scoring_keeps_the_policys_mixed_precision(
    models: dict[int, LlamaForCausalLM], make_rows: MakeRows, mixed_precision: Accelerator
) -> None:
    (batch,) = build_micro_batches(make_rows(LENGTHS, newest_version=3, span=0), max_tokens=10_000)
    in_fp32 = token_logprobs(models[NEWEST], batch, 0.8).logprobs
    source = Published({3: copy.deepcopy(models[NEWEST])}, {3})
    model = mixed_precision.prepare(models[NEWEST])
    policy = token_logprobs(model, batch, 0.8).logprobs.detach()
    assert not torch.allclose(policy, in_fp32, atol=1e-4)
    anchor = make_anchor("snapshot", model, source, temperature=0.8, max_staleness=4)
    (proximal,) = anchor.proximal([batch], trainer_version=NEWEST, reuse_policy=True)
    assert torch.equal(proximal.resolve(policy), policy)


class Talkative(nn.Module):
    """A data-parallel wrapper whose forward is a collective: a rank that calls it alone waits for ever."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, **inputs: object) -> object:
        raise AssertionError("scoring went through the wrapper")


@pytest.mark.parametrize("name", [name for name in ANCHORS if name not in RECORDED])  # those forward nothing
def test_scoring_never_talks_to_other_ranks(
    name: str, models: dict[int, LlamaForCausalLM], make_rows: MakeRows
) -> None:
    source = Published(models, {1, 2, 3})
    anchor = make_anchor(name, Talkative(models[NEWEST]), source, temperature=0.8, max_staleness=4)
    batches = build_micro_batches(make_rows(LENGTHS), max_tokens=64)
    assert len(anchor.proximal(batches, trainer_version=NEWEST, reuse_policy=False)) == len(batches)
    anchor.published(NEWEST + 1, active_fraction=1.0, mean_lag=1.0)


# --------------------------------------------------------------------------------------------- behavior and resident


def test_behavior_is_what_the_engine_said(models: dict[int, LlamaForCausalLM], make_rows: MakeRows) -> None:
    anchor, source = anchor_of("behavior", models, set())
    batches = build_micro_batches(make_rows(LENGTHS), max_tokens=64)
    proximals = anchor.proximal(batches, trainer_version=NEWEST, reuse_policy=True)
    for batch, proximal in zip(batches, proximals, strict=True):
        assert torch.equal(proximal.resolve(torch.zeros_like(batch.behavior_logprobs)), batch.behavior_logprobs)
    assert source.reads == []


@pytest.mark.parametrize("reuse", [True, False])
def test_resident_is_the_trainers_weights_at_arrival(
    models: dict[int, LlamaForCausalLM], make_rows: MakeRows, reuse: bool
) -> None:
    anchor, source = anchor_of("resident", models, set())
    batches = build_micro_batches(make_rows(LENGTHS), max_tokens=64)
    arrival = [token_logprobs(models[NEWEST], batch, 0.8).logprobs.detach() for batch in batches]
    proximals = anchor.proximal(batches, trainer_version=NEWEST, reuse_policy=reuse)
    if not reuse:  # optimizer steps between arrival and use do not move it
        with torch.no_grad():
            models[NEWEST].lm_head.weight.mul_(1.5)
    for batch, proximal, expected in zip(batches, proximals, arrival, strict=True):
        policy = token_logprobs(models[NEWEST], batch, 0.8).logprobs
        assert not proximal.resolve(policy).requires_grad
        assert torch.equal(proximal.resolve(policy), expected)
    assert source.reads == []


@pytest.mark.parametrize("name", ANCHORS)
def test_every_anchor_takes_its_own_state_back(name: str, models: dict[int, LlamaForCausalLM]) -> None:
    anchor, _ = anchor_of(name, models, set())
    anchor.published(5, active_fraction=1.0, mean_lag=1.0)
    assert anchor.name == name
    again, _ = anchor_of(name, models, set())
    again.load_state_dict(anchor.state_dict())
    assert again.metrics() == anchor.metrics()


def test_an_unknown_anchor_is_named(models: dict[int, LlamaForCausalLM]) -> None:
    with pytest.raises(UnknownNameError, match="unknown anchor 'snapshoot'; did you mean 'snapshot'"):
        anchor_of("snapshoot", models, set())
