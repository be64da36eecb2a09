"""What the processes of a job tell each other. All of them run the same program on the same rows.

*Every process knows every token; pixels and verdicts are made where they belong.* Tokens are few, so each process holds
all completions, the replay buffer and the data order, and decides alike. A picture is decoded by the processes whose
devices see it, a response is judged by one process, and the verdicts are exchanged. With one process, nothing happens.
"""

import json
from typing import Any

import numpy as np
from jax.experimental import multihost_utils

from rethinker_jax import peers

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
    data = np.frombuffer(json.dumps(value).encode(), np.uint8)
    lengths = multihost_utils.process_allgather(np.array([len(data)], np.int32)).reshape(-1)
    size = max(SMALLEST, 1 << int(lengths.max() - 1).bit_length())
    padded = np.zeros(size, np.uint8)
    padded[: len(data)] = data
    gathered = multihost_utils.process_allgather(padded).reshape(len(lengths), size)
    return [json.loads(row[:length].tobytes()) for row, length in zip(gathered, lengths, strict=True)]
