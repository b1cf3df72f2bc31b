"""`agentgym serve` and `agentgym eval` with a model: real processes from the command to the engine."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

AGENTGYM = (sys.executable, "-m", "agentgym.cli")
SMALL = ("engine.slots=4", "rollout.in_flight=4", "rollout.max_episode_tokens=250", "rollout.max_tokens_per_turn=6")


def agentgym(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*AGENTGYM, *arguments], capture_output=True, text=True, timeout=200, cwd=cwd)


@pytest.fixture
def served(random_model: Path, tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A running `agentgym serve`, and the URL it printed."""
    command = [*AGENTGYM, "serve", "--model", str(random_model), "--env", "maze", *SMALL]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=tmp_path)
    try:
        assert process.stderr is not None
        lines = []
        for line in process.stderr:
            lines.append(line)
            if found := re.search(r"served at (http://127\.0\.0\.1:\d+/v1)", line):
                yield process, found[1]
                return
        pytest.fail(f"it never said where it serves: {''.join(lines)}")
    finally:
        process.kill()
        process.wait()


def test_a_served_model_plays_and_ctrl_c_ends_it_whole(
    served: tuple[subprocess.Popen[str], str], random_model: Path, tmp_path: Path
) -> None:
    process, url = served
    result = agentgym(
        "eval", "maze", "--policy", f"openai:{url}#{random_model}", "--episodes", "3", "--max-tokens", "8", "--json",
        cwd=tmp_path,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    value = json.loads(result.stdout)
    assert (value["episodes"], value["valid"], value["failed"]) == (3, 3, 0)

    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 0
    _, alive = psutil.wait_procs(family, timeout=60)
    assert alive == []


def test_a_folder_is_evaluated_through_the_service(random_model: Path, tmp_path: Path) -> None:
    arguments = ("eval", "maze", *SMALL, "--policy", str(random_model), "--episodes", "6", "--json", "--seed", "3")
    first, second = (agentgym(*arguments, cwd=tmp_path) for _ in range(2))
    assert first.returncode == 0, first.stderr
    value = json.loads(first.stdout)
    assert (value["episodes"], value["valid"], value["policy_version"]) == (6, 6, 0)
    assert json.loads(second.stdout)["mean_turns"] == value["mean_turns"]
    assert list(tmp_path.iterdir()) == []


def test_a_taken_port_is_bad_input(random_model: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        result = agentgym("serve", "--model", str(random_model), "--env", "maze", "--port", port, cwd=tmp_path)
    assert result.returncode == 2
    assert f"cannot listen on 127.0.0.1:{port}" in result.stderr
    assert "Traceback" not in result.stderr


def test_other_hosts_are_refused_without_a_key(random_model: Path, tmp_path: Path) -> None:
    result = agentgym("serve", "--model", str(random_model), "--env", "maze", "--host", "0.0.0.0", cwd=tmp_path)
    assert result.returncode == 2
    assert "server.api_key_file" in result.stderr
    assert list(tmp_path.iterdir()) == []
