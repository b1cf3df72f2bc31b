"""The collector: keeps episodes in flight while the trainer trains, and hands it batches.

Owns the tasks of asyncio in which episodes run, retries, and what is counted. The rules of staleness are the buffer's,
the order of tasks is the schedule's. Law: whatever stops the flow of episodes is said, at the latest when someone
waits for a batch: a dead engine, an environment that always fails, or what each episode is waiting for.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import Counter, deque
from collections.abc import Mapping
from typing import Any

from agentgym.engine.gate import PublishReport, VersionedPolicy
from agentgym.engine.protocol import Probe, WeightUpdate
from agentgym.errors import AgentGymError, EngineDiedError, EngineError, EnvError, InputError, NotNowError, ServiceError
from agentgym.render.protocol import Renderer
from agentgym.rollout.agenda import Agenda
from agentgym.rollout.attempt import Attempt
from agentgym.rollout.batch import CollectedBatch, CollectorSettings, Outside, OutsideTask
from agentgym.rollout.buffer import Discard, DiscardReason, GroupBuffer, ReadyGroup
from agentgym.rollout.cipo import Corrections
from agentgym.rollout.correction import Correction, prove_prompts
from agentgym.rollout.environments import EnvironmentPool
from agentgym.rollout.episode import EpisodePlan, EpisodeProgress, describe_stall, run_episode
from agentgym.rollout.limits import EpisodeLimits
from agentgym.rollout.live_feed import LiveFeed
from agentgym.rollout.sampler import Sampler
from agentgym.rollout.schedule import Schedule
from agentgym.rollout.shares import Shares
from agentgym.rollout.store import TrajectoryStore
from agentgym.rollout.summary import StepCounts, summarize
from agentgym.trajectory import EpisodeStatus, Trajectory, to_sequences

log = logging.getLogger(__name__)
PATIENCE = 32  # so many failures without a single success between them mean that nothing will succeed


class Collector:
    """Collects groups through `policy` in `environments`; all calls on one event loop.

    Example: `collector.collect(True); batch = await collector.take(trainer_version=0, timeout_s=5.0,
    step=1)`.
    """

    def __init__(
        self,
        settings: CollectorSettings,
        environments: EnvironmentPool | None,
        renderer: Renderer,
        policy: VersionedPolicy,
        limits: EpisodeLimits,
        schedule: Schedule | None,
        store: TrajectoryStore,
    ) -> None:
        """`schedule` is None where outside agents play all episodes; then there may be no environments either."""
        self.settings = settings
        self._environments = environments
        self._renderer = renderer
        self._policy = policy
        self._sampler = Sampler(policy)
        self._limits = limits
        corrections = None
        if settings.cipo is not None and environments is not None and schedule is not None:
            prove_prompts(renderer, environments.tools)
            most = settings.cipo.max_original_tokens or limits.max_episode_tokens // 2
            corrections = Corrections(settings.cipo, settings.max_staleness, most)
        self._agenda = Agenda(schedule, corrections)
        self._store = store
        self._buffer = GroupBuffer(
            settings.group_size, settings.groups_per_step, settings.max_staleness,
            drop_zero_variance=settings.drop_zero_variance,
        )  # fmt: skip
        self.feed = LiveFeed(policy)
        self._shares = Shares(self._buffer.most_groups)
        self._outside: Outside | None = None
        self._waiting: deque[Attempt] = deque()
        self._running: dict[asyncio.Task[None], tuple[str, EpisodeProgress]] = {}
        self._collecting = False
        self._closed = False
        self._broken: AgentGymError | None = None
        self._changed = asyncio.Event()
        self._taking = asyncio.Lock()
        self._watchdog: asyncio.Task[None] | None = None
        self._last_end = time.monotonic()
        self._failures_in_a_row = 0
        self._step = StepCounts()  # since the last batch
        self.episodes = 0
        self.failed = 0
        self.sampled_tokens = 0
        self.discarded: Counter[str] = Counter()

    # ------------------------------------------------------------------------------------------------- questions

    @property
    def collecting(self) -> bool:
        return self._collecting

    @property
    def in_flight(self) -> int:
        return len(self._running)

    @property
    def started_groups(self) -> int:
        return self._buffer.num_unconsumed

    @property
    def ready_groups(self) -> int:
        return self._buffer.num_ready

    def live_versions(self) -> tuple[int, ...]:
        """The served version, and those that a buffered or in-flight token carries or may carry."""
        versions = {self._policy.policy_version} | self._buffer.live_versions()
        for _, progress in self._running.values():
            versions |= progress.live_versions()
        if self._outside is not None:
            versions |= self._outside.live_versions()
        return tuple(sorted(versions))

    def waiting_for(self) -> str:
        """What a taker of batches waits for, in one line."""
        if self._broken is not None:
            return str(self._broken)
        ready, needed = self._buffer.num_ready, self.settings.groups_per_step
        sessions = f"; sessions: {self._outside.waiting_for()}" if self._outside else ""
        if not self._agenda.has_schedule:
            return f"{ready} of {needed} groups ready{sessions or '; no sessions'}{self._paused()}"
        phases = Counter(progress.phase for _, progress in self._running.values())
        doing = ", ".join(f"{count} {phase}" for phase, count in phases.most_common()) or "none running"
        idle = f"; none has finished for {quiet:.0f} s" if (quiet := time.monotonic() - self._last_end) > 5 else ""
        episodes = f"episodes: {doing}{idle if self._running else ''}{sessions if self._agenda.num_outside else ''}"
        return f"{ready} of {needed} groups ready; {episodes}{self._alike()}{self._paused()}"

    def _alike(self) -> str:
        count = self._buffer.zero_variance_in_a_row
        return f"; the last {count} groups had members of one score each and were dropped" if count else ""

    def _paused(self) -> str:
        sampling = "; sampling is paused" if self._policy.pause_under_way else ""
        return sampling if self._collecting else f"{sampling}; collecting is paused"

    # ---------------------------------------------------------------------------------------------------- orders

    def collect(self, running: bool) -> None:
        """Starts or stops beginning new groups. Groups that were begun are played to their end either way."""
        self._collecting = running
        if running and self._watchdog is None:
            self._watchdog = asyncio.create_task(self._watch())
        self._last_end = time.monotonic()
        self._fill()

    def restore(self, data_position: Mapping[str, Any]) -> None:
        """Continues a saved data order. Raises InputError once a group was started."""
        if self._agenda.num_groups or self.episodes:
            raise InputError("the data position must be restored before collecting starts")
        self._agenda.restore(data_position)

    async def take(self, trainer_version: int, timeout_s: float, step: int) -> CollectedBatch | None:
        """The next batch, stored as the trajectories of `step`, or None if there is none within `timeout_s`.

        Raises what keeps episodes from being collected, and CheckpointError if the trajectories cannot be written.
        """
        deadline = time.monotonic() + timeout_s
        async with self._taking:
            while True:
                self._changed.clear()
                taken = self._buffer.take(self.settings.groups_per_step, trainer_version)
                for discard in taken.discarded:
                    self._discard(discard)
                if taken.groups is not None:
                    return self._hand_over(taken.groups, trainer_version, step)
                if self._broken is not None:
                    raise self._broken
                self._fill()
                if not self._agenda.has_schedule:
                    await self._check_engine()
                if self._closed:
                    raise ServiceError("the rollout service is ending")
                left = deadline - time.monotonic()
                if left <= 0:
                    return None
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._changed.wait(), left)

    async def _check_engine(self) -> None:
        """Raises EngineDiedError: no episode of ours would notice."""
        try:
            await self._policy.engine.stats()
        except EngineDiedError as error:
            self._break(error)
            raise
        except EngineError as error:
            log.warning("the engine does not say how it is: %s", error)

    async def publish(self, update: WeightUpdate, probe: Probe | None = None) -> PublishReport:
        """Serves new weights; the batch in training is consumed by that."""
        report = await self._policy.publish(update, probe=probe)
        self._buffer.publish()
        self._fill()
        return report

    # ---------------------------------------------------------------------------------- episodes played by others

    def attach(self, outside: Outside) -> None:
        """Whose episodes come through `begin_outside`, `put` and `put_failed`."""
        self._outside = outside

    def begin_outside(self, group_id: str, task_id: str, seed: int) -> None:
        """A group that outside agents play, under the rules of every other. Raises NotNowError while it must not
        begin: whoever asks again later gets in."""
        if not self._collecting or self._closed:
            raise NotNowError("collecting is paused: the trainer has not begun, or is done; open a session later")
        shares = self._agenda.has_schedule
        if not self._buffer.may_start or (shares and not self._shares.may_open(self._agenda.num_outside)):
            self._shares.refused()
            raise NotNowError(
                f"{self._buffer.num_unconsumed} groups are started and not trained on yet, as many as "
                "rollout.max_staleness allows; finish those that are open, or open a session later"
            )
        self._buffer.start(group_id, self._policy.policy_version, awaited=False)
        self._agenda.begin_outside(group_id, OutsideTask(task_id, seed))

    def put(self, trajectory: Trajectory) -> None:
        """An episode that ended with a score."""
        self._count(trajectory)
        self._put(trajectory)

    def put_failed(self, trajectory: Trajectory) -> None:
        """An episode that ended without a score: counted and stored, and no member of its group."""
        self._count(trajectory)
        self.failed += 1
        self._step.failed += 1
        log.warning("episode %s failed: %s", trajectory.trajectory_id, trajectory.error)
        self.feed.forget([trajectory.trajectory_id])
        self._store.put(trajectory)

    def keep(self, trajectory: Trajectory) -> None:
        """An episode that is not trained on, for the trajectories on disk."""
        self._store.append(trajectory)

    def is_too_old(self, group_id: str) -> bool:
        """As GroupBuffer.is_too_old, for the version served now."""
        return self._buffer.is_too_old(group_id, self._policy.policy_version)

    def give_up(self, group_id: str, reason: DiscardReason, detail: str) -> None:
        """A group that nobody will complete."""
        self._discard(self._buffer.give_up(group_id, reason, detail))
        self._changed.set()

    def _count(self, trajectory: Trajectory) -> None:
        self._last_end = time.monotonic()
        self.episodes += 1
        self.sampled_tokens += trajectory.num_sampled_tokens
        self._step.sampled_tokens += trajectory.num_sampled_tokens

    def end_waiting(self) -> None:
        """Nothing begins any more, and whoever waits for a batch is told so."""
        self._closed = True
        self._collecting = False
        self._waiting.clear()
        self._changed.set()

    async def close(self) -> None:
        """Ends all episodes; their environments are closed."""
        self.end_waiting()
        tasks = [*self._running, *([self._watchdog] if self._watchdog else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # -------------------------------------------------------------------------------------------------- episodes

    def _fill(self) -> None:
        while len(self._running) < self.settings.in_flight and self._broken is None and not self._closed:
            if not self._waiting and not self._begin_group():
                return
            self._start(self._waiting.popleft())

    def _begin_group(self) -> bool:
        if not self._agenda.has_schedule or not self._collecting or not self._buffer.may_start:
            return False
        if not self._shares.may_play(self._agenda.num_groups - self._agenda.num_outside):
            return False
        task = self._agenda.begin(self._policy.policy_version)
        self._buffer.start(task.group_id, self._policy.policy_version)
        self._waiting.extend(Attempt(task, task.group_id, member) for member in range(self.settings.group_size))
        return True

    def _start(self, attempt: Attempt) -> None:
        plan = attempt.plan(self.settings)
        progress = EpisodeProgress(lambda: self._policy.policy_version)
        self.feed.begin(plan.trajectory_id, attempt.group_id)
        task = asyncio.create_task(self._play(attempt, plan, progress))
        self._running[task] = (plan.trajectory_id, progress)
        task.add_done_callback(self._reap)

    async def _play(self, attempt: Attempt, plan: EpisodePlan, progress: EpisodeProgress) -> None:
        assert self._environments is not None  # there is a schedule
        trajectory = await run_episode(plan, self._environments, self._renderer, self._sampler, self._limits, progress)
        self._count(trajectory)
        if trajectory.status is EpisodeStatus.FAILED:
            progress.enter("recovering from a failure")
            await self._fail(attempt, trajectory)
        else:
            self._failures_in_a_row = 0
            self._put(trajectory)

    async def _fail(self, attempt: Attempt, trajectory: Trajectory) -> None:
        """Counts and keeps a failed episode, and tries it again unless it was tried often enough."""
        self.failed += 1
        self._step.failed += 1
        self._failures_in_a_row += 1
        self.feed.forget([trajectory.trajectory_id])
        log.warning("episode %s failed: %s", trajectory.trajectory_id, trajectory.error)
        self._store.put(trajectory)
        if self._sampler.death is not None:
            self._break(self._sampler.death)
            return
        if self._failures_in_a_row >= max(PATIENCE, 2 * self.settings.group_size):
            failures = f"{self._failures_in_a_row} episodes in a row failed"
            self._break(EnvError(f"{failures}; the last one: {trajectory.error}"))
            return
        await asyncio.sleep(min(0.05 * 2 ** min(self._failures_in_a_row, 8), 5.0))  # a daemon may be restarting
        if attempt.retry < self.settings.max_retries:
            self._step.retried += 1
            self._waiting.appendleft(attempt.again())
        else:
            self._put(trajectory)

    def _put(self, trajectory: Trajectory) -> None:
        if trajectory.status is not EpisodeStatus.FAILED:
            self.feed.end(trajectory.trajectory_id, trajectory.group_id, to_sequences(trajectory))
        discard = self._buffer.put(trajectory, self._policy.policy_version)
        self._agenda.see(trajectory, self._buffer.ready(trajectory.group_id))
        if discard is not None:
            self._discard(discard)
        self._changed.set()

    def _discard(self, discard: Discard) -> None:
        asked_for = discard.reason is DiscardReason.ZERO_VARIANCE
        level = logging.DEBUG if asked_for else logging.WARNING
        log.log(level, "group %s discarded (%s): %s", discard.group_id, discard.reason.value, discard.detail)
        if asked_for and self._buffer.zero_variance_in_a_row >= max(PATIENCE, 10 * self.settings.groups_per_step):
            self._break(
                EnvError(
                    f"{self._buffer.zero_variance_in_a_row} groups in a row had members of one score (the last: "
                    f"{discard.detail}): this policy learns nothing from these tasks; choose easier or harder ones, or "
                    "set rollout.drop_zero_variance = false"
                )
            )
        self.discarded[discard.reason.value] += 1
        self._step.discarded[discard.reason.value] += 1
        self.feed.forget_group(discard.group_id)
        self._agenda.settle(discard.group_id)

    def _reap(self, task: asyncio.Task[None]) -> None:
        trajectory_id, _ = self._running.pop(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            wrong = error if isinstance(error, AgentGymError) else EnvError(f"{type(error).__name__}: {error}")
            log.error("the collector broke at %s", trajectory_id, exc_info=error)
            self._break(wrong)
        self._fill()

    def _break(self, error: AgentGymError) -> None:
        self._broken = self._broken or error
        self._changed.set()

    def _hand_over(self, groups: tuple[ReadyGroup, ...], trainer_version: int, step: int) -> CollectedBatch:
        for group in groups:
            for member in group.members:
                self._store.put(member)
        self._store.write(step)
        self.feed.forget(member.trajectory_id for group in groups for member in group.members)
        tasks = tuple(self._agenda.settle(group.group_id) for group in groups)
        counts, self._step = self._step, StepCounts()
        self._fill()
        outside, revised = (
            [group for group, task in zip(groups, tasks, strict=True) if isinstance(task, kind)]
            for kind in (OutsideTask, Correction)
        )
        metrics = summarize(groups, trainer_version, counts, outside, revised) | self._agenda.figures(tasks, groups)
        return CollectedBatch(groups, tasks, metrics, self.live_versions(), self._agenda.position())

    async def _watch(self) -> None:
        """Says in the log what every episode waits for when none has finished for too long."""
        while True:
            await asyncio.sleep(self.settings.stall_warning_s / 2)
            quiet_s = time.monotonic() - self._last_end
            if self._running and quiet_s >= self.settings.stall_warning_s:
                log.warning("%s", describe_stall(list(self._running.values()), quiet_s))
