"""The scorer's queue is bounded: who samples faster than it scores is not followed further until there is room. Whoever
waits for its records hears at once of what keeps them from coming."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from agentgym.errors import TrainingError
from agentgym.server.wire import FeedPage, Piece
from agentgym.trajectory import EpisodeStatus, ScoredSequences, TokenSequence
from agentgym_trainer.anchors.old_logit_model import OldLogitModel
from agentgym_trainer.anchors.scorer_settings import Answer, ScorerSettings

NAMES = tuple(f"t{number}" for number in range(10))


class Feed:
    """A rollout service that has ten ended trajectories of six tokens to show."""

    def __init__(self) -> None:
        self.reads = 0

    @contextlib.contextmanager
    def another(self) -> Iterator[Feed]:
        yield self

    def feed(self, cursor: int = 0, max_tokens: int = 65_536) -> FeedPage:
        self.reads += 1
        new = NAMES if cursor == 0 else ()
        pieces = tuple(Piece(name, 0, 0, 0, (1, 2, 3, 4, 5, 6), (-1, 1, 1, 1, 1, 1), True) for name in new)
        return FeedPage(len(NAMES), pieces, NAMES, 2, None)


def wait_until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 200
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_the_feed_is_not_read_while_the_scorer_is_behind_by_its_bound(tmp_path: Path) -> None:
    feed = Feed()
    settings = ScorerSettings("no-model", str(tmp_path), "{}", "cpu")  # nothing is started: the test takes the jobs
    scorer = OldLogitModel(settings, tmp_path / "scorer.log", queue_tokens=20, poll_s=0.001)
    scorer.follow(feed)
    try:
        scored = []
        for queued in (24, 24, 12):  # whole passages, until there are 20 tokens or no more
            wait_until(lambda queued=queued: scorer.metrics()["anchor/queue_tokens"] == queued)
            if queued >= 20:
                time.sleep(0.05)
                assert (scorer.metrics()["anchor/queue_tokens"], feed.reads) == (queued, 1)
            job = scorer._next_job()
            assert job is not None
            scored += [passage.trajectory_id for passage in job.passages]
            scorer._take(Answer(job.number, (), 0, 0.0, None))
        assert scored == list(NAMES)
        wait_until(lambda: feed.reads > 3)
    finally:
        scorer.__exit__()


ROW = TokenSequence((1, 2), (False, True), (0.0, -0.5), (-1, 0), (-1, 0))
WANTED = [ScoredSequences("t", "g", "e", EpisodeStatus.TERMINATED, 1.0, True, {}, (ROW,), 1)]


def test_a_log_that_cannot_be_written_ends_the_wait(tmp_path: Path) -> None:
    settings = ScorerSettings("no-model", str(tmp_path), "{}", "cpu")
    with (
        OldLogitModel(settings, tmp_path / "gone" / "scorer.log") as scorer,
        pytest.raises(TrainingError, match=r"cannot be started: .*No such file or directory: .*gone/scorer\.log"),
    ):
        scorer.collect(WANTED, None, timeout_s=200.0)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_feed_that_ends_in_a_fault_of_ours_ends_the_wait(tmp_path: Path) -> None:
    class Broken(Feed):
        def feed(self, cursor: int = 0, max_tokens: int = 65_536) -> FeedPage:
            raise ZeroDivisionError("a page of nothing")

    scorer = OldLogitModel(ScorerSettings("no-model", str(tmp_path), "{}", "cpu"), tmp_path / "scorer.log")
    scorer.follow(Broken())
    try:
        with pytest.raises(TrainingError, match="ended by ZeroDivisionError: a page of nothing"):
            scorer.collect(WANTED, None, timeout_s=200.0)
    finally:
        scorer.__exit__()
