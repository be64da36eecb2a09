"""95% intervals: Wilson's for single yes-or-no samples, a cluster bootstrap over items for everything else.

Items that were drawn together (versions of one problem, tasks) are one cluster and are resampled together: as single
items they would make intervals that are too narrow. Several samples of an item say more about the item, not about the
benchmark, so they are averaged first. The seed is fixed: the same records give the same interval.
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

LEVEL = 0.95
Z = 1.959963984540054  # the normal distribution's quantile at 0.975
RESAMPLES = 2000
SEED = 0
MAX_CELLS = 2_000_000  # resamples × clusters that are in memory at once
DIGITS = 9  # bootstrap ends are rounded, so that the order of a matrix product's sums does not show


@dataclasses.dataclass(frozen=True)
class Interval:
    """An estimate with the ends of its 95% interval."""

    value: float
    low: float
    high: float


def wilson(num_correct: float, num: float) -> Interval:
    """Wilson's score interval (1927) of a share; `num_correct` may be a sum of shares.

    Unlike value ± 1.96 standard errors it stays in [0, 1] and has a width at 0 and at 1.
    """
    if not num > 0 or not 0 <= num_correct <= num:
        raise ValueError(f"wanted 0 <= num_correct <= num and num > 0, came {num_correct} of {num}")
    share, square = num_correct / num, Z * Z / num
    middle = share + square / 2
    half = Z * math.sqrt(share * (1 - share) / num + square / (4 * num))
    low = 0.0 if num_correct == 0 else max(0.0, (middle - half) / (1 + square))
    high = 1.0 if num_correct == num else min(1.0, (middle + half) / (1 + square))
    return Interval(share, low, high)


def cluster_numbers(clusters: Sequence[str]) -> np.ndarray:
    """int64 [items]: the same number for items of one cluster; "" is a cluster of its own.

    Where all items are of one cluster there is nothing to resample but the items, so each stands alone then.
    """
    numbers: dict[str, int] = {}
    found = []
    for place, cluster in enumerate(clusters):
        name = f"c{cluster}" if cluster else f"i{place}"
        found.append(numbers.setdefault(name, len(numbers)))
    if len(numbers) == 1:
        found = list(range(len(clusters)))
    return np.array(found, np.int64)


def ratio_intervals(
    numerators: np.ndarray,
    denominators: np.ndarray,
    clusters: np.ndarray,
    *,
    shares: bool = True,
    resamples: int = RESAMPLES,
    seed: int = SEED,
) -> list[Interval | None]:
    """Σ numerators / Σ denominators of every column, with percentile intervals over resampled clusters.

    `numerators` and `denominators` are float [items, columns], `clusters` int [items] as of `cluster_numbers`. Draws in
    which a denominator is zero are left out; None where it is zero over all items. Where all clusters have the same
    ratio, resampling sees no spread: with `shares` (ratios in [0, 1]) the interval is then Wilson's with the clusters
    as trials; otherwise (differences) it has no width, which says too much for few items.
    """
    tops, bottoms = _by_cluster(numerators, clusters), _by_cluster(denominators, clusters)
    drawn = _drawn_ratios(tops, bottoms, resamples, seed)
    intervals: list[Interval | None] = []
    for column in range(numerators.shape[1]):
        # fsum is exact, so the value does not depend on the order of the items.
        total = math.fsum(denominators[:, column])
        if total == 0:
            intervals.append(None)
            continue
        value = math.fsum(numerators[:, column]) / total
        counted = bottoms[:, column] > 0
        if shares and np.allclose(tops[counted, column], value * bottoms[counted, column], rtol=0, atol=1e-12):
            num = int(counted.sum())
            ends = wilson(min(max(value, 0.0), 1.0) * num, num)
            intervals.append(Interval(value, ends.low, ends.high))
            continue
        ratios = drawn[:, column]
        low, high = np.percentile(ratios[np.isfinite(ratios)], [50 * (1 - LEVEL), 50 * (1 + LEVEL)])
        intervals.append(Interval(value, round(float(low), DIGITS), round(float(high), DIGITS)))
    return intervals


def mean_intervals(
    values: np.ndarray,
    clusters: np.ndarray,
    weights: np.ndarray | None = None,
    *,
    shares: bool = True,
    resamples: int = RESAMPLES,
    seed: int = SEED,
) -> list[Interval]:
    """(Weighted) means of the columns of `values`, float [items, columns] with at least one item."""
    if not len(values):
        raise ValueError("an interval wants at least one item, came none")
    bottoms = np.ones(len(values)) if weights is None else weights
    bottoms = np.broadcast_to(bottoms[:, None], values.shape)
    found = ratio_intervals(values * bottoms, bottoms, clusters, shares=shares, resamples=resamples, seed=seed)
    return [interval for interval in found if interval is not None]


def share_interval(
    accuracies: np.ndarray, clusters: np.ndarray, weights: np.ndarray | None = None, *, single: bool
) -> tuple[Interval, str]:
    """The mean of items' accuracies, float [items], and the name of its interval: `wilson` or `bootstrap`.

    Wilson's where there is a `single` sample an item, no cluster of several items, and no weights.
    """
    alone = len(np.unique(clusters)) == len(clusters)
    if single and alone and weights is None:
        return wilson(math.fsum(accuracies), len(accuracies)), "wilson"
    return mean_intervals(accuracies[:, None], clusters, weights)[0], "bootstrap"


def _by_cluster(values: np.ndarray, clusters: np.ndarray) -> np.ndarray:
    sums = np.zeros((int(clusters.max()) + 1 if len(clusters) else 0, values.shape[1]))
    np.add.at(sums, clusters, values)
    return sums


def _drawn_ratios(tops: np.ndarray, bottoms: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    """float [resamples, columns]: the ratios of as many clusters as there are, drawn with replacement."""
    num = len(tops)
    if not num:
        return np.zeros((0, tops.shape[1]))
    rng = np.random.default_rng(seed)
    rows = max(1, min(resamples, MAX_CELLS // num))
    parts = []
    for start in range(0, resamples, rows):
        size = min(rows, resamples - start)
        places = rng.integers(0, num, (size, num)) + num * np.arange(size)[:, None]
        times = np.bincount(places.ravel(), minlength=size * num).reshape(size, num).astype(np.float64)
        top, bottom = times @ tops, times @ bottoms
        parts.append(np.divide(top, bottom, out=np.full_like(top, np.nan), where=bottom > 0))
    return np.concatenate(parts)
