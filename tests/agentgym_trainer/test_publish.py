"""What is published, what the forward computes with, and what the optimizer steps are three views of one model."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from gradient_worker import VERSION, Versions, ragged_trajectories, small_model
from torch import nn
from transformers import LlamaForCausalLM

from agentgym.config import parse_config
from agentgym.versions import BFLOAT16, VersionLog
from agentgym_trainer.anchors.scoring import ScoringModel
from agentgym_trainer.learner import Learner, make_accelerator
from agentgym_trainer.publish import as_published, published_weights
from agentgym_trainer.settings import TrainConfig


def test_tied_tensors_are_published_once_as_copies(make_model: Callable[..., LlamaForCausalLM]) -> None:
    model = make_model(tied=True)
    weights = published_weights(model)
    assert "lm_head.weight" not in weights
    assert all(array.dtype == np.float32 for array in weights.values())
    weights["model.embed_tokens.weight"][:] = 7.0
    assert not bool((model.model.embed_tokens.weight == 7.0).any())


@pytest.mark.parametrize("tied", [True, False])
def test_the_forward_sees_what_was_published_and_the_masters_stay(
    make_model: Callable[..., LlamaForCausalLM], tied: bool
) -> None:
    model = make_model(tied=tied)
    masters = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    weights = published_weights(model, "bfloat16")
    with as_published(model, "bfloat16"):
        for name, parameter in model.named_parameters():
            assert parameter.dtype == torch.float32
            published = torch.from_numpy(weights[name].view(np.int16)).view(torch.bfloat16)
            assert weights[name].dtype == BFLOAT16
            assert torch.equal(parameter, published.float())
            assert torch.equal(parameter, masters[name].bfloat16().float())
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, masters[name])


def test_masters_come_back_after_an_error(make_model: Callable[..., LlamaForCausalLM]) -> None:
    model = make_model()
    before = model.lm_head.weight.detach().clone()
    with pytest.raises(RuntimeError, match="boom"), as_published(model, "bfloat16"):
        raise RuntimeError("boom")
    assert torch.equal(model.lm_head.weight, before)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_tensors_of_every_layout_come_back_from_the_log(tmp_path: Path, dtype: str) -> None:
    module = nn.Linear(6, 4)
    module.weight = nn.Parameter(torch.randn(6, 4).t())  # in memory by columns, as a converted checkpoint may be
    module.scale = nn.Parameter(torch.tensor(1.5))
    module.register_buffer("nothing", torch.zeros(0, 3))
    log, history = VersionLog(tmp_path), []
    for version in range(3):
        with torch.no_grad():
            module.weight[version, 1] += 1.0
        with as_published(module, dtype):
            history.append({name: tensor.clone() for name, tensor in module.state_dict().items()})
        log.hold("test", log.versions)
        log.append(published_weights(module, dtype))
    scoring = ScoringModel(module, 1.0)
    for version in (2, 0, 1, 2):  # the last three along the deltas
        scoring.bring(log, version)
        torch.testing.assert_close(dict(scoring.module.state_dict()), history[version], atol=0.0, rtol=0.0)
    assert log.num_full_copies == 2  # the newest two


def test_counters_are_published_as_they_are() -> None:
    module = nn.Linear(2, 2)
    module.register_buffer("count", torch.tensor(2**30 + 1))
    assert published_weights(module, "bfloat16")["count"] == 2**30 + 1


class Rounded(Versions):
    """The trainer's own weights as they were published, for every version."""

    def __init__(self, model: nn.Module) -> None:
        self.weights = published_weights(model, "bfloat16")

    def read(self, version: int) -> dict[str, np.ndarray]:
        return self.weights


def learned(anchor: str, updates: int) -> dict[str, float]:
    settings = {
        "anchor": anchor, "publish_dtype": "bfloat16", "updates_per_batch": updates, "learning_rate": 1e-12,
    }  # fmt: skip
    config = parse_config(TrainConfig, {"env": {"id": "maze"}, "trainer": settings})
    model = small_model()
    learner = Learner(make_accelerator(config), model, config, Rounded(model))
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    figures = learner.learn(ragged_trajectories(), VERSION)
    for name, value in model.named_parameters():
        torch.testing.assert_close(value, before[name], atol=1e-9, rtol=0.0)  # the masters were stepped, not rounded
    return figures


@pytest.mark.parametrize("updates", [1, 2])
@pytest.mark.parametrize("anchor", ["snapshot", "resident", "ewma"])
def test_the_staleness_ratio_of_unchanged_weights_is_one(anchor: str, updates: int) -> None:
    """Every version is the trainer's own here: policy and proximal logprobs are both of the published weights."""
    assert learned(anchor, updates)["staleness/max_abs_log_ratio"] < 2e-6


def test_mutant_that_computes_with_the_masters_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Learner, "_as_published", lambda self: nullcontext())
    assert learned("snapshot", 1)["staleness/max_abs_log_ratio"] > 1e-4
