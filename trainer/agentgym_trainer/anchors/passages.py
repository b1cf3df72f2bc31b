"""Passages through a model: what of several rows was sampled under one version, scored in micro-batches. Must never
know where the rows come from or whose weights the model has."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from agentgym.trajectory import NO_VERSION
from agentgym_trainer.anchors.followed import Passage
from agentgym_trainer.anchors.protocol import require_finite
from agentgym_trainer.anchors.records import OldLogprobs, digests
from agentgym_trainer.batch import MicroBatch, RowKey, plan_cuts

Score = Callable[[MicroBatch], Tensor]


def score_passages(
    passages: Sequence[Passage], score: Score, *, max_tokens: int, device: torch.device | str, anchor: str
) -> tuple[list[OldLogprobs], int]:
    """Records of passages of one version, and the size of the forwards; micro-batches are cut as the learner's are.
    Raises TrainingError for a logprob that is not finite."""
    ordered = sorted(passages, key=lambda passage: -passage.num_tokens)
    records: list[OldLogprobs] = []
    num_tokens = 0
    for start, stop in pairwise(plan_cuts([passage.num_tokens for passage in ordered], max_tokens)):
        part = ordered[start:stop]
        batch = to_micro_batch(part).to(device)
        scored = require_finite(score(batch), anchor, f"the weights of version {part[0].version}").cpu().numpy()
        num_tokens += batch.num_tokens
        for passage, line in zip(part, scored):
            contexts = digests(passage.token_ids, [stop for _, stop in passage.ranges])
            records += [
                OldLogprobs(
                    passage.trajectory_id, passage.row, first, last, passage.version, line[first:last].copy(), context
                )
                for (first, last), context in zip(passage.ranges, contexts)
            ]
    return records, num_tokens


def to_micro_batch(passages: Sequence[Passage]) -> MicroBatch:
    """The passages as rows, with loss on the tokens to be scored."""
    shape = len(passages), max(passage.num_tokens for passage in passages)
    token_ids = torch.zeros(shape, dtype=torch.int64)
    mask = torch.zeros(shape, dtype=torch.bool)
    for line, wanted, passage in zip(token_ids, mask, passages):
        line[: passage.num_tokens] = torch.tensor(passage.token_ids)
        for start, stop in passage.ranges:
            wanted[start:stop] = True
    versions = torch.where(mask, torch.tensor([[passage.version] for passage in passages]), NO_VERSION)
    nothing = torch.zeros(shape)
    return MicroBatch(
        token_ids=token_ids,
        lengths=torch.tensor([passage.num_tokens for passage in passages]),
        loss_mask=mask,
        behavior_logprobs=nothing,
        policy_versions=versions,
        kv_versions=versions,
        advantages=nothing,
        row_ids=torch.arange(len(passages)),
        keys=tuple(RowKey(passage.trajectory_id, passage.row) for passage in passages),
    )
