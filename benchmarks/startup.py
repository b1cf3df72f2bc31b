"""How long a person waits before anything happens, each time in a fresh process."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time

IMPORT = "import time; t = time.perf_counter(); import agentgym; print(time.perf_counter() - t)"


def run(quick: bool) -> dict[str, object]:
    """Medians of interleaved runs: the import as the process itself sees it, the help as the shell sees it."""
    repetitions = 2 if quick else 15
    _import_s()  # the first runs fill the file cache and write the byte code
    _help_s()
    imports, helps = [], []
    for _ in range(repetitions):
        imports.append(_import_s())
        helps.append(_help_s())
    return {
        "import_agentgym_s": round(statistics.median(imports), 4),
        "cli_help_s": round(statistics.median(helps), 4),
        "repetitions": repetitions,
    }


def _import_s() -> float:
    return float(subprocess.run([sys.executable, "-c", IMPORT], capture_output=True, text=True, check=True).stdout)


def _help_s() -> float:
    started = time.perf_counter()
    subprocess.run([sys.executable, "-m", "agentgym.cli", "--help"], stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - started
