"""How hard the sources of a dataset are (OpenVLThinker §3): a rating and the base model's error rate, in three classes.

Both are put on one scale (z-scores over the sources) and averaged; the averages are cut into three clusters by k-means.
In one dimension the best clusters are runs of the sorted values, so they are found exactly, by dynamic programming
(Wang and Song 2011, R Journal 3/2), and there is nothing to start from or to draw.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np

Label = Literal["easy", "medium", "hard"]
LABELS: tuple[Label, ...] = ("easy", "medium", "hard")
MAX_SOURCES = 4096  # more of them are no sources, and the programme below is quadratic
DIGITS = 12  # to which composites are rounded: beyond them are only errors of rounding


@dataclasses.dataclass(frozen=True)
class SourceDifficulty:
    """One source. `error_rate` is the mean over its problems of 1 - pass rate, `rating` what was given (0 to 10)."""

    source: str
    error_rate: float
    rating: float | None
    composite: float
    label: Label


def source_difficulties(
    error_rates: Mapping[str, float], ratings: Mapping[str, float] | None = None
) -> tuple[SourceDifficulty, ...]:
    """The sources from easy to hard. Without ratings the error rate decides alone.

    Raises ValueError where a source has no rating, and where fewer than three sources can be told apart: three classes
    of them would mean nothing.
    """
    sources = sorted(error_rates)
    if len(sources) > MAX_SOURCES:
        raise ValueError(f"wanted at most {MAX_SOURCES} sources, came {len(sources)}")
    if ratings is not None:
        missing = [source for source in sources if source not in ratings]
        if missing:
            raise ValueError(f"wanted a rating of every source, there is none of {', '.join(map(repr, missing[:8]))}")
    scales = [z_scores([error_rates[source] for source in sources])]
    if ratings is not None:
        scales.append(z_scores([ratings[source] for source in sources]))
    composites = [round(sum(values) / len(values), DIGITS) for values in zip(*scales, strict=True)]
    if len(set(composites)) < len(LABELS):
        raise ValueError(f"wanted at least 3 sources of different difficulty, came {len(set(composites))}")
    clusters = optimal_clusters(composites, len(LABELS))
    found = [
        SourceDifficulty(source, error_rates[source], ratings[source] if ratings else None, composite, LABELS[cluster])
        for source, composite, cluster in zip(sources, composites, clusters, strict=True)
    ]
    return tuple(sorted(found, key=lambda one: (one.composite, one.source)))


def z_scores(values: Sequence[float]) -> list[float]:
    """(value - mean) / std over all values; 0 where they are all equal. std of the values, not of a sample."""
    mean = math.fsum(values) / len(values)
    std = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / len(values))
    return [(value - mean) / std if std > 1e-12 * max(1.0, abs(mean)) else 0.0 for value in values]


def optimal_clusters(values: Sequence[float], k: int) -> list[int]:
    """Cluster of each value, 0 for the lowest: the k clusters with the least sum of squared distances to their means.

    Equal values share a cluster. Of clusterings that are equally good, the one whose higher clusters reach furthest
    down. Raises ValueError where there are fewer than k different values.
    """
    points, place, counts = np.unique(np.asarray(values, float), return_inverse=True, return_counts=True)
    if len(points) < k:
        raise ValueError(f"wanted at least {k} different values, came {len(points)}")
    centred = points - np.average(points, weights=counts)
    sums = [np.concatenate([[0.0], np.cumsum(counts * centred**power)]) for power in range(3)]

    def cost(starts: np.ndarray, end: int) -> np.ndarray:
        """Of one cluster of the points start to end - 1, for each start."""
        count, first, second = (total[end] - total[starts] for total in sums)
        return np.maximum(second - first**2 / count, 0.0)

    num = len(points)
    least = np.full((k + 1, num + 1), np.inf)  # [clusters, points covered]
    least[0, 0] = 0.0
    begins = np.zeros((k + 1, num + 1), int)  # of the last cluster
    tolerance = 1e-12 * max(float(sums[2][-1]), 1e-300)
    for clusters in range(1, k + 1):
        for end in range(clusters, num + 1):
            starts = np.arange(clusters - 1, end)
            totals = least[clusters - 1, starts] + cost(starts, end)
            best = int(np.argmax(totals <= totals.min() + tolerance))
            least[clusters, end], begins[clusters, end] = totals[best], starts[best]
    label_of = np.zeros(num, int)
    end = num
    for cluster in range(k - 1, -1, -1):
        begin = begins[cluster + 1, end]
        label_of[begin:end] = cluster
        end = begin
    return label_of[place].tolist()
