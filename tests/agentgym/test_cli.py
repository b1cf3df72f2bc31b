"""The command line as a person meets it: real processes where exit code and streams matter."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import typer

from agentgym.cli import guarded
from agentgym.errors import ConfigError, TrainingError

AGENTGYM = (sys.executable, "-m", "agentgym.cli")


def agentgym(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "COLUMNS": "200", "NO_COLOR": "1"}
    return subprocess.run(
        [*AGENTGYM, *arguments], capture_output=True, text=True, timeout=200, cwd=cwd, env=environment
    )


def one_message(result: subprocess.CompletedProcess[str]) -> str:
    """The message of a refused command; there is no traceback beside it and nothing on stdout."""
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    return result.stderr.strip()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), ("envs", "eval", "serve", "train", "sandbox")),
        (("envs",), ("--json",)),
        (("eval",), ("--policy", "--episodes", "--split", "--seed", "--sandbox", "--temperature")),
        (("serve",), ("--model", "--env", "--host", "--port", "--engine", "--replicas", "--vllm-url")),
        (("sandbox", "list"), ("--json",)),
        (("train",), ("CONFIG", "--resume")),
        (("sandbox", "build-base"), ("image",)),
    ],
    ids=lambda value: " ".join(value) or "root",
)
def test_every_command_has_help(arguments: tuple[str, ...], words: tuple[str, ...]) -> None:
    result = agentgym(*arguments, "--help")
    assert result.returncode == 0
    for word in words:
        assert word.lower() in result.stdout.lower()


def test_help_does_not_load_what_is_heavy() -> None:
    source = "import sys\nfrom agentgym.cli import build_app\nbuild_app()\nprint('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=True)
    assert result.stdout == "False\n"


def test_envs_lists_the_bundled_ones() -> None:
    rows = [json.loads(line) for line in agentgym("envs", "--json").stdout.splitlines()]
    by_alias = {row["alias"]: row for row in rows}
    assert {"maze", "guess_number", "reverse_text", "python_math"} <= set(by_alias)
    assert by_alias["maze"] == {
        "id": "agentgym/Maze-v0", "alias": "maze", "max_turns": 7, "tools": ["move"], "oracle": True,
    }  # fmt: skip
    table = agentgym("envs").stdout
    assert all(row["id"] in table for row in rows)


@pytest.mark.parametrize(("policy", "reward"), [("oracle", 1.0), ("nop", 0.0)])
def test_eval_plays_an_agent(policy: str, reward: float) -> None:
    result = agentgym("eval", "maze", "--policy", policy, "--episodes", "5", "--json")
    assert result.returncode == 0, result.stderr
    value = json.loads(result.stdout)
    assert (value["policy"], value["episodes"], value["mean_reward"]) == (policy, 5, reward)


def test_eval_is_repeatable_and_its_seed_matters() -> None:
    def play(seed: str) -> str:
        return agentgym("eval", "maze", "--policy", "random", "--episodes", "30", "--seed", seed, "--json").stdout

    def reward(line: str) -> float:
        return json.loads(line)["mean_turns"]

    assert reward(play("1")) == reward(play("1"))
    assert len({reward(play(seed)) for seed in ("1", "2", "3")}) > 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("eval", "mase", "--policy", "nop"), "error: unknown environment 'mase'; did you mean 'maze'?"),
        (("eval", "nofile.py:My-v0"), "error: there is no environment file 'nofile.py'"),
        (("eval", "maze", "--policy", "nothing"), "error: unknown model 'nothing'"),
        (("eval", "maze", "--policy", "tiny", "rollout.grup_size=4"), "did you mean 'rollout.group_size'?"),
        (("eval", "maze", "--policy", "oracle", "rollout.seed=4"), "settings are for models"),
        (("eval", "maze", "--policy", "openai:localhost"), "an OpenAI endpoint reads openai:URL#MODEL"),
        (("eval", "maze", "--policy", "openai:http://x#y", "--key-file", "none"), "cannot read the API key from none"),
        (("serve", "a.toml", "b.toml"), "one configuration file at most, got a.toml and b.toml"),
        (("serve", "--model", "tiny"), "env"),
        (("serve", "--env", "maze", "--replicas", "2"), "only kind = 'vllm' has replicas"),
        (("train", "none.toml"), "error: cannot read the configuration none.toml: No such file"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_bad_input_is_one_message_and_exit_code_2(tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    result = agentgym(*arguments, cwd=tmp_path)
    assert message in one_message(result)
    assert result.returncode == 2
    assert list(tmp_path.iterdir()) == []


def test_a_key_is_never_shown(tmp_path: Path) -> None:
    (tmp_path / "key").write_text("s3cret\n", encoding="utf-8")
    policy = "openai:http://127.0.0.1:9/v1#m"
    result = agentgym("eval", "maze", "--policy", policy, "--key-file", str(tmp_path / "key"), "--episodes", "1")
    assert result.returncode == 1
    assert "127.0.0.1:9" in one_message(result)
    assert "s3cret" not in result.stderr


@pytest.mark.parametrize(
    ("failure", "code", "message"),
    [
        (ConfigError("rollout.group_size must be >= 2, got 1"), 2, "error: rollout.group_size must be >= 2, got 1"),
        (TrainingError("the gradient is not finite"), 1, "error: the gradient is not finite"),
        (KeyboardInterrupt(), 1, "interrupted"),
        (
            OSError(errno.ENOSPC, "No space left on device", "runs/x/metrics.jsonl"), 1,
            "error: the disk is full (writing runs/x/metrics.jsonl): make room and try again",
        ),
        (ModuleNotFoundError("x", name="torch"), 2, "error: this needs torch: pip install 'agentgym-rl[train]'"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)  # fmt: skip
def test_a_failure_is_one_message_and_its_exit_code(
    capsys: pytest.CaptureFixture[str], failure: BaseException, code: int, message: str
) -> None:
    def command() -> None:
        raise failure

    with pytest.raises(typer.Exit) as caught:
        guarded(command)()
    assert caught.value.exit_code == code
    assert capsys.readouterr().err == message + "\n"


@pytest.mark.parametrize(
    "bug", [ZeroDivisionError(), OSError(errno.EACCES, "x"), ModuleNotFoundError("x", name="mine")]
)
def test_a_bug_keeps_its_traceback(bug: Exception) -> None:
    def command() -> None:
        raise bug

    with pytest.raises(type(bug)):
        guarded(command)()


def test_ctrl_c_ends_in_one_message() -> None:
    source = (
        "import agentgym.cli, time\n@agentgym.cli.guarded\ndef f():\n print('on', flush=True)\n time.sleep(60)\nf()"
    )
    program = f"import typer\n{source}".replace("\nf()", "\napp = typer.Typer()\napp.command()(f)\napp()")
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "on\n"
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=200)
    assert (process.returncode, stderr) == (1, "interrupted\n")


def test_a_plugin_that_cannot_be_imported_says_so_and_hides_no_other(tmp_path: Path) -> None:
    info = tmp_path / "broken-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1.0\n", encoding="utf-8")
    (info / "entry_points.txt").write_text("[agentgym.commands]\nbroken = nowhere_at_all:broken\n", encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*AGENTGYM, *arguments], capture_output=True, text=True, env=environment, timeout=200)

    assert run("--help").returncode == 0
    result = run("broken")
    assert "the command 'broken' cannot be loaded from nowhere_at_all:broken" in one_message(result)
    assert result.returncode == 2
    assert run("--version").returncode == 0


def test_the_version() -> None:
    from agentgym import __version__

    assert agentgym("--version").stdout == f"{__version__}\n"
