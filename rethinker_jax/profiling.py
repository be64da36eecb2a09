"""`--profile`: a trace of a few steps by jax's profiler, and a table of where their time went."""

import contextlib
import itertools
from collections.abc import Callable, Generator, Mapping, Sequence
from pathlib import Path
from types import TracebackType

import jax
from jax.profiler import ProfileData

from rethinker_jax import peers, phases
from rethinker_jax.errors import UserError
from rethinker_jax.options import ProfileSteps

MOST_BYTES = 1 << 28  # of a trace that is read for the table; a larger one is left to the viewers
MOST_PROGRAMS = 8
DEVICE_LINE = "XLA Modules"  # of a TPU's plane: one event a run of a program


class Profiler:
    """Traces the steps that `--profile` names, counted from where this process begins; without it, nothing.

    Use as a context manager around the steps: a trace that is under way when the block is left, in whatever way, is
    closed and kept. Each process of a job writes a trace of its own, below `run_dir`. `say` prints a line.
    """

    def __init__(
        self, asked: ProfileSteps | None, first_step: int, num_steps: int, run_dir: Path, say: Callable[[str], None]
    ):
        """Raises UserError where the run ends before the first of the steps."""
        left = num_steps - first_step
        if asked is not None and asked.first > left:
            earlier = f", or name earlier ones, as in --profile 1-{left}" if left else ""
            raise UserError(
                f"--profile {asked.first}-{asked.last}: steps are counted from where this process begins, and the run "
                f"has {left} to go. Raise the number of steps{earlier}."
            )
        self._steps = range(0) if asked is None else range(first_step + asked.first - 1, first_step + asked.last)
        name = f"process_{peers.index()}" if peers.count() > 1 else ""
        self.directory = run_dir / "profile" / name
        self._say = say
        self._traced: list[int] = []
        self._began: phases.Reading | None = None

    def __enter__(self) -> "Profiler":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._finish()

    @contextlib.contextmanager
    def step(self, number: int) -> Generator[None]:
        """The block is a step of the run."""
        if number not in self._steps:
            yield
            return
        if self._began is None:
            self._start()
        self._traced.append(number)
        with jax.profiler.StepTraceAnnotation("step", step_num=number):
            yield
        if number == self._steps[-1]:
            self._finish()

    def _start(self) -> None:
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0  # every call of Python would slow the steps and drown their phases
        jax.profiler.start_trace(str(self.directory), profiler_options=options)
        phases.CLOCK.span = jax.profiler.TraceAnnotation
        self._began = phases.CLOCK.read()

    def _finish(self) -> None:
        """Closes the trace that is under way, if one is, and prints what it shows."""
        if self._began is None:
            return
        spent = self._began.until(phases.CLOCK.read())
        self._began, self._steps, phases.CLOCK.span = None, range(0), phases.no_span
        with phases.during("write"):
            jax.profiler.stop_trace()
            trace = newest_trace(self.directory)
            if peers.index() == 0:  # what is said is of the first process; reading a large trace takes a while
                for line in [*phase_lines(self._traced, spent), *program_lines(trace, sum(spent.values()))]:
                    self._say(line)
        viewer = trace.with_name(trace.name.replace(".xplane.pb", ".trace.json.gz"))
        self._say(f"trace: {viewer} opens at https://ui.perfetto.dev")
        self._say(f"       tensorboard --logdir {self.directory} shows it too, with the plugin xprof")


def newest_trace(directory: Path) -> Path:
    """The file of the last trace that was written there; jax names its folder by the time."""
    return max(directory.glob("plugins/profile/*/*.xplane.pb"), key=lambda path: path.stat().st_mtime_ns)


def phase_lines(steps: Sequence[int], spent: Mapping[str, float]) -> list[str]:
    """A table: seconds of each phase and its share, the longest first and what no phase covers last."""
    total = sum(spent.values())
    ordered = sorted(spent, key=lambda name: (name == phases.REST, -spent[name]))
    steps_said = f"step {steps[0]}" if len(steps) == 1 else f"steps {steps[0]} to {steps[-1]}"
    return [f"profile of {steps_said}: {total:.2f} s", *(_row(name, spent[name], total) for name in ordered)]


def program_lines(trace: Path, total: float) -> list[str]:
    """The same of the programs that the devices ran, as far as the trace tells them; no lines where it is too large."""
    if trace.stat().st_size > MOST_BYTES:
        return []
    found = program_seconds(ProfileData.from_file(str(trace)))
    longest = sorted(found, key=lambda name: -found[name])[:MOST_PROGRAMS]
    heading = ["of that, by program on the device (mean of the devices)"] if found else []
    return [*heading, *(_row(name, found[name], total) for name in longest)]


def _row(name: str, seconds: float, total: float) -> str:
    return f"  {name:<32.32} {seconds:9.3f} s {seconds / max(total, 1e-9):7.1%}"


def program_seconds(data: ProfileData) -> dict[str, float]:
    """Program → seconds in which any operation of it ran, the mean over the planes (devices) that ran programs.

    On a CPU all simulated devices are one plane, and operations of several threads overlap: hence unions of intervals.
    """
    per_plane: list[dict[str, float]] = []
    for plane in data.planes:
        intervals: dict[str, list[tuple[float, float]]] = {}
        whole = [line for line in plane.lines if line.name == DEVICE_LINE]
        for line in whole or plane.lines:
            for event in line.events:
                name = event.name.partition("(")[0] if whole else _module_of(event)
                if name:
                    intervals.setdefault(name, []).append((event.start_ns, event.start_ns + event.duration_ns))
        if intervals:
            per_plane.append({name: _union(sorted(found)) / 1e9 for name, found in intervals.items()})
    names = dict.fromkeys(itertools.chain.from_iterable(per_plane))
    return {name: sum(one.get(name, 0.0) for one in per_plane) / len(per_plane) for name in names}


def _module_of(event: jax.profiler.ProfileEvent) -> str:
    return next((str(value) for key, value in event.stats if key == "hlo_module"), "")


def _union(intervals: Sequence[tuple[float, float]]) -> float:
    """Length of what intervals cover together; they come in order."""
    total, end = 0.0, float("-inf")
    for begin, last in intervals:
        total += max(0.0, last - max(begin, end))
        end = max(end, last)
    return total
