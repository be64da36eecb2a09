"""What a second look that was forced at test time changes (VL-Rethinker Fig. 7): from the forced_* of records."""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from rethinker_jax.benchmarks.accuracy import clusters_of
from rethinker_jax.benchmarks.groups import ItemSamples, flat
from rethinker_jax.benchmarks.intervals import Interval, mean_intervals
from rethinker_jax.benchmarks.records import Record


@dataclasses.dataclass(frozen=True)
class SecondLook:
    """Accuracy before and after, over all samples: one that got no second look counts after as before.

    oracle      right at the first or at the second look: what a perfect judge of when to look again would reach.
    gain        after - before, on the same samples; failures of the second look are in it.
    *_to_*      numbers of forced samples by what was right; not_* includes no answer and what could not be judged.
    more_tokens mean number of tokens that a second look took, trigger included.
    """

    num_forced: int
    before: Interval
    after: Interval
    oracle: Interval
    gain: Interval
    right_to_right: int
    right_to_wrong: int
    wrong_to_right: int
    wrong_to_wrong: int
    changed_answers: int
    more_tokens: float


def second_look(items: Sequence[ItemSamples], weights: np.ndarray | None = None) -> SecondLook | None:
    """None where no second look was forced."""
    forced = [record for record in flat(items) if record.forced_verdict is not None]
    if not forced:
        return None
    before = _means(items, lambda record: record.correct)
    after = _means(items, is_right_after)
    oracle = _means(items, lambda record: record.correct or is_right_after(record))
    clusters = clusters_of(items)
    shares = mean_intervals(np.stack([before, after, oracle], axis=1), clusters, weights)
    (gain,) = mean_intervals((after - before)[:, None], clusters, weights, shares=False)

    def count(first: bool, second: bool) -> int:
        return sum(record.correct == first and is_right_after(record) == second for record in forced)

    return SecondLook(
        num_forced=len(forced),
        before=shares[0],
        after=shares[1],
        oracle=shares[2],
        gain=gain,
        right_to_right=count(True, True),
        right_to_wrong=count(True, False),
        wrong_to_right=count(False, True),
        wrong_to_wrong=count(False, False),
        changed_answers=sum(record.forced_extracted != record.extracted for record in forced),
        more_tokens=sum(record.forced_num_tokens - record.num_tokens for record in forced) / len(forced),
    )


def is_right_after(record: Record) -> bool:
    """Is the sample right after its second look, or as it was where it got none."""
    return record.correct if record.forced_verdict is None else record.forced_verdict == "correct"


def _means(items: Sequence[ItemSamples], what: Callable[[Record], bool]) -> np.ndarray:
    return np.array([sum(map(what, item.records)) / item.num_samples for item in items])
