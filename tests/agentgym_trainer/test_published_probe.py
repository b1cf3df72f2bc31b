"""What engines are compared with is the forward of what was published, and computing it changes nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from gradient_worker import ragged_trajectories
from transformers import LlamaForCausalLM

from agentgym.config import parse_config
from agentgym_trainer.publish import published_weights
from agentgym_trainer.published_probe import published_probe
from agentgym_trainer.settings import TrainConfig

ROUNDED: dict[str, Any] = {"engine": {"dtype": "bfloat16"}, "publish_dtype": "bfloat16"}


def config(engine: Mapping[str, Any] | None = None, **trainer: Any) -> TrainConfig:
    return parse_config(TrainConfig, {"env": {"id": "maze"}, "trainer": trainer, "engine": engine or {}})


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_probe_is_the_forward_of_the_published_weights(
    make_model: Callable[..., LlamaForCausalLM], dtype: str
) -> None:
    model, trajectories = make_model().train(), ragged_trajectories()
    masters = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    probe = published_probe(model, trajectories, config(probe_tokens=5, publish_dtype=dtype))
    assert probe is not None
    row = next(row for trajectory in trajectories for row in trajectory.sequences if len(row) > 1)
    assert probe.token_ids == tuple(row.token_ids[:5])
    served = make_model()
    for name, array in published_weights(model, dtype).items():
        values = array if dtype == "float32" else array.view("<u2").astype(np.uint32) << 16
        tensor = torch.from_numpy(values if dtype == "float32" else values.view(np.float32))
        served.state_dict(keep_vars=True)[name].data.copy_(tensor.reshape(array.shape))
    with torch.no_grad():
        logprobs = served(torch.tensor([list(probe.token_ids)])).logits[0, :-1].log_softmax(-1)
    wanted = logprobs.gather(1, torch.tensor(probe.token_ids[1:])[:, None])[:, 0]
    assert torch.allclose(torch.tensor(probe.logprobs), wanted, atol=1e-6)
    assert model.training
    assert all(torch.equal(parameter, masters[name]) for name, parameter in model.named_parameters())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_tolerance_is_the_coarser_sides_unless_it_is_set(
    make_model: Callable[..., LlamaForCausalLM],
) -> None:
    model, trajectories = make_model(), ragged_trajectories()

    def tolerance(**settings: Any) -> float:
        probe = published_probe(model, trajectories, config(**settings))
        assert probe is not None
        return probe.tolerance

    assert tolerance() == 1e-3
    assert tolerance(dtype="bfloat16") == tolerance(**ROUNDED) == 1.0
    assert tolerance(dtype="bfloat16", probe_tolerance=0.1) == 0.1


def test_no_probe_where_none_is_wanted_or_nothing_was_sampled(make_model: Callable[..., LlamaForCausalLM]) -> None:
    assert published_probe(make_model(), ragged_trajectories(), config(probe_tokens=0)) is None
    assert published_probe(make_model(), [], config()) is None


def test_a_probe_leaves_room_for_the_token_that_an_engine_samples_behind_it(
    make_model: Callable[..., LlamaForCausalLM],
) -> None:
    row = ragged_trajectories()[0].sequences[0]
    values = {"env": {"id": "maze"}, "rollout": {"max_episode_tokens": len(row)}}
    probe = published_probe(make_model(), ragged_trajectories(), parse_config(TrainConfig, values))
    assert probe is not None
    assert probe.token_ids == row.token_ids[:-1]  # as many as the service takes
    assert len(probe.logprobs) == len(row) - 2


def test_a_run_with_an_adapter_starts_servers_that_take_it() -> None:
    values = {"env": {"id": "maze"}, "engine": {"kind": "vllm"}, "trainer": {"lora": {"rank": 12}}}
    assert parse_config(TrainConfig, values).service().engine.max_lora_rank == 12
    values["engine"]["max_lora_rank"] = 64
    assert parse_config(TrainConfig, values).service().engine.max_lora_rank == 64
    assert config(lora={"rank": 12}).service().engine.max_lora_rank is None
