"""From a verdict to the number that the policy is trained on. Pure functions, chosen by name.

`accuracy` is the paper's reward (VL-Rethinker §2.1: 1 for a correct answer, else 0); `vl_rethinker_code` is what the
released code computes, an option because it pays for the word "wait". A verdict that says nothing about the response
(bad_gold, crash, timeout) earns no bonus from any of them.
"""

import dataclasses
from collections.abc import Callable

from rethinker_jax.types import Verdict
from rethinker_jax.verify.extract import ANSWER_TAG, extract

FORMAT_WEIGHT = 0.1
INVALID_REWARD = -0.1
WAIT_BONUS = 1.1
WAIT_COST = 0.2
MAX_WAITS = 5  # occurrences of the letters "wait" in a valid response


@dataclasses.dataclass(frozen=True)
class RewardInput:
    """`stopped`: the response ended with an end token. `forced`: a rethinking trigger was inserted into it."""

    verdict: Verdict
    response: str
    stopped: bool = True
    forced: bool = False


def accuracy(given: RewardInput) -> float:
    """1.0 if correct, else 0.0."""
    return 1.0 if given.verdict.correct else 0.0


def accuracy_and_format(given: RewardInput) -> float:
    """0.9 for a correct answer and 0.1 for a box with something in it, in a response that ended."""
    boxed = given.stopped and _is_boxed(given.response) and given.verdict.verdict in ("correct", "wrong")
    return (1 - FORMAT_WEIGHT) * accuracy(given) + FORMAT_WEIGHT * boxed


def vl_rethinker_code(given: RewardInput) -> float:
    """The released code's shaped reward: invalid -0.1, one or two native waits 1.1, else 0.2 less per wait.

    The bonus is kept to valid responses; the code let it overwrite the penalty for an unfinished one, which is a bug.
    """
    num_waits = count_waits(given.response)
    valid = given.stopped and given.response.lower().count("wait") <= MAX_WAITS
    if not valid:
        return INVALID_REWARD
    if given.forced or not given.verdict.correct:
        return accuracy(given)
    if 0 < num_waits < 3:
        return WAIT_BONUS
    return max(1.0 - WAIT_COST * num_waits, INVALID_REWARD)


def count_waits(response: str) -> int:
    """The code's count of rethinking: `wait,`, `wait a` and `alternatively`, in any case."""
    lowered = response.lower()
    return sum(lowered.count(phrase) for phrase in ("wait,", "wait a", "alternatively"))


def _is_boxed(response: str) -> bool:
    found = extract(response)
    return found.text is not None and found.rule != ANSWER_TAG


REWARDS: dict[str, Callable[[RewardInput], float]] = {
    "accuracy": accuracy,
    "accuracy_and_format": accuracy_and_format,
    "vl_rethinker_code": vl_rethinker_code,
}
