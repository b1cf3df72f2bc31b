"""The `old_logit_model` route: a separate scorer follows the served version and scores tokens as they arrive, while the
trainer trains. Must never know the loss or a batch's rows beyond their tokens.

Laws: what the scorer was given and has not answered is kept, so that its death loses nothing; the queue in front of it
is bounded, since the feed is read only while there is room; every version that something in the queue needs is named to
the log's keeper; and whoever waits for records is told which, and not for ever.

Two threads work beside the trainer: one reads the feed, one talks to the scorer. A token is given to the scorer once no
more of its version can follow in its row (the episode ended, or a newer version is served): one forward for each row
and version. What a batch still lacks goes to the front.
"""

from __future__ import annotations

import contextlib
import itertools
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Protocol

from agentgym.errors import AgentGymError, TrainingError
from agentgym.server.wire import FeedPage
from agentgym.trajectory import ScoredSequences, TokenSequence
from agentgym_trainer.anchors.followed import FOR_A_BATCH, Followed, Passage, lacking
from agentgym_trainer.anchors.records import MissingLogprobsError, OldLogprobs, RecordStore
from agentgym_trainer.anchors.scorer_settings import Answer, Job, ScorerSettings

QUEUE_TOKENS = 262_144  # the scorer may be behind by so many
JOB_TOKENS = 32_768  # of the passages in one job
POLL_S = 0.1
MAX_DEATHS = 3  # in a row, without an answer in between
START_S = 180.0
LOG_LINES = 15

OnWait = Callable[[str], None]


class Feeding(Protocol):
    """What is asked of the rollout service: `agentgym.server.client.ServiceClient`."""

    def feed(self, cursor: int = 0, max_tokens: int = 65_536) -> FeedPage: ...

    def another(self) -> contextlib.AbstractContextManager[Feeding]: ...


class OldLogitModel:
    """The scorer process, its queue and its records; lives beside rank 0. The process starts with the context, its
    work with `follow`."""

    def __init__(
        self, settings: ScorerSettings, log: Path, *, queue_tokens: int = QUEUE_TOKENS, poll_s: float = POLL_S
    ) -> None:
        self._settings = settings
        self._log = log
        self._queue_tokens = queue_tokens
        self._poll_s = poll_s
        self._changed = threading.Condition()  # guards all below
        self._records = RecordStore()
        self._followed = Followed(self._records)
        self._queue: deque[Passage] = deque()
        self._queued_tokens = 0
        self._sent: Job | None = None
        self._batch: dict[str, Sequence[TokenSequence]] = {}  # the rows of the batch being awaited
        self._generations: dict[str, int] = {}  # where not 0
        self._unscorable: dict[tuple[str, int, int], str] = {}  # trajectory, row, version -> why
        self._failure: AgentGymError | None = None
        self._closing = False
        self._numbers = itertools.count()
        self._figures = dict.fromkeys(("recorded_tokens", "scored_tokens", "scorer_s", "scorer_restarts"), 0.0)
        self._deaths = 0
        self._stall_s = self._full_s = 0.0
        self._process: subprocess.Popen[bytes] | None = None
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> OldLogitModel:
        self._start(self._serve)
        return self

    def follow(self, client: Feeding) -> None:
        """Reads the feed of the rollout service from now on."""
        self._start(lambda: self._follow(client))

    def _start(self, work: Callable[[], None]) -> None:
        """A thread, of whose end the waiter hears, whatever ends it: nothing is waited for that nobody does."""

        def run() -> None:
            try:
                work()
            except AgentGymError as error:
                self._fail(error)
            except BaseException as error:
                self._fail(TrainingError(f"what follows or feeds the scorer ended by {type(error).__name__}: {error}"))
                raise

        thread = threading.Thread(target=run, daemon=True)
        self._threads.append(thread)
        thread.start()

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    @property
    def pid(self) -> int | None:
        """The scorer's process now."""
        return None if self._process is None else self._process.pid

    # ----------------------------------------------------------------------------------- called by whoever trains

    def needed_versions(self) -> set[int]:
        """The versions that what is queued or being scored needs."""
        with self._changed:
            return {passage.version for passage in self._under_way()}

    def collect(
        self, trajectories: Sequence[ScoredSequences], known_version: int | None, timeout_s: float,
        on_wait: OnWait | None = None, *, may_lack: bool = False,
    ) -> tuple[OldLogprobs, ...]:  # fmt: skip
        """The records of a batch, waited for; tokens of `known_version` need none. Records of trajectories that can
        be in no later batch are dropped.

        Raises MissingLogprobsError for tokens that could not be scored (unless they `may_lack`), TrainingError at the
        deadline, naming what it waits for, and what keeps the scorer from working.
        """
        began = time.monotonic()
        names = frozenset(trajectory.trajectory_id for trajectory in trajectories)
        with self._changed:
            self._batch = {trajectory.trajectory_id: trajectory.sequences for trajectory in trajectories}
            said = began
            while wanted := self._request(trajectories, known_version):
                if not may_lack and (unscorable := next(filter(None, map(self._why_not, wanted)), None)):
                    raise MissingLogprobsError(unscorable)
                if all(self._why_not(passage) for passage in wanted):
                    break
                self._check()
                waited_s = time.monotonic() - began
                if waited_s >= timeout_s:
                    raise TrainingError(f"waited {waited_s:.0f} s in vain for {self._describe(wanted)}")
                if on_wait is not None and time.monotonic() - said >= 5.0:
                    said = time.monotonic()
                    on_wait(self._describe(wanted))
                self._changed.wait(min(1.0, timeout_s - waited_s))
            self._check()
            records = self._records.of(names)
            live = self._followed.live - names
            self._records.keep_only(live)
            self._generations = {name: known for name, known in self._generations.items() if name in live}
            self._batch = {}
            self._stall_s = time.monotonic() - began
        return records

    def metrics(self) -> dict[str, float]:
        """Counts since the last call, and how things stand."""
        with self._changed:
            counts = {f"anchor/{name}": value for name, value in self._figures.items()}
            for name in ("recorded_tokens", "scored_tokens", "scorer_s"):
                self._figures[name] = 0.0
            full_s, self._full_s = self._full_s, 0.0
            return counts | {
                "anchor/queue_tokens": float(self._queued_tokens),
                "anchor/queue_depth": float(len(self._queue)),
                "anchor/queue_full_s": full_s,
                "anchor/kept_tokens": float(self._records.num_tokens),
                "anchor/stall_s": self._stall_s,
            }

    def _request(self, trajectories: Sequence[ScoredSequences], known_version: int | None) -> list[Passage]:
        """What the batch lacks, all of it at the front of the queue or being scored."""
        wanted = [
            passage for trajectory in trajectories for passage in lacking(self._records, trajectory, known_version)
        ]
        self._drop_queued(lambda passage: passage.trajectory_id in self._batch)
        answering = (
            {_place(passage) for passage in self._sent.passages if self._is_wanted(passage)} if self._sent else ()
        )
        front = [p for p in wanted if _place(p) not in answering and not self._why_not(p)]
        self._put(sorted(front, key=lambda passage: -passage.version), first=True)
        return wanted

    def _why_not(self, passage: Passage) -> str | None:
        return self._unscorable.get(_place(passage))

    def _describe(self, wanted: Sequence[Passage]) -> str:
        versions = sorted({passage.version for passage in wanted})
        scorer = f"process {self.pid}" if self.pid else "starting"
        return (
            f"old logprobs of {sum(passage.num_wanted for passage in wanted)} tokens in {len(wanted)} rows, versions "
            f"{versions}, from the scorer ({scorer}; {len(self._queue)} passages queued; log: {self._log})"
        )

    def _check(self) -> None:
        if self._failure is not None:
            raise self._failure

    # --------------------------------------------------------------------------------------- the feed, in a thread

    def _follow(self, service: Feeding) -> None:
        with service.another() as client:
            while not self._closing:
                page = client.feed(self._followed.cursor)
                with self._changed:
                    self._followed.apply(page)
                    for piece in page.pieces:
                        if piece.generation:
                            self._generations[piece.trajectory_id] = piece.generation
                    if page.live is None:  # more of the same version may follow, and it is scored in one piece
                        continue
                    self._forget_gone()
                    self._hand_out(page.policy_version)
                    self._changed.wait_for(lambda: self._closing, self._poll_s)

    def _hand_out(self, served: int) -> None:
        """Everything that is ready to be scored, as there is room for it."""
        while not self._closing:
            if self._queued_tokens >= self._queue_tokens:
                began = time.monotonic()
                self._changed.wait_for(lambda: self._closing or self._queued_tokens < self._queue_tokens)
                self._full_s += time.monotonic() - began
                continue
            passages = self._followed.take(below=served, most_tokens=self._queue_tokens - self._queued_tokens)
            if not passages:
                return
            self._put([passage for passage in passages if passage.trajectory_id not in self._batch])

    def _forget_gone(self) -> None:
        """What nobody can ask for any more needs no scoring. Records stay until a batch was collected: a trajectory
        leaves the feed a moment before the batch that it is in arrives."""
        live = self._followed.live | self._batch.keys()
        self._drop_queued(lambda passage: passage.trajectory_id not in live)
        self._unscorable = {place: why for place, why in self._unscorable.items() if place[0] in live}

    def _drop_queued(self, unwanted: Callable[[Passage], bool]) -> None:
        self._queue = deque(passage for passage in self._queue if not unwanted(passage))
        self._queued_tokens = sum(passage.num_tokens for passage in self._queue)

    def _put(self, passages: Sequence[Passage], first: bool = False) -> None:
        if first:
            self._queue.extendleft(reversed(passages))
        else:
            self._queue.extend(passages)
        self._queued_tokens += sum(passage.num_tokens for passage in passages)
        self._changed.notify_all()

    # -------------------------------------------------------------------------------------- the scorer, in a thread

    def _serve(self) -> None:
        try:
            while not self._closing:
                try:
                    self._serve_one_process()
                except (EOFError, ConnectionError):
                    self._note_death()
        finally:
            if self._process is not None:
                self._process.kill()
                self._process.wait()

    def _serve_one_process(self) -> None:
        """Jobs and answers in turn until the process dies (EOFError, ConnectionError) or this ends."""
        with self._started() as connection:
            self._take(self._answer(connection, time.monotonic() + START_S))
            while not self._closing:
                job = self._next_job()
                if job is None:
                    if connection.poll():
                        connection.recv()  # nothing is owed: this is the end of the stream
                    continue
                connection.send(job)
                self._take(self._answer(connection, None))

    def _started(self) -> Connection:
        ours, theirs = socket.socketpair()
        command = [sys.executable, "-m", "agentgym_trainer.anchors.scorer_process", "--fd", str(theirs.fileno())]
        try:
            with theirs, self._log.open("ab") as log:
                self._process = subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, pass_fds=(theirs.fileno(),),
                    start_new_session=True,  # Ctrl-C is the trainer's; the scorer ends when its connection does
                )  # fmt: skip
        except OSError as error:
            ours.close()
            raise TrainingError(f"the scorer process cannot be started: {error}") from error
        connection = Connection(ours.detach())
        connection.send(self._settings)
        return connection

    def _next_job(self) -> Job | None:
        """The first passages of the queue that are of one version; None after a while without any."""
        with self._changed:
            if self._sent is None and not self._queue:
                self._changed.wait_for(lambda: self._closing or bool(self._queue), self._poll_s)
            if self._sent is None and self._queue and not self._closing:
                self._sent = Job(next(self._numbers), tuple(self._cut_job()))
                self._changed.notify_all()  # there is room
            return self._sent

    def _cut_job(self) -> Iterable[Passage]:
        version, size, others = self._queue[0].version, 0, []
        chosen: list[Passage] = []
        while self._queue and size < JOB_TOKENS:
            passage = self._queue.popleft()
            if passage.version == version:
                chosen.append(passage)
                size += passage.num_tokens
            else:
                others.append(passage)
        self._queue.extendleft(reversed(others))
        self._queued_tokens -= size
        return chosen

    def _answer(self, connection: Connection, deadline: float | None) -> Answer | None:
        """None if this ends meanwhile."""
        while not connection.poll(self._poll_s):
            if self._closing:
                return None
            if deadline is not None and time.monotonic() >= deadline:
                raise TrainingError(f"the scorer process was not ready within {START_S:.0f} s\n{self._tail()}")
        return connection.recv()

    def _take(self, answer: Answer | None) -> None:
        if answer is None:
            return
        with self._changed:
            if answer.fault is not None and (answer.number < 0 or answer.fault.kind != "VersionError"):
                raise TrainingError(f"the scorer cannot score: {answer.fault.message}")
            if answer.number < 0:  # it is ready; what a forerunner owed is asked again
                return
            self._deaths = 0
            job, self._sent = self._sent, None
            assert job is not None, "an answer comes to what was asked"
            valid = [passage for passage in job.passages if self._is_wanted(passage)]
            places = {(passage.trajectory_id, passage.row) for passage in valid}
            if answer.fault is not None:
                for passage in valid:
                    self._unscorable[_place(passage)] = _unscored(passage, answer.fault.message)
            for record in answer.records:
                if (record.trajectory_id, record.row) in places and self._records.add(record):
                    self._figures["recorded_tokens"] += record.stop - record.start
            self._figures["scored_tokens"] += answer.num_forwarded
            self._figures["scorer_s"] += answer.seconds
            self._changed.notify_all()

    def _is_wanted(self, passage: Passage) -> bool:
        """Whether a passage is of a row as it is now: not of a generation that ended meanwhile."""
        rows = self._batch.get(passage.trajectory_id)
        if rows is not None:
            place, length = passage.row, passage.num_tokens
            return place < len(rows) and rows[place].token_ids[:length] == passage.token_ids
        return passage.generation in (FOR_A_BATCH, self._generations.get(passage.trajectory_id, 0))

    def _note_death(self) -> None:
        assert self._process is not None
        code = self._process.wait()
        with self._changed:
            if self._closing:
                return
            self._deaths += 1
            self._figures["scorer_restarts"] += 1
            if self._deaths >= MAX_DEATHS:
                how = f"signal {-code}" if code < 0 else f"exit code {code}"
                raise TrainingError(
                    f"the scorer process died {self._deaths} times in a row without an answer, last by {how}\n"
                    f"{self._tail()}"
                )

    def _tail(self) -> str:
        lines = self._log.read_text(encoding="utf-8", errors="replace").splitlines()[-LOG_LINES:]
        return "\n".join([f"end of {self._log}:", *lines])

    def _fail(self, error: AgentGymError) -> None:
        with self._changed:
            if not self._closing:
                self._failure = self._failure or error
            self._changed.notify_all()

    def _under_way(self) -> list[Passage]:
        return [*self._queue, *(self._sent.passages if self._sent else ())]


def _place(passage: Passage) -> tuple[str, int, int]:
    return passage.trajectory_id, passage.row, passage.version


def _unscored(passage: Passage, why: str) -> str:
    start, stop = passage.ranges[0][0], passage.ranges[-1][1]
    return (
        f"anchor old_logit_model: tokens {start}..{stop} of trajectory {passage.trajectory_id} row {passage.row} could "
        f"not be scored under version {passage.version}: {why}; trainer.anchor_fallback names an anchor for such tokens"
    )
