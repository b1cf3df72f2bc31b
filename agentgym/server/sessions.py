"""Sessions: episodes that outside agents play through the OpenAI surface, from their opening to the buffer.

Laws: whatever a session's agent samples becomes turns of its one trajectory; a session ends once, and says how
(finished, abandoned, expired), and only a finished one has a score. Who opened it says what it earned: the agent's own
bearer cannot. Must never know HTTP.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import secrets
import time
from collections import Counter, OrderedDict
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from agentgym.errors import CheckpointError, InputError, NotNowError
from agentgym.render import ChatTemplateRenderer
from agentgym.rewards import Score
from agentgym.rollout.collector import Collector
from agentgym.rollout.intake import Declared, Intake
from agentgym.rollout.recording import RecordedPrompt, Recording
from agentgym.server.replies import Exchange, Question, Reply, is_long
from agentgym.server.sessions_errors import (
    SessionBusyError,
    SessionEndedError,
    SessionLimitError,
    UnknownSessionError,
    UntrainableError,
)
from agentgym.server.sessions_retries import Asked, Retries
from agentgym.server.settings import OUTSIDE, SessionsSection
from agentgym.trajectory import EpisodeStatus, Trajectory

log = logging.getLogger(__name__)
SWEEP_S = 1.0  # between two looks for sessions whose time is up
KEPT_ENDED = 1024  # ended sessions that can still be asked about
BUSY_LOOKS, LOOK_S = 100, 0.02  # how long the end of a session waits for the answers to its last requests


class SessionState(StrEnum):
    OPEN = "open"
    FINISHED = "finished"
    ABANDONED = "abandoned"  # by whoever opened it
    EXPIRED = "expired"  # nobody finished it in its time


@dataclass(frozen=True, slots=True)
class SessionLimits:
    """What one session may use. Example: `SessionLimits(max_turns=50, max_tokens=20_000, ttl_s=600.0, idle_s=60.0)`."""

    max_turns: int
    max_tokens: int  # sampled ones, of all turns together
    ttl_s: float
    idle_s: float


@dataclass(frozen=True, slots=True)
class SessionView:
    """A session as its own agent, or whoever opened it, may see it.

    Example: `SessionView("ses-000004", SessionState.OPEN, "maze-17", 3, "", "s-000001", True, turns=4, ...)`.
    """

    session_id: str
    state: SessionState
    task_id: str
    seed: int
    group: str
    group_id: str | None  # None: not trained on
    trains: bool
    turns: int
    undelivered: int
    sampled_tokens: int
    links: Mapping[str, int]  # turns by how they hang together
    left_s: float
    score: Score | None


class Session:
    """One recorded episode. It is the Conversation of its agent's requests."""

    def __init__(
        self,
        session_id: str,
        declared: Declared,
        group_id: str | None,
        limits: SessionLimits,
        renderer: ChatTemplateRenderer,
        temperature: float | None,
        served: Callable[[], int],
    ) -> None:
        self.session_id: str | None = session_id
        self.name = session_id
        self.declared = declared
        self.group_id = group_id
        self.limits = limits
        self.recording = Recording(renderer)
        self.state = SessionState.OPEN
        self.score: Score | None = None
        self.began = time.monotonic()
        self._last_asked = self.began
        self._temperature = temperature  # None: any
        self._served = served
        self._retries = Retries()
        self._under_way: dict[int, int] = {}  # requests being sampled -> the version served when they began
        self._numbers = itertools.count()

    @property
    def num_under_way(self) -> int:
        return len(self._under_way)

    @property
    def left_s(self) -> float:
        """Until it expires; while its agent is being answered, it is not idle."""
        idle = float("inf") if self._under_way else self._last_asked + self.limits.idle_s
        return max(0.0, min(self.began + self.limits.ttl_s, idle) - time.monotonic())

    def live_versions(self) -> set[int]:
        """Versions of the tokens sampled so far; of those being sampled, every one they may hold."""
        first = min(self._under_way.values(), default=self._served() + 1)
        return self.recording.live_versions().union(range(first, self._served() + 1))

    @contextlib.asynccontextmanager
    async def ask(self, question: Question) -> AsyncIterator[Exchange]:
        """As Conversation.ask. Raises SessionEndedError, SessionLimitError and UntrainableError."""
        self.check_open()
        self._check_trainable(question)
        number = next(self._numbers)
        async with self._retries.ask(question) as asked:
            if not asked.known:
                self._check_limits(question)
            self._under_way[number] = self._served()
            try:
                if not asked.known:
                    asked.prompt = await self._prompt(question)
                yield _Recorded(self, asked, self._tokens_left(question))
            finally:
                del self._under_way[number]
                self._last_asked = time.monotonic()

    async def _prompt(self, question: Question) -> RecordedPrompt:
        if not is_long(question.messages):
            return self.recording.prompt(question.messages, question.tools)
        return await asyncio.to_thread(self.recording.prompt, question.messages, question.tools)

    def view(self) -> SessionView:
        recording = self.recording
        return SessionView(
            self.name,
            self.state,
            self.declared.task_id,
            self.declared.seed,
            self.declared.group,
            self.group_id,
            self.group_id is not None,
            recording.num_turns,
            recording.num_undelivered,
            recording.num_sampled_tokens,
            dict(Counter(link.value for link in recording.links())),
            self.left_s if self.state is SessionState.OPEN else 0.0,
            self.score,
        )

    def trajectory(self, status: EpisodeStatus, error: str | None) -> Trajectory:
        turns = self.recording.turns()
        seconds = time.monotonic() - self.began
        metrics = {
            "turns": float(len(turns)), "seconds": seconds, "env_s": 0.0, "sampling_s": 0.0, "tool_errors": 0.0,
            "undelivered": float(self.recording.num_undelivered),
        }  # fmt: skip
        metrics |= {f"link_{name}": float(count) for name, count in self.view().links.items()}
        return Trajectory(
            self.name, self.group_id or self.name, OUTSIDE, self.declared.task_id, self.declared.seed,
            self.recording.opening(), turns, status, self.score, metrics, error,
        )  # fmt: skip

    def check_open(self) -> None:
        """Raises SessionEndedError."""
        if self.state is not SessionState.OPEN:
            raise SessionEndedError(f"session {self.name} is {self.state.value}; open another one")
        if self.left_s == 0.0:
            raise SessionEndedError(f"session {self.name} is {SessionState.EXPIRED.value}; open another one")

    def _check_trainable(self, question: Question) -> None:
        if self._temperature is not None and question.sampling.temperature != self._temperature:
            raise UntrainableError(
                "temperature",
                f"this session trains a policy that acts at temperature {self._temperature:g}, got "
                f"{question.sampling.temperature:g}; send temperature={self._temperature:g}",
            )
        if self._temperature is not None and question.sampling.stop:
            raise UntrainableError(
                "stop", "stop strings cut a reply's text, not its tokens; this session trains on both"
            )

    def _check_limits(self, question: Question) -> None:
        turns = self.recording.num_turns + self.num_under_way + question.sampling.n
        if turns > self.limits.max_turns:
            raise SessionLimitError(f"session {self.name} has used its {self.limits.max_turns} turns; finish it")
        if self._tokens_left(question) < 1:
            sampled, most = self.recording.num_sampled_tokens, self.limits.max_tokens
            raise SessionLimitError(f"session {self.name} has sampled {sampled} tokens of {most}; finish it")

    def _tokens_left(self, question: Question) -> int:
        """For each of its replies."""
        return (self.limits.max_tokens - self.recording.num_sampled_tokens) // question.sampling.n


class _Recorded:
    """An Exchange of a session."""

    def __init__(self, session: Session, asked: Asked, left: int) -> None:
        self._session = session
        self._asked = asked
        self.known = asked.known
        self.left: int | None = left
        self.prompt_ids: Sequence[int] = (
            self.known[0].prompt_ids if self.known else asked.prompt.token_ids if asked.prompt else ()
        )

    def record(self, replies: Sequence[Reply]) -> None:
        """As Exchange.record. Raises SessionEndedError if the session ended meanwhile."""
        self._session.check_open()
        asked = self._asked
        assert asked.prompt is not None
        recording = self._session.recording
        asked.numbers = tuple(recording.add(asked.prompt, reply.completion, reply.message) for reply in replies)
        asked.known = tuple(replies)

    def deliver(self) -> None:
        """As Exchange.deliver."""
        self._asked.delivered = True
        for number in self._asked.numbers:
            self._session.recording.deliver(number)


class Sessions:
    """All sessions of a service.

    >>> session = sessions.open(Declared("maze-17", 3))
    >>> await sessions.finish(session.name, {"reached": 1.0})
    """

    def __init__(
        self, settings: SessionsSection, collector: Collector, renderer: ChatTemplateRenderer,
        served: Callable[[], int], trains: bool,
    ) -> None:  # fmt: skip
        self.settings = settings
        self.trains = trains
        self.ended: Counter[str] = Counter()  # by state
        self.on_forget: Callable[[str], None] = lambda session_id: None
        self._collector = collector
        self._renderer = renderer
        self._served = served
        self._intake = Intake(collector, settings.group_ttl_s)
        self._open: dict[str, Session] = {}
        self._over: OrderedDict[str, SessionView] = OrderedDict()  # without their tokens, which the buffer has
        self._numbers = itertools.count()
        self._sweeper: asyncio.Task[None] | None = None
        collector.attach(self)

    # ------------------------------------------------------------------------------------------------- questions

    @property
    def num_open(self) -> int:
        return len(self._open)

    def get(self, session_id: str) -> Session:
        """An open session. Raises UnknownSessionError and SessionEndedError."""
        session = self._open.get(session_id)
        if session is None:
            raise SessionEndedError(f"session {session_id} is {self.view(session_id).state.value}; open another one")
        session.check_open()
        return session

    def view(self, session_id: str) -> SessionView:
        """A session that is open, or has ended not too long ago. Raises UnknownSessionError."""
        if session_id in self._open:
            return self._open[session_id].view()
        if session_id not in self._over:
            raise UnknownSessionError(f"there is no session {session_id!r}")
        return self._over[session_id]

    def live_versions(self) -> set[int]:
        """As Outside.live_versions."""
        return {version for session in self._open.values() if session.group_id for version in session.live_versions()}

    def waiting_for(self) -> str:
        """As Outside.waiting_for."""
        return self._intake.waiting_for()

    # ---------------------------------------------------------------------------------------------------- orders

    def open(
        self,
        declared: Declared,
        *,
        ttl_s: float | None = None,
        max_turns: int | None = None,
        max_tokens: int | None = None,
    ) -> Session:
        """Begins an episode; limits may be lower than the configured ones. Raises NotNowError where there are too many
        or the buffer takes no more."""
        most = self.settings
        if len(self._open) >= most.max_open:
            raise NotNowError(f"{len(self._open)} sessions are open, as many as sessions.max_open allows; finish some")
        limits = SessionLimits(
            min(max_turns or most.max_turns, most.max_turns),
            min(max_tokens or most.max_tokens, most.max_tokens),
            min(ttl_s or most.ttl_s, most.ttl_s),
            most.idle_s,
        )
        name = f"ses-{next(self._numbers):06d}-{secrets.token_hex(4)}"
        group_id = self._intake.open(name, declared) if self.trains else None
        exact = self.trains and not most.any_temperature
        temperature = self._collector.settings.temperature if exact else None
        session = Session(name, declared, group_id, limits, self._renderer, temperature, self._served)
        self._open[name] = session
        if self._sweeper is None:
            self._sweeper = asyncio.create_task(self._sweep())
        return session

    async def finish(
        self, session_id: str, components: Mapping[str, float], *, truncated: bool = False, invalid: str | None = None
    ) -> SessionView:
        """Ends an episode with what it earned; `invalid` says why nobody knows that. Raises InputError for what is no
        reward, SessionEndedError, and SessionBusyError while its agent is still being answered."""
        session = self.get(session_id)
        score = Score.of(components) if invalid is None else Score.invalid(invalid)
        if not components and invalid is None:
            raise InputError("components must name at least one reward, or `invalid` say why there is none")
        if invalid is None and not score.valid:
            raise InputError(score.why)
        for _ in range(BUSY_LOOKS):  # a client that hung up is noticed in a moment, unless all this stands still
            if session.num_under_way:
                await asyncio.sleep(LOOK_S)
        self.get(session_id)
        if session.num_under_way:
            raise SessionBusyError(f"{session.num_under_way} requests of session {session_id} are still being answered")
        if not session.recording.turns():
            raise InputError(f"session {session_id} has no turns to train on; end it with DELETE instead")
        session.score = score
        status = EpisodeStatus.TRUNCATED if truncated else EpisodeStatus.TERMINATED
        self._end(session, SessionState.FINISHED, session.trajectory(status, None))
        return self.view(session_id)

    def abandon(self, session_id: str) -> SessionView:
        """Ends an episode without a score. Raises SessionEndedError."""
        session = self.get(session_id)
        self._end_unscored(session, SessionState.ABANDONED, "abandoned by whoever opened it")
        return self.view(session_id)

    def expire(self) -> None:
        """Ends the sessions whose time is up, and gives up groups that nobody completes."""
        try:
            for session in [session for session in self._open.values() if session.left_s == 0.0]:
                limits = session.limits
                why = f"not finished within {limits.ttl_s:g} s, or nothing asked for {limits.idle_s:g} s"
                self._end_unscored(session, SessionState.EXPIRED, why)
        except CheckpointError as error:  # a full disk may have room in a moment: until then they stay as they are
            log.error("a session cannot be ended: %s", error)
        self._intake.sweep()

    async def close(self) -> None:
        """Ends the watch over sessions; those that are open end with the service."""
        if self._sweeper is not None:
            self._sweeper.cancel()
            await asyncio.gather(self._sweeper, return_exceptions=True)

    # ----------------------------------------------------------------------------------------------------- parts

    def _end_unscored(self, session: Session, state: SessionState, why: str) -> None:
        error = f"Session{state.value.capitalize()}: {why}"
        session.score = None  # of a finish that could not be written
        self._end(session, state, session.trajectory(EpisodeStatus.FAILED, error))

    def _end(self, session: Session, state: SessionState, trajectory: Trajectory) -> None:
        if session.group_id is None:
            self._collector.keep(trajectory)  # first: where the disk does not take it, the session is not over
        session.state = state
        del self._open[session.name]
        self._over[session.name] = session.view()
        self.ended[state.value] += 1
        if session.group_id is not None:
            (self._intake.fail if trajectory.score is None else self._intake.finish)(session.name, trajectory)
        while len(self._over) > KEPT_ENDED:
            self.on_forget(self._over.popitem(last=False)[0])

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(SWEEP_S)
            self.expire()
