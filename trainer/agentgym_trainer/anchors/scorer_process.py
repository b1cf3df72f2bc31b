"""The scorer: a process with a model of its own that answers passages with records. Must never know the rollout
service, the optimizer or a batch.

Law: one answer for each job, by the weights of the job's version, read from the log that the trainer keeps; when the
connection ends, so does the process.
"""

from __future__ import annotations

import argparse
import contextlib
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from torch import Tensor
from transformers.utils.logging import disable_progress_bar

from agentgym.errors import AgentGymError, CheckpointError, VersionError
from agentgym.server.wire import to_fault
from agentgym.versions import VersionReader
from agentgym_trainer.anchors.followed import Passage
from agentgym_trainer.anchors.passages import score_passages
from agentgym_trainer.anchors.records import OldLogprobs
from agentgym_trainer.anchors.scorer_settings import READY, Answer, Job, ScorerSettings
from agentgym_trainer.anchors.scoring import ScoringModel
from agentgym_trainer.batch import MicroBatch
from agentgym_trainer.learner import load_model
from agentgym_trainer.publish import published_metadata
from agentgym_trainer.settings import TrainConfig

TRIES = 6  # of reading a version while the trainer turns a full copy into a delta under it


class Scorer:
    """A model that is brought to the version of each job."""

    def __init__(self, settings: ScorerSettings) -> None:
        disable_progress_bar()
        config = TrainConfig.model_validate_json(settings.config)
        torch.set_num_threads(config.trainer.threads)
        self._device = torch.device(settings.device)
        model = load_model(Path(settings.model_folder), config).to(self._device)  # type: ignore[arg-type]
        self._scoring = ScoringModel(model, config.rollout.temperature, own=True)
        self._versions = VersionReader(Path(settings.versions_folder), published_metadata(model))
        self._mixed = config.trainer.dtype == "bfloat16"  # as the policy computes
        self._max_tokens = config.trainer.micro_batch_tokens

    def answer(self, job: Job) -> Answer:
        """Raises nothing of ours: what went wrong is in the answer."""
        began = time.perf_counter()
        try:
            records, num_tokens = self._score(job.passages)
        except AgentGymError as error:
            return Answer(job.number, (), 0, time.perf_counter() - began, to_fault(error))
        return Answer(job.number, tuple(records), num_tokens, time.perf_counter() - began, None)

    def _score(self, passages: Sequence[Passage]) -> tuple[list[OldLogprobs], int]:
        self._bring(passages[0].version)
        return score_passages(
            passages, self._forward, max_tokens=self._max_tokens, device=self._device, anchor="old_logit_model"
        )

    def _forward(self, batch: MicroBatch) -> Tensor:
        mixed = torch.autocast(self._device.type, torch.bfloat16) if self._mixed else contextlib.nullcontext()
        with mixed:
            return self._scoring.score(batch)

    def _bring(self, version: int) -> None:
        """The trainer may replace a file by another that says the same while it is being read."""
        for left in reversed(range(TRIES)):
            try:
                self._scoring.bring(self._versions, version)
                return
            except (VersionError, CheckpointError):
                if not left:
                    raise
                time.sleep(0.01)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fd", type=int, required=True, help="the socket to the trainer")
    connection = Connection(parser.parse_args().fd)
    with contextlib.suppress(EOFError, ConnectionError):  # the trainer has ended
        try:
            scorer = Scorer(connection.recv())
        except AgentGymError as error:
            connection.send(Answer(-1, (), 0, 0.0, to_fault(error)))
            return
        connection.send(READY)
        while True:
            connection.send(scorer.answer(connection.recv()))


if __name__ == "__main__":
    main()
