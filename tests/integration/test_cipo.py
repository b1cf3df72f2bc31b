"""A run with correction prompts for real: service, engine process, buffer, exact old logprobs, checkpoint, resume."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from agentgym.rollout.correction import COMPONENT
from agentgym.rollout.store import read_trajectories, step_file
from agentgym.trajectory import Trajectory

QUICKSTART = Path(__file__).parents[2] / "configs" / "quickstart.toml"


def train(target: Path, *arguments: str) -> str:
    command = [sys.executable, "-m", "agentgym.cli", "train", str(target), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stderr


def metrics_of(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def revisions_of(folder: Path, steps: range) -> list[Trajectory]:
    return [t for step in steps for t in read_trajectories(step_file(folder, step)) if t.group_id.startswith("c-")]


@pytest.mark.slow
@pytest.mark.timeout(900)  # two runs
def test_a_run_trains_on_corrections_beside_plain_groups_and_resumes(tmp_path: Path) -> None:
    train(
        QUICKSTART, f"run.dir={tmp_path}", "trainer.steps=4", "trainer.checkpoint_every=2", "evaluation.episodes=0",
        "rollout.groups_per_step=8", "rollout.in_flight=48", "engine.slots=48", "rollout.max_episode_tokens=384",
        "rollout.cipo.share=0.4",
    )  # fmt: skip
    folder = tmp_path / "quickstart"
    rows = metrics_of(folder)
    assert [row["policy_version"] for row in rows] == [1, 2, 3, 4]
    groups = [row["cipo/groups"] for row in rows]
    assert 0 < sum(groups) <= 0.5 * 8 * 4
    assert any("cipo/wrong_to_correct" in row for row in rows)
    # every token was learned from once, with exact old logprobs, behind the very prompt that the engine saw
    assert all(row["policy/num_tokens"] == row["sampled_tokens"] for row in rows)
    assert all(row["anchor/num_fallbacks"] == 0 for row in rows)
    assert all(row["discrepancy/max_abs_log_ratio"] < 1e-4 for row in rows)

    revisions = revisions_of(folder, range(1, 5))
    assert len({revision.group_id for revision in revisions}) == sum(groups)
    assert all(revision.score and COMPONENT in revision.score.components for revision in revisions)
    for revision in revisions:
        roles = [message.role for message in revision.opening]
        assert roles[:2] == ["user", "assistant"]
        assert roles[-1] == "user"

    stderr = train(folder, "--resume", "trainer.steps=7")
    assert "resumed after step 4" in stderr
    resumed = revisions_of(folder, range(5, 8))
    assert resumed
    assert not {revision.group_id for revision in resumed} & {revision.group_id for revision in revisions}
    assert metrics_of(folder)[4]["cipo/correct_share"] > 0
