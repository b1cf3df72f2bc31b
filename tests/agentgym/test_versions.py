"""Law E for the version log: numbers are never reused, held versions never dropped, memory bounded by live versions."""

import os
import subprocess
import sys
import tempfile
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from agentgym.deltas import flip
from agentgym.errors import CheckpointError, VersionError
from agentgym.versions import VersionLog, VersionReader
from agentgym.weight_file import BFLOAT16, load_file


def weights(value: int) -> dict[str, np.ndarray]:
    return {"w": np.full(3, value, np.float32)}


def test_versions_count_up_from_zero_and_read_back_exactly(tmp_path):
    log = VersionLog(tmp_path)
    assert log.latest is None
    assert [log.append(weights(0)), log.append(weights(1))] == [0, 1]
    np.testing.assert_array_equal(log.read(1)["w"], np.full(3, 1, np.float32))


def test_a_number_is_not_reused_after_reopening_even_if_its_weights_were_never_finished(tmp_path):
    log = VersionLog(tmp_path)
    log.append(weights(0))
    (tmp_path / "issued").write_text("4")  # a crash between issuing 4 and writing its weights
    (tmp_path / "00000004.partial").write_bytes(b"half")
    reopened = VersionLog(tmp_path)
    assert reopened.versions == (0,)
    assert reopened.append(weights(5)) == 5
    assert not list(tmp_path.glob("*.partial"))


def test_the_number_is_durable_before_the_weights(tmp_path, monkeypatch):
    log = VersionLog(tmp_path)
    log.append(weights(0))

    def full_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("agentgym.versions.save_file", full_disk)
    with pytest.raises(CheckpointError, match="No space left on device"):
        log.append(weights(1))
    monkeypatch.undo()
    assert VersionLog(tmp_path).versions == (0,)
    assert VersionLog(tmp_path).append(weights(2)) == 2


def test_a_dropped_version_is_a_typed_error(tmp_path):
    log = VersionLog(tmp_path)
    log.append(weights(0))
    log.append(weights(1))
    with pytest.raises(VersionError, match="version 0 is not in the log"):
        log.read(0)
    with pytest.raises(VersionError, match=r"batch refers to policy versions \[0\]"):
        log.hold("batch", [0, 1])


def test_an_unwritable_folder_is_a_typed_error(tmp_path):
    (tmp_path / "versions").write_text("a file")
    with pytest.raises(CheckpointError, match="cannot be opened"):
        VersionLog(tmp_path / "versions")


class Holding(RuleBasedStateMachine):
    """Random appends, holds and reopenings against a model that keeps everything."""

    def __init__(self):
        super().__init__()
        import tempfile
        from pathlib import Path

        self.folder = tempfile.TemporaryDirectory()
        self.log = VersionLog(Path(self.folder.name))
        self.held: dict[str, set[int]] = {}
        self.issued: list[int] = []

    @rule()
    def append(self):
        version = self.log.append(weights(len(self.issued)))
        assert all(version > earlier for earlier in self.issued)
        self.issued.append(version)

    @rule(holder=st.sampled_from(["service", "batch"]), data=st.data())
    def hold(self, holder, data):
        chosen = data.draw(st.sets(st.sampled_from(self.log.versions))) if self.log.versions else set()
        self.log.hold(holder, chosen)
        self.held[holder] = chosen

    @rule()
    def reopen(self):
        self.log = VersionLog(self.log.folder)
        for holder, versions in self.held.items():
            self.log.hold(holder, versions)
            # holding one holder at a time may drop the other's: a reopened log starts without holders
            self.held = {holder: versions}
            break
        else:
            self.held = {}

    @invariant()
    def held_versions_stay_and_nothing_else_does(self):
        referenced = set().union(*self.held.values()) if self.held else set()
        latest = {self.issued[-1]} if self.issued else set()
        assert referenced <= set(self.log.versions)
        if self.held:
            assert set(self.log.versions) == referenced | latest
        for version in referenced:
            assert self.log.read(version)["w"][0] == self.issued.index(version)

    def teardown(self):
        self.folder.cleanup()


TestHolding = Holding.TestCase
TestHolding.settings = settings(max_examples=30, stateful_step_count=20, deadline=None)


def test_a_reader_follows_the_log_of_another_process(tmp_path):
    log, reader = VersionLog(tmp_path, first=7), VersionReader(tmp_path)
    assert log.append(weights(3)) == 7
    assert 7 in reader
    np.testing.assert_array_equal(reader.read(7)["w"], weights(3)["w"])
    log.append(weights(4))
    with pytest.raises(VersionError, match=r"7 is not in the log .* \(it holds \(8,\)\)"):
        reader.read(7)


class Interrupted(VersionReader):
    """A reader whose process stands still within a read while the keeper of the log drops what it reads: behind its
    first or its second look at the files."""

    def __init__(self, log: VersionLog, looks: int) -> None:
        super().__init__(log.folder)
        self._log, self._looks = log, looks

    def _nearest_full(self, version: int) -> int | None:
        found = super()._nearest_full(version)
        self._looks -= 1
        if not self._looks:
            self._log.hold("test", [])
        return found


@pytest.mark.parametrize("looks", [1, 2])
def test_a_version_that_leaves_while_it_is_read_is_a_typed_error_and_not_another_version(tmp_path, looks):
    log = filled(tmp_path, drifting(5))
    log.hold("test", [1])  # it is reached from version 4, which stays
    with pytest.raises(VersionError, match=r"version 1 left the log .* while it was read"):
        Interrupted(log, looks).read(1)
    assert log.versions == (4,)


# --------------------------------------------------------------------------------------------- deltas in the log


def drifting(steps: int, dtype=BFLOAT16) -> list[dict[str, np.ndarray]]:
    """Versions of a model of 1,000 elements, of which 20 change a step."""
    rng = np.random.default_rng(0)
    versions = [{"w": rng.integers(0, 2**16, 1000).astype("<u2").view(dtype), "b": np.float32(1.5).reshape(())}]
    for _ in range(steps - 1):
        words = versions[-1]["w"].view("<u2").copy()
        words[rng.choice(1000, 20, replace=False)] ^= 1
        versions.append({"w": words.view(dtype), "b": versions[-1]["b"]})
    return versions


def assert_holds(log: VersionReader, version: int, expected: dict[str, np.ndarray]) -> None:
    found = log.read(version)
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert found[name].dtype == array.dtype
        assert found[name].shape == array.shape
        assert found[name].tobytes() == array.tobytes(), (version, name)


def filled(folder: Path, history: list[dict[str, np.ndarray]]) -> VersionLog:
    log = VersionLog(folder)
    for weights in history:
        log.hold("test", log.versions)
        log.append(weights)
    return log


def test_older_versions_are_deltas_and_read_back_exactly(tmp_path):
    history = drifting(9)
    log = filled(tmp_path, history)
    for reader in (log, VersionReader(tmp_path), VersionLog(tmp_path)):
        assert reader.versions == tuple(range(9))
        for version, weights in enumerate(history):
            assert_holds(reader, version, weights)
    assert sorted(path.name for path in tmp_path.glob("*.safetensors")) == [
        "00000007.safetensors", "00000008.safetensors",
    ]  # fmt: skip
    assert log.last is not None
    assert log.last.changed_fraction == 20 / 1001
    assert 0 < log.last.delta_bytes < 200 < log.last.full_bytes


def test_engines_find_the_two_newest_versions_whole(tmp_path):
    log = filled(tmp_path, drifting(4))
    assert load_file(log.path(3)).keys() == load_file(log.path(2)).keys() == {"w", "b"}
    with pytest.raises(VersionError, match="version 1 is kept as a delta only"):
        log.path(1)


def test_one_copy_is_switched_in_place_in_both_directions(tmp_path):
    history = drifting(6)
    log = filled(tmp_path, history)
    weights, at = log.read(5), 5
    for version in (4, 2, 0, 5, 1, 1, 3):
        steps = log.steps(at, version)
        assert steps is not None
        for step in steps:
            flip(weights, step)
        at = version
        assert weights["w"].tobytes() == history[version]["w"].tobytes()


def test_where_most_elements_change_full_copies_are_kept_and_it_is_said(tmp_path):
    rng = np.random.default_rng(0)
    history = [{"w": rng.standard_normal(500).astype(np.float32)} for _ in range(4)]
    log = filled(tmp_path, history)
    assert log.num_full_copies == 4
    assert log.last is not None
    assert (log.last.changed_fraction, log.last.delta_bytes) == (1.0, 0)
    assert log.steps(3, 2) is None
    for version, weights in enumerate(history):
        assert_holds(log, version, weights)


def test_a_chain_may_end_in_the_middle(tmp_path):
    """Small steps, a large one, small steps: the version before the large one stays whole for those behind it."""
    small, large = drifting(3), drifting(3)
    for weights in large:
        weights["w"] = (weights["w"].view("<u2") ^ np.uint16(0x5555)).view(BFLOAT16)
    history = [*small, *large, *small]
    log = filled(tmp_path, history)
    for version, weights in enumerate(history):
        assert_holds(log, version, weights)
    assert sorted(int(path.stem) for path in tmp_path.glob("*.safetensors")) == [2, 5, 7, 8]
    assert log.steps(8, 0) is None
    assert log.steps(2, 0) is not None


def test_links_of_a_held_version_stay_until_it_goes(tmp_path):
    history = drifting(8)
    log = VersionLog(tmp_path)
    for weights in history:
        log.hold("test", [0] if log.versions else [])
        log.append(weights)
    assert log.versions == (0, 7)
    assert_holds(log, 0, history[0])
    assert len(list(tmp_path.glob("*.delta"))) == 7
    log.hold("test", [])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["00000007.safetensors", "issued"]


def test_mutant_that_forgets_the_links_is_refused(tmp_path, monkeypatch):
    def careless(self):
        live = set().union(*self._holders.values()) | {self.latest}
        self._versions &= live
        for path in self._files():
            if int(path.stem[:8]) not in live:
                path.unlink()

    monkeypatch.setattr(VersionLog, "_drop_unheld", careless)
    with pytest.raises((VersionError, AssertionError)):
        test_links_of_a_held_version_stay_until_it_goes(tmp_path)


@pytest.mark.parametrize("victim", ["00000002-00000003.delta", "00000003.safetensors"])
def test_a_corrupt_entry_is_named(tmp_path, victim):
    log = filled(tmp_path, drifting(5))
    data = bytearray((tmp_path / victim).read_bytes())
    data[-1] ^= 4
    (tmp_path / victim).write_bytes(data)
    with pytest.raises(VersionError, match=victim):
        log.read(2 if "delta" in victim else 3)
    assert_holds(log, 4, drifting(5)[4])


@given(cut=st.integers(0, 2000))
@settings(max_examples=25, deadline=None)
def test_a_torn_last_entry_is_left_out_and_its_number_burned(tmp_path_factory, cut):
    folder = tmp_path_factory.mktemp("versions")
    history = drifting(4)
    log = filled(folder, history)
    whole = log.path(3).read_bytes()
    log.path(3).write_bytes(whole[: min(cut, len(whole) - 1)])
    reopened = VersionLog(folder)
    assert reopened.versions == (0, 1, 2)
    for version in reopened.versions:
        assert_holds(reopened, version, history[version])
    reopened.hold("test", [0, 1, 2])
    assert reopened.append(history[3]) == 4
    assert_holds(reopened, 0, history[0])
    assert_holds(reopened, 4, history[3])


def test_a_torn_delta_is_left_out_while_the_full_copy_is_there(tmp_path):
    history = drifting(3)
    filled(tmp_path, history)
    torn = tmp_path / "00000001-00000002.delta"
    torn.write_bytes(torn.read_bytes()[:-3])
    log = VersionLog(tmp_path)
    assert not torn.exists()
    for version, weights in enumerate(history):
        assert_holds(log, version, weights)


KILLED = """
import os, pathlib, sys
sys.path.insert(0, sys.argv[3])
from test_versions import drifting
from agentgym.versions import VersionLog
real = {name: getattr(os, name) for name in ("rename", "fsync", "unlink")}
left = int(sys.argv[2])
def counted(name):
    def call(*arguments, **named):
        global left
        left -= 1
        if left < 0:
            os._exit(9)
        return real[name](*arguments, **named)
    return call
for name in real:
    setattr(os, name, counted(name))
log = VersionLog(pathlib.Path(sys.argv[1]))
for weights in drifting(5):
    log.hold("test", log.versions[-3:])
    print(log.append(weights), flush=True)
"""


@pytest.mark.parametrize("calls", range(0, 44, 3))
def test_killed_between_any_two_writes_nothing_announced_is_lost(tmp_path, calls):
    """The process ends at once before its n-th rename, fsync or unlink."""
    command = [sys.executable, "-c", KILLED, str(tmp_path), str(calls), str(Path(__file__).parent)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode in (0, 9), done.stderr
    announced = [int(line) for line in done.stdout.split()]
    log = VersionLog(tmp_path)
    assert set(announced[-3:]) <= set(log.versions)
    for version in log.versions:
        assert_holds(log, version, drifting(5)[version])
    assert log.append(drifting(1)[0]) > max(announced, default=-1)
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize("calls", range(9))
def test_ctrl_c_within_a_publication_leaves_what_was_there_before(tmp_path, monkeypatch, calls):
    """It comes at the n-th rename or fsync."""
    history = drifting(4)
    log = filled(tmp_path, history[:3])
    log.hold("test", log.versions)
    before = {path.name for path in tmp_path.iterdir()}
    left = calls

    def interrupted(real):
        def call(*arguments):
            nonlocal left
            left -= 1
            if left == -1:
                raise KeyboardInterrupt
            return real(*arguments)

        return call

    for name in ("rename", "fsync"):
        monkeypatch.setattr(os, name, interrupted(getattr(os, name)))
    with pytest.raises(KeyboardInterrupt):
        log.append(history[3])
    monkeypatch.undo()
    assert {path.name for path in tmp_path.iterdir()} == before
    last = log.append(history[3])
    for version, weights in zip((0, 1, 2, last), history, strict=True):
        assert_holds(VersionReader(tmp_path), version, weights)


class Chain(RuleBasedStateMachine):
    """Sparse and dense steps, holds and reopenings; whatever is held reads back bit for bit, and what is on the disk
    is what that takes."""

    def __init__(self):
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.log = VersionLog(Path(self.folder.name))
        self.words = np.zeros(40, np.uint16)
        self.published: dict[int, bytes] = {}
        self.held: set[int] = set()

    @rule(places=st.sets(st.integers(0, 39), max_size=25), bits=st.integers(1, 2**16 - 1))
    def append(self, places, bits):
        self.words = self.words.copy()
        self.words[list(places)] ^= np.uint16(bits)
        self.published[self.log.append({"w": self.words.view(BFLOAT16)})] = self.words.tobytes()

    @rule(data=st.data())
    def hold(self, data):
        if self.log.versions:
            self.held = data.draw(st.sets(st.sampled_from(self.log.versions)))
            self.log.hold("test", self.held)

    @rule()
    def reopen(self):
        self.log = VersionLog(self.log.folder)
        self.log.hold("test", self.held)

    @invariant()
    def what_is_held_reads_back(self):
        reader = VersionReader(self.log.folder)
        latest = {max(self.published)} if self.published else set()
        assert set(self.log.versions) == self.held | latest
        for version in self.log.versions:
            assert self.log.read(version)["w"].tobytes() == self.published[version]
            assert reader.read(version)["w"].tobytes() == self.published[version]

    @invariant()
    def nothing_older_than_the_oldest_live_version_is_stored(self):
        stored = [int(path.stem[:8]) for path in self.log._files()]
        assert min(stored, default=0) >= min(self.log.versions, default=0)
        assert self.log.num_full_copies <= 1 + len(self.log.versions) + sum(
            self.log.steps(a, b) is None for a, b in pairwise(sorted(stored))
        )

    def teardown(self):
        self.folder.cleanup()


TestChain = Chain.TestCase
TestChain.settings = settings(max_examples=30, stateful_step_count=20, deadline=None)
