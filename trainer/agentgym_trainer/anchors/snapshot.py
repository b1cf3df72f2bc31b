"""The `snapshot` anchor: exact old logprobs from the published weights of each token's own version; and `auto`, which
falls back where a version is gone. Must never know the loss.

Law: a token sampled under version v is scored by the published weights of v. Only rows that hold v-tokens, only up to
their last v-token, go through a forward for v; the version that equals the trainer's present weights is not loaded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from agentgym.errors import VersionError
from agentgym_trainer.anchors.ewma import EwmaAnchor
from agentgym_trainer.anchors.protocol import Proximal, VersionSource, require_finite
from agentgym_trainer.anchors.scoring import ScoringModel
from agentgym_trainer.batch import MicroBatch
from agentgym_trainer.logprobs import token_logprobs


class SnapshotAnchor:
    """Exact. With `fallback`, the `auto` anchor: tokens of versions that the log has not are scored by the fallback
    and counted (`anchor/num_fallbacks`); without it they raise VersionError."""

    def __init__(
        self, model: nn.Module, temperature: float, versions: VersionSource, fallback: EwmaAnchor | None = None
    ) -> None:
        self.name = "snapshot" if fallback is None else "auto"
        self._model = model
        self._temperature = temperature
        self._versions = versions
        self._fallback = fallback
        self._scoring = ScoringModel(model, temperature)
        self._counts: dict[str, float] = {}

    @torch.no_grad()
    def proximal(
        self, micro_batches: Sequence[MicroBatch], *, trainer_version: int, reuse_policy: bool
    ) -> list[Proximal]:
        logprobs = [torch.zeros_like(batch.behavior_logprobs) for batch in micro_batches]
        present = sorted({int(v) for batch in micro_batches for v in batch.policy_versions[batch.loss_mask].unique()})
        counts = {"num_fallbacks": 0, "num_exact": 0, "num_scored_tokens": 0}
        for version in present:
            if version == trainer_version and reuse_policy:
                continue
            exact = version == trainer_version or self._load(version)
            for batch, target in zip(micro_batches, logprobs):
                mask = batch.loss_mask & (batch.policy_versions == version)
                if not bool(mask.any()):
                    continue
                counts["num_scored_tokens"] += self._score_into(target, batch, mask, version, trainer_version, exact)
                counts["num_fallbacks"] += 0 if exact else int(mask.sum())
        result = []
        for batch, scored in zip(micro_batches, logprobs):
            own = batch.loss_mask & (batch.policy_versions == trainer_version) if reuse_policy else None
            fresh_kv = batch.loss_mask & (batch.kv_versions == batch.policy_versions)
            counts["num_exact"] += int(fresh_kv.sum())
            result.append(Proximal(scored, own))
        counts["num_exact"] = max(0, counts["num_exact"] - counts["num_fallbacks"])
        self._counts = {f"anchor/{name}": float(value) for name, value in counts.items()}
        return result

    def _load(self, version: int) -> bool:
        """Swaps in `version`; False if it is gone and there is a fallback."""
        try:
            weights = self._versions.read(version)
        except VersionError:
            if self._fallback is None:
                raise
            return False
        self._scoring.load(weights, version)
        return True

    def _score_into(
        self, target: Tensor, batch: MicroBatch, mask: Tensor, version: int, trainer_version: int, exact: bool
    ) -> int:
        """Writes the logprobs of the tokens in `mask` into `target`; returns the size of the forward."""
        rows = mask.any(-1).nonzero(as_tuple=True)[0]
        num_columns = int(mask.any(0).nonzero()[-1]) + 1
        part = batch.select(rows, num_columns, loss_mask=mask)
        if not exact:
            assert self._fallback is not None
            scored = self._fallback.score(part)
        elif version == trainer_version:
            scored = token_logprobs(self._model, part, self._temperature).logprobs
        else:
            scored = self._scoring.score(part)
        require_finite(scored, self.name, f"the weights of version {version}")
        target[mask] = scored[part.loss_mask].to(target.dtype)
        return part.num_tokens

    def published(self, version: int, *, active_fraction: float, mean_lag: float) -> None:
        if self._fallback is not None:
            self._fallback.published(version, active_fraction=active_fraction, mean_lag=mean_lag)

    def metrics(self) -> dict[str, float]:
        return self._counts | (self._fallback.metrics() if self._fallback is not None else {})

    def state_dict(self) -> dict[str, Any]:
        return self._fallback.state_dict() if self._fallback is not None else {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if self._fallback is not None:
            self._fallback.load_state_dict(state)
