"""One rank of the world-size law: computes a step's gradient as the learner does and saves it from rank 0.

Run as `accelerate launch --cpu --num_processes N gradient_worker.py OUT.pt ANCHOR`.
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


def gradient(anchor: str, micro_batch_tokens: int) -> dict[str, torch.Tensor]:
    config = TrainConfig.model_validate(
        {
            "env": {"id": "maze"},
            "trainer": {"anchor": anchor, "micro_batch_tokens": micro_batch_tokens},
            "loss": {"entropy_coefficient": 0.01},
        }
    )
    accelerator = make_accelerator(config)
    exchange = BatchExchange(accelerator)
    trajectories = exchange.share("batch", ragged_trajectories() if accelerator.is_main_process else None)
    model = small_model()
    learner = Learner(accelerator, model, config, Versions(model))
    rows = learner.rows_of(trajectories)
    batches = learner.micro_batches_of(rows)
    proximal = learner.anchor.proximal(batches, trainer_version=VERSION, reuse_policy=True)
    metrics = learner.accumulate(rows, batches, proximal, VERSION)
    figures = learner.over_ranks(metrics).finalise()
    gradients = {name: p.grad.clone() for name, p in learner.module.named_parameters()}
    gradients["figures"] = torch.tensor([figures["policy/num_tokens"], figures["policy/loss"], figures["total/k3"]])
    return gradients


if __name__ == "__main__":
    found = gradient(sys.argv[2], int(sys.argv[3]))
    if int(os.environ.get("RANK", "0")) == 0:
        torch.save(found, Path(sys.argv[1]))
