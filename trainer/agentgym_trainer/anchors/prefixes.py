"""What one version must forward: of each row that holds its tokens, the prefix up to the last of them. Must never know
a model.

Law: a causal model's logprob of a token needs the tokens before it and nothing else, so what comes behind a version's
last token is left out, and prefixes of similar length share a micro-batch, whichever they came from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from agentgym.trajectory import NO_VERSION
from agentgym_trainer.batch import MicroBatch, RowKey, plan_cuts


@dataclass(frozen=True, slots=True)
class Prefix:
    """The first `length` tokens of a row of a micro-batch.

    Example: row 3 of the second micro-batch, whose last token of the version is its tenth: `Prefix(1, 3, 10)`.
    """

    micro_batch: int
    row: int
    length: int


def plan_prefixes(masks: Sequence[Tensor], max_tokens: int) -> list[list[Prefix]]:
    """Prefixes up to the last True of each row of the masks [B, T], longest first, cut into micro-batches of at most
    `max_tokens` padded tokens as the learner's are."""
    found = []
    for number, mask in enumerate(masks):
        places = torch.arange(1, mask.shape[1] + 1, device=mask.device)
        lengths = (mask * places).amax(-1).tolist()
        found += [Prefix(number, row, length) for row, length in enumerate(lengths) if length]
    found.sort(key=lambda prefix: -prefix.length)
    cuts = plan_cuts([prefix.length for prefix in found], max_tokens)
    return [found[start:stop] for start, stop in pairwise(cuts)]


def gather(micro_batches: Sequence[MicroBatch], masks: Sequence[Tensor], prefixes: Sequence[Prefix]) -> MicroBatch:
    """The prefixes as one micro-batch, with loss where the masks are True."""

    def table(columns: Sequence[Tensor], fill: float) -> Tensor:
        filled = columns[0].new_full((len(prefixes), max(prefix.length for prefix in prefixes)), fill)
        for line, prefix in zip(filled, prefixes):
            line[: prefix.length] = columns[prefix.micro_batch][prefix.row, : prefix.length]
        return filled

    device = micro_batches[0].token_ids.device
    return MicroBatch(
        token_ids=table([batch.token_ids for batch in micro_batches], 0),
        lengths=torch.tensor([prefix.length for prefix in prefixes], device=device),
        loss_mask=table(masks, False),
        behavior_logprobs=table([batch.behavior_logprobs for batch in micro_batches], 0.0),
        policy_versions=table([batch.policy_versions for batch in micro_batches], NO_VERSION),
        kv_versions=table([batch.kv_versions for batch in micro_batches], NO_VERSION),
        advantages=table([batch.advantages for batch in micro_batches], 0.0),
        row_ids=torch.stack([micro_batches[prefix.micro_batch].row_ids[prefix.row] for prefix in prefixes]),
        keys=tuple(_key(micro_batches[prefix.micro_batch], prefix.row) for prefix in prefixes),
    )


def _key(batch: MicroBatch, row: int) -> RowKey | None:
    return batch.keys[row] if batch.keys else None


def scatter(scored: Tensor, prefixes: Sequence[Prefix], masks: Sequence[Tensor], targets: Sequence[Tensor]) -> None:
    """Writes what was scored of `gather`'s micro-batch to where its tokens came from, in place."""
    for values, prefix in zip(scored, prefixes):
        mask = masks[prefix.micro_batch][prefix.row]
        line = targets[prefix.micro_batch][prefix.row]
        line[mask] = values[: prefix.length][mask[: prefix.length]].to(line.dtype)
