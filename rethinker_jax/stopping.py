"""Being asked to stop: Ctrl-C and SIGTERM are noticed between steps, so that a run ends with a checkpoint."""

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType

from rethinker_jax.errors import Stopped

INTERRUPTED, PREEMPTED = 130, 75


class StopRequest:
    """`exit_code` is None until someone asks; a second Ctrl-C ends the process at once."""

    def __init__(self) -> None:
        self.exit_code: int | None = None

    def hear(self, number: int, _: FrameType | None) -> None:
        if number == signal.SIGINT and self.exit_code is not None:
            raise KeyboardInterrupt
        self.exit_code = INTERRUPTED if number == signal.SIGINT else PREEMPTED

    def stopped(self, step: int) -> Stopped:
        why = "interrupted" if self.exit_code == INTERRUPTED else "asked to stop (SIGTERM)"
        return Stopped(f"{why} after step {step}, checkpoint saved; the same command goes on from there", self.exit_code or 0)


@contextlib.contextmanager
def listening() -> Iterator[StopRequest]:
    """Hear SIGINT and SIGTERM while the block runs; the handlers from before come back after it."""
    request = StopRequest()
    before = {number: signal.signal(number, request.hear) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
