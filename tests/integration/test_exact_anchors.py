"""The exact anchors in real runs: service, engine process, HTTP, scorer process, versions, publications."""

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

pytestmark = pytest.mark.timeout(600)
QUICKSTART = Path(__file__).parents[2] / "configs" / "quickstart.toml"
FEW = (
    "trainer.steps=5", "rollout.group_size=4", "rollout.groups_per_step=4", "rollout.in_flight=24", "engine.slots=24",
    "evaluation.episodes=0", "trainer.checkpoint_every=100",
)  # fmt: skip


def processes_of(folder: Path) -> list[psutil.Process]:
    """Those that were told the run folder, and those that write a log into it, as the scorer does."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        told = any(str(folder) in part for part in process.info["cmdline"] or ())
        with contextlib.suppress(OSError):  # it has ended
            told = told or str(folder) in os.readlink(f"/proc/{process.pid}/fd/1")
        if told:
            found.append(process)
    return found


@pytest.mark.parametrize("anchor", ["snapshot", "interrupt", "old_logit_model"])
def test_every_old_logprob_is_that_of_its_own_version(tmp_path, anchor):
    done = subprocess.run(
        [sys.executable, "-m", "agentgym.cli", "train", str(QUICKSTART), f"run.dir={tmp_path}", *FEW,
         f"trainer.anchor={anchor}", "rollout.max_staleness=2"],
        capture_output=True, text=True, timeout=400,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    folder = tmp_path / "quickstart"
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["policy_version"] for row in rows] == [1, 2, 3, 4, 5]
    assert max(row["trajectory/lag_max"] for row in rows) >= 1
    # the policy has moved since the tokens were sampled
    assert max(row["staleness/max_abs_log_ratio"] for row in rows) > 1e-2
    for row in rows:
        assert row["anchor/num_fallbacks"] == 0
        assert row["anchor/num_exact"] == row["policy/num_tokens"] > 0
        # The engine recorded what its own weights gave: the same version's logprobs, here and there in fp32. Those of
        # a neighbouring version are a hundredth off, or more.
        assert row["discrepancy/max_abs_log_ratio"] < 1e-4
    if anchor == "interrupt":
        assert all(row["anchor/broken_pauses"] == 0 for row in rows)
        assert all(row["time/pause_s"] >= row["anchor/stall_s"] > 0 for row in rows)
        assert sum(row["anchor/recorded_tokens"] for row in rows) > 0
    if anchor == "old_logit_model":
        assert rows[-1]["anchor/scorer_restarts"] == 0
        assert sum(row["anchor/recorded_tokens"] for row in rows) > 0
    assert processes_of(folder) == []


@pytest.mark.slow
def test_two_ranks_share_the_work_of_an_interruption(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
         "-m", "agentgym_trainer", str(QUICKSTART), f"run.dir={tmp_path}", *FEW, "trainer.anchor=interrupt"],
        capture_output=True, text=True, timeout=400,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    folder = tmp_path / "quickstart"
    assert (folder / "checkpoints" / "step-000005" / "random_states_1.pkl").exists()  # there was a second rank
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert max(row["trajectory/lag_max"] for row in rows) >= 1
    assert all(row["discrepancy/max_abs_log_ratio"] < 1e-4 for row in rows)
    assert all(row["anchor/num_exact"] == row["policy/num_tokens"] > 0 for row in rows)
