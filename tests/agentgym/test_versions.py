"""Law E for the version log: numbers are never reused, held versions never dropped, memory bounded by live versions."""

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from agentgym.errors import CheckpointError, VersionError
from agentgym.versions import VersionLog, VersionReader


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
