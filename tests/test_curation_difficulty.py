"""Difficulty of sources, exact k-means in one dimension, and the order of a curriculum."""

import itertools
import math
import random

import numpy as np
import pytest

from rethinker_jax.curation.curriculum import CurriculumOrder, curriculum_order, easiness_of
from rethinker_jax.curation.difficulty import optimal_clusters, source_difficulties, z_scores


def test_z_scores() -> None:
    """Mean 3, squares 4 + 0 + 4 over 3: std sqrt(8/3). Catches the std of a sample, sqrt(8/2)."""
    assert z_scores([1.0, 3.0, 5.0]) == pytest.approx([-2 / math.sqrt(8 / 3), 0, 2 / math.sqrt(8 / 3)])
    assert z_scores([0.1] * 3) == [0.0] * 3  # not noise over noise: 0.1 * 3 / 3 is not 0.1
    assert z_scores([7.0]) == [0.0]


def squares(values: list[float], labels: list[int]) -> float:
    total = 0.0
    for label in set(labels):
        inside = [value for value, one in zip(values, labels, strict=True) if one == label]
        total += sum((value - sum(inside) / len(inside)) ** 2 for value in inside)
    return total


def test_clusters_are_the_best_of_all() -> None:
    """Against every assignment of 7 values to 3 clusters. Catches a heuristic that ends in a local optimum."""
    draw = random.Random(0)
    for _ in range(6):
        values = [round(draw.gauss(0, 1), 1) + (5 if draw.random() < 0.2 else 0) for _ in range(7)]
        if len(set(values)) < 3:
            continue
        best = min(squares(values, list(labels)) for labels in itertools.product(range(3), repeat=7))
        found = optimal_clusters(values, 3)
        assert squares(values, found) == pytest.approx(best)
        order = [label for _, label in sorted(zip(values, found, strict=True))]
        assert order == sorted(order) and set(found) == {0, 1, 2}


def test_clusters_of_known_cases() -> None:
    """Equal values share a cluster; (0, 0.1), (5), (9, 9.2) is clear. Ties are decided, not left to rounding."""
    assert optimal_clusters([9.0, 0.0, 5.0, 9.2, 0.1], 3) == [2, 0, 1, 2, 0]
    assert optimal_clusters([1.0, 1.0, 1.0, 2.0, 3.0], 3) == [0, 0, 0, 1, 2]
    assert optimal_clusters([0.0, 1.0, 2.0, 3.0], 3) == [0, 1, 2, 2]  # three clusterings cost 0.5
    assert optimal_clusters([4.0, 4.0], 1) == [0, 0]
    with pytest.raises(ValueError, match="at least 3 different values, came 2"):
        optimal_clusters([1.0, 2.0, 2.0], 3)


def test_difficulty_averages_both_scales() -> None:
    """Ratings 0, 5, 10 and error rates 0.9, 0.1, 0.5 have the z-scores (-1, 0, 1)·1.2247 and (1, -1, 0)·1.2247.

    Averages: 0, -0.61, 0.61. Catches either scale alone: by ratings a is easy, by errors it is hard.
    """
    found = source_difficulties({"a": 0.9, "b": 0.1, "c": 0.5}, {"a": 0, "b": 5, "c": 10, "unknown": 3})
    assert [(one.source, one.label) for one in found] == [("b", "easy"), ("a", "medium"), ("c", "hard")]
    assert [one.composite for one in found] == pytest.approx([-0.6123724, 0.0, 0.6123724])
    by_errors = source_difficulties({"a": 0.9, "b": 0.1, "c": 0.5})
    assert [(one.source, one.label, one.rating) for one in by_errors] == [
        ("b", "easy", None), ("c", "medium", None), ("a", "hard", None),
    ]  # fmt: skip


def test_difficulty_of_a_scale_that_says_nothing() -> None:
    """Equal error rates weigh nothing; the ratings decide. Catches a division by a std of 0."""
    found = source_difficulties({"a": 0.5, "b": 0.5, "c": 0.5}, {"a": 3, "b": 2, "c": 1})
    assert [one.source for one in found] == ["c", "b", "a"]


@pytest.mark.parametrize(
    ("rates", "ratings", "message"),
    [
        ({"a": 0.5}, None, "at least 3 sources of different difficulty, came 1"),
        ({"a": 0.5, "b": 0.5, "c": 0.5}, None, "came 1"),
        ({"a": 0.1, "b": 0.2, "c": 0.3}, {"a": 1, "c": 2}, "none of 'b'"),
        ({str(number): number / 5000 for number in range(5000)}, None, "at most 4096 sources"),
    ],
)
def test_difficulty_that_means_nothing_is_refused(rates: dict, ratings: dict | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        source_difficulties(rates, ratings)


def test_curriculum_goes_from_easy_to_hard_in_blocks() -> None:
    """7 rows in 3 blocks: 3, 2, 2. Catches hard first, blocks that change by epoch, and no shuffling inside."""
    easiness = [0.1, 0.9, 0.5, 0.8, 0.0, 1.0, 0.4]
    blocks = [{5, 1, 3}, {2, 6}, {0, 4}]
    orders = {tuple(curriculum_order(easiness, 3, seed=0, epoch=epoch).tolist()) for epoch in range(20)}
    for order in orders:
        assert [set(order[:3]), set(order[3:5]), set(order[5:])] == blocks
    assert len(orders) > 8  # of 3! * 2 * 2 = 24
    again = curriculum_order(easiness, 3, seed=0, epoch=4)
    assert (again == curriculum_order(easiness, 3, seed=0, epoch=4)).all()
    assert curriculum_order(easiness, 7, seed=3).tolist() == [5, 1, 3, 2, 6, 0, 4]
    assert curriculum_order(easiness, 99, seed=3).tolist() == [5, 1, 3, 2, 6, 0, 4]


def test_one_stage_is_a_permutation_as_plain_shuffling() -> None:
    order = curriculum_order([0.5] * 50, 1, seed=1)
    assert sorted(order.tolist()) == list(range(50)) and order.tolist() != list(range(50))
    assert order.dtype == np.int64


def test_the_order_of_a_curriculum_goes_on_epoch_after_epoch() -> None:
    """As DataOrder: places beyond the rows are the next epoch's. Catches one order for all, and state from reading."""
    easiness = [place / 20 for place in range(20)]
    order = CurriculumOrder(easiness, 2, seed=5)
    epochs = [[order[epoch * 20 + place] for place in range(20)] for epoch in range(3)]
    assert epochs == [curriculum_order(easiness, 2, 5, epoch).tolist() for epoch in range(3)]
    assert epochs[0] != epochs[1] and {*epochs[1][:10]} == {*range(10, 20)}
    assert [order[place] for place in (45, 3, 45)] == [epochs[2][5], epochs[0][3], epochs[2][5]]


@pytest.mark.parametrize(("values", "stages"), [([], 1), ([0.5], 0), ([0.5, float("nan")], 1), ([math.inf], 1)])
def test_curriculum_refuses_what_has_no_order(values: list[float], stages: int) -> None:
    with pytest.raises(ValueError, match="wanted"):
        curriculum_order(values, stages, seed=0)


def test_easiness_of_columns() -> None:
    assert [easiness_of(value) for value in ("easy", "medium", "hard", 0.25, 1)] == [1.0, 0.5, 0.0, 0.25, 1.0]
    for value in (None, "", "simple", float("nan"), True, [0.5]):
        with pytest.raises(ValueError, match="wanted a finite number"):
            easiness_of(value)
