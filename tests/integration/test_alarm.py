"""The discrepancy alarm in whole runs: an engine that is not what the trainer takes it for, from the first batch on,
and one that goes wrong at its publications. And that a run's figures are all there, by lag."""

import json
import re
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

pytestmark = pytest.mark.timeout(600)
QUICKSTART = Path(__file__).parents[2] / "configs" / "quickstart.toml"
FEW = (
    "rollout.group_size=4", "rollout.groups_per_step=4", "rollout.in_flight=24", "engine.slots=24",
    "evaluation.episodes=0", "trainer.checkpoint_every=100",
)  # fmt: skip
# Both sides would allow for bfloat16 by themselves; whoever names the floor means it.
ROUNDED = (
    "engine.dtype=bfloat16", "trainer.publish_dtype=bfloat16", "trainer.discrepancy_floor=1e-4", "trainer.steps=2",
)  # fmt: skip


def train(folder: Path, *arguments: str) -> tuple[subprocess.CompletedProcess[str], list[dict]]:
    command = [sys.executable, "-m", "agentgym.cli", "train", str(QUICKSTART), f"run.dir={folder}", *FEW, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400)
    assert "Traceback" not in done.stderr
    metrics = folder / "quickstart" / "metrics.jsonl"
    rows = [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.exists() else []
    left = [p for p in psutil.process_iter(["cmdline"]) if any(str(folder) in part for part in p.info["cmdline"] or ())]
    assert left == []
    return done, rows


def said(done: subprocess.CompletedProcess[str]) -> str:
    return " ".join(done.stderr.split())


def test_at_the_start_a_run_is_warned_of_the_likely_cause_and_goes_on(tmp_path):
    done, rows = train(tmp_path, *ROUNDED)
    assert done.returncode == 0, done.stderr[-4000:]
    message = r"engine and trainer disagree about the same weights: .*likely cause: bf16_compute \(.*Mend: .*bfloat16"
    assert len(re.findall(message, said(done))) == 1  # of two batches: the second is not news
    assert [row["engine_mismatch/above_floor"] for row in rows] == [1.0, 1.0]
    assert [row["engine_mismatch/num_alarms"] for row in rows] == [1.0, 1.0]
    assert "engine_mismatch/cause/bf16_compute" in rows[0]
    assert not any(name.startswith("engine_mismatch/cause/") for name in rows[1])


def test_a_run_that_is_to_stop_ends_before_its_first_optimizer_step(tmp_path):
    done, rows = train(tmp_path, *ROUNDED, "trainer.on_discrepancy=stop")
    assert done.returncode == 1
    assert re.search(r"error: engine and trainer disagree .*likely cause: bf16_compute ", said(done))
    assert "trainer.on_discrepancy = 'warn' goes on all the same" in said(done)
    assert rows == []
    assert (tmp_path / "quickstart" / "versions" / "issued").read_text() == "1"  # the first that was rounded


@pytest.fixture(scope="module")
def ignored(tmp_path_factory):
    return train(tmp_path_factory.mktemp("ignored"), *ROUNDED, "trainer.on_discrepancy=ignore")


def test_a_run_that_is_to_ignore_it_keeps_the_figures_and_says_nothing(ignored):
    done, rows = ignored
    assert done.returncode == 0, done.stderr[-4000:]
    assert "disagree" not in said(done)
    assert [row["engine_mismatch/above_floor"] for row in rows] == [1.0, 1.0]
    assert all(row["engine_mismatch/excess"] > 1e-4 and row["engine_mismatch/num_tokens"] > 0 for row in rows)
    assert not any(name.startswith("engine_mismatch/cause/") for row in rows for name in row)


OF_RATIOS = (
    "k1", "k2", "k3", "ess_fraction", "chi2", "perplexity_ratio", "mean_exp_abs_log_ratio", "max_abs_log_ratio",
)  # fmt: skip
OF_TOKENS = (
    "num_tokens", "active_fraction", "mask_pass_fraction", "clip_pass_fraction", "overlap_fraction", "num_vetoed",
    "num_vetoed_rows", "stale_kv_fraction", "num_dropped",
)  # fmt: skip
OF_TRAJECTORIES = ("versions_mean", "versions_max", "partial_span_mean", "partial_span_max", "delivered_fraction")


def test_every_run_shows_every_diagnostic_by_lag(ignored):
    _, rows = ignored
    assert rows
    for row in rows:
        lags = {name.split("/")[1] for name in row if name.startswith("policy/lag")}
        assert lags
        wanted = {f"policy/{lag}/{name}" for lag in lags for name in OF_TOKENS} | {
            f"policy/{name}" for name in OF_TOKENS
        }
        for ratio in ("discrepancy", "staleness", "total"):
            wanted |= {f"{ratio}/{lag}/{name}" for lag in lags for name in OF_RATIOS}
            wanted |= {f"{ratio}/{name}" for name in (*OF_RATIOS, "ess_row_fraction")}
            of_rows = {name for name in row if re.fullmatch(rf"{ratio}/lag\w+/ess_row_fraction", name)}
            assert of_rows  # a row is in the bucket of its oldest token
        oldest = {name.split("/")[1] for name in row if name.startswith("trajectory/lag") and name.count("/") == 2}
        wanted |= {f"trajectory/{lag}/{name}" for lag in oldest for name in OF_TRAJECTORIES}
        wanted |= {f"trajectory/{name}" for name in OF_TRAJECTORIES}
        wanted |= {f"anchor/{lag}/num_fallbacks" for lag in lags}
        wanted |= {"anchor/num_fallbacks", "anchor/num_exact", "anchor/ewma_age", "anchor/ewma_resets"}
        assert wanted <= row.keys(), sorted(wanted - row.keys())
        for name in ("policy/{}num_tokens", "anchor/{}num_fallbacks", "trajectory/{}num_trajectories"):
            assert sum(row.get(name.format(f"{lag}/"), 0.0) for lag in lags | oldest) == row[name.format("")]


def test_what_goes_wrong_during_a_run_stops_it_there(tmp_path):
    done, rows = train(
        tmp_path, "engine.publish_mode=keep", "trainer.learning_rate=2e-3", "trainer.steps=80",
        "rollout.max_staleness=4", "trainer.on_discrepancy=stop",
    )  # fmt: skip
    assert done.returncode == 1, done.stderr[-4000:]
    assert re.search(r"disagree about the same weights: .*likely cause: stale_kv .*publish_mode = 'abort'", said(done))
    assert rows  # it began well
    assert all(row["engine_mismatch/above_floor"] == 0.0 for row in rows)
