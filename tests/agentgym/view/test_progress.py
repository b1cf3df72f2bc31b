from __future__ import annotations

import io
import math

from rich.console import Console

from agentgym.view.progress import TrainProgress, describe


def plain() -> tuple[Console, io.StringIO]:
    out = io.StringIO()
    return Console(file=out, force_terminal=False, width=200), out


def test_describe_shows_what_is_there_in_a_fixed_order() -> None:
    assert describe({"tokens_per_s": 1234.4, "reward_mean": 0.5, "another": 3.0}) == "reward 0.500  tokens/s 1,234"
    assert describe({}) == ""


def test_describe_does_not_hide_a_loss_that_is_no_number() -> None:
    assert describe({"loss": math.nan}) == "loss nan"


def test_without_a_terminal_the_first_and_the_last_step_are_lines() -> None:
    console, out = plain()
    with TrainProgress(4, console, plain_every_s=3600) as progress:
        for step in range(1, 5):
            progress.update(step, {"reward_mean": step / 10})
    assert out.getvalue().splitlines() == ["step 1/4  reward 0.100", "step 4/4  reward 0.400"]


def test_without_a_terminal_every_step_may_be_a_line() -> None:
    console, out = plain()
    with TrainProgress(3, console, plain_every_s=0.0) as progress:
        for step in (1, 2, 3):
            progress.update(step, {})
    assert len(out.getvalue().splitlines()) == 3


def test_a_note_is_written_as_it_is() -> None:
    console, out = plain()
    with TrainProgress(1, console) as progress:
        progress.note("held-out [bold]0.34[/bold]")
    assert out.getvalue() == "held-out [bold]0.34[/bold]\n"


def test_on_a_terminal_the_bar_carries_the_figures() -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=200)
    with TrainProgress(2, console) as progress:
        progress.update(2, {"reward_mean": 0.75, "staleness_mean": 1.5})
    assert "reward 0.750  staleness 1.50" in out.getvalue()
    assert "2/2" in out.getvalue()
