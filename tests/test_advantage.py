"""Advantages by hand, and the laws that every estimator keeps."""

import itertools

import numpy as np
import pytest

from rethinker_jax.advantage import group_advantages, pass_at_k

ESTIMATORS = ("group_mean", "group_std", "rloo")


def rewards(*rows):
    return np.array(rows, np.float32)


@pytest.mark.parametrize(
    "estimator, wanted",
    [
        ("group_mean", [3 / 4, -1 / 4, -1 / 4, -1 / 4]),  # mean 1/4
        # variance 1/4 · 3/4 with divisor n = 4; with n - 1 it would be 1.5 and -0.5
        ("group_std", [3**0.5, -(3**-0.5), -(3**-0.5), -(3**-0.5)]),
        ("rloo", [1, -1 / 3, -1 / 3, -1 / 3]),  # the three others: 0, and one right of three
    ],
)
def test_one_right_of_four(estimator, wanted):
    """Catches a std with n - 1, a leave-one-out mean that counts the sample itself, and a division nobody asked for."""
    r = rewards([1, 0, 0, 0])
    found = group_advantages(r, r, estimator)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, [wanted], rtol=1e-6)


@pytest.mark.parametrize(
    "estimator, wanted",
    [
        (
            "group_mean",
            [3 / 4, -1 / 4, -1 / 4, 3 / 4],
        ),  # baseline 1/4, of the first responses; 2/4 if of the final ones
        # both together: 3 right of 8, std sqrt(3/8 · 5/8)
        ("group_std", np.array([3, -1, -1, 3]) / 4 / (15 / 64) ** 0.5),
        # the forced sample's siblings were 0, 0, 1; the honest success's 0, 0, 0
        ("rloo", [2 / 3, -1 / 3, -1 / 3, 1]),
    ],
)
def test_a_forced_success_does_not_lower_its_siblings(estimator, wanted):
    """The first sample was wrong and was mended. Catches a baseline of the rewards after replacement, as released."""
    found = group_advantages(rewards([1, 0, 0, 1]), rewards([0, 0, 0, 1]), estimator)
    np.testing.assert_allclose(found, [wanted], rtol=1e-6)


def test_a_forced_success_where_all_were_wrong():
    """Catches a std of the first rewards alone, which is 0 here, and blame for siblings that did as expected."""
    final, first = rewards([1, 0, 0, 0]), rewards([0, 0, 0, 0])
    for estimator in ("group_mean", "rloo"):
        assert group_advantages(final, first, estimator).tolist() == [[1, 0, 0, 0]]
    # one of eight: std sqrt(1/8 · 7/8) = sqrt(7) / 8
    np.testing.assert_allclose(group_advantages(final, first, "group_std"), [[8 / 7**0.5, 0, 0, 0]], rtol=1e-6)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("n", [2, 3, 7, 8])
@pytest.mark.parametrize("value", [0.0, 1.0, 0.1, -0.1, 1.1, 1 / 3])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_equal_rewards_teach_nothing(estimator, value, n, dtype):
    """Catches 0/0, and rounding of the mean (3 · 0.1 / 3 ≠ 0.1) that a division by an equally small std makes ±1."""
    r = np.full((2, n), value, dtype)
    np.testing.assert_allclose(group_advantages(r, r, estimator), 0.0, atol=1e-7)


def test_laws_of_random_groups():
    """Catches groups that are mixed (axis 0 for axis 1), and a baseline that is not the group's."""
    r = np.random.default_rng(0).normal(size=(5, 6)).astype(np.float32)
    mean, std, rloo = (group_advantages(r, r, estimator) for estimator in ESTIMATORS)
    np.testing.assert_allclose(mean.sum(axis=1), 0, atol=1e-5)
    np.testing.assert_allclose(rloo, mean * 6 / 5, rtol=1e-5)  # r - (S - r)/5 = (6r - S)/5
    np.testing.assert_allclose((std**2).mean(axis=1), 1, rtol=1e-5)
    np.testing.assert_allclose(group_advantages(r * 3 + 2, r * 3 + 2, "group_std"), std, rtol=1e-4, atol=1e-5)
    for estimator in ESTIMATORS:
        alone = [group_advantages(r[i : i + 1], r[i : i + 1], estimator)[0] for i in range(5)]
        assert group_advantages(r, r, estimator).tolist() == [one.tolist() for one in alone]


def test_pass_at_k_is_the_share_of_subsets_that_hold_a_right_one():
    """Catches 1 - (1 - c/n)^k, which draws with replacement and is too low."""
    for n in range(1, 8):
        for c, k in itertools.product(range(n + 1), range(1, n + 1)):
            subsets = list(itertools.combinations([True] * c + [False] * (n - c), k))
            assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, subsets)) / len(subsets), abs=1e-12)


def test_pass_at_k_of_large_numbers():
    """1 - C(1999, 100) / C(2000, 100) = 100/2000. Catches factorials that overflow."""
    assert pass_at_k(2000, 1, 100) == pytest.approx(0.05)


def test_pass_at_more_than_was_drawn_is_refused():
    with pytest.raises(ValueError, match=r"pass@9 wants at least 9 samples, came 8"):
        pass_at_k(8, 8, 9)
