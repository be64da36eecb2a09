"""Accuracy: the headline, by category, by kind of question, and how it is spread over the items."""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from rethinker_jax.benchmarks.groups import ItemSamples, flat
from rethinker_jax.benchmarks.intervals import Interval, cluster_numbers, share_interval
from rethinker_jax.benchmarks.items import Headline
from rethinker_jax.errors import UserError

ALMOST_ALL, ALMOST_NONE = 0.95, 0.05  # VL-Rethinker's monitor counts groups above and below these as solved or not
JUDGE_FAILURES = ("bad_gold", "timeout", "crash")


@dataclasses.dataclass(frozen=True)
class Accuracy:
    """A mean accuracy over `num_problems` items with its interval, and how that was made."""

    interval: Interval
    method: str
    num_problems: int


def clusters_of(items: Sequence[ItemSamples]) -> np.ndarray:
    return cluster_numbers([item.first.cluster for item in items])


def headline_weights(items: Sequence[ItemSamples], headline: Headline, dimension: str = "") -> np.ndarray | None:
    """float [items]: what each item counts, so that a macro mean is a weighted one; None for the plain mean.

    `macro` is the mean over the values of `dimension` of their items' means; "" is the only dimension there is.
    Raises UserError where the items do not have it.
    """
    if headline == "mean":
        return None
    if not dimension:
        dimensions = sorted({name for item in items for name in item.first.categories})
        if len(dimensions) != 1:
            raise UserError(
                f"a macro mean wants the dimension whose values are averaged; the items have "
                f"{', '.join(dimensions) or 'none'}"
            )
        dimension = dimensions[0]
    values = []
    for item in items:
        if dimension not in item.first.categories:
            raise UserError(f"item {item.id!r}: a macro mean over {dimension!r} wants that category, which it lacks")
        values.append(item.first.categories[dimension])
    _, place, count = np.unique(np.array(values, object).astype(str), return_inverse=True, return_counts=True)
    return 1.0 / count[place]


def accuracy_of(items: Sequence[ItemSamples], weights: np.ndarray | None = None) -> Accuracy:
    """Mean over items of the share of right samples."""
    shares = np.array([item.accuracy for item in items])
    single = all(item.num_samples == 1 for item in items)
    interval, method = share_interval(shares, clusters_of(items), weights, single=single)
    return Accuracy(interval, method, len(items))


def accuracy_by_category(items: Sequence[ItemSamples]) -> dict[str, dict[str, Accuracy]]:
    """dimension → value → accuracy of the items that have it."""
    found: dict[str, dict[str, list[ItemSamples]]] = {}
    for item in items:
        for dimension, value in item.first.categories.items():
            found.setdefault(dimension, {}).setdefault(value, []).append(item)
    return {
        dimension: {value: accuracy_of(values[value]) for value in sorted(values)}
        for dimension, values in sorted(found.items())
    }


def lenient_accuracy(items: Sequence[ItemSamples], weights: np.ndarray | None = None) -> Interval:
    """Where any stated answer counts, boxed or not: the rest of the gap to `accuracy_of` is format."""
    shares = np.array([_mean(item, lambda record: record.lenient == "correct") for item in items])
    single = all(item.num_samples == 1 for item in items)
    return share_interval(shares, clusters_of(items), weights, single=single)[0]


def judged_accuracy(items: Sequence[ItemSamples]) -> float | None:
    """Right samples among those that the verifier could judge; None where there are none."""
    judged = [record for record in flat(items) if record.verdict not in JUDGE_FAILURES]
    return sum(record.correct for record in judged) / len(judged) if judged else None


def chance(items: Sequence[ItemSamples]) -> float | None:
    """Expected accuracy of guessing one of the options; None where some item's options are not known."""
    sizes = [len(item.first.choices) for item in items]
    return float(np.mean([1 / size for size in sizes])) if sizes and all(sizes) else None


def solve_shares(items: Sequence[ItemSamples]) -> dict[str, float]:
    """Shares of items that (almost) all or (almost) none of the samples solve."""
    shares = np.array([item.accuracy for item in items])
    return {
        "solve_all": float((shares > ALMOST_ALL).mean()),
        "solve_none": float((shares < ALMOST_NONE).mean()),
    }


def difficulty_bins(items: Sequence[ItemSamples]) -> dict[str, int]:
    """Numbers of items by the share of right samples: none, below 3/8, below 6/8, below 1, all."""
    names = ("0", "(0, 3/8)", "[3/8, 6/8)", "[6/8, 1)", "1")
    counts = dict.fromkeys(names, 0)
    for item in items:
        right, num = item.num_correct, item.num_samples
        if right in (0, num):
            name = "1" if right else "0"
        else:  # in whole numbers, so that 3 of 8 is not below 3/8
            name = names[1] if 8 * right < 3 * num else names[2] if 8 * right < 6 * num else names[3]
        counts[name] += 1
    return counts


def _mean(item: ItemSamples, what: Callable[..., bool]) -> float:
    return sum(what(record) for record in item.records) / item.num_samples
