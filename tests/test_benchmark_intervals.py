"""Intervals against values by hand, and by how often they hold the truth."""

import numpy as np
import pytest

from rethinker_jax.benchmarks.intervals import (
    cluster_numbers,
    mean_intervals,
    ratio_intervals,
    share_interval,
    wilson,
)


@pytest.mark.parametrize(
    "right, num, low, high",
    [
        # z² = 3.841459. (p + z²/2n ± z √(p(1-p)/n + z²/4n²)) / (1 + z²/n):
        (5, 10, 0.236593, 0.763407),  # (0.5 + 0.192073 ± 1.959964 √(0.025 + 0.009604)) / 1.384146
        (0, 10, 0.0, 0.277533),  # high = (z²/n) / (1 + z²/n) = 0.384146 / 1.384146
        (10, 10, 0.722467, 1.0),  # the same from the other side
    ],
)
def test_wilson_by_hand(right, num, low, high):
    """Catches Wald's interval, which has no width at 0 and 1 and leaves [0, 1] near them."""
    found = wilson(right, num)
    assert (found.value, found.low, found.high) == pytest.approx((right / num, low, high), abs=1e-6)


@pytest.mark.parametrize("right, num", [(81, 263), (1, 7), (2.5, 9), (6530, 6531)])
def test_wilson_solves_its_equation(right, num):
    """Catches a slip in the closed form: the ends are the x with (p - x)² = z² x (1 - x) / n."""
    found = wilson(right, num)
    assert found.low < right / num < found.high
    for end in (found.low, found.high):
        assert (right / num - end) ** 2 == pytest.approx(1.959963984540054**2 * end * (1 - end) / num)


def test_wilson_as_published():
    """Catches the wrong level: Newcombe (1998), Table I, method 3, has 0.2553 to 0.3662 for 81 of 263."""
    found = wilson(81, 263)
    assert (found.low, found.high) == pytest.approx((0.2553, 0.3662), abs=5e-5)


@pytest.mark.parametrize("right, num", [(0, 0), (2, 1), (-1, 3), (float("nan"), 3)])
def test_wilson_refuses_what_is_no_share(right, num):
    """Catches a division by zero that would end as NaN in a result file."""
    with pytest.raises(ValueError, match="num_correct"):
        wilson(right, num)


def test_bootstrap_holds_the_truth_as_often_as_it_says():
    """Catches an interval of one item's spread, of single samples as if independent (85%), or of the wrong level."""
    rng = np.random.default_rng(1)
    held = 0
    for number in range(300):
        solve = rng.beta(1.0, 1.5, size=150)  # mean 0.4
        accuracies = rng.binomial(4, solve) / 4
        (found,) = mean_intervals(accuracies[:, None], np.arange(150), resamples=400, seed=number)
        held += found.low <= 0.4 <= found.high
    # 95% of 300 with a standard error of 1.3%; percentile intervals of 150 items are a little short.
    assert 0.91 <= held / 300 <= 0.985


def test_clusters_widen_the_interval():
    """Catches items resampled one by one: five copies of each of 40 items carry the information of 40, not of 200."""
    once = np.tile([0.0, 1.0], 20)
    copies = np.repeat(once, 5)
    (alone,) = mean_intervals(once[:, None], np.arange(40))
    (together,) = mean_intervals(copies[:, None], cluster_numbers([f"c{i // 5}" for i in range(200)]))
    (wrong,) = mean_intervals(copies[:, None], np.arange(200))
    assert together == alone
    assert wrong.high - wrong.low < 0.6 * (alone.high - alone.low)  # 1/√5 = 0.45


def test_cluster_numbers():
    """Catches items without a cluster thrown into one, and a single cluster that leaves nothing to resample."""
    assert cluster_numbers(["a", "", "a", ""]).tolist() == [0, 1, 0, 2]
    assert cluster_numbers(["a", "a", "a"]).tolist() == [0, 1, 2]
    assert cluster_numbers(["", "i0"]).tolist() == [0, 1]


def test_wilson_is_for_one_sample_an_item_that_stands_alone():
    """Catches Wilson over samples of few items, and over clusters."""
    flags = np.array([1.0, 0, 1, 1])
    found, method = share_interval(flags, np.arange(4), single=True)
    assert (found, method) == (wilson(3, 4), "wilson")
    assert share_interval(flags, np.array([0, 0, 1, 1]), single=True)[1] == "bootstrap"
    assert share_interval(flags, np.arange(4), single=False)[1] == "bootstrap"
    assert share_interval(flags, np.arange(4), np.array([1.0, 1, 2, 2]), single=True)[1] == "bootstrap"


def test_no_spread_is_not_certainty():
    """Catches 100% (100 to 100) from three items that were solved in all samples."""
    (found,) = mean_intervals(np.ones((3, 1)), np.arange(3))
    assert (found.value, found.low, found.high) == pytest.approx((1.0, wilson(3, 3).low, 1.0))
    (gap,) = mean_intervals(np.zeros((3, 1)), np.arange(3), shares=False)
    assert (gap.low, gap.high) == (0, 0)


def test_ratio_of_sums():
    """Catches a mean of ratios: (1 + 0) / (1 + 3) is 0.25, the mean of 1 and 0 is 0.5; and 0 / 0 as a number."""
    tops, bottoms = np.array([[1.0, 0], [0, 0]]), np.array([[1.0, 0], [3, 0]])
    first, second = ratio_intervals(tops, bottoms, np.arange(2))
    assert first is not None and first.value == 0.25
    assert second is None


def test_many_items_in_parts():
    """Catches a draw that mixes up rows when the resamples do not fit into memory at once."""
    rng = np.random.default_rng(0)
    flags = (rng.random(3000) < 0.3).astype(float)
    (found,) = mean_intervals(flags[:, None], np.arange(3000))
    close = wilson(flags.sum(), 3000)
    assert (found.low, found.high) == pytest.approx((close.low, close.high), abs=0.002)
