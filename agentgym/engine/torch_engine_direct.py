"""The torch engine without its thread: the caller's own loop computes. Law: equal requests, given together, give equal
tokens and logprobs, bit for bit; no clock and no thread decides what shares a forward.

For experiments that must be repeatable (the staleness lab) and may step back to older weights; what serves others is
torch_engine.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel

from agentgym.engine.torch_engine_batch import SlotBatch, Work
from agentgym.engine.torch_engine_weights import load_weights, read_model
from agentgym.errors import EngineError, PromptTooLongError
from agentgym.policy import Completion, SamplingParams, Segment

Request = tuple[Sequence[int], SamplingParams]


class DirectEngine:
    """Samples all requests of one call together, in fp32, with the weights last loaded.

    >>> engine = DirectEngine(Path("model"), slots=64, max_context=256)
    >>> engine.sample([((1, 7, 8), SamplingParams(max_tokens=8, seed=0))])
    [Completion(...)]
    """

    def __init__(self, model_folder: Path, *, slots: int, max_context: int) -> None:
        self.max_context = max_context
        self._batch = SlotBatch(read_model(model_folder, torch.float32), slots, max_context)
        with torch.inference_mode():
            self._batch.prove()

    @property
    def model(self) -> PreTrainedModel:
        """The module that samples, for whoever wants to see what becomes of other logits (a forward hook)."""
        return self._batch.model

    @property
    def policy_version(self) -> int:
        return self._batch.policy_version

    def load(self, version: int, path: Path) -> None:
        """Serves the weights in `path` as `version`, newer or older than the last; no key of others is kept."""
        load_weights(self._batch.model, path)
        self._batch.renew(version)

    def sample(self, requests: Sequence[Request]) -> list[Completion]:
        """One completion of each request, in their order. Requests need a seed. Raises EngineError."""
        works = [self._work(*request) for request in requests]
        batch = self._batch
        batch.waiting.extend(works)
        ended: dict[int, Completion] = {}
        with torch.inference_mode():
            while not batch.idle:
                for work, outcome in batch.step():
                    if isinstance(outcome, EngineError):
                        batch.interrupt()
                        raise outcome
                    ids, logprobs = tuple(work.token_ids), tuple(work.logprobs)
                    segment = Segment(ids, logprobs, batch.policy_version, work.kv_version, outcome)
                    ended[id(work)] = Completion.from_segments((segment,))
        return [ended[id(work)] for work in works]

    def _work(self, prompt_ids: Sequence[int], params: SamplingParams) -> Work:
        if len(prompt_ids) + params.max_tokens > self.max_context:
            raise PromptTooLongError(
                f"a prompt of {len(prompt_ids)} tokens and max_tokens {params.max_tokens} do not fit the context of "
                f"{self.max_context}"
            )
        if params.seed is None:
            raise EngineError("the direct engine is repeatable: a request needs a seed")
        return Work(np.array(prompt_ids, dtype=np.int64), params, params.seed)
