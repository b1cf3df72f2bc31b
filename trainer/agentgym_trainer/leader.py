"""Rank 0's dealings: the rollout service, the version log, the run folder and the person who watches.

Laws: a version is in the log before it is published; the log keeps every version that a buffered, in-flight or
current token carries; the run folder is complete enough to open at every moment.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from agentgym.errors import ConfigError, InputError, ServiceError
from agentgym.server.client import ServiceClient, start_service
from agentgym.server.models import model_id
from agentgym.server.wire import Batch, Evaluation, Probe, PublishReport, ServiceStatus
from agentgym.trajectory import ScoredSequences
from agentgym.versions import VersionLog
from agentgym.view.plot import plot_diagnostics, plot_rewards
from agentgym.view.progress import TrainProgress
from agentgym.view.tables import final_table
from agentgym_trainer.anchors.old_logit_model import QUEUE_TOKENS, OldLogitModel
from agentgym_trainer.anchors.records import OldLogprobs
from agentgym_trainer.anchors.scorer_settings import ScorerSettings
from agentgym_trainer.checkpoint import Progress
from agentgym_trainer.publish import Publication
from agentgym_trainer.run_folder import RunFolder
from agentgym_trainer.settings import TrainConfig


@dataclass(frozen=True, slots=True)
class Paths:
    """Where every rank finds what rank 0 keeps.

    Example: `Paths(Path("runs/x/versions"), Path("runs/x/checkpoints"))`.
    """

    versions: Path
    checkpoints: Path


@dataclass(frozen=True, slots=True)
class Step:
    """What rank 0 hands to every rank: a batch, the version of the weights that it meets, and the old logprobs that
    came with it (None where the anchor has its own).

    Example: `Step(Batch("step-000003", ...), trainer_version=3, old_logprobs=None)`.
    """

    batch: Batch
    trainer_version: int
    old_logprobs: tuple[OldLogprobs, ...] | None

    @property
    def trajectories(self) -> list[ScoredSequences]:
        return [member for group in self.batch.groups for member in group.members]

    @property
    def versions(self) -> set[int]:
        """The policy versions that its loss tokens carry."""
        rows = (row for member in self.trajectories for row in member.sequences)
        return {v for row in rows for v, loss in zip(row.policy_versions, row.loss_mask) if loss}


class Leader:
    """Use through `Leader.started`; `begin`, then `next_step` and `publish` in turn, then `finish`."""

    def __init__(
        self, config: TrainConfig, folder: RunFolder, client: ServiceClient, versions: VersionLog, console: Console,
        watch: TrainProgress, scorer: OldLogitModel | None = None,
    ) -> None:  # fmt: skip
        self.paths = Paths(versions.folder, folder.checkpoints_path)
        self._config = config
        self._folder = folder
        self._client = client
        self._versions = versions
        self._console = console
        self._watch = watch
        self._scorer = scorer
        self._started = time.monotonic()
        self._served = -1  # the version that the engine serves
        self.ended_pause: int | None = None  # the pause of sampling that the last publication ended
        self._unacknowledged: list[str] = []
        self._wait_s = 0.0
        self._step_began = self._started
        self._last_wait = ""

    @classmethod
    @contextlib.contextmanager
    def started(cls, config: TrainConfig, folder: RunFolder, model_folder: Path, console: Console) -> Iterator[Leader]:
        """Starts the rollout service as a child, or connects to `run.service_url`; ends what it started."""
        with contextlib.ExitStack() as stack:
            if config.run.service_url and config.run.service_key_file:
                key = _read_key(config.run.service_key_file)
                client = stack.enter_context(ServiceClient(config.run.service_url, key))
                status = client.wait_ready()
                _check_model(status, config, model_folder)
                versions = VersionLog(Path(status.versions_dir), first=status.policy_version + 1)
                _hold_known(versions, "service", status.live_versions)  # what an earlier run left in its buffer
                scorer = stack.enter_context(_scorer(config, folder, model_folder, versions))
            else:
                console.print(f"starting the rollout service for {config.env.id} (log: {folder.path}/service.log)")
                # What the engine starts with was not rounded: it is version 0 only where nothing is, and where version
                # 0 is an adapter that does nothing.
                versions = VersionLog(folder.versions_path, first=0 if _is_published_whole(config) else 1)
                scorer = stack.enter_context(_scorer(config, folder, model_folder, versions))
                service = start_service(config.service(), model_folder, folder.path, folder.versions_path)
                client = stack.enter_context(service)
            if config.rollout.source != "environment":
                console.print(f"outside agents play: they open sessions at {client.url}/v1/sessions")
            watch = stack.enter_context(TrainProgress(config.trainer.steps, console))
            if scorer is not None:
                scorer.follow(client)
            yield cls(config, folder, client, versions, console, watch, scorer)

    @property
    def sampling(self) -> ServiceClient:
        """Whose sampling an interruption pauses."""
        return self._client

    def begin(self, weights: Publication, progress: Progress, started: float) -> None:
        """Brings the engine to `weights`, measures them, and starts collecting."""
        self._started = started
        self._folder.forget_metrics_from(progress.step + 1)
        fresh = self._versions.latest is None and not self._config.run.service_url and _is_published_whole(self._config)
        version = self._versions.append(weights.weights, weights.metadata)
        if fresh:  # version 0 is what the engine was started with
            self._served = version
            self._versions.hold("service", [version])
        else:
            self._serve(version)
        if progress.position:
            self._client.restore(progress.position)
            self._watch.note(f"resumed after step {progress.step} as policy version {version}")
        if not self._folder.evaluations():  # a resumed run has its "before" already
            self._evaluate(progress.step, "before")
        self._client.collect(True)

    def next_step(self, number: int) -> Step:
        """Waits for the batch of step `number` (counted from 1) and keeps the versions that its tokens carry."""
        began = time.monotonic()
        timeout_s = self._config.trainer.batch_timeout_s
        batch = self._client.take_batch(self._served, timeout_s, on_wait=self._show_wait, step=number)
        self._wait_s, self._step_began = time.monotonic() - began, began
        step = Step(batch, self._served, None)
        self._hold_for_scorer()
        _hold_known(self._versions, "batch", step.versions)
        _hold_known(self._versions, "service", batch.live_versions)
        self._unacknowledged.append(batch.batch_id)
        return step if self._scorer is None else replace(step, old_logprobs=self._collect(self._scorer, step))

    def _collect(self, scorer: OldLogitModel, step: Step) -> tuple[OldLogprobs, ...]:
        """The old logprobs of a batch; those of the trainer's own weights are the policy's, if it is used once."""
        trainer = self._config.trainer
        return scorer.collect(
            step.trajectories, step.trainer_version if trainer.updates_per_batch == 1 else None,
            trainer.batch_timeout_s, lambda what: self._watch.note(f"waiting: {what}"),
            may_lack=trainer.anchor_fallback is not None,
        )  # fmt: skip

    def _hold_for_scorer(self) -> None:
        """Before any other holder lets go of a version: the scorer may still need it."""
        if self._scorer is not None:
            _hold_known(self._versions, "scorer", self._scorer.needed_versions())

    def publish(
        self, done: int, step: Step, weights: Publication, metrics: Mapping[str, float], probe: Probe | None = None
    ) -> Mapping[str, float]:
        """After step `done` (counted from 1): new weights to the log and the engine, figures to the run folder.
        Returns the figures."""
        began = time.monotonic()
        self._hold_for_scorer()
        report = self._serve(self._versions.append(weights.weights, weights.metadata), probe)
        figures = {
            **step.batch.metrics,
            **metrics,
            "seconds": time.monotonic() - self._started,
            "tokens_per_s": step.batch.metrics["sampled_tokens"] / (time.monotonic() - self._step_began),
            "time/wait_s": self._wait_s,
            "time/publish_s": time.monotonic() - began,
            "time/pause_s": report.pause_s,
            "versions/loaded_mb": report.loaded_bytes / 2**20,
            **({} if report.probe_off is None else {"discrepancy/probe_max_abs": report.probe_off}),
            "policy_version": float(self._served),
            **_log_figures(self._versions),
            **(self._scorer.metrics() if self._scorer else {}),
        }
        every = self._config.evaluation.every
        if every and done % every == 0 and done < self._config.trainer.steps:
            evaluation = self._evaluate(done, f"after step {done}")
            figures["heldout/reward_mean"] = evaluation.mean_reward if evaluation else float("nan")
        self._folder.log_metrics(done, figures)
        self._watch.update(done, figures)
        return figures

    def acknowledge(self) -> None:
        """A durable checkpoint contains every batch that was taken so far."""
        for batch_id in self._unacknowledged:
            self._client.acknowledge(batch_id)
        self._unacknowledged.clear()

    def finish(self) -> None:
        """Measures the trained policy and completes the run folder."""
        self._client.collect(False)
        self._evaluate(self._config.trainer.steps, "after")
        evaluations = self._folder.evaluations()
        before, after = (evaluations[0], evaluations[-1]) if evaluations else ({}, {})
        plot_rewards(
            self._folder.metrics_path, self._folder.plot_path, title=self._config.env.id,
            before=before.get("mean_reward"), after=after.get("mean_reward"),
        )  # fmt: skip
        plot_diagnostics(self._folder.metrics_path, self._folder.diagnostics_path, title=self._config.env.id)
        summary: dict[str, Any] = {
            "env": self._config.env.id,
            "model": self._config.model.name,
            "steps": self._config.trainer.steps,
            "policy_version": self._served,
            "reward_before": before.get("mean_reward"),
            "reward_after": after.get("mean_reward"),
            "success_before": before.get("success_rate"),
            "success_after": after.get("success_rate"),
            "seconds_total": time.monotonic() - self._started,
        }
        self._folder.write_summary(summary)
        shown = {**summary, "run folder": str(self._folder.path), "plot": str(self._folder.plot_path)}
        final_table(shown, self._console, title=f"run {self._config.run.name}")

    def _serve(self, version: int, probe: Probe | None = None) -> PublishReport:
        report = self._client.publish(version, self._versions.path(version), probe)
        self._served = version
        self.ended_pause = report.ended_pause
        _hold_known(self._versions, "service", report.live_versions)
        return report

    def _evaluate(self, done: int, when: str) -> Evaluation | None:
        section = self._config.evaluation
        if section.episodes == 0:
            return None
        evaluation = self._client.evaluate(
            section.episodes, "heldout", section.temperature, self._config.run.seed, on_wait=self._show_wait
        )
        if evaluation.valid == 0:
            raise ServiceError(f"none of {evaluation.episodes} held-out episodes could be scored; see service.log")
        self._folder.log_evaluation(done, asdict(evaluation))
        self._watch.note(
            f"held-out {when}: reward {evaluation.mean_reward:.3f}, success {evaluation.success_rate:.3f} "
            f"({evaluation.valid} episodes, {evaluation.failed} failed, temperature {section.temperature:g})"
        )
        return evaluation

    def _show_wait(self, status: ServiceStatus) -> None:
        wait = status.evaluating or status.waiting_for
        if wait != self._last_wait:
            self._watch.note(f"waiting: {wait}")
        self._last_wait = wait


def _scorer(
    config: TrainConfig, folder: RunFolder, model_folder: Path, versions: VersionLog
) -> contextlib.AbstractContextManager[OldLogitModel | None]:
    """The scorer process, for the anchor that has one; it loads its model while the service starts."""
    trainer = config.trainer
    if trainer.anchor != "old_logit_model":
        return contextlib.nullcontext()
    device = trainer.old_logit_device or "cpu"
    settings = ScorerSettings(str(model_folder), str(versions.folder), config.model_dump_json(), device)
    most = trainer.old_logit_queue_tokens or QUEUE_TOKENS
    return OldLogitModel(settings, folder.path / "scorer.log", queue_tokens=most)


def _log_figures(versions: VersionLog) -> dict[str, float]:
    """What the log holds and what the last publication cost. A delta of no bytes: too much changed, or fp32 was
    published, and full copies are kept."""
    last = versions.last
    assert last is not None, "a publication came first"
    return {
        "versions/stored": float(len(versions.versions)),
        "versions/stored_mb": versions.stored_bytes / 2**20,
        "versions/full_copies": float(versions.num_full_copies),
        "versions/changed_fraction": last.changed_fraction,
        "versions/delta_mb": last.delta_bytes / 2**20,
        "versions/full_mb": last.full_bytes / 2**20,
        "versions/record_s": last.seconds,
    }


def _hold_known(versions: VersionLog, holder: str, referred: Iterable[int]) -> None:
    """Holds what the log has. A version it never had (a service that served before this log began) is not an error
    here: the anchor that is asked for its logprobs raises, or counts a fallback."""
    versions.hold(holder, [version for version in referred if version in versions])


def _is_published_whole(config: TrainConfig) -> bool:
    return config.trainer.publish_dtype == "float32" or config.trainer.lora is not None


def _check_model(status: ServiceStatus, config: TrainConfig, model_folder: Path) -> None:
    if status.model_id != model_id(model_folder):
        raise InputError(
            f"the service at {config.run.service_url} serves the model {status.model!r}, and this run trains "
            f"{config.model.name!r}, which is another one by its config.json; set model.name to the service's, or "
            "start a service with this run's"
        )


def _read_key(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError as error:
        raise ConfigError(f"run.service_key_file {path} cannot be read: {error.strerror}") from error
