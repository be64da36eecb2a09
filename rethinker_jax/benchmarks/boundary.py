"""What a model can solve at all, against another: does training widen it or only make it likelier (arXiv 2504.13837).

For that paper's numbers take many samples (its n is 128 to 1024, temperature 0.6, top-p 0.95) and leave out items with
options, where guessing solves everything.
"""

import dataclasses
from collections.abc import Sequence

from rethinker_jax.benchmarks.groups import ItemSamples
from rethinker_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class SolvableSets:
    """Ids of the items that at least one of the first `num_samples` samples solves, by whose."""

    num_samples: int
    both: tuple[str, ...]
    only_a: tuple[str, ...]
    only_b: tuple[str, ...]
    neither: tuple[str, ...]


def solvable_sets(a: Sequence[ItemSamples], b: Sequence[ItemSamples], num_samples: int | None = None) -> SolvableSets:
    """Over the items that both have. `num_samples` None is the smallest number that an item has.

    Raises UserError where an item has fewer: more samples solve more, so the numbers must be equal.
    """
    pairs = shared_items(a, b)
    fewest = min((item.num_samples for pair in pairs for item in pair), default=0)
    num = fewest if num_samples is None else num_samples
    if num > fewest:
        raise UserError(f"wanted {num} samples of every item, came one with {fewest}; finish the generations")
    names: dict[tuple[bool, bool], list[str]] = {(x, y): [] for x in (True, False) for y in (True, False)}
    for left, right in pairs:
        names[_solved(left, num), _solved(right, num)].append(left.id)
    return SolvableSets(
        num,
        both=tuple(names[True, True]),
        only_a=tuple(names[True, False]),
        only_b=tuple(names[False, True]),
        neither=tuple(names[False, False]),
    )


def shared_items(a: Sequence[ItemSamples], b: Sequence[ItemSamples]) -> list[tuple[ItemSamples, ItemSamples]]:
    """Pairs of the items with the same id, by id."""
    others = {item.id: item for item in b}
    return [(item, others[item.id]) for item in sorted(a, key=lambda item: item.id) if item.id in others]


def _solved(item: ItemSamples, num_samples: int) -> bool:
    return any(record.correct for record in item.records[:num_samples])
