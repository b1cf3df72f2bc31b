"""The anchors `interrupt` and `old_logit_model`: exact old logprobs that were recorded before the batch was built, and
are looked up. Must never know who recorded them, or the loss.

Law: a token is looked up by trajectory, row, position and version. One that was never scored is an error that names it,
or the fallback that was asked for by name, counted. Tokens of the trainer's present version are left to the policy
forward where that computes the same.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from agentgym.errors import InputError
from agentgym.trajectory import NO_VERSION
from agentgym_trainer.anchors.fallback import WithFallback, count_exact, patch
from agentgym_trainer.anchors.protocol import Anchor, Proximal, Resolvable
from agentgym_trainer.anchors.records import MissingLogprobsError, OldLogprobs, RecordStore, runs_of
from agentgym_trainer.batch import PADDING_ROW, MicroBatch
from agentgym_trainer.logprobs import logprob_dtype

SHOWN = 3  # missing runs that an error names


class RecordedAnchor(WithFallback):
    """Exact by `records`, which whoever scores fills. `why` says where a missing record should have come from."""

    def __init__(self, name: str, model: nn.Module, why: str, fallback: Anchor | None = None) -> None:
        self.name = name
        self._dtype = logprob_dtype(model)
        self.records = RecordStore(np.float64 if self._dtype == torch.float64 else np.float32)
        self._why = why
        super().__init__(fallback)

    def begin_batch(self, records: Sequence[OldLogprobs]) -> None:
        """The records of the next batch, and of it alone."""
        self.records.keep_only(())
        self.records.extend(records)

    @torch.no_grad()
    def proximal(
        self, micro_batches: Sequence[MicroBatch], *, trainer_version: int, reuse_policy: bool
    ) -> Sequence[Resolvable]:
        exact: list[Proximal] = []
        missing: list[Tensor] = []
        gone: list[str] = []
        for batch in micro_batches:
            from_policy = batch.loss_mask & (batch.policy_versions == trainer_version) if reuse_policy else None
            wanted = batch.loss_mask if from_policy is None else batch.loss_mask & ~from_policy
            logprobs, lacking = self._look_up(batch, wanted, gone)
            exact.append(Proximal(logprobs, from_policy))
            missing.append(lacking)
        if gone and self._fallback is None:
            more = f" and {len(gone) - SHOWN} more runs" if len(gone) > SHOWN else ""
            raise MissingLogprobsError(
                f"anchor {self.name}: no old logprobs of {'; '.join(gone[:SHOWN])}{more}. {self._why} "
                "trainer.anchor_fallback names an anchor for such tokens"
            )
        self._counts = count_exact(micro_batches, missing)
        if not gone or self._fallback is None:
            return exact
        return patch(exact, missing, micro_batches, self._fallback, trainer_version, reuse_policy)

    def _look_up(self, batch: MicroBatch, wanted: Tensor, gone: list[str]) -> tuple[Tensor, Tensor]:
        """Logprobs [B, T] of the `wanted` tokens, and where there are none; notes those runs in `gone`."""
        logprobs = torch.zeros(batch.loss_mask.shape, dtype=self._dtype)
        lacking = torch.zeros(batch.loss_mask.shape, dtype=torch.bool)
        sampled = np.where(batch.loss_mask.cpu().numpy(), batch.policy_versions.cpu().numpy(), NO_VERSION)
        asked, token_ids = wanted.cpu().numpy(), batch.token_ids.cpu().numpy()
        for line, (row_id, length) in enumerate(zip(batch.row_ids.tolist(), batch.lengths.tolist())):
            if row_id == PADDING_ROW or not asked[line].any():
                continue
            key = batch.keys[line] if batch.keys else None
            if key is None:
                raise InputError(f"anchor {self.name} needs rows that say which trajectory they are of; row {row_id}")
            values, known = self.records.lookup(
                key.trajectory_id, key.row, token_ids[line, :length], sampled[line, :length]
            )
            logprobs[line, :length] = torch.from_numpy(np.where(asked[line, :length], values, 0.0))
            without = asked[line, :length] & ~known
            lacking[line, :length] = torch.from_numpy(without)
            gone += [
                f"trajectory {key.trajectory_id} row {key.row} tokens {start}..{stop} of version {version}"
                for start, stop, version in runs_of(np.where(without, sampled[line, :length], NO_VERSION))
            ]
        device = batch.loss_mask.device
        return logprobs.to(device), lacking.to(device)
