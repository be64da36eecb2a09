"""Being asked to stop: what Ctrl-C and SIGTERM do, so that a run ends with all it has done on the disk."""

import contextlib
import signal
from collections.abc import Generator
from types import FrameType

from rethinker_jax.errors import Stopped

INTERRUPTED, PREEMPTED = 130, 75


class StopRequest:
    """A request raises Stopped at once, or at the end of the block that holds it back. A second Ctrl-C never waits."""

    def __init__(self) -> None:
        self._exit_code: int | None = None
        self._held = False

    @property
    def asked(self) -> bool:
        return self._exit_code is not None

    @contextlib.contextmanager
    def held(self) -> Generator[None]:
        """For a step and its checkpoint: a request that comes inside is raised at the end, unless something else is."""
        self._held = True
        try:
            yield
        finally:
            self._held = False
        if self._exit_code is not None:
            raise _stopped(self._exit_code)

    def hear(self, number: int, _: FrameType | None) -> None:
        if number == signal.SIGINT and self.asked:
            raise KeyboardInterrupt
        self._exit_code = INTERRUPTED if number == signal.SIGINT else PREEMPTED
        if not self._held:
            raise _stopped(self._exit_code)


def _stopped(exit_code: int) -> Stopped:
    why = "interrupted" if exit_code == INTERRUPTED else "asked to stop (SIGTERM)"
    return Stopped(f"{why}; the same command goes on from the last checkpoint", exit_code)


@contextlib.contextmanager
def listening() -> Generator[StopRequest]:
    """Hear SIGINT and SIGTERM while the block runs; the handlers from before come back after it."""
    request = StopRequest()
    before = {number: signal.signal(number, request.hear) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
