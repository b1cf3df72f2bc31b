"""The progress of a training run in a terminal. Law: it shows figures that it is given, and computes none.

On a terminal it is one live line with a bar; elsewhere (a log, a pipe) it is a plain line now and then, so that a run
in CI still says what it does.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

# metric -> what it is called on the line, and how it is written
SHOWN: Mapping[str, tuple[str, str]] = {
    "reward_mean": ("reward", "{:.3f}"),
    "success_rate": ("success", "{:.3f}"),
    "loss": ("loss", "{:+.4f}"),
    "staleness_mean": ("staleness", "{:.2f}"),
    "staleness_max": ("oldest", "{:.0f}"),
    "tokens_per_s": ("tokens/s", "{:,.0f}"),
    "policy_version": ("version", "{:.0f}"),
}


def describe(metrics: Mapping[str, float]) -> str:
    """The figures of one step as one line; what is absent is left out, what is not finite is shown as it is.

    >>> describe({"reward_mean": 0.5, "tokens_per_s": 1234.5})
    'reward 0.500  tokens/s 1,234'
    """
    parts = []
    for key, (label, form) in SHOWN.items():
        if key in metrics:
            value = float(metrics[key])
            parts.append(f"{label} {form.format(value) if math.isfinite(value) else value}")
    return "  ".join(parts)


class TrainProgress:
    """The live line of a run.

    >>> with TrainProgress(60) as progress:
    ...     progress.note("held-out success before: 0.34")
    ...     progress.update(1, {"reward_mean": 0.35, "staleness_mean": 0.0, "tokens_per_s": 2100.0, "loss": 0.01})
    """

    def __init__(self, total_steps: int, console: Console | None = None, plain_every_s: float = 5.0) -> None:
        """`plain_every_s`: how often a line is written where there is no terminal."""
        self._total = total_steps
        self._console = console or Console(stderr=True)
        self._plain_every_s = plain_every_s
        self._last_line = -math.inf
        self._bar = Progress(
            SpinnerColumn(),
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=24),
            TimeElapsedColumn(),
            TextColumn("{task.fields[figures]}"),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task = self._bar.add_task("train", total=total_steps, figures="")

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def update(self, step: int, metrics: Mapping[str, float]) -> None:
        """Step `step` (counted from 1) is done, with these figures."""
        figures = describe(metrics)
        if self._console.is_terminal:
            self._bar.update(self._task, completed=step, figures=escape(figures))
            return
        now = time.monotonic()
        if step == 1 or step >= self._total or now - self._last_line >= self._plain_every_s:
            self._last_line = now
            self._print(f"step {step}/{self._total}  {figures}")

    def note(self, text: str) -> None:
        """One line that stays, above the bar."""
        self._print(text)

    def _print(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)
