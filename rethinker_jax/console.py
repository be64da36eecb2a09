"""What a person sees of a run: a progress bar, or plain lines where there is no terminal, and the table at the end."""

import statistics
import time
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

from rethinker_jax.health import alarm_words, left_out_words
from rethinker_jax.terminal import printable

PLAIN_INTERVAL_S = 5.0


class RunProgress:
    """Progress through the steps of a run. A terminal gets a bar, anything else at most one line in five seconds.

    `first_step` is the number of steps done before, by the run that this one resumes; `unit` is what a step is called.
    `quiet` shows nothing. Use as a context manager.
    """

    def __init__(
        self,
        num_steps: int,
        first_step: int = 0,
        title: str = "",
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
        unit: str = "step",
        quiet: bool = False,
    ):
        self._num_steps = num_steps
        self._title = title
        self._unit = unit
        self._console = console or Console(stderr=True, quiet=quiet)
        self._done = first_step
        self._clock = clock  # seconds
        self._last_time = clock()
        self._paces: deque[float] = deque(maxlen=32)  # seconds per step, recently
        self._last_line = -PLAIN_INTERVAL_S
        self._bar = None
        if self._console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=None),
                MofNCompleteColumn(),
                TextColumn("{task.fields[numbers]}"),
                console=self._console,
                expand=True,
            )
            self._task = self._bar.add_task(title or "starting", total=num_steps, completed=first_step, numbers="")

    def __enter__(self) -> "RunProgress":
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar:
            self._bar.stop()

    def phase(self, text: str) -> None:
        """Says what is going on between steps: "evaluation before", "checkpoint"."""
        if self._bar:
            self._bar.update(self._task, description=text)
        else:
            self._print(text)

    def note(self, text: str) -> None:
        """Prints a line that stays, above the bar."""
        self._print(text)

    def update(self, done: int, numbers: Mapping[str, float]) -> None:
        """After a step: `done` steps of the run are behind us.

        Shown in the order given are `reward`, `accuracy` and `effective_share` (both 0 to 1), `tokens_per_second`, and
        any other number under its own name. NaN is a dash.
        """
        now = self._clock()
        if done > self._done:
            self._paces.append((now - self._last_time) / (done - self._done))
            self._last_time, self._done = now, done
        shown = [_field(name, value) for name, value in numbers.items()]
        line = "  ".join([*shown, f"{_duration(self.seconds_left())} left"])
        if self._bar:
            self._bar.update(self._task, completed=done, description=self._title, numbers=line)
        elif now - self._last_line >= PLAIN_INTERVAL_S or done >= self._num_steps:
            self._last_line = now
            self._print(f"{self._unit} {done}/{self._num_steps}  {line}")

    def seconds_left(self) -> float:
        """By the median pace of the recent steps, which compiling and saving do not sway; NaN before the first one."""
        if not self._paces:
            return float("nan")
        return statistics.median(self._paces) * (self._num_steps - self._done)

    def _print(self, text: str) -> None:
        self._console.print(printable(text), markup=False, highlight=False, soft_wrap=True)


def parameter_line(counts: Mapping[str, int]) -> str:
    """`parameters: vision 1 + merger 2 + decoder 3 = 6, trained 3 (50.0%)`, from `count_parameters`."""
    parts = [f"{name} {count:,}" for name, count in counts.items() if count and name not in ("total", "trained")]
    total, trained = counts["total"], counts["trained"]
    return f"parameters: {' + '.join(parts)} = {total:,}, trained {trained:,} ({_percent(trained / total)})"


_BEFORE_AFTER = (
    ("accuracy, greedy", "greedy"),
    ("pass@1", "pass@1"),
    ("pass@8", "pass@8"),
    ("rethinking, unforced", "rethink_ratio"),
)
_FIRST_LAST = (
    ("zero-advantage groups", "zero_advantage_share"),
    ("effective share of the batch", "effective_share"),
)


def summary_table(summary: Mapping[str, Any]) -> Table:
    """The table of `summary.json`: what the run changed. Values that are missing or null are dashes."""
    table = Table(title="before and after")
    for heading in ("on the test split", "before", "after", "change"):
        table.add_column(heading, justify="left" if heading == "on the test split" else "right")
    before, after = summary.get("before") or {}, summary.get("after") or {}
    for label, name in _BEFORE_AFTER:
        _add_row(table, label, before.get(name), after.get(name))
    table.add_section()
    table.add_row("[bold]in training[/bold]", "[bold]first tenth[/bold]", "[bold]last tenth[/bold]", "")
    for label, name in _FIRST_LAST:
        share = summary.get(name) or {}
        _add_row(table, label, share.get("first"), share.get("last"))
    if summary.get("validation"):
        _add_validation(table, summary["validation"])
    return table


def print_summary(summary: Mapping[str, Any], paths: Mapping[str, Path | str], console: Console | None = None) -> None:
    """Prints the table, the time it took, and where things are: label → path, one a line and never wrapped."""
    console = console or Console()
    console.print(summary_table(summary))
    if summary.get("wall_s") is not None:
        cpu = f" ({_duration(summary['cpu_s'])} of CPU)" if summary.get("cpu_s") is not None else ""
        console.print(f"took {_duration(summary['wall_s'])}{cpu}", highlight=False)
    for label, words in (
        ("alarms", alarm_words(summary.get("alarms") or {})),
        ("rows left out", left_out_words(summary.get("rows_left_out") or {})),
    ):
        if words:
            console.print(printable(f"{label}: {words}"), markup=False, highlight=False, soft_wrap=True)
    for label, path in paths.items():
        console.print(printable(f"{label}: {path}"), markup=False, highlight=False, soft_wrap=True)


def _add_validation(table: Table, validation: Mapping[str, Any]) -> None:
    """Greedy responses to the validation rows: before the first step, after the last, and at the best checkpoint."""
    before, last, best = (validation.get(when) or {} for when in ("before", "last", "best"))
    table.add_section()
    table.add_row("[bold]in validation[/bold]", "[bold]before[/bold]", "[bold]after[/bold]", "")
    step = validation.get("best_step")
    for when, found in (("last", last), (f"best, checkpoint {step}", best)):
        table.add_row(
            f"reward, {when}", *(_number(_or_nan(scores, "reward"), ".3f") for scores in (before, found)),
            _number(_or_nan(found, "reward") - _or_nan(before, "reward"), "+.3f"),
        )  # fmt: skip
        _add_row(table, f"accuracy, {when}", before.get("accuracy"), found.get("accuracy"))


def _or_nan(scores: Mapping[str, Any], name: str) -> float:
    value = scores.get(name)
    return float("nan") if value is None else value


def _add_row(table: Table, label: str, before: float | None, after: float | None) -> None:
    change = "-" if before is None or after is None else f"{100 * (after - before):+.1f} points"
    table.add_row(label, _percent(before), _percent(after), change)


def _field(name: str, value: float) -> str:
    match name:
        case "accuracy":
            return f"accuracy {_percent(value)}"
        case "effective_share":
            return f"effective {_percent(value)}"
        case "tokens_per_second":
            return f"{_number(value, '.0f')} tok/s"
        case "reward":
            return f"reward {_number(value, '.2f')}"
        case _:
            return f"{name} {_number(value, '.3g')}"


def _number(value: float, form: str) -> str:
    return "-" if value != value else format(value, form)


def _percent(value: float | None) -> str:
    return "-" if value is None or value != value else f"{100 * value:.1f}%"


def _duration(seconds: float) -> str:
    """`2h 05m`, `3m 20s` or `45s`."""
    if seconds != seconds:
        return "-"
    whole = round(seconds)
    hours, minutes = whole // 3600, whole % 3600 // 60
    if hours:
        return f"{hours}h {minutes:02d}m"
    return f"{minutes}m {whole % 60:02d}s" if minutes else f"{whole}s"
