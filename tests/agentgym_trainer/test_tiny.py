"""The tiny model's warm start: loss where it belongs, falling, and the same for the same seed."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

from agentgym.errors import TrainingError
from agentgym.trajectory import TokenSequence
from agentgym_trainer.tiny import Recipe, build_model, warm_start

SMALL = replace(Recipe(), steps=30, batch=8, warmup_steps=3)
VOCABULARY, PAD, END = 12, 10, 11


def sequence(ids: list[int], mask: list[bool]) -> TokenSequence:
    zeros, none = (0.0,) * len(ids), (-1,) * len(ids)
    return TokenSequence(tuple(ids), tuple(mask), zeros, none, none)


def copying(count: int, seed: int = 0) -> list[TokenSequence]:
    """Rows `a b c | a END`: what follows can be known, what stands before is chance."""
    chance = random.Random(seed)
    rows = []
    for _ in range(count):
        prompt = [chance.randrange(8) for _ in range(chance.randrange(2, 6))]
        rows.append(sequence([*prompt, 9, prompt[0], END], [False] * (len(prompt) + 1) + [True, True]))
    return rows


def fresh(seed: int = 0):
    return build_model(SMALL, VOCABULARY, PAD, END, seed)


def test_loss_falls() -> None:
    result = warm_start(fresh(), copying(200), replace(SMALL, steps=60), 0, lambda text: None)

    assert result.last_loss < 0.7 * result.first_loss
    assert result.steps == 60
    assert result.parameters == sum(parameter.numel() for parameter in fresh().parameters())


def test_same_seed_gives_the_same_weights_whatever_the_global_generator_did() -> None:
    models = []
    for noise in (1, 2):
        torch.manual_seed(noise)
        model = fresh(seed=5)
        warm_start(model, copying(50), replace(SMALL, steps=5), 5, lambda text: None)
        models.append(model.state_dict())

    assert all(torch.equal(models[0][name], models[1][name]) for name in models[0])
    other = fresh(seed=6).state_dict()
    assert not torch.equal(other["model.embed_tokens.weight"], fresh(seed=5).state_dict()["model.embed_tokens.weight"])


def test_building_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    fresh(seed=9)

    assert torch.equal(torch.rand(2), expected)


def test_first_loss_is_that_of_the_assistants_tokens_alone() -> None:
    rows = copying(8)
    model = fresh()
    with torch.no_grad():
        sums = [0.0, 0]
        for row in rows:
            logprobs = model(input_ids=torch.tensor([row.token_ids])).logits[0].log_softmax(-1)
            for t in range(1, len(row)):
                if row.loss_mask[t]:
                    sums[0] -= float(logprobs[t - 1, row.token_ids[t]])
                    sums[1] += 1

    result = warm_start(model, rows, replace(SMALL, steps=1), 0, lambda text: None)

    assert result.first_loss == pytest.approx(sums[0] / sums[1], rel=1e-5)


def test_full_recipe_has_about_as_many_parameters_as_it_says() -> None:
    model = build_model(Recipe(), 29, 20, 21, 0)

    assert sum(parameter.numel() for parameter in model.parameters()) == 103_552
    assert (model.config.pad_token_id, model.config.eos_token_id) == (20, 21)


def test_nothing_to_learn_from_is_refused() -> None:
    with pytest.raises(TrainingError, match="no token of an assistant"):
        warm_start(fresh(), [sequence([1, 2, 3], [False] * 3)], SMALL, 0, lambda text: None)
