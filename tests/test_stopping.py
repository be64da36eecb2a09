"""Being asked to stop: at once outside a step, behind it inside, and never waiting for the second Ctrl-C."""

import os
import signal

import pytest

from rethinker_jax.errors import Stopped
from rethinker_jax.stopping import listening


def ask(number: signal.Signals) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 75)])
def test_a_request_waits_for_the_end_of_a_step(number: signal.Signals, code: int) -> None:
    """Catches a step that is cut, and a code that a launcher would not start again."""
    done = []
    with listening() as stop, pytest.raises(Stopped) as stopped, stop.held():
        ask(number)
        done.append("the rest of the step")
    assert done and stopped.value.exit_code == code


def test_outside_a_step_it_is_heard_at_once() -> None:
    with listening(), pytest.raises(Stopped):
        ask(signal.SIGTERM)
        raise AssertionError("not heard")


def test_a_second_ctrl_c_never_waits() -> None:
    """Catches a user who cannot get out of a step of an hour; SIGTERM after SIGTERM goes on waiting."""
    with listening() as stop, pytest.raises(KeyboardInterrupt), stop.held():
        ask(signal.SIGINT)
        ask(signal.SIGINT)
        raise AssertionError("not heard")
    with listening() as stop, pytest.raises(Stopped), stop.held():
        ask(signal.SIGTERM)
        ask(signal.SIGTERM)


def test_the_handlers_from_before_come_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with listening():
        assert signal.getsignal(signal.SIGTERM) != before
    assert signal.getsignal(signal.SIGTERM) == before
