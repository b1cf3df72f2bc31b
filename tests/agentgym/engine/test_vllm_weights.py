"""What of a published file goes to a vLLM server: whole layers that changed, described by their bytes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from agentgym.engine.vllm.inside.layers import layer_of
from agentgym.engine.vllm.replica import derived_seed
from agentgym.engine.vllm.sampling import Sampling
from agentgym.engine.vllm.weights import PublishedTensors, checksum
from agentgym.errors import EngineError
from agentgym.policy import SamplingParams

TENSORS = {
    "model.embed_tokens.weight": np.arange(40, dtype=np.float32),
    "model.layers.0.mlp.up_proj.weight": np.ones((8, 8), np.float32),
    "model.layers.0.self_attn.q_proj.weight": np.ones((8, 4), np.float32),
    "model.layers.1.mlp.up_proj.weight": np.ones((8, 8), np.float32),
    "model.norm.weight": np.ones(8, np.float16),
}


def published(folder: Path, name: str = "a.safetensors", **changes: np.ndarray) -> PublishedTensors:
    save_file(TENSORS | changes, folder / name)
    return PublishedTensors.read(folder / name)


def test_a_layer_of_which_a_tensor_changed_goes_whole_and_nothing_else(tmp_path: Path) -> None:
    first = published(tmp_path)
    assert first.changed(None).keys() == TENSORS.keys()
    assert not first.changed(first.checksums)
    up = TENSORS["model.layers.0.mlp.up_proj.weight"].copy()
    up[3, 3] = np.nextafter(np.float32(1), np.float32(2))
    second = published(tmp_path, "b.safetensors", **{"model.layers.0.mlp.up_proj.weight": up})
    assert second.changed(first.checksums).keys() == {
        "model.layers.0.mlp.up_proj.weight", "model.layers.0.self_attn.q_proj.weight",
    }  # fmt: skip
    assert second.sizes["model.norm.weight"] == 16
    some = {name: value for name, value in first.checksums.items() if name != "model.norm.weight"}
    assert second.changed(some).keys() == TENSORS.keys()  # another set of names: nothing is known


def test_layers_are_named_by_their_first_number() -> None:
    assert layer_of("model.layers.3.mlp.experts.7.w1") == "model.layers.3"
    assert layer_of("transformer.h.0.attn.bias") == "transformer.h.0"
    assert layer_of("lm_head.weight") == "lm_head"


@pytest.mark.parametrize("size", [0, 1, 7, 8, 4096, 8191, 8192, 8193, 8192 * 3 + 5])
def test_a_checksum_sees_every_bit_and_every_place(size: int) -> None:
    rng = np.random.default_rng(size)
    data = rng.integers(0, 256, size).astype(np.uint8)
    seen = {checksum(data), checksum(np.append(data, np.uint8(0)))}
    assert len(seen) == 2
    for _ in range(min(size, 40)):
        at, bit = int(rng.integers(size)), int(rng.integers(8))
        other = data.copy()
        other[at] ^= np.uint8(1 << bit)
        assert checksum(other) != checksum(data)
    words = data[: size // 8 * 8].reshape(-1, 8)
    if len(words) > 1 and (words[0] != words[-1]).any():
        other = data.copy()
        other[: size // 8 * 8].reshape(-1, 8)[[0, -1]] = words[[-1, 0]]
        assert checksum(other) != checksum(data)


def test_files_that_are_cut_off_or_no_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="not a readable safetensors file"):
        PublishedTensors.read(tmp_path / "none.safetensors")
    save_file(TENSORS, tmp_path / "a.safetensors")
    whole = (tmp_path / "a.safetensors").read_bytes()
    for name, content in {"short": whole[:-4], "header": whole[:20], "empty": b"", "junk": b"\xff" * 64}.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(EngineError, match=name):
            PublishedTensors.read(tmp_path / name)


def test_what_was_sampled_is_cut_where_versions_change() -> None:
    work = Sampling([1], SamplingParams(9), None)
    assert work.segments(4)[0].policy_version == 4
    work.add([5, 6], [-0.5, -0.6], 1, 1)
    work.add([7], [-0.7], 1, 1)
    work.add([8], [-0.8], 2, 1)
    work.relabel(0, [(0, 1, 1), (2, 2, 1)])  # what the server stamped: the third token was the new version's already
    work.finish_reason = "stop"
    first, second = work.segments(2)
    assert (first.token_ids, first.policy_version, first.kv_version, first.finish_reason) == ((5, 6), 1, 1, "abort")
    assert (second.token_ids, second.policy_version, second.kv_version, second.finish_reason) == ((7, 8), 2, 1, "stop")


def test_a_resumed_request_has_other_numbers() -> None:
    seeds = {derived_seed(seed, position) for seed in range(50) for position in range(200)}
    assert len(seeds) == 50 * 200
    assert all(0 <= seed < 2**63 for seed in seeds)
