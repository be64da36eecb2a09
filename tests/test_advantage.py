"""Advantages by hand, and the laws that every estimator keeps."""

import itertools
import math
import statistics
import typing

import numpy as np
import pytest

from rethinker_jax import advantage, config
from rethinker_jax.advantage import group_advantages, pass_at_k

ESTIMATORS = ("group_mean", "group_std", "rloo")
RANKED = ("pass_at_k", "best_of_n", "g2rpo")  # by the order of the whole group
WHITENED = ("reinforce_plus_plus", "reinforce_plus_plus_baseline")  # over the whole rollout batch


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
@pytest.mark.parametrize("estimator", [*ESTIMATORS, *RANKED, *WHITENED])
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


# --- by the order of the group -------------------------------------------------------------------------------------


def test_pass_at_k_by_hand() -> None:
    """One right of four, k = 2. Of the six pairs three hold it: mean 1/2, std 1/2. Pairs that hold a right sample are
    worth 1: (1 - 1/2)/(1/2) = 1. Pairs that hold a given wrong one are worth 1/3 on average: -1/3. Catches a std over
    samples (sqrt(3)/4), and blame that a wrong sample shares for a pair that its sibling saved."""
    r = rewards([1, 0, 0, 0])
    np.testing.assert_allclose(group_advantages(r, r, "pass_at_k", k=2), [[1, -1 / 3, -1 / 3, -1 / 3]], rtol=1e-6)


def subsets_of(values: list[float], k: int, own: int) -> float:
    """pass@k advantage of sample `own` by listing every subset."""
    worth = {chosen: max(values[i] for i in chosen) for chosen in itertools.combinations(range(len(values)), k)}
    with_own = [value for chosen, value in worth.items() if own in chosen]
    std = statistics.pstdev(worth.values())
    return (statistics.fmean(with_own) - statistics.fmean(worth.values())) / std if std > 1e-9 else 0.0


@pytest.mark.parametrize("k", [1, 2, 3, 5])
@pytest.mark.parametrize("values", [[0, 1, 1, 0, 0, 1], [0.5, 1, 0, 0.5, 0.5, -1], [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]])
def test_pass_at_k_is_that_of_all_subsets(values: list[float], k: int) -> None:
    """Catches binomials one off, and ties that are broken by position: equal rewards have equal advantages."""
    r = rewards(values)
    found = group_advantages(r, r, "pass_at_k", k=k)[0]
    exact = [float(value) for value in r[0]]
    np.testing.assert_allclose(found, [subsets_of(exact, k, own) for own in range(6)], rtol=1e-5, atol=1e-7)
    if k == 1:
        np.testing.assert_allclose(found, group_advantages(r, r, "group_std")[0], rtol=1e-5)


@pytest.mark.parametrize("k", [2, 4, 7])
@pytest.mark.parametrize("num_correct", range(1, 8))
def test_pass_at_k_is_the_papers_closed_form(num_correct: int, k: int) -> None:
    """Rewards 0 and 1, n = 8 (arXiv 2508.10751): R = 1 - C(wrong, k)/C(n, k), σ² = R(1 - R); right (1 - R)/σ, wrong
    (1 - R - C(wrong - 1, k - 1)/C(n - 1, k - 1))/σ. Where every subset holds a right one, nothing is left to teach."""
    r = rewards([1] * num_correct + [0] * (8 - num_correct))
    wrong = 8 - num_correct
    mean = 1 - math.comb(wrong, k) / math.comb(8, k)
    found = group_advantages(r, r, "pass_at_k", k=k)[0]
    if mean == 1:
        assert not found.any()
        return
    sigma = math.sqrt(mean * (1 - mean))
    of_wrong = 1 - mean - math.comb(wrong - 1, k - 1) / math.comb(7, k - 1)
    np.testing.assert_allclose(found, [(1 - mean) / sigma] * num_correct + [of_wrong / sigma] * wrong, rtol=1e-5)


def test_best_of_n_by_hand() -> None:
    """(0.9 - 0.5) / std for the best alone; nobody where two are best. Mean 0.4, squares 0.25 + 0.01 + 0.01 + 0.09, std
    0.3 with divisor 4 (0.3464 with 3). Catches a gap to the mean, and praise for both of two equals."""
    r = rewards([0.9, 0.5, 0.1, 0.1], [1, 1, 0, 0])
    r[0, 1] = 0.5
    std = statistics.pstdev([0.9, 0.5, 0.1, 0.1])
    np.testing.assert_allclose(group_advantages(r, r, "best_of_n"), [[0.4 / std, 0, 0, 0], [0, 0, 0, 0]], rtol=1e-5)


def test_g2rpo_by_hand() -> None:
    """Published: one right of five gives 1.28 and four times -0.32. Φ⁻¹(0.9) = 1.2816; the others share the mean of
    Φ⁻¹(0.1, 0.3, 0.5, 0.7) = -1.2816/4 = -0.3204. The quantile of their mean rank would be Φ⁻¹(0.4) = -0.2533."""
    found = group_advantages(rewards([0, 0, 0, 0, 1]), rewards([0, 0, 0, 0, 1]), "g2rpo")
    np.testing.assert_allclose(found, [[-0.320388] * 4 + [1.281552]], rtol=1e-5)


@pytest.mark.parametrize("values", [[3, 1, 2], [0.1, -5, 100, 7], [1, 1, 0, 0, 0.5, 0.5, 2]])
def test_g2rpo_is_that_of_a_loop(values: list[float]) -> None:
    """Sorted one by one. Catches ranks from 0 (infinite quantiles), and size where only order should count."""
    order = sorted(values)
    quantiles = [statistics.NormalDist().inv_cdf((place + 0.5) / len(values)) for place in range(len(values))]
    wanted = [statistics.fmean(q for q, v in zip(quantiles, order, strict=True) if v == value) for value in values]
    r = rewards(values)
    np.testing.assert_allclose(group_advantages(r, r, "g2rpo"), [wanted], rtol=1e-5, atol=1e-7)
    stretched = np.exp(r.astype(np.float64) / 50)
    np.testing.assert_allclose(group_advantages(stretched, stretched, "g2rpo"), [wanted], rtol=1e-5, atol=1e-7)


def test_g2rpo_ties_survive_rounding() -> None:
    """0.1 + 0.2 and 0.3 differ in the last bit. Catches two equals of which one is praised for it."""
    r = np.array([[0.1 + 0.2, 0.3, 1.0]])
    found = group_advantages(r, r, "g2rpo")[0]
    assert r[0, 0] != r[0, 1] and found[0] == found[1]


@pytest.mark.parametrize("estimator", RANKED)
def test_ranked_siblings_of_a_forced_success_keep_what_they_had(estimator: config.Estimator) -> None:
    """The first sample was wrong and was mended. It stands as a right one among its siblings' first responses; they
    stand among first responses alone. Catches an order of the rewards after replacement."""
    first, final = rewards([0, 0, 0, 1]), rewards([1, 0, 0, 1])
    found = group_advantages(final, first, estimator, k=2)[0]
    np.testing.assert_array_equal(found[1:], group_advantages(first, first, estimator, k=2)[0, 1:])
    np.testing.assert_array_equal(found[0], group_advantages(final, final, estimator, k=2)[0, 0])


# --- by something outside of the group -----------------------------------------------------------------------------


def test_remax_subtracts_the_greedy_reward() -> None:
    """Catches a baseline of the wrong prompt, a mean that is subtracted too, and a baseline that is left out in
    silence."""
    r = rewards([1, 0], [1, 0.5], [0, 0])
    found = group_advantages(r, r, "remax", greedy_rewards=np.array([1.0, 0.5, 0.25]))
    assert found.tolist() == [[0, -1], [0.5, 0], [-0.25, -0.25]]
    with pytest.raises(ValueError, match="wants the rewards of greedy responses, came none"):
        group_advantages(r, r, "remax")


def test_reinforce_plus_plus_by_hand() -> None:
    """Rewards 1, 0 of one prompt and 0, 0 of another, with 6, 1, 2, 3 policy tokens: half of the 12 tokens have 1, so
    mean 1/2 and std 1/2. Catches a mean over samples (1/4, and so sqrt(3)), whitening by group (the second has no
    std), and a divisor of 11."""
    r, lengths = rewards([1, 0], [0, 0]), np.array([[6, 1], [2, 3]])
    found = group_advantages(r, r, "reinforce_plus_plus", lengths=lengths)
    np.testing.assert_allclose(found, [[1, -1], [-1, -1]], rtol=1e-6)


def test_reinforce_plus_plus_weighs_by_tokens() -> None:
    """Every token of every sample written out: numpy's mean and std over them. With a baseline, the group's mean over
    samples goes first. Catches weights on one of mean and std alone."""
    rng = np.random.default_rng(0)
    r, lengths = rng.normal(size=(4, 3)), rng.integers(1, 40, (4, 3))
    for estimator, values in (
        ("reinforce_plus_plus", r),
        ("reinforce_plus_plus_baseline", r - r.mean(axis=1, keepdims=True)),
    ):
        tokens = np.repeat(values.ravel(), lengths.ravel())
        found = group_advantages(r, r, estimator, lengths=lengths)
        np.testing.assert_allclose(found, (values - tokens.mean()) / tokens.std(), rtol=1e-5, atol=1e-6)
        assert np.abs(found - (values - values.mean()) / values.std()).max() > 0.01  # lengths matter


def test_a_sample_without_policy_tokens_counts_for_nothing() -> None:
    """Catches 0/0 where nothing was drawn, and a forced row of trigger alone that moves the mean."""
    r = rewards([1, 0, 9])
    found = group_advantages(r, r, "reinforce_plus_plus", lengths=np.array([[1, 1, 0]]))
    np.testing.assert_allclose(found[0, :2], [1, -1], rtol=1e-6)
    assert not group_advantages(r, r, "reinforce_plus_plus", lengths=np.zeros((1, 3))).any()


def test_the_registry_is_what_the_config_offers() -> None:
    """Catches an estimator that can be named and is not there, or is there and cannot be named."""
    assert set(advantage.ESTIMATORS) == set(typing.get_args(config.Estimator))


# --- pass@k --------------------------------------------------------------------------------------------------------


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
