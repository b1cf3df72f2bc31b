"""What a batch may hold: one model's trajectories, within the lag bound, with logprobs that are numbers; through the
learner, which leaves the weights alone where it refuses."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from gradient_worker import VERSION, Versions, ragged_trajectories, small_model

from agentgym.config import parse_config
from agentgym.errors import BadLogprobsError, InputError, MixedModelsError, TrainingError
from agentgym.server.models import model_id
from agentgym.trajectory import ScoredSequences
from agentgym_trainer.admission import admit
from agentgym_trainer.learner import Learner, make_accelerator
from agentgym_trainer.settings import TrainConfig

Change = Callable[[ScoredSequences], ScoredSequences]


def learner(model_id: str = "", **sections: dict[str, Any]) -> Learner:
    trainer = {"anchor": "resident", "learning_rate": 1e-2, "on_discrepancy": "ignore"} | sections.pop("trainer", {})
    config = parse_config(TrainConfig, {"env": {"id": "maze"}, "trainer": trainer, **sections})
    model = small_model()
    return Learner(make_accelerator(config), model, config, Versions(model), model_id)


def with_versions(trajectory: ScoredSequences, oldest: int) -> ScoredSequences:
    """Its oldest token is of that version; at least one is."""
    rows = []
    for row in trajectory.sequences:
        versions = tuple(max(v, oldest) if loss else v for v, loss in zip(row.policy_versions, row.loss_mask))
        first = row.loss_mask.index(True)
        rows.append(dataclasses.replace(row, policy_versions=(*versions[:first], oldest, *versions[first + 1 :])))
    return dataclasses.replace(trajectory, sequences=tuple(rows))


def with_broken_logprobs(trajectory: ScoredSequences, value: float, every: int) -> ScoredSequences:
    rows = []
    for row in trajectory.sequences:
        sampled = [t for t, loss in enumerate(row.loss_mask) if loss][::every]
        logprobs = tuple(value if t in sampled else p for t, p in enumerate(row.behavior_logprobs))
        rows.append(dataclasses.replace(row, behavior_logprobs=logprobs))
    return dataclasses.replace(trajectory, sequences=tuple(rows))


def refused(made: Learner, batch: list[ScoredSequences], error: type[Exception], message: str) -> None:
    before = {name: value.clone() for name, value in made.module.state_dict().items()}
    with pytest.raises(error, match=message):
        made.learn(batch, VERSION)
    assert all(torch.equal(before[name], value) for name, value in made.module.state_dict().items())


# -------------------------------------------------------------------------------------------------------------- lag


def test_what_is_older_than_the_bound_is_left_out_and_counted() -> None:
    batch = [with_versions(t, 1 if i in (2, 7) else 2) for i, t in enumerate(ragged_trajectories())]
    found = admit(batch, trainer_version=4, max_staleness=2)
    assert [t.trajectory_id for t in found.trajectories] == [
        t.trajectory_id for i, t in enumerate(batch) if i not in (2, 7)
    ]
    tokens = sum(batch[i].num_sampled_tokens for i in (2, 7))
    assert found.figures() == {"trajectory/num_stale": 2.0, "trajectory/num_stale_tokens": float(tokens)}
    assert admit(batch, trainer_version=3, max_staleness=2).num_stale == 0  # on the bound


def test_the_gradient_is_as_if_stale_trajectories_had_never_been_there() -> None:
    batch = [with_versions(t, 1 if i in (2, 7) else 2) for i, t in enumerate(ragged_trajectories())]
    both, alone = learner(rollout={"max_staleness": 1}), learner(rollout={"max_staleness": 1})
    figures = both.learn(batch, VERSION)
    alone.learn([t for i, t in enumerate(batch) if i not in (2, 7)], VERSION)
    assert figures["trajectory/num_stale"] == 2.0
    assert figures["trajectory/lag_max"] == 1.0
    for name, value in alone.module.state_dict().items():
        assert torch.equal(both.module.state_dict()[name], value)


def test_a_batch_of_stale_trajectories_alone_is_an_error_that_says_so() -> None:
    batch = [with_versions(t, 1) for t in ragged_trajectories()]
    made = learner(rollout={"max_staleness": 0})
    refused(made, batch, TrainingError, "none of the batch's 11 .* 11 were older than rollout.max_staleness allows")


# --------------------------------------------------------------------------------------------------------- logprobs


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_tokens_without_a_finite_logprob_are_dropped_and_counted_up_to_a_fraction(value: float) -> None:
    batch = ragged_trajectories()
    batch[3] = with_broken_logprobs(batch[3], value, every=5)
    broken = sum(not math.isfinite(p) for row in batch[3].sequences for p in row.behavior_logprobs)
    total = sum(t.num_sampled_tokens for t in batch)
    allowed = learner(loss={"max_dropped_fraction": broken / total})
    figures = allowed.learn(batch, VERSION)
    assert (figures["policy/num_dropped"], figures["policy/num_tokens"]) == (broken, total - broken)
    assert all(math.isfinite(value) for value in figures.values())
    assert all(bool(parameter.isfinite().all()) for parameter in allowed.module.parameters())
    strict = learner(loss={"max_dropped_fraction": 0.999 * broken / total})
    refused(strict, batch, BadLogprobsError, f"{broken} of {total} loss tokens .* engine's logprobs are broken")


def test_an_engine_that_gives_no_logprobs_at_all_is_an_error() -> None:
    batch = [with_broken_logprobs(t, math.nan, every=1) for t in ragged_trajectories()]
    refused(learner(loss={"max_dropped_fraction": 0.9}), batch, BadLogprobsError, "have no finite behavior logprob")


# ----------------------------------------------------------------------------------------------------------- models


def sampled_by(*models: str) -> list[ScoredSequences]:
    """The batch, trajectory i sampled by models[i % len]."""
    return [dataclasses.replace(t, model=models[i % len(models)]) for i, t in enumerate(ragged_trajectories())]


@pytest.mark.parametrize(
    ("own", "batch", "message"),
    [
        ("a", sampled_by("a", "b"), "mixes models: 6 of a, 5 of b trajectories"),
        ("", sampled_by("a", "b"), "mixes models"),
        ("a", sampled_by("a", ""), "mixes models: 6 of a, 5 of a model not named"),
        ("a", sampled_by("b"), "was sampled by model b and the one in training is a"),
    ],
)
def test_a_batch_of_several_models_or_of_another_is_refused(
    own: str, batch: list[ScoredSequences], message: str
) -> None:
    refused(learner(own), batch, MixedModelsError, message)


def test_a_batch_of_the_model_in_training_is_learned_from() -> None:
    for own, batch in (("a", sampled_by("a")), ("a", ragged_trajectories()), ("", sampled_by("a"))):
        assert learner(own).learn(batch, VERSION)["policy/num_tokens"] > 0


def test_a_models_id_is_of_what_it_computes_and_not_of_who_saved_it(tmp_path: Path) -> None:
    small_model().save_pretrained(tmp_path / "one")
    said = json.loads((tmp_path / "one/config.json").read_text())

    def saved(name: str, change: dict[str, Any]) -> str:
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(dict(reversed(list((said | change).items())))))
        return model_id(tmp_path / name)

    one = model_id(tmp_path / "one")
    assert saved("again", {"transformers_version": "0.0", "_name_or_path": "/elsewhere"}) == one
    assert saved("deeper", {"num_hidden_layers": 3}) != one
    assert saved("turned", {"rms_norm_eps": 1e-3}) != one
    with pytest.raises(InputError, match="holds no readable config"):
        model_id(tmp_path)


def test_a_sampled_token_without_a_version_is_an_error_and_not_called_stale() -> None:
    batch = ragged_trajectories()
    batch[4] = with_versions(batch[4], -1)
    refused(learner(), batch, InputError, f"trajectory {batch[4].trajectory_id}: a sampled token has no policy version")
