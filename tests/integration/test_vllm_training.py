"""Training on two vLLM servers of which one is killed: the run goes on; no trajectory is lost, torn or there twice."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import httpx
import psutil
import pytest

from agentgym.rollout.store import read_trajectories, step_file
from agentgym.trajectory import Trajectory

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(1200)]

QUICKSTART = Path(__file__).parents[2] / "configs" / "quickstart.toml"
GROUPS, SIBLINGS = 4, 8
SMALL = (
    "engine.kind=vllm", "engine.replicas=2", "engine.slots=24", f"rollout.groups_per_step={GROUPS}",
    "rollout.in_flight=48", "evaluation.episodes=0",
)  # fmt: skip


class Run:
    """A training run under way."""

    def __init__(self, target: Path, python: Path, steps: int) -> None:
        self.folder = target / "quickstart"
        arguments = (f"run.dir={target}", f"engine.vllm_python={python}", f"trainer.steps={steps}", *SMALL)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "agentgym.cli", "train", str(QUICKSTART), *arguments],
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    def rows(self) -> list[dict[str, float]]:
        path = self.folder / "metrics.jsonl"
        whole = path.read_text().split("\n")[:-1] if path.exists() else []  # the last may be being written
        return [json.loads(line) for line in whole]

    def log(self) -> str:
        return (self.folder / "service.log").read_text()

    def comebacks(self) -> int:
        return len(re.findall(r"vllm \d serves version", self.log())) - 2

    def wait(self, condition: Callable[[], bool], seconds: float = 400.0) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert self.process.poll() is None, self.end()
            assert time.monotonic() < deadline, self.log()[-3000:]
            time.sleep(0.05)

    def busy(self) -> bool:
        """Whether every server has requests just now that no publication cuts, as the service says to anybody."""
        for child in psutil.Process(self.process.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess, httpx.TransportError):
                if "agentgym.server" in child.cmdline():
                    ports = [each.laddr.port for each in child.net_connections("tcp4") if each.status == "LISTEN"]
                    said = httpx.get(f"http://127.0.0.1:{ports[0]}/v1/policy", timeout=60).json()
                    running = [replica["running"] for replica in said["replicas"]]
                    return len(running) == 2 and all(running) and said["publishing"] is None
        return False

    def oldest_server(self) -> int:
        """The HTTP process of one of the servers that run now, the one that was started first."""
        servers: dict[int, psutil.Process] = {}
        for child in psutil.Process(self.process.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):  # it was there for a moment
                if child.cmdline()[1:3] == ["-m", "vllm.entrypoints.openai.api_server"]:
                    servers[child.pid] = child
        # a child that was forked and is not yet another program has its parent's command line
        own = [server for server in servers.values() if server.ppid() not in servers]
        assert len(own) == 2
        return min(own, key=lambda server: server.create_time()).pid

    def kill_a_server(self) -> None:
        os.kill(self.oldest_server(), signal.SIGKILL)

    def kill_a_busy_server(self) -> None:
        """One that owes answers. It is held first, or it might give the last of them just before it is killed; and so
        is the trainer, whose publication would take the requests back."""
        held = (self.process.pid, self.oldest_server())
        killed = False
        while not killed:
            self.wait(self.busy)
            for pid in held:
                os.kill(pid, signal.SIGSTOP)
            # the service has read what was on the way by its first answer, the second is of what is owed
            if killed := self.busy() and self.busy():
                os.kill(held[1], signal.SIGKILL)
                self.wait(lambda: "is taken out" in self.log())
            for pid in held[: 1 if killed else 2]:
                os.kill(pid, signal.SIGCONT)

    def end(self) -> str:
        _, said = self.process.communicate(timeout=400)
        return said


def assert_nothing_lost(run: Run, steps: int) -> None:
    rows = run.rows()
    assert [row["step"] for row in rows] == list(range(1, steps + 1))
    assert [row["policy_version"] for row in rows] == list(range(1, steps + 1))
    seen: Counter[str] = Counter()
    members: dict[str, set[str]] = {}
    for step, row in enumerate(rows, start=1):
        trajectories = list(read_trajectories(step_file(run.folder, step)))
        assert len(trajectories) == row["groups"] * SIBLINGS == GROUPS * SIBLINGS
        assert row["failed"] == row["retried"] == row["discarded_groups"] == 0
        assert row["policy/num_tokens"] == sum(trajectory.num_sampled_tokens for trajectory in trajectories)
        # the trainer's own forward of every token's version agrees: also for those that began on a server that died
        assert row["anchor/num_fallbacks"] == 0
        assert row["discrepancy/max_abs_log_ratio"] < 1e-4
        assert row["discrepancy/probe_max_abs"] < 1e-4
        for trajectory in trajectories:
            seen[trajectory.trajectory_id] += 1
            members.setdefault(trajectory.group_id, set()).add(trajectory.trajectory_id)
            assert_whole(trajectory)
    assert set(seen.values()) == {1}
    assert members == {group: {f"{group}.{member}" for member in range(SIBLINGS)} for group in members}


def assert_whole(trajectory: Trajectory) -> None:
    """Each turn continues the one before it, and each token's keys are of its own version."""
    before: tuple[int, ...] = ()
    oldest = 0
    for turn in trajectory.turns:
        completion = turn.completion
        assert turn.prompt_ids[: len(before)] == before
        assert len(completion.token_ids) == len(completion.logprobs) == len(completion.policy_versions) > 0
        assert list(completion.policy_versions) == sorted(completion.policy_versions)
        assert completion.policy_versions[0] >= oldest
        assert completion.kv_versions == completion.policy_versions
        before, oldest = (*turn.prompt_ids, *completion.token_ids), completion.policy_versions[-1]


def test_kill_9_of_one_of_two_servers_while_a_run_trains(tmp_path: Path, vllm_python: Path) -> None:
    steps = 5
    run = Run(tmp_path, vllm_python, steps)
    try:
        run.wait(lambda: len(run.rows()) >= 1)
        run.kill_a_busy_server()
        said = run.end()
    finally:
        run.process.kill()
    assert run.process.returncode == 0, said[-4000:]
    assert "is taken out" in run.log()
    assert re.search(r"a request goes on behind \d+ tokens", run.log())  # there was something to lose
    assert_nothing_lost(run, steps)


@pytest.mark.slow
def test_each_of_two_servers_is_killed_once_and_both_come_back(tmp_path: Path, vllm_python: Path) -> None:
    """A server takes one to three minutes to come back; the run, which goes on meanwhile, is then interrupted."""
    run = Run(tmp_path, vllm_python, 5000)
    try:
        run.wait(lambda: len(run.rows()) >= 1)
        for comebacks in (1, 2):
            run.kill_a_server()
            run.wait(lambda: run.comebacks() == comebacks)  # noqa: B023  asked before the next round
        steps = len(run.rows())
        run.wait(lambda: len(run.rows()) >= steps + 5)
        run.process.send_signal(signal.SIGINT)
        said = run.end()
    finally:
        run.process.kill()
    assert run.process.returncode == 1
    assert "interrupted" in said
    assert run.log().count("is taken out") == 2
    assert_nothing_lost(run, len(run.rows()))
