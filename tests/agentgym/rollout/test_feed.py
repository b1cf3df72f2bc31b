"""The feed: whatever was sampled is shown once, at the place where the trainer's row will have it."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentgym.errors import InputError
from agentgym.messages import Message
from agentgym.policy import Completion
from agentgym.rollout.feed import Feed, Piece
from agentgym.trajectory import NO_VERSION, EpisodeStatus, Trajectory, Turn, to_sequences

Place = tuple[str, int, int]  # trajectory, row, position


@dataclass
class Mirror:
    """What a reader knows after the pages that it has read."""

    cursor: int = 0
    rows: dict[tuple[str, int], list[tuple[int, int]]] = field(default_factory=dict)  # (token, version)
    generations: dict[str, int] = field(default_factory=dict)
    ended: set[str] = field(default_factory=set)

    def read(self, feed: Feed, max_tokens: int) -> int:
        """Reads to the end; returns the number of tokens that came."""
        came, is_all = 0, False
        while not is_all:
            self.cursor, pieces, is_all = feed.read(self.cursor, max_tokens)
            sizes = [len(piece.token_ids) for piece in pieces]
            assert sum(sizes) <= max_tokens or len(pieces) == 1
            came += sum(sizes)
            for piece in pieces:
                self.take(piece)
        for name in {name for name, _ in self.rows} - set(feed.live):
            self.rows = {key: row for key, row in self.rows.items() if key[0] != name}
        return came

    def take(self, piece: Piece) -> None:
        if piece.generation != self.generations.setdefault(piece.trajectory_id, piece.generation):
            assert piece.generation > self.generations[piece.trajectory_id]
            self.generations[piece.trajectory_id] = piece.generation
            self.rows = {key: row for key, row in self.rows.items() if key[0] != piece.trajectory_id}
        if piece.ended:
            self.ended.add(piece.trajectory_id)
        if piece.token_ids:
            row = self.rows.setdefault((piece.trajectory_id, piece.row), [])
            assert piece.start == len(row)  # nothing twice, nothing left out
            row += zip(piece.token_ids, piece.policy_versions, strict=True)


def turn(prompt: list[int], ids: list[int], versions: list[int]) -> Turn:
    completion = Completion(tuple(ids), (-0.5,) * len(ids), tuple(versions), tuple(versions), "stop")
    return Turn(tuple(prompt), completion, Message("assistant", ""), (), 0.0)


def ended(name: str, turns: list[Turn]) -> Trajectory:
    return Trajectory(name, "g", "my/E-v0", "t", 0, (), tuple(turns), EpisodeStatus.TERMINATED, None, {}, None)


def test_an_interrupted_completion_is_shown_as_it_grows() -> None:
    feed, mirror = Feed(), Mirror()
    feed.begin("t", "g")
    feed.extend("t", [1, 7], [5], [3])
    assert mirror.read(feed, 100) == 3
    feed.extend("t", [1, 7], [5, 6], [3, 4])
    assert mirror.read(feed, 100) == 1
    feed.extend("t", [1, 7], [5, 6, 2], [3, 4, 4])
    feed.extend("t", [1, 7, 5, 6, 2, 9], [8], [4])
    assert mirror.read(feed, 100) == 3
    assert mirror.rows == {("t", 0): [(1, -1), (7, -1), (5, 3), (6, 4), (2, 4), (9, -1), (8, 4)]}
    assert mirror.read(feed, 100) == 0


def test_a_page_is_bounded_and_the_next_one_goes_on() -> None:
    feed, mirror = Feed(), Mirror()
    for n in range(5):
        feed.begin(f"t{n}", "g")
        feed.extend(f"t{n}", [1], [5, 6, 2], [n] * 3)
    cursor, pieces, is_all = feed.read(0, 9)
    assert [piece.trajectory_id for piece in pieces] == ["t0", "t1"]
    assert not is_all
    cursor, pieces, is_all = feed.read(cursor, 1)  # a piece larger than the bound comes alone
    assert [piece.trajectory_id for piece in pieces] == ["t2"]
    assert mirror.read(feed, 4) == 20


def test_what_is_forgotten_is_not_shown_and_not_held() -> None:
    feed = Feed()
    for n in range(4):
        feed.begin(f"t{n}", f"g{n % 2}")
        feed.extend(f"t{n}", [1], [5], [0])
    feed.forget(["t0", "unknown"])
    feed.forget_group("g1")
    assert feed.live == ("t2",)
    assert feed.num_tokens == 2
    cursor, pieces, is_all = feed.read(0, 100)
    assert [piece.trajectory_id for piece in pieces] == ["t2"]
    assert is_all
    assert feed.read(cursor, 100) == (cursor, (), True)


def test_an_end_that_differs_begins_the_trajectory_anew() -> None:
    """A session's reply that never reached the agent is no part of what is trained on."""
    feed, mirror = Feed(), Mirror()
    feed.begin("t", "g")
    feed.extend("t", [1], [5, 6], [0, 0])
    feed.extend("t", [1], [9], [0])
    mirror.read(feed, 100)
    assert len(mirror.rows) == 2
    final = ended("t", [turn([1], [9], [0])])
    feed.end("t", "g", to_sequences(final))
    mirror.read(feed, 100)
    assert mirror.rows == {("t", 0): [(1, -1), (9, 0)]}
    assert mirror.generations == {"t": 1}
    assert mirror.ended == {"t"}


@pytest.mark.parametrize(("cursor", "max_tokens"), [(-1, 5), (2, 5), (0, 0)])
def test_a_cursor_that_no_page_gave_is_refused(cursor: int, max_tokens: int) -> None:
    feed = Feed()
    feed.begin("t", "g")
    feed.extend("t", [1], [5], [0])
    with pytest.raises(InputError, match="the feed is at 1"):
        feed.read(cursor, max_tokens)


@settings(deadline=None, max_examples=150)
@given(st.integers(0, 2**32 - 1))
def test_whatever_the_interleaving_a_reader_ends_with_the_trainers_rows(seed: int) -> None:
    """Several episodes grow by turns, interruptions, branches and rewritten histories, and end, are retried or are
    forgotten; readers come whenever they like."""
    rng = random.Random(seed)
    feed = Feed()
    mirrors = [Mirror(), Mirror()]
    turns: dict[str, list[Turn]] = {}
    whole: dict[str, Turn] = {}
    done: dict[str, Trajectory] = {}
    version, names = 0, iter(range(10_000))

    def prompt_of(name: str) -> list[int]:
        if not turns[name] or rng.random() < 0.15:
            return [1, *(rng.randrange(4) for _ in range(rng.randrange(3)))]
        before = rng.choice(turns[name]) if rng.random() < 0.2 else turns[name][-1]
        return [*before.prompt_ids, *before.completion.token_ids, *(rng.randrange(4) for _ in range(rng.randrange(3)))]

    for _ in range(rng.randrange(60)):
        act = rng.random()
        if act < 0.15:
            name = f"t{next(names)}"
            turns[name] = []
            feed.begin(name, "g")
        elif act < 0.25:
            version += 1
        elif act < 0.4:
            mirror = rng.choice(mirrors)
            mirror.read(feed, rng.randrange(1, 30))
        elif turns:
            name = rng.choice(list(turns))
            if name not in whole:
                ids = [rng.randrange(4) for _ in range(rng.randrange(1, 6))]
                span = sorted(version + rng.randrange(2) for _ in ids)
                version = max(version, span[-1])
                whole[name] = turn(prompt_of(name), ids, span)
            current = whole[name]
            shown = rng.randrange(1, len(current.completion.token_ids) + 1)
            part = current.completion.token_ids[:shown]
            feed.extend(name, current.prompt_ids, part, current.completion.policy_versions[:shown])
            if shown == len(current.completion.token_ids):
                turns[name].append(whole.pop(name))
            if act > 0.9 and name not in whole:
                final = ended(name, turns.pop(name))
                if rng.random() < 0.3:
                    feed.forget([name])
                else:
                    feed.end(name, "g", to_sequences(final))
                    done[name] = final
            elif act > 0.85 and done:
                gone = rng.choice(list(done))
                feed.forget([gone])
                del done[gone]
    for mirror in mirrors:
        mirror.read(feed, rng.randrange(1, 30))
        for name, final in done.items():
            expected = {
                (name, n): [
                    (token, v if loss else NO_VERSION)
                    for token, v, loss in zip(row.token_ids, row.policy_versions, row.loss_mask)
                ]
                for n, row in enumerate(to_sequences(final))
            }
            assert {key: row for key, row in mirror.rows.items() if key[0] == name} == expected
            assert name in mirror.ended
        for name, taken in turns.items():  # of those under way, each sampled token stands behind its own context
            for one in taken:
                sampled = list(zip(one.completion.token_ids, one.completion.policy_versions))
                start, stop = len(one.prompt_ids), len(one.prompt_ids) + len(sampled)
                assert any(
                    row[start:stop] == sampled and tuple(token for token, _ in row[:start]) == one.prompt_ids
                    for (owner, _), row in mirror.rows.items()
                    if owner == name
                )
