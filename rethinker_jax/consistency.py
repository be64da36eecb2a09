"""Think→answer consistency: does the reasoning make the answer likely. GRPO-CARE (arXiv 2506.16141, §3). numpy only.

A reference model reads prompt and reasoning, and the likelihood that it gives to the answer's tokens says how well the
two fit. Among a group's accurate responses, those that fit no worse than their mean earn a bonus, before advantages.
"""

import bisect
from collections.abc import Callable

import numpy as np

from rethinker_jax.config_rewards import ConsistencyConfig
from rethinker_jax.types import Rollout

MIN_ACCURACY = 0.1
ROUNDING = 1e-9  # a mean of equal likelihoods may come out above each of them


def answer_mask(rollout: Rollout, decode: Callable[[np.ndarray], str]) -> np.ndarray:
    """bool [length] over the tokens of what is trained on: those of the extracted answer.

    All False where there is no answer, or where it is not in the text as it was extracted (several boxes).
    """
    completion, answer = rollout.completion, rollout.verdict.extracted
    ids = completion.token_ids
    mask = np.zeros(len(ids), bool)
    start = completion.text.rfind(answer) if answer else -1
    if answer and start >= 0:

        def num_chars(count: int) -> int:
            return len(decode(ids[:count]))

        counts = range(len(ids) + 1)
        first = bisect.bisect_right(counts, start, key=num_chars) - 1
        last = bisect.bisect_left(counts, start + len(answer), key=num_chars)
        mask[first:last] = True
    return mask & completion.sampled_mask


def likelihood(log_probs: np.ndarray, mask: np.ndarray, cap: float) -> float:
    """exp of the mean of `log_probs` [length] under `mask`, at most `cap`; NaN where there is no answer."""
    return min(float(np.exp(log_probs[mask].mean())), cap) if mask.any() else float("nan")


def consistent(accuracy: np.ndarray, likelihoods: np.ndarray, margin: float) -> tuple[np.ndarray, np.ndarray]:
    """(accurate, consistent), both bool [groups, n], from `accuracy` and `likelihoods` (NaN = no answer), [groups, n].

    Accurate: above 0.1 and no worse than the group's mean. Consistent: accurate, and as likely as the mean of the
    group's accurate responses less `margin`.
    """
    accurate = (accuracy > MIN_ACCURACY) & (accuracy >= accuracy.mean(axis=1, keepdims=True)) & ~np.isnan(likelihoods)
    known = np.where(accurate, likelihoods, 0.0)
    mean = known.sum(axis=1, keepdims=True) / np.maximum(accurate.sum(axis=1, keepdims=True), 1)
    return accurate, accurate & (known >= mean - margin - ROUNDING)


def bonuses(accuracy: np.ndarray, likelihoods: np.ndarray, config: ConsistencyConfig) -> np.ndarray:
    """float64 [groups, n]: `weight` · accuracy for consistent responses, else 0."""
    return np.where(consistent(accuracy, likelihoods, config.margin)[1], config.weight * accuracy, 0.0)
