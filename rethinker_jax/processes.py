"""What the processes of a job tell each other. All of them run the same program on the same rows.

*Every process knows every token; pixels and verdicts are made where they belong.* Tokens are few, so each process holds
all completions, the replay buffer and the data order, and decides alike. A picture is decoded by the processes whose
devices see it, a response is judged by one process, and the verdicts are exchanged. With one process, nothing happens.
"""

import contextlib
import json
import threading
from collections.abc import Callable, Generator
from typing import Any, TypeVar

import numpy as np
from jax.experimental import multihost_utils

from rethinker_jax import peers
from rethinker_jax.errors import UserError

T = TypeVar("T")
SIGN_S = 5.0  # between signs of a process that waits for long work of the first one
SMALLEST = 1 << 12  # bytes of a message; sizes are powers of two, so that few programs are compiled


def is_first() -> bool:
    """Does this process write what is written once: metrics, rollouts, reports, what a person reads."""
    return peers.index() == 0


def is_mine(number: int) -> bool:
    """Does this process do what comes at this place of a list that all have."""
    return number % peers.count() == peers.index()


def exchange(value: Any) -> list[Any]:
    """The JSON values of all processes, by their numbers. All must call it, in the same order, in the main thread."""
    if peers.count() == 1:
        return [value]
    peers.at("exchange")  # who waits here is not who hangs
    data = np.frombuffer(json.dumps(value).encode(), np.uint8)
    lengths = multihost_utils.process_allgather(np.array([len(data)], np.int32)).reshape(-1)
    size = max(SMALLEST, 1 << int(lengths.max() - 1).bit_length())
    padded = np.zeros(size, np.uint8)
    padded[: len(data)] = data
    gathered = multihost_utils.process_allgather(padded).reshape(len(lengths), size)
    return [json.loads(row[:length].tobytes()) for row, length in zip(gathered, lengths, strict=True)]


def first_says(value: Any) -> Any:
    """The JSON value of process 0; those of the others are not looked at. As `exchange`, for all to call."""
    return exchange(value if is_first() else None)[0]


def first_does(work: Callable[[], T], place: str) -> T | None:
    """Process 0 does what may take hours, and the others wait; an error of it ends all. None in the others.

    All give signs of working meanwhile, so that nobody takes the waiting for a hang: one in `work` itself goes unseen.
    """
    with _signing(place):
        done = work() if is_first() else None
        exchange(None)
    return done


def check_same(what: str, make: Callable[[], Any]) -> None:
    """Raises UserError in all processes unless all make the same JSON value; nothing is made where there is one."""
    if peers.count() == 1:
        return
    found = exchange(make())
    others = [number for number, value in enumerate(found) if value != found[0]]
    if others:
        raise UserError(
            f"{what}: process {others[0]} of {peers.count()} reads other than process 0. Give all the same files."
        )


@contextlib.contextmanager
def _signing(place: str) -> Generator[None]:
    over = threading.Event()

    def sign() -> None:
        peers.at(place)
        while not over.wait(SIGN_S):
            peers.at(place)

    thread = threading.Thread(target=sign, name="signs", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
