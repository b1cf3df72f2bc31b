"""One rank of the world-size law: computes a step's gradients as the learner does and saves them from rank 0.

Run as `torchrun --standalone --nproc_per_node N gradient_worker.py OUT.pt MICRO_BATCH_TOKENS`.
"""

import os
import sys
from pathlib import Path

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from agentgym.trajectory import EpisodeStatus, ScoredSequences, TokenSequence
from agentgym_trainer.exchange import BatchExchange
from agentgym_trainer.learner import Learner, make_accelerator
from agentgym_trainer.publish import published_weights
from agentgym_trainer.settings import TrainConfig

VERSION = 3


class Versions:
    """Published weights of versions 1..3: the trainer's own, drifted."""

    def __init__(self, model):
        self.weights = published_weights(model)

    def read(self, version):
        rng = np.random.default_rng(version)
        drift = 0.0 if version == VERSION else 0.02
        return {n: w + drift * rng.standard_normal(w.shape).astype(np.float32) for n, w in self.weights.items()}


def small_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=23,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=64,
        )
    )


def ragged_trajectories() -> list[ScoredSequences]:
    """Three groups, eleven trajectories (an odd number, so that one rank is short of a row), mixed versions."""
    rng = np.random.default_rng(5)
    result = []
    for index in range(11):
        length = int(rng.integers(4, 30))
        mask = tuple(bool(x) for x in (np.arange(length) > 1) & (rng.random(length) < 0.6))
        row = TokenSequence(
            tuple(int(x) for x in rng.integers(0, 23, length)),
            mask,
            tuple(float(-rng.random() * 3 - 1) if m else 0.0 for m in mask),
            tuple(int(rng.integers(1, VERSION + 1)) if m else -1 for m in mask),
            tuple(VERSION if m else -1 for m in mask),
        )
        score = float(rng.random())
        result.append(
            ScoredSequences(
                f"t{index}", f"g{index % 3}", "e", EpisodeStatus.TERMINATED, score, True, {}, (row,), sum(mask)
            )
        )
    return result


CASES = {
    "snapshot": {
        "trainer": {"anchor": "snapshot"},
        "loss": {"entropy_coefficient": 0.01, "reference_coefficient": 0.2},
    },
    "behavior": {"trainer": {"anchor": "behavior"}, "loss": {"entropy_coefficient": 0.01}},
    "gspo": {"trainer": {"anchor": "snapshot"}, "loss": {"objective": "gspo", "correction": "token_truncate"}},
    "m2po": {"trainer": {"anchor": "behavior"}, "loss": {"objective": "m2po", "m2po_max_second_moment": 0.9}},
}


def gradients(case: str, micro_batch_tokens: int) -> dict[str, torch.Tensor]:
    values = {"env": {"id": "maze"}, **CASES[case]}
    values["trainer"] = {**values["trainer"], "micro_batch_tokens": micro_batch_tokens}
    config = TrainConfig.model_validate(values)
    accelerator = make_accelerator(config)
    exchange = BatchExchange(accelerator)
    trajectories = exchange.share(f"batch/{case}", ragged_trajectories() if accelerator.is_main_process else None)
    model = small_model()
    learner = Learner(accelerator, model, config, Versions(model))
    with torch.no_grad():  # away from the reference, which is of the initial weights
        for parameter in learner.module.parameters():
            parameter.mul_(1.1)
    rows = learner.rows_of(trajectories)
    batches = learner.micro_batches_of(rows)
    proximal = learner.anchor.proximal(batches, trainer_version=VERSION, reuse_policy=True)
    metrics = learner.accumulate(rows, batches, proximal, VERSION)
    figures = learner.over_ranks(metrics).finalise()
    found = {f"{case}/{name}": p.grad.clone() for name, p in learner.module.named_parameters()}  # pyright: ignore[reportOptionalMemberAccess]
    names = ("num_tokens", "loss", "active_fraction", "reference_k3")
    found[f"{case}/figures"] = torch.tensor([figures[f"policy/{name}"] for name in names] + [figures["total/k3"]])
    found["num_ranks"] = torch.tensor(accelerator.num_processes)
    return found


if __name__ == "__main__":
    everything: dict[str, torch.Tensor] = {}
    for name in CASES:
        everything |= gradients(name, int(sys.argv[2]))
    if int(os.environ.get("RANK", "0")) == 0:
        torch.save(everything, Path(sys.argv[1]))
