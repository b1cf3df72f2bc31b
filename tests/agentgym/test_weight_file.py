"""The file of a version: what other readers of the format find in it, and what is not believed."""

import json
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch

from agentgym.errors import VersionError
from agentgym.weight_file import BFLOAT16, is_whole, load_file, map_file, save_file

WEIGHTS = {
    "norm": np.array([1.0, -0.0, np.nan], np.float32),
    "embed": np.arange(6, dtype="<u2").reshape(2, 3).view(BFLOAT16),
    "count": np.array(7, np.int64),
    "odd": np.zeros((0, 4), np.float16),
    "flag": np.array([True]),
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    save_file(WEIGHTS, tmp_path / "w.safetensors")
    return tmp_path / "w.safetensors"


def test_engines_read_it_as_any_safetensors_file(path):
    found = safetensors.torch.load_file(path)
    assert found.keys() == WEIGHTS.keys()
    assert found["embed"].dtype == torch.bfloat16
    assert found["embed"].view(torch.int16).tolist() == [[0, 1, 2], [3, 4, 5]]
    assert found["norm"].numpy().tobytes() == WEIGHTS["norm"].tobytes()
    assert found["count"].item() == 7
    assert found["odd"].shape == (0, 4)
    with safetensors.safe_open(path, "pt") as file:
        assert file.metadata()["format"] == "pt"


def test_a_file_that_another_program_wrote_is_read(tmp_path):
    safetensors.numpy.save_file({"w": np.arange(3.0)}, tmp_path / "w.safetensors")
    assert load_file(tmp_path / "w.safetensors")["w"].tolist() == [0.0, 1.0, 2.0]


def test_what_is_loaded_can_be_written_to_and_what_is_mapped_cannot(path):
    load_file(path)["norm"][0] = 2.0
    with pytest.raises(ValueError, match="read-only"):
        map_file(path)["norm"][0] = 2.0


def test_every_tear_is_seen(path):
    whole = path.read_bytes()
    for size in (*range(0, len(whole), 7), len(whole) - 1):
        path.write_bytes(whole[:size])
        assert not is_whole(path)
        for read in (load_file, map_file):
            with pytest.raises(VersionError, match=r"w\.safetensors"):
                read(path)
    path.write_bytes(whole + b"x")
    assert not is_whole(path)


def test_a_changed_bit_is_seen_by_its_checksum(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert is_whole(path)
    with pytest.raises(VersionError, match=r"w\.safetensors was changed"):
        load_file(path)


@pytest.mark.parametrize("header", [b"[]", b"{", b'{"w": 3}', b'{"w": {"data_offsets": []}}', b"\xff"])
def test_what_is_no_safetensors_file_is_refused(tmp_path, header):
    path = tmp_path / "w.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(VersionError, match=r"w\.safetensors is no safetensors file"):
        load_file(path)


def test_dtypes_that_cannot_be_published_are_named(tmp_path):
    with pytest.raises(VersionError, match="w is complex128; published weights can be F64"):
        save_file({"w": np.zeros(2, complex)}, tmp_path / "w.safetensors")
    header = json.dumps({"w": {"dtype": "F8_E4M3", "shape": [0], "data_offsets": [0, 0]}}).encode()
    (tmp_path / "v.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(VersionError, match="holds F8_E4M3"):
        load_file(tmp_path / "v.safetensors")
