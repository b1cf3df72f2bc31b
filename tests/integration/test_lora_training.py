"""`agentgym train` with an adapter, and its resume: the adapter is what travels, is kept and goes on."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

pytestmark = pytest.mark.timeout(900)  # two runs
QUICKSTART = Path(__file__).parents[2] / "configs" / "quickstart.toml"
SMALL = (
    "rollout.groups_per_step=4", "rollout.in_flight=32", "engine.slots=32", "evaluation.episodes=0",
    "trainer.learning_rate=3e-3", "trainer.checkpoint_every=1", "trainer.anchor=snapshot", "trainer.lora.rank=4",
    "trainer.publish_dtype=bfloat16",
)  # fmt: skip


def run(*arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "agentgym.cli", "train", *arguments], capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stderr


def metrics_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_an_adapter_is_trained_published_and_resumed(tmp_path):
    folder = tmp_path / "quickstart"
    run(str(QUICKSTART), f"run.dir={tmp_path}", "trainer.steps=3", *SMALL)
    after_three = load_file(folder / "adapter" / "adapter_model.safetensors")
    stderr = run(str(folder), "--resume", "trainer.steps=5")
    assert "resumed after step 3" in stderr
    rows = metrics_of(folder)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
    assert [row["policy_version"] for row in rows] == [1, 2, 3, 5, 6]  # version 4 is the adapter that came back
    assert max(row["trajectory/lag_max"] for row in rows) >= 1
    # both sides compute with what was rounded; the engine merges, the trainer does not: a scale, a name or a base that
    # was off would show here
    assert all(row["discrepancy/max_abs_log_ratio"] < 1e-4 for row in rows)
    assert max(row["staleness/max_abs_log_ratio"] for row in rows) > 1e-3
    assert all(row["anchor/num_exact"] == row["policy/num_tokens"] for row in rows)

    with safe_open(folder / "versions" / "00000006.safetensors", "pt") as file:
        assert file.metadata()["format"] == "lora"
        published = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    saved = load_file(folder / "adapter" / "adapter_model.safetensors")
    assert published.keys() == saved.keys()
    assert all(torch.equal(published[name], saved[name].bfloat16()) for name in saved)
    moved = max(float((saved[name] - after_three[name]).abs().max()) for name in saved)
    assert 0 < moved < 0.03  # two steps of Adam behind the third, not five from a new adapter
    whole = AutoModelForCausalLM.from_pretrained(folder / "model")
    held = sum(tensor.numel() for tensor in saved.values())
    assert held < sum(parameter.numel() for parameter in whole.parameters()) / 5


def test_targets_that_the_model_has_not_end_the_run_before_any_work(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "agentgym.cli", "train", str(QUICKSTART), f"run.dir={tmp_path / 'runs'}",
         "trainer.lora.rank=4", 'trainer.lora.target_modules=["query"]'],
        capture_output=True, text=True, timeout=400,
    )  # fmt: skip
    assert done.returncode == 2
    assert "names 'query', which the model has not; its linear layers are" in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "runs").exists()
