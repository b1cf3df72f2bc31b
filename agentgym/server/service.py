"""The rollout service: environment, renderer, engine and collector put together. Must never know HTTP.

Law: what comes from outside is checked here before any work starts, whichever door it came through; and whatever was
opened is closed, whichever way the service ends.
"""

from __future__ import annotations

import asyncio
import inspect
import itertools
import logging
import math
import time
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Literal

from agentgym import registry
from agentgym.engine.gate import VersionedPolicy
from agentgym.engine.protocol import Engine, Probe, WeightUpdate
from agentgym.errors import InputError, ServiceError
from agentgym.render import ChatTemplateRenderer, load_renderer
from agentgym.rollout.collector import CollectedBatch, Collector, CollectorSettings
from agentgym.rollout.environments import EnvironmentPool
from agentgym.rollout.evaluation import plan_evaluation, run_evaluation
from agentgym.rollout.feed import FeedPage
from agentgym.rollout.limits import EpisodeLimits
from agentgym.rollout.schedule import Schedule
from agentgym.rollout.store import TrajectoryStore
from agentgym.rollout.summary import succeeded
from agentgym.sandbox.warm.pool import SandboxPool
from agentgym.server.engines import start_engine
from agentgym.server.models import model_id
from agentgym.server.replies import vocabulary_size
from agentgym.server.sessions import Sessions
from agentgym.server.settings import OUTSIDE, ServiceConfig
from agentgym.server.wire import (
    MAX_FEED_TOKENS,
    MAX_PAUSE_S,
    Batch,
    Evaluation,
    Group,
    PauseReport,
    PublishReport,
    ServiceStatus,
)
from agentgym.trajectory import EpisodeStatus, Trajectory, to_scored_sequences

EngineFactory = Callable[[ServiceConfig, Path], Awaitable[Engine]]
RATE_WINDOW_S = 10.0
log = logging.getLogger(__name__)


class RolloutService:
    """Use through `RolloutService.start` and `close`."""

    def __init__(
        self,
        config: ServiceConfig,
        record: registry.EnvRecord | None,
        environments: EnvironmentPool | None,
        boxes: SandboxPool | None,
        renderer: ChatTemplateRenderer,
        engine: Engine,
        run_dir: Path,
        versions_dir: Path,
        vocab_size: int,
        model_id: str,
    ) -> None:
        rollout = config.rollout
        self.config = config
        self.model_name = config.model.name
        self._model_id = model_id
        self.vocab_size = vocab_size  # ids that the model can read
        self.renderer = renderer
        self.policy = VersionedPolicy(engine, publish_mode=config.engine.publish_mode)
        self.max_context = min(config.max_context, engine.max_context)
        self._env_id = record.env_id if record else OUTSIDE
        self._environments = environments  # None: outside agents bring theirs
        self._boxes = boxes  # None: the environment runs no code
        self._versions_dir = versions_dir.resolve()
        self._limits = EpisodeLimits(
            max_turns=rollout.max_turns or (record.max_turns if record else 1),
            max_tokens_per_turn=rollout.max_tokens_per_turn,
            max_episode_tokens=min(rollout.max_episode_tokens, engine.max_context),
            max_episode_s=rollout.max_episode_s,
            max_env_call_s=rollout.max_env_call_s,
        )
        settings = CollectorSettings(
            env_id=self._env_id,
            group_size=rollout.group_size,
            groups_per_step=rollout.groups_per_step,
            max_staleness=rollout.max_staleness,
            in_flight=rollout.in_flight,
            temperature=rollout.temperature,
            max_retries=rollout.max_retries,
            stall_warning_s=rollout.stall_warning_s,
            seed=rollout.seed,
            drop_zero_variance=rollout.drop_zero_variance,
            cipo=rollout.cipo,
        )
        schedule = None  # outside agents play
        if environments is not None and rollout.source != "sessions":
            schedule = Schedule(environments.task_ids("train"), rollout.seed)
        self.collector = Collector(
            settings,
            environments,
            renderer,
            self.policy,
            self._limits,
            schedule,
            TrajectoryStore(run_dir),
        )
        self.sessions = Sessions(
            config.sessions, self.collector, renderer, lambda: self.policy.policy_version,
            trains=rollout.source != "environment",
        )  # fmt: skip
        self._unacknowledged: set[str] = set()
        self._batches = itertools.count()
        self._evaluations: dict[str, _EvaluationRun] = {}
        self._rates: deque[tuple[float, int]] = deque([(time.monotonic(), 0)])
        self._closing = False

    @classmethod
    async def start(
        cls,
        config: ServiceConfig,
        model_folder: Path,
        run_dir: Path,
        versions_dir: Path,
        engine_factory: EngineFactory = start_engine,
    ) -> RolloutService:
        """Opens everything. Raises InputError and its kin for what cannot run on this machine, EngineError."""
        record = None if config.env.id == OUTSIDE else registry.lookup(config.env.id)
        # the engine last: it takes longest, and what is wrong with the rest is told at once
        renderer = await asyncio.to_thread(load_renderer, model_folder, config.render.tool_format)
        boxes = await asyncio.to_thread(_box_pool, record, config) if record else None
        environments: EnvironmentPool | None = None
        engine: Engine | None = None
        try:
            if record is not None:
                environments = await asyncio.to_thread(_environment_pool, record, config, boxes)
            engine = await engine_factory(config, model_folder)
            vocab_size = vocabulary_size(model_folder, renderer)
            return cls(
                config, record, environments, boxes, renderer, engine, run_dir, versions_dir, vocab_size,
                model_id(model_folder),
            )  # fmt: skip
        except BaseException:
            if engine is not None:
                await engine.close()
            if environments is not None:
                await environments.close()
            await _close_boxes(boxes)
            raise

    async def close(self) -> None:
        """Ends episodes, environments, sandboxes and engine; idempotent."""
        if self._closing:
            return
        self._closing = True
        for run in self._evaluations.values():
            run.task.cancel()
        await asyncio.gather(*(run.task for run in self._evaluations.values()), return_exceptions=True)
        await self.sessions.close()
        await self.collector.close()
        if self._environments is not None:
            await self._environments.close()
        await _close_boxes(self._boxes)
        await self.policy.engine.close()

    # ----------------------------------------------------------------------------------------------- the trainer's

    def status(self) -> ServiceStatus:
        collector = self.collector
        return ServiceStatus(
            policy_version=self.policy.policy_version,
            collecting=collector.collecting,
            in_flight=collector.in_flight,
            started_groups=collector.started_groups,
            ready_groups=collector.ready_groups,
            episodes=collector.episodes,
            failed=collector.failed,
            discarded_groups=collector.discarded.total(),
            sampled_tokens=collector.sampled_tokens,
            tokens_per_s=self._tokens_per_s(),
            live_versions=collector.live_versions(),
            versions_dir=str(self._versions_dir),
            evaluating=next((run.progress for run in self._evaluations.values() if not run.task.done()), ""),
            waiting_for=collector.waiting_for(),
            model=self.model_name,
            model_id=self._model_id,
        )

    async def take_batch(self, trainer_version: int, timeout_s: float, step: int) -> Batch | None:
        """The next batch, or None at the timeout. Raises what keeps episodes from being collected."""
        if step < 0 or not 0.0 <= timeout_s <= 60.0:
            raise InputError(f"a batch needs step >= 0 and 0 <= timeout_s <= 60, got {step} and {timeout_s}")
        collected = await self.collector.take(trainer_version, timeout_s, step)
        if collected is None:
            return None
        batch_id = f"step-{step:06d}-{next(self._batches)}"
        self._unacknowledged.add(batch_id)
        return _to_batch(batch_id, collected, self._boxes.metrics().named() if self._boxes else {}, self._model_id)

    async def publish(self, version: int, path: str, probe: Probe | None = None) -> PublishReport:
        """Serves the weights in `path`, which must lie in the versions folder: a request is hostile until checked."""
        if probe is not None:
            self._check_probe(probe)
        try:
            file = Path(path).resolve()
            inside = file.is_relative_to(self._versions_dir) and file.suffix == ".safetensors"
            exists = inside and file.is_file()
        except (OSError, ValueError) as error:  # too long, a zero byte
            raise InputError(f"{path[:200]!r} is no path: {error}") from error
        if not inside:
            raise InputError(f"published weights must be a .safetensors file in {self._versions_dir}, got {path!r}")
        if not exists:
            raise InputError(f"there are no weights at {path}")
        report = await self.collector.publish(WeightUpdate(version, file), probe)
        live = self.collector.live_versions()
        return PublishReport(
            report.version, report.pause_s, report.total_s, live, report.loaded_bytes, report.ended_pause,
            report.probe_off,
        )  # fmt: skip

    def _check_probe(self, probe: Probe) -> None:
        count = len(probe.token_ids)
        if not 2 <= count < self.max_context or len(probe.logprobs) != count - 1:
            raise InputError(
                f"a probe has 2 to {self.max_context - 1} tokens and a logprob of each but the first, got {count} and "
                f"{len(probe.logprobs)}"
            )
        if not all(0 <= token < self.vocab_size for token in probe.token_ids):
            raise InputError(f"the tokens of a probe must be in [0, {self.vocab_size})")
        if not 0 < probe.tolerance < math.inf or not all(map(math.isfinite, probe.logprobs)):
            raise InputError(f"a probe needs finite logprobs and a tolerance > 0, got {probe.tolerance}")

    def feed(self, cursor: int, max_tokens: int) -> FeedPage:
        """The token rows of every trajectory that is buffered or in flight, as they grew since `cursor`."""
        if not 1 <= max_tokens <= MAX_FEED_TOKENS:
            raise InputError(f"a page of the feed holds 1 to {MAX_FEED_TOKENS} tokens, got max_tokens {max_tokens}")
        return self.collector.feed.page(cursor, max_tokens)

    async def pause(self, limit_s: float) -> PauseReport:
        """Interrupts all sampling until the next publication or `resume`, but for no longer than `limit_s`."""
        if not 0.0 < limit_s <= MAX_PAUSE_S:
            raise InputError(f"a pause lasts up to {MAX_PAUSE_S:g} s, got limit_s {limit_s}")
        pause = await self.policy.pause(limit_s)
        return PauseReport(pause.pause_id, self.policy.policy_version)

    async def resume(self) -> None:
        """Ends a pause; nothing happens where there is none."""
        await self.policy.resume()

    def acknowledge(self, batch_id: str) -> None:
        if batch_id not in self._unacknowledged:
            raise InputError(f"batch {batch_id!r} was never taken, or is acknowledged already")
        self._unacknowledged.remove(batch_id)

    def evaluate(self, episodes: int, split: Literal["train", "heldout"], temperature: float, seed: int) -> str:
        """Begins an evaluation; its id is what `evaluation` waits for."""
        if split not in ("train", "heldout"):
            raise InputError(f"split must be 'train' or 'heldout', got {split!r}")
        if not 1 <= episodes <= 1_000_000:
            raise InputError(f"an evaluation needs 1 to 1000000 episodes, got {episodes}")
        if self._environments is None:
            raise InputError("an evaluation needs an environment: set env.id, or evaluation.episodes=0")
        plans = plan_evaluation(self._env_id, self._environments, episodes, split, temperature, seed)
        run = _EvaluationRun(len(plans), self.policy.policy_version)
        run.task = asyncio.create_task(
            run_evaluation(
                plans, self._environments, self.renderer, self.policy, self._limits, self.config.rollout.in_flight,
                run.add,
            )
        )  # fmt: skip
        evaluation_id = f"evaluation-{len(self._evaluations)}"
        self._evaluations[evaluation_id] = run
        return evaluation_id

    async def evaluation(self, evaluation_id: str, timeout_s: float) -> Evaluation | None:
        """The result of an evaluation, or None if it has none within `timeout_s`."""
        run = self._evaluations.get(evaluation_id)
        if run is None:
            raise InputError(f"there is no evaluation {evaluation_id!r}")
        await asyncio.wait((run.task,), timeout=min(max(timeout_s, 0.0), 60.0))
        if not run.task.done():
            return None
        if run.task.cancelled():
            raise ServiceError("the rollout service is ending")
        run.task.result()  # raises what ended it
        return run.result()

    def _tokens_per_s(self) -> float:
        now, tokens = time.monotonic(), self.collector.sampled_tokens
        self._rates.append((now, tokens))
        while len(self._rates) > 2 and now - self._rates[0][0] > RATE_WINDOW_S:
            self._rates.popleft()
        then, before = self._rates[0]
        return (tokens - before) / max(now - then, 1e-9)


class _EvaluationRun:
    """An evaluation under way: sums only, since its trajectories are kept by nobody."""

    task: asyncio.Task[None]

    def __init__(self, episodes: int, policy_version: int) -> None:
        self._episodes = episodes
        self._policy_version = policy_version
        self._began = time.monotonic()
        self._ended_s = 0.0
        self._done = 0
        self._failed = 0
        self._valid = 0
        self._reward = 0.0
        self._successes = 0
        self._turns = 0

    def add(self, trajectory: Trajectory) -> None:
        self._done += 1
        self._ended_s = time.monotonic() - self._began
        if trajectory.status is EpisodeStatus.FAILED:
            self._failed += 1
            log.warning("evaluation episode %s failed: %s", trajectory.trajectory_id, trajectory.error)
        if trajectory.score is not None and trajectory.score.valid:
            self._valid += 1
            self._reward += trajectory.score.value
            self._successes += succeeded(trajectory)
            self._turns += len(trajectory.turns)

    @property
    def progress(self) -> str:
        return f"{self._done}/{self._episodes} episodes evaluated"

    def result(self) -> Evaluation:
        valid = self._valid or float("nan")
        return Evaluation(
            episodes=self._episodes,
            valid=self._valid,
            failed=self._failed,
            mean_reward=self._reward / valid,
            success_rate=self._successes / valid,
            mean_turns=self._turns / valid,
            policy_version=self._policy_version,
            seconds=self._ended_s,
        )


def _environment_pool(record: registry.EnvRecord, config: ServiceConfig, boxes: SandboxPool | None) -> EnvironmentPool:
    kwargs = dict(config.env.kwargs)
    if boxes is not None:
        kwargs["sandbox"] = boxes
    most = 2 * config.rollout.in_flight  # an evaluation may run beside the collector
    return EnvironmentPool(lambda: registry.make(record.env_id, **kwargs), most, config.rollout.max_env_call_s)


def _box_pool(record: registry.EnvRecord, config: ServiceConfig) -> SandboxPool | None:
    """Where the environment's boxes come from; None for one that runs no code. Raises UnavailableError."""
    if "sandbox" not in inspect.signature(record.env_class).parameters:
        return None
    settings = config.sandbox
    host = None
    if settings.docker_host is not None:
        from agentgym.sandbox.docker.host import DockerHost  # Docker's client is loaded by those who use it

        host = DockerHost(settings.docker_host, settings.docker_tls)
    tier = config.env.kwargs.get("sandbox", settings.tier)
    return SandboxPool(tier, warm=settings.warm, starters=settings.starters, host=host)


async def _close_boxes(boxes: SandboxPool | None) -> None:
    if boxes is not None:
        await asyncio.to_thread(boxes.close)


def _to_batch(batch_id: str, collected: CollectedBatch, box_metrics: Mapping[str, float], model_id: str) -> Batch:
    groups = tuple(
        Group(
            group.group_id,
            group.members[0].env_id,
            task.task_id,
            task.seed,
            tuple(to_scored_sequences(member, model_id) for member in group.members),
        )
        for group, task in zip(collected.groups, collected.tasks, strict=True)
    )
    metrics = {**collected.metrics, **box_metrics}
    rows = [row for group in groups for member in group.members for row in member.sequences]
    metrics["rows"] = float(len(rows))
    metrics["delivered_fraction"] = sum(row.num_loss_tokens for row in rows) / max(metrics["sampled_tokens"], 1.0)
    return Batch(batch_id, groups, collected.live_versions, metrics, collected.data_position)
