"""The whole loop for real: tiny model, service, engine process, HTTP, buffer, loss, version log, publication."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from agentgym.rollout.store import read_trajectories, step_file

pytestmark = pytest.mark.timeout(900)  # whole runs, two or three a test
QUICKSTART = Path(__file__).parents[2] / "configs" / "quickstart.toml"
SMALL = ["rollout.groups_per_step=8", "rollout.in_flight=48", "engine.slots=48", "evaluation.episodes=32"]


def command(target: Path, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "agentgym.cli", "train", str(target), *arguments]


def run(target: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(command(target, *arguments), capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-4000:]
    return done


def metrics_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def evaluations_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "evaluations.jsonl").read_text().splitlines()]


def processes_of(folder: Path) -> list[psutil.Process]:
    """Service processes that were started for a run folder, and their children."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        if any(str(folder) in part for part in process.info["cmdline"] or ()) and "agentgym.server" in " ".join(
            process.info["cmdline"]
        ):
            found += [process, *process.children(recursive=True)]
    return found


def test_weights_published_as_bfloat16_are_what_both_sides_compute_with(tmp_path):
    run(
        QUICKSTART, f"run.dir={tmp_path}", "trainer.steps=4", "trainer.publish_dtype=bfloat16",
        "trainer.learning_rate=1e-5", "trainer.anchor=snapshot", *SMALL,
    )  # fmt: skip
    rows = metrics_of(tmp_path / "quickstart")
    assert [row["policy_version"] for row in rows] == [2, 3, 4, 5]  # version 1 is the first that was rounded
    assert max(row["trajectory/lag_max"] for row in rows) >= 1
    # a trainer that computed with its masters, or an engine that did, would differ in the third decimal
    assert all(row["discrepancy/max_abs_log_ratio"] < 1e-4 for row in rows)
    assert all(0 < row["versions/changed_fraction"] < 0.3 for row in rows)
    assert all(0 < row["versions/delta_mb"] < row["versions/full_mb"] / 2 for row in rows)
    assert all(row["versions/loaded_mb"] == pytest.approx(row["versions/full_mb"], rel=0.02) for row in rows)
    assert rows[-1]["versions/full_copies"] <= 2


def test_a_run_trains_on_several_versions_and_leaves_a_folder(tmp_path):
    run(QUICKSTART, f"run.dir={tmp_path}", "trainer.steps=6", "trainer.checkpoint_every=3", *SMALL)
    folder = tmp_path / "quickstart"
    rows = metrics_of(folder)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert [row["policy_version"] for row in rows] == [1, 2, 3, 4, 5, 6]
    # the data carries several versions, and old logprobs were exact for each of them
    assert max(row["trajectory/lag_max"] for row in rows) >= 1
    assert all(row["trajectory/lag_max"] <= 2 for row in rows)
    assert all(row["anchor/num_fallbacks"] == 0 for row in rows)
    assert all(row["discrepancy/max_abs_log_ratio"] < 1e-4 for row in rows)
    assert max(row["staleness/max_abs_log_ratio"] for row in rows) > 1e-3
    assert all(row["trajectory/delivered_fraction"] == 1.0 for row in rows)
    summary = json.loads((folder / "summary.json").read_text())
    assert 0.15 <= summary["reward_before"] <= 0.55
    assert (folder / "reward.png").read_bytes().startswith(b"\x89PNG")
    assert (folder / "model" / "config.json").is_file()
    trajectories = list(read_trajectories(step_file(folder, 3)))
    assert len(trajectories) >= 8 * 8
    assert all(turn.completion.token_ids for trajectory in trajectories for turn in trajectory.turns)
    assert processes_of(folder) == []


def test_a_killed_run_leaves_no_process_and_resumes_where_its_checkpoint_stands(tmp_path):
    folder = tmp_path / "quickstart"
    arguments = (f"run.dir={tmp_path}", "trainer.steps=200", "trainer.checkpoint_every=2", *SMALL)
    trainer = subprocess.Popen(command(QUICKSTART, *arguments), stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 400
        while len(list((folder / "checkpoints").glob("step-*"))) < 2:
            assert time.monotonic() < deadline, "no second checkpoint within 400 s"
            assert trainer.poll() is None, "the trainer ended by itself"
            time.sleep(0.05)
        children = processes_of(folder)
        assert len(children) >= 2  # service and engine
    finally:
        trainer.send_signal(signal.SIGKILL)
        trainer.wait()
    _, alive = psutil.wait_procs(children, timeout=100)
    assert alive == []

    checkpoint = max(int(path.name[5:]) for path in (folder / "checkpoints").glob("step-*"))
    before = evaluations_of(folder)[0]["mean_reward"]
    issued = int((folder / "versions" / "issued").read_text())
    done = run(folder, "--resume", f"trainer.steps={checkpoint + 2}")
    assert re.search(rf"resumed after step {checkpoint}\b", done.stderr)
    rows = metrics_of(folder)
    assert [row["step"] for row in rows] == list(range(1, checkpoint + 3))
    versions = [row["policy_version"] for row in rows]
    assert versions == sorted(set(versions))
    assert rows[checkpoint]["policy_version"] > issued  # numbers given out before the crash are not used again
    # the summary's "before" is the run's, not the resumed policy's
    assert [row["step"] for row in evaluations_of(folder)] == [0, checkpoint + 2]
    assert json.loads((folder / "summary.json").read_text())["reward_before"] == before
    first, second = ({t.group_id for t in read_trajectories(step_file(folder, step))} for step in (1, checkpoint + 1))
    assert not first & second  # the data order went on


@pytest.mark.parametrize(
    ("arguments", "message", "code"),
    [
        (["env.id=mase"], r"unknown environment 'mase'; did you mean 'maze'", 2),
        (["model.name=tinny"], r"unknown model 'tinny'; did you mean 'tiny'", 2),
        (["trainer.anchor=snapshoot"], r"trainer\.anchor", 2),
        (["trainer.stepz=3"], r"unknown key 'trainer\.stepz'; did you mean 'trainer\.steps'", 2),
        (["rollout.group_size=1"], r"group_size:? must be >= 2 for group advantages, got 1", 2),
    ],
)
def test_bad_input_ends_with_one_message_before_any_work(tmp_path, arguments, message, code):
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache")}
    done = subprocess.run(
        command(QUICKSTART, f"run.dir={tmp_path / 'runs'}", *arguments),
        capture_output=True, text=True, timeout=400, env=environment,
    )  # fmt: skip
    assert done.returncode == code
    assert re.search(message, " ".join(done.stderr.split()))
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "runs").exists()


def test_ctrl_c_ends_with_one_message_and_leaves_no_process(tmp_path):
    folder = tmp_path / "quickstart"
    trainer = subprocess.Popen(
        command(QUICKSTART, f"run.dir={tmp_path}", "trainer.steps=500", *SMALL),
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 400
        while not (folder / "metrics.jsonl").exists():
            assert time.monotonic() < deadline
            assert trainer.poll() is None
            time.sleep(0.1)
        trainer.send_signal(signal.SIGINT)
        _, stderr = trainer.communicate(timeout=300)
    finally:
        trainer.kill()
    assert trainer.returncode == 1
    assert "Traceback" not in stderr
    assert re.search("interrupted", stderr, re.IGNORECASE)
    assert processes_of(folder) == []
    assert not list(folder.rglob("*.partial"))


def launched(*arguments: str) -> list[str]:
    """Two processes. By torchrun: `accelerate launch --cpu` starts one, however many it is asked for."""
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    return [sys.executable, *torchrun, "-m", "agentgym_trainer", *arguments]


def test_two_processes_train_one_policy(tmp_path):
    few = ("trainer.steps=3", "trainer.checkpoint_every=2", "evaluation.episodes=16", *SMALL[:3])
    done = subprocess.run(
        launched(str(QUICKSTART), f"run.dir={tmp_path}", *few), capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, done.stderr[-4000:]
    folder = tmp_path / "quickstart"
    rows = metrics_of(folder)
    assert [row["policy_version"] for row in rows] == [1, 2, 3]
    # every token of the batch was learned from once, whichever rank it went to
    assert all(row["policy/num_tokens"] == row["sampled_tokens"] for row in rows)
    checkpoints = sorted((folder / "checkpoints").iterdir())
    assert [path.name for path in checkpoints] == ["step-000002", "step-000003"]
    assert all((path / "random_states_1.pkl").exists() for path in checkpoints)  # there was a second rank
    assert processes_of(folder) == []


def test_a_run_connects_to_a_service_that_runs_already(tmp_path):
    served = tmp_path / "served"
    sections = ("run.seed=0", "rollout.seed=0", "model.seed=0", *SMALL)
    service = subprocess.Popen(
        [sys.executable, "-m", "agentgym.cli", "serve", str(QUICKSTART), *SMALL[:3], "--run-dir", str(served)],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert service.stderr is not None
        url = next(found[0] for line in service.stderr if (found := re.findall(r"service_url=(\S+)", line)))
        key = served / "trainer.key"
        for name in ("first", "second"):  # the second run meets a service that has served versions already
            connect = (f"run.service_url={url}", f"run.service_key_file={key}", f"run.name={name}")
            run(QUICKSTART, f"run.dir={tmp_path}", "trainer.steps=2", *connect, *sections)
        other = tmp_path / "other"
        other.mkdir()
        (other / "config.json").write_text('{"model_type": "llama", "vocab_size": 9}')
        refused = subprocess.run(
            command(QUICKSTART, f"run.dir={tmp_path}", *connect, "run.name=third", *sections, f"model.name={other}"),
            capture_output=True, text=True, timeout=400,
        )  # fmt: skip
        assert refused.returncode == 2
        assert "serves the model 'tiny', and this run trains" in " ".join(refused.stderr.split())
        assert not (tmp_path / "third").exists()
        versions = [row["policy_version"] for name in ("first", "second") for row in metrics_of(tmp_path / name)]
        assert versions == sorted(set(versions))
        assert len(versions) == 4
        assert service.poll() is None
    finally:
        service.send_signal(signal.SIGINT)
        service.wait(200)
