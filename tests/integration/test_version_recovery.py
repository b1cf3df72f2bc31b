"""The version log outlives its trainer: what a service holds of a killed run has exact old logprobs in the next one."""

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from agentgym.server.client import ServiceClient

QUICKSTART = Path(__file__).parents[2] / "configs" / "quickstart.toml"
FEW = ("rollout.groups_per_step=8", "rollout.in_flight=48", "engine.slots=48")


@pytest.mark.slow
@pytest.mark.timeout(900)  # two runs
def test_a_trainer_that_comes_after_a_killed_one_scores_its_tokens_exactly(tmp_path):
    program = [sys.executable, "-m", "agentgym.cli"]
    served = tmp_path / "served"
    service = subprocess.Popen(
        [*program, "serve", str(QUICKSTART), *FEW, "--run-dir", str(served)],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert service.stderr is not None
        url = next(found[0] for line in service.stderr if (found := re.findall(r"service_url=(\S+)", line)))
        sections = (
            f"run.dir={tmp_path}", f"run.service_url={url}", f"run.service_key_file={served / 'trainer.key'}", *FEW,
            "rollout.seed=0", "model.seed=0", "evaluation.episodes=0",
        )  # fmt: skip
        killed = subprocess.Popen(
            [*program, "train", str(QUICKSTART), *sections, "run.name=killed", "trainer.steps=500"],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        figures = tmp_path / "killed" / "metrics.jsonl"
        deadline = time.monotonic() + 400
        while not figures.exists() or figures.read_text().count("\n") < 4:
            assert time.monotonic() < deadline, "no four steps within 400 s"
            assert killed.poll() is None, "the trainer ended by itself"
            time.sleep(0.05)
        killed.send_signal(signal.SIGKILL)
        killed.wait()
        with ServiceClient(url, (served / "trainer.key").read_text()) as client:
            while client.status().ready_groups < 8:  # what the next one trains on first is the killed one's
                assert time.monotonic() < deadline, "no batch within 400 s"
                time.sleep(0.05)
        done = subprocess.run(
            [*program, "train", str(QUICKSTART), *sections, "run.name=next", "trainer.steps=2"],
            capture_output=True, text=True, timeout=400,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-4000:]
    finally:
        service.send_signal(signal.SIGINT)
        service.wait(200)
    rows = [json.loads(line) for line in (tmp_path / "next" / "metrics.jsonl").read_text().splitlines()]
    before = json.loads(figures.read_text().split("\n")[-2])["policy_version"]  # the kill may cut one short behind it
    first = rows[0]
    assert first["policy_version"] - 1 > before  # its own initial weights are a version of their own, behind the others
    assert first["policy/mean_lag"] > 0.5  # the batch is of the killed trainer's versions,
    assert first["anchor/num_fallbacks"] == 0  # which are in the log
    assert first["anchor/num_exact"] == first["policy/num_tokens"]
    assert first["discrepancy/max_abs_log_ratio"] < 1e-4
    assert first["staleness/max_abs_log_ratio"] > 1e-2  # other weights than those that it trains
