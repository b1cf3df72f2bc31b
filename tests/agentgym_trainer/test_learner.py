"""What a batch's figures count: the same however many optimizer steps it is cut into, and by lag what the anchor counts
in all; ranks are asked once for each sum."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gradient_worker import VERSION, Versions, ragged_trajectories, small_model
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from agentgym.config import parse_config
from agentgym.errors import VersionError
from agentgym_trainer.learner import Learner, load_model, make_accelerator
from agentgym_trainer.logprobs import token_logprobs
from agentgym_trainer.metrics import LAG_BUCKETS, StepMetrics
from agentgym_trainer.settings import TrainConfig

COUNTS = (
    "policy/num_tokens", "trajectory/num_rows", "trajectory/num_excluded", "trajectory/num_trajectories",
    "trajectory/num_undelivered", "trajectory/num_too_long", "trajectory/delivered_fraction",
    "trajectory/num_zero_variance_groups",
)  # fmt: skip


class Counting(Learner):
    """Notes how often ranks are asked for their sums."""

    asked = 0

    def over_ranks(self, metrics: StepMetrics) -> StepMetrics:
        self.asked += 1
        return super().over_ranks(metrics)


class Without(Versions):
    """A log that lacks one version."""

    def __init__(self, model: Any, gone: int) -> None:
        super().__init__(model)
        self.gone = gone

    def read(self, version: int) -> Mapping[str, np.ndarray]:
        if version == self.gone:
            raise VersionError(f"policy version {version} is not in the log")
        return super().read(version)


def learner(gone: int = -1, **sections: dict[str, Any]) -> Counting:
    config = parse_config(TrainConfig, {"env": {"id": "maze"}, **sections})
    model = small_model()
    return Counting(make_accelerator(config), model, config, Without(model, gone))


@pytest.mark.parametrize("updates", [2, 3])
def test_a_batch_counts_the_same_however_it_is_cut(updates: int) -> None:
    batch = [  # one group earns the same throughout
        dataclasses.replace(trajectory, score=0.5) if trajectory.group_id == "g0" else trajectory
        for trajectory in ragged_trajectories()
    ]
    settings = {"anchor": "snapshot", "on_discrepancy": "ignore", "max_sequence_tokens": 23}  # some rows are longer
    whole = learner(trainer=settings).learn(batch, VERSION)
    cut = learner(trainer={**settings, "updates_per_batch": updates}).learn(batch, VERSION)
    assert {name: cut[name] for name in COUNTS} == {name: whole[name] for name in COUNTS}
    assert whole["trajectory/num_zero_variance_groups"] == 1.0
    assert whole["trajectory/num_too_long"] > 0
    # what engine and trainer are compared on comes before the first optimizer step
    assert 0 < cut["engine_mismatch/num_tokens"] < whole["engine_mismatch/num_tokens"]


def test_the_baseline_of_a_batch_is_of_all_its_updates() -> None:
    """Three updates of one group each, within which all scores are equal: only their common mean tells them apart."""
    batch = [
        dataclasses.replace(trajectory, score=float(trajectory.group_id == "g0"))
        for trajectory in ragged_trajectories()
    ]
    batch[0] = dataclasses.replace(batch[0], valid=False)
    settings = {"anchor": "resident", "advantages": "batch_mean", "on_discrepancy": "ignore", "updates_per_batch": 3}
    made = learner(trainer=settings)
    figures = made.learn(batch, VERSION)
    assert figures["gradient_norm"] > 0.01
    assert figures["trajectory/num_zero_variance_groups"] == 3.0
    mean = np.mean([trajectory.score for trajectory in batch[1:]])
    whole = made.advantages_of(batch)
    np.testing.assert_allclose(whole.of([3, 0, 5]).values, [1.0 - mean, 0.0, -mean])
    assert whole.of([3, 0, 5]).included.tolist() == [True, False, True]


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_every_schedule_warms_up(schedule: str) -> None:
    trainer = {"anchor": "behavior", "learning_rate": 0.4, "schedule": schedule, "warmup_steps": 4}
    figures = learner(trainer=trainer).learn(ragged_trajectories(), VERSION)
    assert figures["learning_rate"] == pytest.approx(0.1)  # of the step to come


@pytest.mark.parametrize("action", ["warn", "ignore"])
@pytest.mark.parametrize("updates", [1, 2])
def test_ranks_are_asked_for_nothing_that_is_known(action: str, updates: int) -> None:
    made = learner(trainer={"anchor": "resident", "on_discrepancy": action, "updates_per_batch": updates})
    made.learn(ragged_trajectories(), VERSION)
    assert made.asked == updates  # of two: the first, which the alarm looks at, and the rest


def test_fallbacks_are_counted_by_the_lag_of_their_tokens() -> None:
    made = learner(gone=1, trainer={"anchor": "auto"})
    figures = made.learn(ragged_trajectories(), VERSION)
    by_lag = {name: figures.get(f"anchor/{name}/num_fallbacks") for name in LAG_BUCKETS}
    assert by_lag.pop("lag2") == figures["anchor/num_fallbacks"] == figures["policy/lag2/num_tokens"] > 0
    assert by_lag.pop("lag0") == by_lag.pop("lag1") == 0.0
    assert set(by_lag.values()) == {None}  # no tokens, no figure


def gpt2() -> PreTrainedModel:
    """Its configuration drops a tenth of everything, unless told otherwise."""
    return GPT2LMHeadModel(GPT2Config(vocab_size=23, n_positions=64, n_embd=16, n_layer=2, n_head=2))


def llama() -> PreTrainedModel:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=23, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, attention_dropout=0.5, initializer_range=0.4,
        )
    )  # fmt: skip


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("model", [gpt2, llama])
def test_the_policy_drops_nothing_as_the_engine_does(
    model: Callable[[], PreTrainedModel], checkpointing: bool, tmp_path: Path
) -> None:
    model().save_pretrained(tmp_path)
    trainer = {"anchor": "resident", "gradient_checkpointing": checkpointing, "on_discrepancy": "ignore"}
    config = parse_config(TrainConfig, {"env": {"id": "maze"}, "trainer": trainer})
    loaded = load_model(tmp_path, config)
    assert loaded.training == checkpointing  # the mode in which transformers checkpoints, and some route at random
    made = Learner(make_accelerator(config), loaded, config, Versions(loaded))
    (batch,) = made.micro_batches_of(made.rows_of(ragged_trajectories()))
    policy = token_logprobs(loaded, batch).logprobs.detach()
    as_sampled = token_logprobs(loaded.eval(), batch).logprobs.detach()
    torch.testing.assert_close(policy, as_sampled, atol=1e-5, rtol=0.0)
