"""The `snapshot` anchor: exact old logprobs from the published weights of each token's own version; and `auto`, which
falls back where a version is gone. Must never know the loss.

Law: a token sampled under version v is scored by the published weights of v. Only rows that hold v-tokens, only up to
their last v-token, go through a forward for v; the version that equals the trainer's present weights is not loaded.
Versions are visited in order, from the end that is nearer to the weights that the last batch left in the copy: each is
then a step along the log.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from agentgym.errors import VersionError
from agentgym_trainer.anchors.fallback import WithFallback, count_exact, patch
from agentgym_trainer.anchors.prefixes import gather, plan_prefixes, scatter
from agentgym_trainer.anchors.protocol import Anchor, Proximal, Resolvable, VersionSource, require_finite
from agentgym_trainer.anchors.scoring import ScoringModel
from agentgym_trainer.batch import MicroBatch
from agentgym_trainer.logprobs import logprob_dtype, token_logprobs, unwrap


class SnapshotAnchor(WithFallback):
    """Exact. With `fallback`, the `auto` anchor: tokens of versions that the log has not are scored by the fallback
    and counted (`anchor/num_fallbacks`); without it they raise VersionError."""

    def __init__(
        self, model: nn.Module, temperature: float, versions: VersionSource, fallback: Anchor | None = None
    ) -> None:
        self.name = "snapshot" if fallback is None else "auto"
        self._model = model
        self._temperature = temperature
        self._versions = versions
        super().__init__(fallback)
        self._scoring = ScoringModel(model, temperature)

    @torch.no_grad()
    def proximal(
        self, micro_batches: Sequence[MicroBatch], *, trainer_version: int, reuse_policy: bool
    ) -> Sequence[Resolvable]:
        dtype = logprob_dtype(self._model)
        logprobs = [torch.zeros_like(batch.behavior_logprobs, dtype=dtype) for batch in micro_batches]
        present = {int(v) for batch in micro_batches for v in batch.policy_versions[batch.loss_mask].unique()}
        gone: set[int] = set()
        num_scored_tokens = 0
        for version in _in_order(present, self._scoring.version):
            if version == trainer_version and reuse_policy:
                continue
            if version != trainer_version and not self._load(version):
                gone.add(version)
                continue
            scorer = self._policy if version == trainer_version else self._scoring.score
            num_scored_tokens += self._score_into(logprobs, micro_batches, scorer, version)
        missing = [batch.loss_mask & _is_of(batch.policy_versions, gone) for batch in micro_batches]
        self._counts = count_exact(micro_batches, missing) | {"anchor/num_scored_tokens": float(num_scored_tokens)}
        exact = [
            Proximal(scored, batch.loss_mask & (batch.policy_versions == trainer_version) if reuse_policy else None)
            for batch, scored in zip(micro_batches, logprobs)
        ]
        if not gone or self._fallback is None:
            return exact
        return patch(exact, missing, micro_batches, self._fallback, trainer_version, reuse_policy)

    def _load(self, version: int) -> bool:
        """Swaps in `version`; False if it is gone and there is a fallback."""
        try:
            self._scoring.bring(self._versions, version)
        except VersionError:
            if self._fallback is None:
                raise
            return False
        return True

    def _policy(self, part: MicroBatch) -> Tensor:
        # Without the wrapper: its forward may talk to the other ranks, which score other numbers of micro-batches.
        return token_logprobs(unwrap(self._model), part, self._temperature).logprobs

    def _score_into(
        self, logprobs: Sequence[Tensor], batches: Sequence[MicroBatch], scorer: Callable[[MicroBatch], Tensor],
        version: int,
    ) -> int:  # fmt: skip
        """Writes the logprobs of the version's tokens into `logprobs`; returns the size of the forwards."""
        masks = [batch.loss_mask & (batch.policy_versions == version) for batch in batches]
        num_tokens = 0
        for prefixes in plan_prefixes(masks, max_tokens=max(batch.num_tokens for batch in batches)):
            part = gather(batches, masks, prefixes)
            scored = require_finite(scorer(part), self.name, f"the weights of version {version}")
            scatter(scored, prefixes, masks, logprobs)
            num_tokens += part.num_tokens
        return num_tokens


def _in_order(versions: set[int], at: int | None) -> list[int]:
    """From the end that is nearer to `at`, which may lie anywhere; newest first where that is all one."""
    newest_first = sorted(versions, reverse=True)
    if at is not None and versions and abs(at - newest_first[-1]) < abs(at - newest_first[0]):
        return newest_first[::-1]
    return newest_first


def _is_of(policy_versions: Tensor, versions: set[int]) -> Tensor:
    wanted = torch.tensor(sorted(versions), dtype=torch.int64, device=policy_versions.device)
    return torch.isin(policy_versions, wanted)
