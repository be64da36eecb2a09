"""Where the main thread is, said once: for the watch over other processes, for the clock of a step, and for a trace.

A phase counts until it ends; one inside another is part of that, in the clock, and a span of its own in a trace. So the
seconds of phases are disjoint. A phase that waits for the device's result has the device's time in it; where one ends
with work under way, its place says so.
"""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import AbstractContextManager
from typing import Literal

from rethinker_jax import peers

Phase = Literal[
    "prompts", "rollout", "verify", "log_probs", "replay", "pack", "update", "validation", "write", "checkpoint",
    "evaluation",
]  # fmt: skip
REST = "rest"  # what no phase covers
# Phase → metric of a step.
METRICS: Mapping[str, str] = {
    "prompts": "seconds_prompts",
    "rollout": "seconds_sampling",
    "verify": "seconds_waiting_for_verdicts",
    "log_probs": "seconds_log_probs",
    "replay": "seconds_replay",
    "pack": "seconds_packing",
    "update": "seconds_device_steps",
    "validation": "seconds_validation",
    "write": "seconds_writing",
    "checkpoint": "seconds_checkpoint",
    "evaluation": "seconds_evaluation",  # lies before the first step and behind the last one
    REST: "seconds_rest",
}
Span = Callable[[str], AbstractContextManager[object]]


def no_span(_: str) -> AbstractContextManager[object]:
    return contextlib.nullcontext()


@dataclasses.dataclass(frozen=True)
class Reading:
    """What a clock said at a moment: its time, and the seconds of each phase up to then."""

    at: float
    spent: Mapping[str, float]

    def until(self, later: "Reading") -> dict[str, float]:
        """Seconds of each phase that ran between the two, the rest last; they add up to the time between them."""
        spent = {name: seconds - self.spent.get(name, 0.0) for name, seconds in later.spent.items()}
        found = {name: seconds for name, seconds in spent.items() if seconds > 0}
        return found | {REST: later.at - self.at - sum(found.values())}


class Clock:
    """Seconds by phase of one thread. `span` marks a phase in a trace; it does nothing while none is recorded."""

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock = clock
        self._spent: dict[str, float] = {}
        self._inside = False
        self.span: Span = no_span

    @contextlib.contextmanager
    def during(self, phase: Phase) -> Generator[None]:
        """The block is this phase, also where it raises; within another phase it is part of that."""
        peers.at(phase)
        outer, self._inside = self._inside, True
        began_at = self._clock()
        try:
            with self.span(phase):
                yield
        finally:
            self._inside = outer
            if not outer:
                self._spent[phase] = self._spent.get(phase, 0.0) + self._clock() - began_at

    def read(self) -> Reading:
        """To be asked between phases: one under way has not counted yet."""
        return Reading(self._clock(), dict(self._spent))


CLOCK = Clock()  # of this process's main thread
during = CLOCK.during


class Laps:
    """The time between two lines of a run's metrics, as metrics of the later one."""

    def __init__(self, clock: Clock = CLOCK):
        self._clock = clock
        self._last = clock.read()

    def metrics(self) -> dict[str, float]:
        """`seconds` since this was asked last, and their parts by phase."""
        now = self._clock.read()
        parts, total = self._last.until(now), now.at - self._last.at
        self._last = now
        return {"seconds": total} | {METRICS[name]: seconds for name, seconds in parts.items()}
