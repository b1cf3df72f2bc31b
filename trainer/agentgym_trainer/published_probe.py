"""What the trainer computes for a few tokens with the weights that it publishes, for engines to be compared with. Must
never know how they compare.

Law: the forward is that of the published weights, on rank 0 alone, and leaves the model as it was.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from agentgym.server.wire import Probe
from agentgym.trajectory import ScoredSequences
from agentgym_trainer.batch import MicroBatch
from agentgym_trainer.logprobs import token_logprobs
from agentgym_trainer.publish import as_published
from agentgym_trainer.settings import TrainConfig

# The largest difference of a probe of 64 tokens, measured. Both sides in fp32: 1e-4 at most
# (benchmarks/logprob_conformance). A forward wholly in bfloat16 against fp32, SmolLM2-135M on 80 passages of this
# repository's pages: 0.18 at the median, 0.28 in one of ten, 0.69 at most (0.70 on random tokens; the tiny model 0.09
# and 0.28). Weights that are off by 3 % each show 1.7 at the median; those of a step before show less than bfloat16
# does, and are told by r_d alone.
_TOLERANCE = {"float32": 1e-3, "bfloat16": 1.0}


def published_probe(
    module: torch.nn.Module, trajectories: Sequence[ScoredSequences], config: TrainConfig
) -> Probe | None:
    """The first tokens of the batch's first row under `module` as it is published; None where probes are turned off.
    One token fewer than a row may have at most: an engine that scores a prompt samples one behind it."""
    length = min(config.trainer.probe_tokens, config.max_context - 1)
    rows = [sequence for trajectory in trajectories for sequence in trajectory.sequences if len(sequence) > 1]
    if not length or not rows:
        return None
    token_ids = rows[0].token_ids[:length]
    device = next(module.parameters()).device
    training = module.training
    module.eval()
    try:
        with torch.no_grad(), as_published(module, config.trainer.publish_dtype):
            logprobs = token_logprobs(module, _whole_row(token_ids).to(device)).logprobs[0, 1:]
    finally:
        module.train(training)
    coarsest = "bfloat16" if "bfloat16" in (config.trainer.dtype, config.engine.dtype) else "float32"
    tolerance = config.trainer.probe_tolerance or _TOLERANCE[coarsest]
    return Probe(tuple(token_ids), tuple(logprobs.tolist()), tolerance)


def _whole_row(token_ids: Sequence[int]) -> MicroBatch:
    """One row [1, T] whose every token but the first is scored."""
    ids = torch.tensor([list(token_ids)])
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[0, 0] = False
    blank = torch.zeros(ids.shape)
    versions = torch.full_like(ids, -1)
    first = torch.zeros(1, dtype=torch.int64)
    return MicroBatch(
        token_ids=ids, lengths=torch.tensor([ids.shape[1]]), loss_mask=mask, behavior_logprobs=blank,
        policy_versions=versions, kv_versions=versions, advantages=blank, row_ids=first,
    )  # fmt: skip
