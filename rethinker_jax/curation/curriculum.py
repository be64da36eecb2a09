"""The order of a curriculum: easy rows first, in blocks, shuffled inside each block."""

import math
from collections.abc import Sequence

import numpy as np

from rethinker_jax.curation.difficulty import LABELS


def curriculum_order(easiness: Sequence[float], num_stages: int, seed: int, epoch: int = 0) -> np.ndarray:
    """The row met in i-th place of an epoch, int64 [rows]: a permutation that depends on the arguments alone.

    Rows are sorted by easiness, the easiest first (equal ones in the order of the rows), and cut into `num_stages`
    blocks whose sizes differ by one at most, the larger ones first. Inside a block the order is drawn anew every epoch;
    which rows a block holds is not. One stage is plain shuffling, as many stages as rows plain sorting.
    Raises ValueError for no rows, no stages and an easiness that is not finite.
    """
    if not len(easiness) or num_stages < 1:
        raise ValueError(f"wanted rows and at least one stage, came {len(easiness)} rows and {num_stages} stages")
    values = np.asarray(easiness, float)
    if not np.isfinite(values).all():
        raise ValueError(f"wanted finite numbers, came {values[~np.isfinite(values)][0]} among them")
    random = np.random.default_rng([seed, epoch])
    blocks = np.array_split(np.argsort(-values, kind="stable"), min(num_stages, len(values)))
    return np.concatenate([random.permutation(block) for block in blocks])


def easiness_of(value: object) -> float:
    """A row's easiness by a column that `select` writes: a pass rate as it is; easy 1, medium 0.5, hard 0.

    Raises ValueError for anything else, no value included: a row without one has no place in the order.
    """
    if isinstance(value, str) and value in LABELS:
        return 1.0 - LABELS.index(value) / (len(LABELS) - 1)
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return float(value)
    raise ValueError(f"wanted a finite number or one of {', '.join(LABELS)}, came {value!r:.80}")


class CurriculumOrder:
    """`order[i]` is the row met in i-th place, for any i ≥ 0, as of `prompts.order.DataOrder`; epoch after epoch."""

    def __init__(self, easiness: Sequence[float], num_stages: int, seed: int):
        self._easiness, self._num_stages, self._seed = tuple(easiness), num_stages, seed
        self._made = (0, self._order(0))  # of one epoch; one assignment, so that threads may share it

    def __getitem__(self, place: int) -> int:
        epoch, within = divmod(place, len(self._easiness))
        made, order = self._made
        if made != epoch:
            order = self._order(epoch)
            self._made = (epoch, order)
        return int(order[within])

    def _order(self, epoch: int) -> np.ndarray:
        return curriculum_order(self._easiness, self._num_stages, self._seed, epoch)
