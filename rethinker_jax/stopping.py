"""Being asked to stop: what Ctrl-C and SIGTERM do, so that a run ends with all it has done on the disk."""

import contextlib
import signal
from collections.abc import Generator, Sequence
from types import FrameType

from rethinker_jax import peers
from rethinker_jax.errors import Stopped

INTERRUPTED, PREEMPTED = 130, 75


class StopRequest:
    """A request raises Stopped at once, or at the end of the block that holds it back. A second Ctrl-C never waits.

    Of several processes, one may be asked alone: inside the block they `agree`, so that all stop behind the same step.
    """

    def __init__(self) -> None:
        self._asked = self._agreed = 0
        self._held = False

    @property
    def asked(self) -> int:
        """The exit code that a stop was asked with; 0 = it was not."""
        return self._asked

    def agree(self, asked: Sequence[int]) -> bool:
        """Whether the block is to end in a stop: `asked` of all processes."""
        self._agreed = max(asked)
        if self._agreed:
            peers.stop_together()
        return self._agreed > 0

    @contextlib.contextmanager
    def held(self) -> Generator[None]:
        """For a step and its checkpoint: a request that comes inside is raised at the end, unless something else is."""
        self._held = True
        try:
            yield
        finally:
            self._held = False
        code = self._agreed if peers.watched() else self._asked
        if code:
            raise _stopped(code)

    def hear(self, number: int, _: FrameType | None) -> None:
        if number == signal.SIGINT and self.asked:
            raise KeyboardInterrupt
        self._asked = INTERRUPTED if number == signal.SIGINT else PREEMPTED
        if not self._held:
            raise _stopped(self._asked)


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
