"""pass@k curves: the unbiased estimate for k = 1, 2, 4, ... up to the number of samples."""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from rethinker_jax.advantage import pass_at_k
from rethinker_jax.benchmarks.groups import ItemSamples
from rethinker_jax.benchmarks.intervals import Interval, mean_intervals

# Items of a benchmark share few pairs of counts, and each costs a product of up to n factors.
_estimate = lru_cache(maxsize=65536)(pass_at_k)


def sizes(num_samples: int) -> tuple[int, ...]:
    """1, 2, 4, ... up to the number of samples, which is always the last."""
    found = [1]
    while 2 * found[-1] <= num_samples:
        found.append(2 * found[-1])
    return tuple(found) if found[-1] == num_samples else (*found, num_samples)


def pass_at_k_values(items: Sequence[ItemSamples], ks: Sequence[int]) -> np.ndarray:
    """float [items, ks]: of every item the share of its subsets of k samples that hold a right one."""
    return np.array([[_estimate(item.num_samples, item.num_correct, k) for k in ks] for item in items])


def pass_at_k_curve(
    items: Sequence[ItemSamples], clusters: np.ndarray, weights: np.ndarray | None = None
) -> dict[int, Interval]:
    """k → mean over items with its interval, up to the smallest number of samples that an item has."""
    ks = sizes(min(item.num_samples for item in items))
    return dict(zip(ks, mean_intervals(pass_at_k_values(items, ks), clusters, weights), strict=True))
