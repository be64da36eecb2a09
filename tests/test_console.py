"""What a person sees, read back from the text."""

import io
import itertools
import math
from pathlib import Path

import pytest
from rich.console import Console

from rethinker_jax.console import RunProgress, print_summary

NUMBERS = {"reward": 0.5, "accuracy": 0.25, "effective_share": 1.0, "tokens_per_second": 1234.4}


def test_plain_lines_are_rare_and_complete():
    """One line a step would fill a log with thousands; losing the last one would leave a run that looks unfinished."""
    clock = itertools.count(100.0, 1.0)  # every look at the clock is a second later
    stream = io.StringIO()
    with RunProgress(13, console=Console(file=stream), clock=lambda: next(clock)) as progress:
        progress.phase("evaluation before")
        for done in range(1, 14):
            progress.update(done, NUMBERS)
    lines = stream.getvalue().splitlines()
    # The first step, then every fifth second, then the last step.
    assert [line.split("  ")[0] for line in lines] == [
        "evaluation before", "step 1/13", "step 6/13", "step 11/13", "step 13/13",
    ]  # fmt: skip
    assert "reward 0.50  accuracy 25.0%  effective 100.0%  1234 tok/s  12s left" in lines[1]


def test_time_left_counts_only_this_process():
    """A resumed run that divided by all steps would promise to be done in no time; 10 steps at 1 s are left here."""
    clock = itertools.count(0.0, 1.0)
    progress = RunProgress(100, first_step=80, console=Console(file=io.StringIO()), clock=lambda: next(clock))
    assert math.isnan(progress.seconds_left())
    for done in range(81, 91):
        progress.update(done, NUMBERS)
    assert progress.seconds_left() == 10.0


def test_compiling_does_not_sway_the_time_left():
    times = iter([0.0, 60.0, 61.0, 62.0])  # the first step takes a minute; a mean would say 20 s per step
    progress = RunProgress(10, console=Console(file=io.StringIO()), clock=lambda: next(times))
    for done in (1, 2, 3):
        progress.update(done, NUMBERS)
    assert progress.seconds_left() == 7.0


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "160")
    stream = Terminal()
    with RunProgress(4, console=Console(file=stream)) as progress:
        progress.note("skipped [3 rows]")
        progress.update(2, NUMBERS | {"reward": math.nan, "nll": 0.12345})
    text = stream.getvalue()
    assert "2/4" in text and "1234 tok/s" in text and "reward -" in text and "nll 0.123" in text
    assert "skipped [3 rows]" in text  # rich would swallow the bracket as markup


def test_summary_table():
    summary = {
        "before": {"greedy": 0.625, "pass@1": 0.4375, "pass@8": 0.9, "rethink_ratio": 0.0},
        "after": {"greedy": 0.975, "pass@1": 0.9, "pass@8": 0.85, "rethink_ratio": None},
        "zero_advantage_share": {"first": 0.1, "last": 0.6},
        "effective_share": {"first": 0.9, "last": 1.0},
        "wall_s": 3725.0,
        "cpu_s": 59.6,
    }
    stream = io.StringIO()
    long_path = Path("/a" * 80) / "report.html"
    print_summary(summary, {"report": long_path}, Console(file=stream, width=80))
    text = stream.getvalue()
    rows = {line.split("│")[1].strip(): line for line in text.splitlines() if line.startswith("│")}
    assert "62.5%" in rows["accuracy, greedy"] and "+35.0 points" in rows["accuracy, greedy"]
    assert "-5.0 points" in rows["pass@8"]
    assert "points" not in rows["rethinking, unforced"]  # no change without both numbers
    assert "+50.0 points" in rows["zero-advantage groups"]
    assert "took 1h 02m (1m 00s of CPU)" in text
    assert f"report: {long_path}\n" in text  # a wrapped path cannot be copied


def test_summary_of_a_run_without_evaluation():
    stream = io.StringIO()
    print_summary({"before": None, "after": None}, {}, Console(file=stream, width=80))
    assert "accuracy, greedy" in stream.getvalue()
