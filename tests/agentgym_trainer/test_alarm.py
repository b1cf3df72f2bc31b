"""The alarm: what it looks at, when it speaks, what it stops; in a real learner, before the first optimizer step."""

from __future__ import annotations

import copy
import dataclasses
import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from faulty_engine import FaultyEngine
from transformers import LlamaForCausalLM

from agentgym.errors import TrainingError
from agentgym.trajectory import EpisodeStatus, ScoredSequences, TokenSequence
from agentgym.versions import VersionLog
from agentgym_trainer.alarm import FLOORS, DiscrepancyAlarm
from agentgym_trainer.batch import Row, build_micro_batches
from agentgym_trainer.correction import Correction
from agentgym_trainer.diagnosis import Diagnosis, Finding, Mismatch
from agentgym_trainer.learner import Learner, make_accelerator
from agentgym_trainer.loss import decoupled_loss
from agentgym_trainer.metrics import StepMetrics
from agentgym_trainer.publish import as_published, published_weights
from agentgym_trainer.settings import TrainConfig

GOOD, BAD = Mismatch(100, 1e-6, 1e-5, 1e-6), Mismatch(100, 0.1, 1.0, 0.12)
NOTHING = Mismatch(0, 0.0, 0.0, 0.0)
WHY = Diagnosis("bf16_head", "the output layer", BAD, (Finding("bf16_head", "the output layer", 0.97, 1e-3),))


def look(alarm: DiscrepancyAlarm, mismatch: Mismatch, asked: list[int] | None = None) -> dict[str, float]:
    def ask() -> Diagnosis:
        if asked is not None:
            asked.append(1)
        return WHY

    return alarm.look(mismatch, ask)


def test_agreement_is_said_once_and_asks_nothing(caplog: pytest.LogCaptureFixture) -> None:
    alarm, asked = DiscrepancyAlarm(1e-4, "warn"), []
    with caplog.at_level(logging.INFO):
        figures = [look(alarm, mismatch, asked) for mismatch in (NOTHING, GOOD, GOOD)]
    assert asked == []
    assert [record.getMessage() for record in caplog.records] == [
        "engine and trainer agree: mean |dlogp| 1e-06 over 100 tokens"
    ]
    assert figures[0] == {"engine_mismatch/num_tokens": 0, "engine_mismatch/above_floor": 0,
                          "engine_mismatch/num_alarms": 0}  # fmt: skip
    assert figures[1]["engine_mismatch/excess"] == 1e-6
    assert figures[1]["engine_mismatch/max_abs_log_ratio"] == 1e-5


def test_an_alarm_names_the_cause_and_then_grows_rarer(caplog: pytest.LogCaptureFixture) -> None:
    alarm = DiscrepancyAlarm(1e-4, "warn")
    spoken = []
    for step in range(100):
        figures = look(alarm, BAD)
        assert figures["engine_mismatch/above_floor"] == 1.0
        if "engine_mismatch/cause/bf16_head" in figures:
            assert figures["engine_mismatch/cause/bf16_head"] == 0.97
            spoken.append(step)
    assert spoken == [0, 10, 30, 70]
    assert figures["engine_mismatch/num_alarms"] == 4
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 4
    assert "likely cause: bf16_head" in warnings[0]
    assert "compute the output layer in float32" in warnings[0]
    look(alarm, GOOD)
    assert "engine_mismatch/cause/bf16_head" in look(alarm, BAD)  # a new alarm is not a repeated one


def test_what_the_settings_mean(caplog: pytest.LogCaptureFixture) -> None:
    asked: list[int] = []
    assert look(DiscrepancyAlarm(1e-4, "ignore"), BAD, asked)["engine_mismatch/above_floor"] == 1.0
    assert asked == []
    assert look(DiscrepancyAlarm(0.13, "stop"), BAD, asked)["engine_mismatch/above_floor"] == 0.0
    assert asked == []
    with pytest.raises(TrainingError, match=r"trainer\.discrepancy_floor 0\.0001\); likely cause: bf16_head"):
        look(DiscrepancyAlarm(1e-4, "stop"), BAD)
    with pytest.raises(TrainingError):
        look(DiscrepancyAlarm(1e-4, "stop"), Mismatch(3, float("nan"), float("nan"), float("nan")))
    assert caplog.records == []
    look(DiscrepancyAlarm(1e-4, "warn", loud=False), BAD)  # a rank that is not the one to say it
    assert caplog.records == []


def test_the_default_floor_is_of_the_loosest_dtype_that_computes() -> None:
    def floor(**overrides: object) -> float:
        values: dict = {"env": {"id": "maze"}}
        for key, value in overrides.items():
            section, _, name = key.partition("__")
            values.setdefault(section, {})[name] = value
        return DiscrepancyAlarm.of(TrainConfig.model_validate(values), loud=True).floor

    assert floor() == FLOORS["float32"] == 1e-4
    rounded = {"engine__dtype": "bfloat16", "trainer__publish_dtype": "bfloat16"}
    assert floor(**rounded) == floor(trainer__dtype="bfloat16") == FLOORS["bfloat16"]
    assert floor(trainer__publish_dtype="bfloat16") == 1e-4  # rounded values, computed in fp32 on both sides
    assert floor(trainer__discrepancy_floor=0.3) == 0.3


def test_resets_at_every_step_are_said_to_be_no_staleness(caplog: pytest.LogCaptureFixture) -> None:
    alarm = DiscrepancyAlarm(1e-4, "warn")
    for count in (1.0, 2.0, 2.0, 3.0, 4.0):
        alarm.look_at_resets(count)
    assert caplog.records == []
    alarm.look_at_resets(5.0)
    assert "reset at 3 steps in a row" in caplog.records[0].getMessage()
    alarm.look_at_resets(6.0)
    assert len(caplog.records) == 1


# ---------------------------------------------------------------------------------------------- what it looks at


def metrics_of(rows: Sequence[Row], policy_off: float, proximal_off: float, version: int) -> StepMetrics:
    metrics = StepMetrics()
    for batch in build_micro_batches(rows, max_tokens=1000):
        behavior = batch.behavior_logprobs
        _, terms = decoupled_loss(
            behavior + policy_off, behavior + proximal_off, behavior, batch.advantages, batch.loss_mask,
            correction=Correction("none"), denominator=1.0,
        )  # fmt: skip
        metrics.add(terms, batch, trainer_version=version)
    return metrics


def test_tokens_of_no_lag_and_else_exact_old_logprobs(make_rows: Callable[..., list[Row]]) -> None:
    rows = make_rows([30, 20], newest_version=4, span=2)
    fresh = sum(v == 4 for row in rows for v in row.sequence.policy_versions)
    found = metrics_of(rows, 0.2, 0.01, 4).engine_mismatch(exact=True)
    assert found.num_tokens == fresh > 0
    assert found.mean_abs == pytest.approx(0.2, rel=1e-5)
    assert found.max_abs == pytest.approx(0.2, rel=1e-5)
    assert found.excess == pytest.approx(np.expm1(0.2), rel=1e-5)
    lagging = metrics_of(rows, 0.2, 0.01, 5)  # nothing of version 5 has come yet
    assert lagging.engine_mismatch(exact=False) == NOTHING
    found = lagging.engine_mismatch(exact=True)
    assert found.num_tokens == sum(row.sequence.num_loss_tokens for row in rows)
    assert found.mean_abs == pytest.approx(0.01, rel=1e-4)


# --------------------------------------------------------------------------------------------- in a real learner


def config_of(tmp_path: Path, **trainer: object) -> TrainConfig:
    return TrainConfig.model_validate(
        {
            "env": {"id": "maze"},
            "run": {"dir": tmp_path},
            "rollout": {"groups_per_step": 2},
            "trainer": {"learning_rate": 0.05, "steps": 4, "advantages": "batch_mean", **trainer},
        }
    )


def trajectories_of(rows: Sequence[TokenSequence]) -> list[ScoredSequences]:
    return [
        ScoredSequences(
            f"t{index}", f"g{index // 2}", "maze", EpisodeStatus.TERMINATED, float(index % 2), True, {}, (row,),
            row.num_loss_tokens,
        )
        for index, row in enumerate(rows)
    ]  # fmt: skip


@pytest.fixture
def played(make_model: Callable[..., LlamaForCausalLM]) -> Callable[..., list[TokenSequence]]:
    def play(model: LlamaForCausalLM, version: int = 0) -> list[TokenSequence]:
        engine = FaultyEngine(lambda t: (model, version))
        return [engine.play([3, 4, 5 + index], 20) for index in range(4)]

    return play


def row_of_version(row: TokenSequence, version: int) -> TokenSequence:
    labels = tuple(version if mask else -1 for mask in row.loss_mask)
    return dataclasses.replace(row, policy_versions=labels, kv_versions=labels)


def test_a_run_is_stopped_before_its_first_optimizer_step(make_model, played, tmp_path) -> None:
    model = make_model(0)
    rounded = copy.deepcopy(model)
    with as_published(rounded, "bfloat16"):
        rows = played(rounded)
    log = VersionLog(tmp_path / "versions")
    log.append(published_weights(model))
    config = config_of(tmp_path, on_discrepancy="stop")
    learner = Learner(make_accelerator(config), model, config, log)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(TrainingError, match=r"likely cause: bf16_weights .*on_discrepancy = 'warn' goes on"):
        learner.learn(trajectories_of(rows), 0)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_run_that_goes_on_counts_what_it_saw(make_model, played, tmp_path, caplog) -> None:
    model = make_model(0)
    log = VersionLog(tmp_path / "versions")
    log.append(published_weights(model))
    config = config_of(tmp_path)
    learner = Learner(make_accelerator(config), model, config, log)
    figures = learner.learn(trajectories_of(played(copy.deepcopy(model))), 0)
    assert figures["engine_mismatch/num_tokens"] == 80
    assert figures["engine_mismatch/excess"] < 1e-5
    assert figures["engine_mismatch/above_floor"] == 0.0
    log.hold("service", [0])
    log.append(published_weights(model))
    rows = [row_of_version(row, 1) for row in played(make_model(0))]
    figures = learner.learn(trajectories_of(rows), 1)  # the engine missed the publication, and says it has it
    assert figures["engine_mismatch/above_floor"] == 1.0
    assert figures["engine_mismatch/cause/wrong_version"] > 0.99
    assert "it computes with version 0, not with version 1" in caplog.text
