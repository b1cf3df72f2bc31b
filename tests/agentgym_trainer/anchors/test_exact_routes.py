"""The three exact routes beside each other: a real engine samples while versions are published under it, and whatever
the interleaving, each token's old logprob is that of its own version's weights."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from agentgym.config import parse_config
from agentgym.engine.gate import PublishReport, VersionedPolicy
from agentgym.engine.protocol import WeightUpdate
from agentgym.engine.torch_engine import TorchEngine
from agentgym.errors import TrainingError
from agentgym.messages import Message
from agentgym.policy import SamplingParams
from agentgym.rollout.feed import FeedPage
from agentgym.rollout.live_feed import LiveFeed
from agentgym.server.wire import PauseReport, Piece
from agentgym.trajectory import EpisodeStatus, ScoredSequences, TokenSequence, Trajectory, Turn, to_sequences
from agentgym.versions import VersionLog, VersionReader
from agentgym_trainer.anchors import make_anchor
from agentgym_trainer.anchors.interrupt import Interruption
from agentgym_trainer.anchors.old_logit_model import OldLogitModel
from agentgym_trainer.anchors.recorded import RecordedAnchor
from agentgym_trainer.anchors.records import MissingLogprobsError
from agentgym_trainer.anchors.scorer_settings import ScorerSettings
from agentgym_trainer.batch import MicroBatch, Row, RowKey, build_micro_batches
from agentgym_trainer.logprobs import token_logprobs
from agentgym_trainer.publish import published_weights
from agentgym_trainer.settings import TrainConfig

TEMPERATURE = 0.8
CONTEXT = 64
ALONE = 1  # rows one by one: the layout of all routes is the same


class OneRank:
    """The exchange of a run of one process."""

    rank, num_ranks = 0, 1

    def share(self, key: str, value: Any) -> Any:
        assert value is not None
        return value


class World:
    """Episodes that sample through the gate, in a thread with its own event loop; the trainer's calls are blocking, as
    over HTTP."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.rng = random.Random(seed)
        self.loop = asyncio.new_event_loop()
        self.engine = TorchEngine(folder, slots=6, max_context=CONTEXT)
        self.policy = VersionedPolicy(self.engine)
        self.live = LiveFeed(self.policy)
        self.ended: list[Trajectory] = []
        self.room = 8  # no episode begins while so many wait for a batch
        self._names = iter(range(10_000))
        self._thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self._thread.start()
        self._playing = [asyncio.run_coroutine_threadsafe(self._play(), self.loop) for _ in range(6)]

    def close(self) -> None:
        for task in self._playing:
            task.cancel()
        self.do(self.engine.close())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()

    def do(self, work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(200)

    async def _play(self) -> None:
        while True:
            while len(self.ended) >= self.room:
                await asyncio.sleep(0.001)
            name = f"t{next(self._names):04d}"
            self.live.begin(name, "g")
            turns: list[Turn] = []
            prompt = [1, *(self.rng.randrange(2, 23) for _ in range(self.rng.randrange(1, 5)))]
            for number in range(self.rng.randrange(1, 4)):
                params = SamplingParams(self.rng.randrange(1, 9), TEMPERATURE, seed=number, session=name)
                completion = await self.policy.complete(prompt, params)
                turns.append(Turn(tuple(prompt), completion, Message("assistant", ""), (), 0.0))
                prompt = [*prompt, *completion.token_ids, self.rng.randrange(2, 23)]
                await asyncio.sleep(self.rng.choice((0.0, 0.002, 0.01)))  # a tool
                if self.rng.random() < 0.15:  # a history that the agent rewrote
                    prompt = [1, *prompt[2:]]
            if self.rng.random() < 0.15:  # a failed episode
                self.live.forget([name])
                continue
            ended = Trajectory(name, "g", "my/E-v0", "t", 0, (), tuple(turns), EpisodeStatus.TERMINATED, None, {}, None)
            self.live.end(name, "g", to_sequences(ended))
            self.ended.append(ended)

    # --------------------------------------------------------------------------- what a ServiceClient has, and more

    def feed(self, cursor: int = 0, max_tokens: int = 65_536) -> FeedPage:
        async def page() -> FeedPage:
            return self.live.page(cursor, 40)  # small pages: many cursors

        return self.do(page())

    def pause(self, limit_s: float) -> PauseReport:
        async def paused() -> PauseReport:
            if self.policy.pause_under_way is None:
                await self._amid_sampling()
            pause = await self.policy.pause(limit_s)
            return PauseReport(pause.pause_id, self.policy.policy_version)

        return self.do(paused())

    def go_on(self, limit_s: float) -> PauseReport:
        """A pause that is none: sampling goes on in the middle of something."""
        self.do(self._amid_sampling())
        return PauseReport(0, 0)

    async def _amid_sampling(self) -> None:
        """Until completions are under way that have tokens, however slowly the trainer comes to ask."""
        while not (self.engine._batch.sampled_tokens > 0 and len(list(self.policy.in_flight())) >= 3):
            if len(self.ended) >= self.room:  # nobody plays any more
                self.room = len(self.ended) + 4
            await asyncio.sleep(0.001)

    @contextlib.contextmanager
    def another(self) -> Iterator[World]:
        yield self

    def take(self, size: int) -> list[ScoredSequences]:
        """A batch, oldest first."""

        async def taken() -> list[Trajectory]:
            self.room = max(self.room, size)
            while len(self.ended) < size:
                await asyncio.sleep(0.005)
            batch, self.ended = self.ended[:size], self.ended[size:]
            self.live.forget([member.trajectory_id for member in batch])
            return batch

        return [
            ScoredSequences(t.trajectory_id, "g", "e", EpisodeStatus.TERMINATED, 0.0, True, {}, to_sequences(t), 0)
            for t in self.do(taken())
        ]

    def live_versions(self) -> set[int]:
        """As the service answers a publication."""

        async def found() -> set[int]:
            rows = [row for known in self.live._followed.values() for row in known.rows]
            return {v for row in rows for v in row.versions if v >= 0} | {self.policy.policy_version}

        return self.do(found())


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # as the scorer process: the same kernels
    yield
    torch.set_num_threads(before)


@pytest.fixture
def folder(make_model: Callable[..., LlamaForCausalLM], tmp_path: Path) -> Path:
    make_model(0).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def open_world(folder: Path) -> Iterator[Callable[[int], World]]:
    with contextlib.ExitStack() as stack:

        def begin(seed: int) -> World:
            world = World(folder, seed)
            stack.callback(world.close)
            return world

        yield begin


def scorer_settings(folder: Path, versions: Path) -> ScorerSettings:
    values = {
        "env": {"id": "maze"}, "rollout": {"temperature": TEMPERATURE},
        "trainer": {"anchor": "old_logit_model", "micro_batch_tokens": ALONE},
    }  # fmt: skip
    config = parse_config(TrainConfig, values)
    return ScorerSettings(str(folder), str(versions), config.model_dump_json(), "cpu")


def rows_of(batch: list[ScoredSequences]) -> list[MicroBatch]:
    rows = [Row(row, 0.5, RowKey(one.trajectory_id, n)) for one in batch for n, row in enumerate(one.sequences)]
    return build_micro_batches(rows, max_tokens=ALONE)


def move(model: LlamaForCausalLM, seed: int) -> None:
    """An optimizer step: some weights change, and by so much that another version's logprobs are far off."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += (
                0.3
                * torch.randn(parameter.shape, generator=generator)
                * (torch.rand(parameter.shape, generator=generator) < 0.2)
            )


@torch.no_grad()
def brute_force(models: dict[int, LlamaForCausalLM], batch: MicroBatch) -> torch.Tensor:
    every = torch.stack([token_logprobs(model, batch, TEMPERATURE).logprobs for model in models.values()])
    assert list(models) == list(range(len(models)))
    return every.gather(0, batch.policy_versions.clamp(min=0)[None])[0]


class Trainer:
    """The order of a step, with the interruption and without an optimizer."""

    def __init__(self, world: World, model: LlamaForCausalLM, tmp_path: Path) -> None:
        self.world = world
        self.model = model
        self.log = VersionLog(tmp_path / "versions")
        self.version = self.log.append(published_weights(model))
        self.live: set[int] = set()
        self.models = {0: copy.deepcopy(model)}
        reader = VersionReader(self.log.folder)
        self.anchors = {
            name: make_anchor(name, model, reader, temperature=TEMPERATURE, max_staleness=9)
            for name in ("snapshot", "interrupt", "old_logit_model")
        }
        interrupt = self.anchors["interrupt"]
        assert isinstance(interrupt, RecordedAnchor)
        self.interruption = Interruption(
            model, interrupt.records, OneRank(), world,  # type: ignore[arg-type]
            temperature=TEMPERATURE, max_tokens=ALONE, limit_s=200.0,
        )  # fmt: skip

    def hold(self, holder: str, versions: set[int]) -> None:
        self.log.hold(holder, [version for version in versions if version in self.log])

    def publish(self) -> PublishReport:
        self.world.room = len(self.world.ended) + 4
        self.interruption.before_update(self.version)
        move(self.model, self.version)
        self.live = {*self.world.live_versions(), self.version}
        self.hold("service", self.live)
        self.version = self.log.append(published_weights(self.model))
        self.models[self.version] = copy.deepcopy(self.model)
        update = WeightUpdate(self.version, self.log.path(self.version))
        report = self.world.do(self.world.policy.publish(update))
        self.interruption.published(report.ended_pause)
        return report

    def check(self, batch: list[ScoredSequences], names: tuple[str, ...]) -> tuple[int, int]:
        """Every anchor's proximal logprobs against brute force and, to the bit, against each other."""
        batches = rows_of(batch)
        found: dict[str, list[torch.Tensor]] = {name: [] for name in names}
        for name in names:
            for one in batches:  # one row at a time: the layout is the same for all routes
                (proximal,) = self.anchors[name].proximal([one], trainer_version=self.version, reuse_policy=True)
                assert self.anchors[name].metrics()["anchor/num_fallbacks"] == 0
                policy = token_logprobs(self.model, one, TEMPERATURE).logprobs.detach()
                found[name].append(proximal.resolve(policy))
        stale = mixed = 0
        for number, one in enumerate(batches):
            exact = brute_force(self.models, one)
            for name in names:
                mine = found[name][number]
                assert torch.equal(mine, found[names[0]][number]), name
                torch.testing.assert_close(mine, exact, atol=3e-5, rtol=0.0)
            sampled = one.behavior_logprobs[one.loss_mask]  # the engine had the same weights
            torch.testing.assert_close(exact[one.loss_mask], sampled, atol=1e-4, rtol=0.0)
            versions = one.policy_versions[one.loss_mask]
            stale += int((versions < self.version).sum())
            mixed += len(versions.unique()) > 1
        return stale, mixed


def test_the_routes_agree_to_the_bit_and_a_killed_scorer_loses_nothing(
    open_world: Callable[[int], World], folder: Path, make_model: Callable[..., LlamaForCausalLM], tmp_path: Path
) -> None:
    world = open_world(0)
    trainer = Trainer(world, make_model(0), tmp_path)
    stale = mixed = 0
    settings = scorer_settings(folder, trainer.log.folder)
    with OldLogitModel(settings, tmp_path / "scorer.log", queue_tokens=200, poll_s=0.01) as scorer:
        scorer.follow(world)
        for step in range(100):
            if step >= 14 and mixed > 3:  # how often a publication meets an episode is up to the machine
                break
            batch = world.take(5)
            rows = [row for one in batch for row in one.sequences]
            trainer.hold("scorer", scorer.needed_versions())
            trainer.hold("batch", {v for row in rows for v in row.policy_versions if v >= 0})
            if step == 6 and scorer.pid:
                os.kill(scorer.pid, signal.SIGKILL)
            recorded = trainer.anchors["old_logit_model"]
            assert isinstance(recorded, RecordedAnchor)
            recorded.begin_batch(scorer.collect(batch, trainer.version, timeout_s=200.0))
            counts = trainer.check(batch, ("snapshot", "interrupt", "old_logit_model"))
            stale, mixed = stale + counts[0], mixed + counts[1]
            trainer.publish()
        figures = scorer.metrics()
        check_refusals(scorer, world.take(1))
    assert figures["anchor/scorer_restarts"] == 1
    assert trainer.interruption.metrics()["anchor/broken_pauses"] == 0
    assert stale > 50  # the batches were of older versions,
    assert mixed > 3  # and of several at a time


@pytest.mark.parametrize("seed", range(2))
def test_interruptions_score_each_token_under_its_own_version(
    open_world: Callable[[int], World], make_model: Callable[..., LlamaForCausalLM], tmp_path: Path, seed: int
) -> None:
    world = open_world(seed + 1)
    trainer = Trainer(world, make_model(0), tmp_path)
    stale = 0
    for _ in range(12):
        stale += trainer.check(world.take(world.rng.randrange(1, 8)), ("interrupt",))[0]
        trainer.publish()
    assert stale > 30
    assert trainer.interruption.metrics()["anchor/broken_pauses"] == 0
    assert set(trainer.log.versions) <= trainer.live | {trainer.version}  # the records need none


def test_mutant_that_does_not_pause_leaves_tokens_without_old_logprobs(
    open_world: Callable[[int], World], make_model: Callable[..., LlamaForCausalLM], tmp_path: Path
) -> None:
    world = open_world(9)
    world.pause = world.go_on  # type: ignore[method-assign]
    trainer = Trainer(world, make_model(0), tmp_path)

    def train() -> None:
        for _ in range(12):
            trainer.check(world.take(4), ("interrupt",))
            trainer.publish()

    with pytest.raises(MissingLogprobsError, match=r"anchor interrupt: no old logprobs of trajectory t\d+ row \d"):
        train()
    assert trainer.interruption.metrics()["anchor/broken_pauses"] > 0


def test_a_pause_that_ran_out_is_noticed_and_its_tokens_are_scored_all_the_same(
    open_world: Callable[[int], World], make_model: Callable[..., LlamaForCausalLM], tmp_path: Path
) -> None:
    """A pause that is over when scoring is done is begun again, until one lasted."""
    world = open_world(5)
    trainer = Trainer(world, make_model(0), tmp_path)
    asked: list[int] = []
    pause = world.pause

    def short_at_first(limit_s: float) -> PauseReport:
        report = pause(limit_s if asked else 0.001)
        while not asked and world.policy.pause_under_way is not None:
            time.sleep(0.001)
        asked.append(report.pause_id)
        return report

    trainer.check(world.take(3), ("interrupt",))
    world.pause = short_at_first  # type: ignore[method-assign]
    trainer.publish()
    assert len(set(asked)) == 2
    assert trainer.interruption.metrics()["anchor/broken_pauses"] == 0
    for _ in range(4):
        trainer.check(world.take(4), ("interrupt",))
        trainer.publish()


def test_a_pause_is_counted_from_where_nothing_is_sampled_any_more(
    open_world: Callable[[int], World], make_model: Callable[..., LlamaForCausalLM], tmp_path: Path
) -> None:
    world = open_world(6)
    trainer = Trainer(world, make_model(0), tmp_path)
    pause = world.pause

    def on_the_way(limit_s: float) -> PauseReport:
        time.sleep(0.2)
        return pause(limit_s)

    world.pause = on_the_way  # type: ignore[method-assign]
    trainer.check(world.take(3), ("interrupt",))
    report = trainer.publish()
    assert report.pause_s >= trainer.interruption.metrics()["anchor/stall_s"] > 0


def check_refusals(scorer: OldLogitModel, batch: list[ScoredSequences]) -> None:
    """What a scorer says that cannot score, or does not answer."""
    row = TokenSequence((1, 5, 6), (False, True, True), (0.0,) * 3, (-1, 99, 99), (-1, 99, 99))
    unknown = [replace(batch[0], trajectory_id="never-seen", sequences=(row,))]
    with pytest.raises(
        MissingLogprobsError, match=r"never-seen row 0 .* under version 99: .* is not in the log .*holds"
    ):
        scorer.collect(unknown, None, timeout_s=200.0)
    assert scorer.collect(unknown, None, timeout_s=200.0, may_lack=True) == ()
    assert scorer.collect(unknown, 99, timeout_s=200.0) == ()  # nothing is wanted
    assert scorer.pid is not None
    os.kill(scorer.pid, signal.SIGSTOP)
    again = [replace(unknown[0], trajectory_id="again")]
    message = r"in vain for old logprobs of 2 tokens in 1 rows, versions \[99\], from the scorer \(process \d+"
    with pytest.raises(TrainingError, match=message):
        scorer.collect(again, None, timeout_s=0.3)
    os.kill(scorer.pid, signal.SIGCONT)
    with pytest.raises(MissingLogprobsError, match=r"trainer\.anchor_fallback"):
        scorer.collect(again, None, timeout_s=200.0)


@pytest.mark.slow
def test_a_scorer_that_cannot_start_ends_the_wait(open_world: Callable[[int], World], tmp_path: Path) -> None:
    world = open_world(8)
    settings = scorer_settings(tmp_path / "no-model", tmp_path)
    with (
        OldLogitModel(settings, tmp_path / "scorer.log") as scorer,
        pytest.raises(TrainingError, match=r"the scorer cannot score: model\.name: .*no-model does not hold a causal"),
    ):
        scorer.collect(world.take(2), None, timeout_s=200.0)


class TwoPages:
    """A feed of which the first page ends within what was sampled under version 1, while version 2 is served."""

    @contextlib.contextmanager
    def another(self) -> Iterator[TwoPages]:
        yield self

    def feed(self, cursor: int = 0, max_tokens: int = 65_536) -> FeedPage:
        begins = Piece("t", 0, 0, 0, (1, 2, 3), (-1, 1, 1), False)
        goes_on = Piece("t", 0, 0, 3, (4, 5), (1, 2), False)
        rest = ((begins,), (goes_on,), ())[cursor]
        return FeedPage(min(cursor + 1, 2), rest, None if cursor == 0 else ("t",), 2, None)


def test_a_version_is_scored_in_one_piece_however_the_feed_s_pages_cut_it(tmp_path: Path) -> None:
    settings = ScorerSettings("no-model", str(tmp_path), "{}", "cpu")  # nothing is started: the test takes the job
    scorer = OldLogitModel(settings, tmp_path / "scorer.log", queue_tokens=20, poll_s=0.001)
    scorer.follow(TwoPages())
    try:
        while (job := scorer._next_job()) is None:
            pass
    finally:
        scorer.__exit__()
    (passage,) = job.passages
    assert (passage.version, passage.token_ids, passage.ranges) == (1, (1, 2, 3, 4), ((1, 4),))
