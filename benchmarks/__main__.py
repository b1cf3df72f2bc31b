"""`python -m benchmarks`: every figure that is quoted, as a command that prints it.

    python -m benchmarks --list
    python -m benchmarks NAME [--quick] [--out FILE]
    python -m benchmarks table

NAME prints one JSON line and nothing else on stdout; progress goes to stderr. Nothing is asserted.

Contract of a benchmark: a module of this package, named like the benchmark, with `run(quick: bool) -> dict[str,
object]`. It returns the figures (JSON values), prints only to stderr, seeds what it draws, and, where it compares,
runs the sides interleaved in one process lifetime and gives medians. `quick` is a smoke run of seconds, for tests.
It is entered in BENCHMARKS below with one sentence and its targets.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from agentgym.errors import AgentGymError, UnknownNameError
from benchmarks.machine import ROOT, describe_commit, describe_machine
from benchmarks.table import write_table

RESULTS = ROOT / "benchmarks" / "results"


@dataclass(frozen=True, slots=True)
class Benchmark:
    """Example: `Benchmark("startup", "How long an import and a --help take.", "import <= 0.5, help <= 1.0")`."""

    name: str  # also the module's
    about: str
    target: str  # on 2 quiet cores


BENCHMARKS = {
    benchmark.name: benchmark
    for benchmark in (
        Benchmark(
            "quickstart",
            "The whole quickstart, five seeds, each in an empty cache: what is learned, how fast, in how much memory.",
            "reward_before <= 0.40 and reward_after >= 0.90 for every seed; seconds_total <= 180; peak_rss_mb <= 2000",
        ),
        Benchmark(
            "engine_generate",
            "The torch engine beside transformers' generate on 64 episodes of unequal length.",
            "ratio >= 3",
        ),
        Benchmark(
            "trainer_throughput",
            "Tokens trained per second beside padded batches and the bound without padding.",
            "ratio_bound >= 0.9, ratio_padded >= 2",
        ),
        Benchmark(
            "version_log",
            "What a policy version costs as a delta of bf16 bits, and a switch between two of them in place.",
            "chain8_fraction <= 0.2 at lr <= 5e-6",
        ),
        Benchmark(
            "exact_cost",
            "An optimizer step with exact old logprobs, beside the usual recompute, on rows of one to four versions.",
            "snapshot's step_time_ratio <= 1.25, fresh_step_time_ratio <= 1.0",
        ),
        Benchmark(
            "separation",
            "Law F on real rollouts: tokens whose r_d leaves [1/1.2, 1.2] as the lag window grows, by anchor.",
            "snapshot flat, resident growing, ewma between",
        ),
        Benchmark(
            "sandbox_call",
            "One tool call through the worker of a box, beside `docker exec`.",
            "worker_p50_ms <= 3, worker_p99_ms <= 15, ratio >= 20",
        ),
        Benchmark(
            "sandbox_start",
            "A box from the warm pool and cold in each tier, until its first command has answered.",
            "pool_acquire_p50_ms <= 5, docker_cold_p50_ms <= 350, namespace_cold_p50_ms <= 20",
        ),
        Benchmark(
            "sandbox_capacity",
            "Boxes that live at once, and the memory of one.",
            "docker_live 64, namespace_live 200",
        ),
        Benchmark(
            "sandbox_cycles",
            "A thousand boxes one after another in each tier, and what is left of them.",
            "all leaks 0",
        ),
        Benchmark(
            "sandbox_sigkill",
            "What is left 30 s after `kill -9` of an owner with 16 boxes live and 4 being created.",
            "left_after_30s 0",
        ),
        Benchmark(
            "server_gateway",
            "vLLM asked directly and through our gateway, 48 requests at once.",
            "ratio >= 0.95, added_latency_p50_ms <= 3",
        ),
        Benchmark(
            "server_sessions",
            "500 sessions at once: outside agents that all ask at the same time.",
            "concurrent 500, errors 0",
        ),
        Benchmark(
            "publish",
            "New weights to a vLLM server while it samples: every mode, whole and sparse.",
            "pause_ms <= 60 ms + bytes / (2 GB/s)",
        ),
        Benchmark(
            "logprob_conformance",
            "Logprobs of the torch engine and of vLLM beside the plain forward.",
            "max_abs <= 1e-4 (float32)",
        ),
        Benchmark(
            "startup",
            "How long `import agentgym` and `agentgym --help` take, each in a fresh process.",
            "import_agentgym_s <= 0.5, cli_help_s <= 1.0",
        ),
    )
}


def measure(name: str, quick: bool) -> dict[str, object]:
    """Runs a benchmark; the one line it prints, as a dictionary. Raises UnknownNameError."""
    if name not in BENCHMARKS:
        raise UnknownNameError.of("benchmark", name, BENCHMARKS)
    module = importlib.import_module(f"benchmarks.{name}")
    machine = describe_machine()  # before, so that its load is not our own
    started = time.perf_counter()
    with contextlib.redirect_stdout(sys.stderr):
        figures = module.run(quick)
    return {
        "benchmark": name,
        "figures": figures,
        "machine": machine,
        "commit": describe_commit(),
        "seconds": round(time.perf_counter() - started, 3),
        **({"quick": True} if quick else {}),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Print one figure set as one JSON line.")
    parser.add_argument("name", nargs="?", help="a benchmark, or `table` to write docs/benchmarks.md from the results")
    parser.add_argument("--list", action="store_true", help="list the benchmarks with their targets")
    parser.add_argument("--quick", action="store_true", help="a smoke run; its figures mean nothing")
    parser.add_argument("--out", type=Path, help="also write the line to this file (benchmarks/results/NAME.json)")
    options = parser.parse_args(arguments)
    # children inherit it: OpenMP teams that spin beside another busy process ruin every figure on small machines
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    if options.list:
        for benchmark in BENCHMARKS.values():
            print(f"{benchmark.name:20} {benchmark.about}\n{'':20} target: {benchmark.target}")
        return 0
    if options.name is None:
        parser.error("name a benchmark, or use --list")
    try:
        if options.name == "table":
            print(
                write_table(RESULTS, ROOT / "docs" / "benchmarks.md", {b.name: b.target for b in BENCHMARKS.values()})
            )
            return 0
        line = json.dumps(measure(options.name, options.quick))
        if options.out is not None:
            options.out.parent.mkdir(parents=True, exist_ok=True)
            options.out.write_text(line + "\n", encoding="utf-8")
        print(line)
    except AgentGymError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
