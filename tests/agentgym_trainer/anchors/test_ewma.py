"""Law D: the exponentially weighted anchor, and mutants of its recurrence that must not pass."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from transformers import LlamaForCausalLM

from agentgym.errors import CheckpointError, TrainingError
from agentgym_trainer.anchors import ewma as ewma_module
from agentgym_trainer.anchors.ewma import EwmaAnchor, average_in, decay_of
from agentgym_trainer.batch import Row, build_micro_batches
from agentgym_trainer.logprobs import token_logprobs

MakeModel = Callable[..., LlamaForCausalLM]
MakeRows = Callable[..., list[Row]]
Averager = Callable[[Tensor, Tensor, float, float], None]


def recurrence(thetas: list[Tensor], betas: list[float], averager: Averager) -> Tensor:
    average, weight = thetas[0].clone(), 1.0
    for theta, beta in zip(thetas[1:], betas):
        averager(average, theta, weight, beta)
        weight = beta * weight + 1.0
    return average


def closed_form(thetas: list[Tensor], betas: list[float]) -> Tensor:
    """sum_k (product of the later betas) theta(k), over the same sum of ones."""
    weights = [math.prod(betas[k:]) for k in range(len(thetas))]
    return sum((w * theta for w, theta in zip(weights, thetas)), torch.zeros_like(thetas[0])) / sum(weights)


def check_law_d(averager: Averager) -> None:
    generator = torch.Generator().manual_seed(0)
    thetas = [torch.randn(5, generator=generator, dtype=torch.float64) for _ in range(9)]
    for betas in ([2 / 3] * 8, [0.1, 0.9, 0.5, 0.5, 0.0, 0.3, 0.8, 0.6]):
        torch.testing.assert_close(recurrence(thetas, betas, averager), closed_form(thetas, betas), atol=1e-14, rtol=0)
    # Linear drift: W/2 versions behind, once the start is forgotten.
    for window in (1.0, 4.0, 8.0):
        beta = window / (window + 2)
        line = [torch.tensor([3.0 * t + 1.0], dtype=torch.float64) for t in range(400)]
        behind = line[-1] - recurrence(line, [beta] * 399, averager)
        torch.testing.assert_close(behind, torch.tensor([3.0 * window / 2]).double(), atol=1e-9, rtol=0)


def test_the_recurrence_is_the_closed_form() -> None:
    check_law_d(average_in)


def _without_bias_correction(average: Tensor, current: Tensor, weight: float, beta: float) -> None:
    average.mul_(beta).add_(current, alpha=1 - beta)


def _with_the_new_weight(average: Tensor, current: Tensor, weight: float, beta: float) -> None:
    average_in(average, current, beta * weight + 1.0, beta)


@pytest.mark.parametrize("mutant", [_without_bias_correction, _with_the_new_weight])
def test_mutants_of_the_recurrence_are_refused(mutant: Averager) -> None:
    with pytest.raises(AssertionError):
        check_law_d(mutant)


@given(st.lists(st.floats(-10, 10), min_size=2, max_size=6), st.floats(0, 0.99))
def test_an_average_stays_within_what_it_averages(values: list[float], beta: float) -> None:
    thetas = [torch.tensor([value], dtype=torch.float64) for value in values]
    average = recurrence(thetas, [beta] * (len(values) - 1), average_in).item()
    assert min(values) - 1e-9 <= average <= max(values) + 1e-9


def test_shards_average_as_the_whole_does() -> None:
    generator = torch.Generator().manual_seed(0)
    thetas = [torch.randn(12, generator=generator) for _ in range(5)]
    whole = recurrence(thetas, [0.6] * 4, average_in)
    shards = [
        recurrence([theta[part].clone() for theta in thetas], [0.6] * 4, average_in)
        for part in (slice(5), slice(5, 12))
    ]
    assert torch.equal(torch.cat(shards), whole)


def one_rank_of_two(rank: int, folder: Path) -> None:
    """In a process of its own; leaves what it found in `folder`."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    torch.manual_seed(0)
    whole, sharded = nn.Linear(6, 5), nn.Linear(6, 5)
    for name, value in list(whole.named_parameters()):
        setattr(sharded, name, nn.Parameter(distribute_tensor(value.detach().clone(), mesh, [Shard(0)])))
    one, many = (EwmaAnchor(model, 1.0, max_staleness=4) for model in (whole, sharded))
    for version in range(1, 5):
        with torch.no_grad():
            for value, part in zip(whole.parameters(), sharded.parameters()):
                change = torch.randn(value.shape)
                value += change
                part += distribute_tensor(change, mesh, [Shard(0)])
        for anchor in (one, many):
            anchor.published(version, active_fraction=0.5 if version == 2 else 1.0, mean_lag=0.5 * version)
    parts = {name: average for name, average in many.weights.items() if isinstance(average, DTensor)}
    is_a_part = len(parts) == 2 and parts["weight"].to_local().shape[0] < 5
    has_a_history = not torch.equal(one.weights["weight"], whole.weight)
    same = [torch.equal(average, parts[name].full_tensor()) for name, average in one.weights.items()]
    (folder / f"{rank}").write_text(json.dumps([is_a_part and has_a_history, *same]))
    dist.destroy_process_group()


def test_two_processes_that_hold_a_shard_each_average_as_one_that_holds_the_whole(tmp_path: Path) -> None:
    """Real shards, through the anchor: its own copy, its own updates, a reset among them; bitwise."""
    ranks = [subprocess.Popen([sys.executable, __file__, str(rank), str(tmp_path)]) for rank in range(2)]
    try:
        assert [rank.wait(280) for rank in ranks] == [0, 0]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    assert [json.loads((tmp_path / f"{rank}").read_text()) for rank in range(2)] == [[True] * 3] * 2


@pytest.mark.parametrize(
    ("mean_lag", "max_staleness", "beta"),
    [(0.0, 4, 0.0), (1.0, 4, 0.5), (2.0, 4, 2 / 3), (9.0, 4, 2 / 3), (0.5, 0, 0.0), (4.0, 8, 0.8)],
)
def test_the_decay_follows_the_mean_lag_up_to_its_bound(mean_lag: float, max_staleness: int, beta: float) -> None:
    assert decay_of(mean_lag, max_staleness) == pytest.approx(beta)


# ------------------------------------------------------------------------------------------------ the anchor itself


class Small(nn.Module):
    """One parameter and one buffer."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3, dtype=dtype))
        self.register_buffer("seen", torch.zeros(1))

    @torch.no_grad()
    def become(self, value: float) -> Small:
        self.weight.fill_(value)
        self.seen.fill_(value)
        return self


def publish(anchor: EwmaAnchor, model: Small, values: list[float], *, active_fraction: float = 1.0) -> None:
    for version, value in enumerate(values, start=1):
        model.become(value)
        anchor.published(version, active_fraction=active_fraction, mean_lag=2.0)


def test_mean_age_goes_to_half_the_window() -> None:
    model = Small().become(0.0)
    anchor = EwmaAnchor(model, 1.0, max_staleness=4)
    publish(anchor, model, [1.0])
    assert anchor.metrics()["anchor/ewma_age"] == pytest.approx(0.4)  # ages 0 and 1 with weights 1 and 2/3
    publish(anchor, model, [2.0] * 200)
    assert anchor.metrics()["anchor/ewma_age"] == pytest.approx(2.0)


def test_a_reset_erases_history_and_is_counted() -> None:
    model = Small().become(5.0)
    anchor = EwmaAnchor(model, 1.0, max_staleness=4)
    publish(anchor, model, [7.0, 9.0])
    assert anchor.weights["weight"][0] != 9.0
    publish(anchor, model, [0.1], active_fraction=0.899)
    assert torch.equal(anchor.weights["weight"], model.weight)
    assert anchor.metrics() == {"anchor/ewma_age": 0.0, "anchor/ewma_beta": 0.0, "anchor/ewma_resets": 1.0}
    publish(anchor, model, [0.2], active_fraction=0.9)  # on the bound: no reset, and nothing from before the last one
    assert anchor.metrics()["anchor/ewma_resets"] == 1.0
    assert anchor.weights["weight"][0].item() == pytest.approx((0.2 + 0.1 * 2 / 3) / (1 + 2 / 3))


def test_beta_zero_is_the_current_weights_bitwise(make_model: MakeModel, make_rows: MakeRows) -> None:
    model = make_model(0)
    anchor = EwmaAnchor(model, 1.0, max_staleness=4)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(-1.37)
    anchor.published(1, active_fraction=1.0, mean_lag=0.0)
    for name, parameter in model.named_parameters():
        assert torch.equal(anchor.weights[name], parameter)
    batches = build_micro_batches(make_rows([9, 14, 5]), max_tokens=64)
    for batch, proximal in zip(batches, anchor.proximal(batches, trainer_version=4, reuse_policy=True)):
        assert proximal.from_policy is None
        assert torch.equal(proximal.logprobs, token_logprobs(model, batch).logprobs)
        assert not proximal.logprobs.requires_grad


def test_buffers_are_copied_and_the_average_is_kept_in_fp32() -> None:
    model = Small(torch.bfloat16).become(1.0)
    anchor = EwmaAnchor(model, 1.0, max_staleness=4)
    publish(anchor, model, [1.0078125] * 3)  # the next bf16 number: a bf16 average could not move between them
    average = anchor.weights["weight"]
    assert average.dtype == torch.float32
    assert 1.0 < average[0].item() < 1.0078125
    assert anchor.state_dict()["average"]["seen"].item() == pytest.approx(1.0078125)


def test_the_trainers_weights_are_not_touched() -> None:
    model = Small().become(1.0)
    anchor = EwmaAnchor(model, 1.0, max_staleness=4)
    publish(anchor, model, [2.0, 3.0])
    assert model.weight.tolist() == [3.0] * 3
    assert model.weight.requires_grad


def test_resume_is_bitwise() -> None:
    values = [0.3, -1.7, 2.2, 0.9, 5.1, -0.4]
    model = Small().become(1.1)
    whole = EwmaAnchor(model, 1.0, max_staleness=4)
    publish(whole, model, values)
    model = Small().become(1.1)
    first = EwmaAnchor(model, 1.0, max_staleness=4)
    publish(first, model, values[:3])
    state = first.state_dict()
    publish(first, model, [99.0])  # what was saved does not follow
    second = EwmaAnchor(Small().become(values[2]), 1.0, max_staleness=4)
    second.load_state_dict(state)
    model = second._model
    assert isinstance(model, Small)
    publish(second, model, values[3:])
    assert torch.equal(second.weights["weight"], whole.weights["weight"])
    assert second.metrics() == whole.metrics()


def test_a_state_of_another_model_is_refused_and_changes_nothing(make_model: MakeModel) -> None:
    """Other names, other shapes, and tensors that fit while the model computes something else with them."""
    anchor = EwmaAnchor(make_model(), 1.0, max_staleness=4)
    before = anchor.state_dict()
    turned = make_model(1)
    turned.config.rope_parameters = {**turned.config.rope_parameters, "rope_theta": 77.0}
    wider = LlamaForCausalLM(type(turned.config)(**{**make_model().config.to_dict(), "intermediate_size": 40}))
    missing = {**before, "average": {k: v for k, v in before["average"].items() if k != "lm_head.weight"}}
    transposed = {**before, "average": {**before["average"], "lm_head.weight": before["average"]["lm_head.weight"].T}}
    for state, message in [
        (
            EwmaAnchor(turned, 1.0, max_staleness=4).state_dict(),
            "rope_parameters is .*77.0.* in it and .* here;",
        ),
        (EwmaAnchor(wider, 1.0, max_staleness=4).state_dict(), "intermediate_size is 40 in it and 24 here"),
        (missing, "'lm_head.weight' is only here"),
        (transposed, r"'lm_head.weight' is \[16, 23\] in it and \[23, 16\] here"),
        (EwmaAnchor(Small(), 1.0, max_staleness=4).state_dict(), "is only here"),
        ({}, "no state of an ewma anchor: 'age' is missing"),
    ]:
        with pytest.raises(CheckpointError, match=message):
            anchor.load_state_dict(state)
        after = anchor.state_dict()
        assert all(torch.equal(after["average"][name], tensor) for name, tensor in before["average"].items())
        assert {k: v for k, v in after.items() if k != "average"} == {k: v for k, v in before.items() if k != "average"}


def test_a_state_of_this_model_is_taken_from_another_release_of_the_library(make_model: MakeModel) -> None:
    model = make_model()
    state = EwmaAnchor(model, 1.0, max_staleness=4).state_dict()
    said = json.loads(state["model"])
    said |= {"a_key_of_another_release": 1}
    del said["rms_norm_eps"]
    EwmaAnchor(model, 1.0, max_staleness=4).load_state_dict({**state, "model": json.dumps(said)})


def test_broken_weights_are_an_error(make_model: MakeModel, make_rows: MakeRows) -> None:
    model = make_model()
    anchor = EwmaAnchor(model, 1.0, max_staleness=4)
    with torch.no_grad():
        model.lm_head.weight[0, 0] = math.nan
    anchor.published(1, active_fraction=1.0, mean_lag=1.0)
    with pytest.raises(TrainingError, match="anchor ewma scored a non-finite logprob"):
        anchor.proximal(build_micro_batches(make_rows([9]), max_tokens=64), trainer_version=4, reuse_policy=True)


def test_mutant_that_keeps_old_buffers_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ewma_module, "average_in", lambda average, current, weight, beta: None)
    with pytest.raises(AssertionError):
        test_a_reset_erases_history_and_is_counted()


if __name__ == "__main__":
    one_rank_of_two(int(sys.argv[1]), Path(sys.argv[2]))
