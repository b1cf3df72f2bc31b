"""The benchmark harness, through its command where it prints."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from agentgym.errors import InputError
from benchmarks.__main__ import BENCHMARKS, main
from benchmarks.quickstart import MemorySampler, seconds_to
from benchmarks.table import render_table, write_table

ROOT = Path(__file__).resolve().parents[2]


def test_a_benchmark_prints_one_json_line_and_nothing_else(tmp_path: Path) -> None:
    out = tmp_path / "results" / "startup.json"
    command = [sys.executable, "-m", "benchmarks", "startup", "--quick", "--out", str(out)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    (line,) = result.stdout.splitlines()
    value = json.loads(line)
    assert set(value) == {"benchmark", "figures", "machine", "commit", "seconds", "quick"}
    assert value["benchmark"] == "startup"
    assert value["figures"]["import_agentgym_s"] > 0
    assert value["figures"]["cli_help_s"] > 0
    assert {"cpu", "cores", "memory_mb", "python"} <= set(value["machine"])
    assert out.read_text(encoding="utf-8") == result.stdout


def test_every_benchmark_is_listed_with_its_target_and_exists(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--list"]) == 0
    listed = capsys.readouterr().out
    for name, benchmark in BENCHMARKS.items():
        assert benchmark.name == name
        assert name in listed
        assert benchmark.target in listed
        assert (ROOT / "benchmarks" / f"{name}.py").exists()


def test_an_unknown_benchmark_is_bad_input(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["starup"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "unknown benchmark 'starup'; did you mean 'startup'?" in captured.err


STORED = {
    "benchmark": "quickstart",
    "figures": {"reward_after": [0.98765, 0.9], "seconds_to_90": [None], "tokens": 12345.6},
    "machine": {"cpu": "X", "cores": 2, "memory_mb": 1024, "python": "3.11.7", "load_1min": 0.1},
    "commit": "abc",
    "seconds": 61.4,
}


def test_the_table_shows_what_is_stored(tmp_path: Path) -> None:
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "quickstart.json").write_text(json.dumps(STORED), encoding="utf-8")
    page = write_table(tmp_path / "results", tmp_path / "docs" / "benchmarks.md", {"quickstart": "fast"})
    text = page.read_text(encoding="utf-8")
    assert "| reward_after | 0.9877, 0.9 |" in text
    assert "| seconds_to_90 | - |" in text
    assert "| tokens | 12,346 |" in text
    assert "Target: fast." in text


def test_a_smoke_run_says_so_in_the_table() -> None:
    assert "these figures mean nothing" in render_table([{**STORED, "quick": True}], {})
    assert "these figures mean nothing" not in render_table([STORED], {})


def test_a_table_needs_results(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no results"):
        write_table(tmp_path, tmp_path / "page.md", {})


def test_a_stored_result_that_is_no_json_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text("nonsense", encoding="utf-8")
    with pytest.raises(InputError, match=r"x\.json is not the JSON line"):
        write_table(tmp_path, tmp_path / "page.md", {})


def test_seconds_to_the_goal() -> None:
    rows = [
        {"seconds": 1.0, "reward_mean": None},
        {"seconds": 2.0, "reward_mean": 0.95},
        {"seconds": 3.0, "reward_mean": 0.99},
    ]
    assert seconds_to(0.9, rows) == 2.0
    assert seconds_to(0.999, rows) is None


def test_memory_is_that_of_the_whole_process_tree() -> None:
    child = "x = b'x' * (150 * 2**20); print('ready', flush=True); input()"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    process = subprocess.Popen([sys.executable, "-c", parent], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    sampler = MemorySampler(process.pid, every_s=0.01)
    while sampler.samples < 2:  # of both processes: they wait for us
        assert process.poll() is None
        time.sleep(0.01)
    process.communicate("\n")
    assert 150 < sampler.stop() < 400
