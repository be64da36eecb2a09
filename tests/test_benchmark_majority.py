"""maj@k by hand and by enumeration, with the real verifier as the judge of what is the same answer."""

import itertools
import math

import numpy as np
import pytest
from benchmark_cases import record, samples

from rethinker_jax.benchmarks.groups import group_records
from rethinker_jax.benchmarks.majority import (
    NO_CANDIDATE,
    Pair,
    agreement,
    answer_entropy,
    candidate_groups,
    majority_at_k,
    same_text,
    verified_same,
)
from rethinker_jax.config import VerifierConfig
from rethinker_jax.verify.pool import VerifierPool

NONE = NO_CANDIDATE


@pytest.fixture(scope="module")
def same():
    with VerifierPool(VerifierConfig()) as pool:
        yield verified_same(pool)


def votes(answers, gold="1/2", **others):
    right = {"1/2", "0.5", "\\frac{1}{2}"}
    return group_records(
        [
            record("q", i, "no_answer" if a is None else "correct" if a in right else "wrong", a, answer=gold, **others)
            for i, a in enumerate(answers)
        ]
    )


def classes(groups):
    """The partition alone: which samples vote for one candidate."""
    found = {}
    for place, group in enumerate(groups.tolist()):
        if group != NONE:
            found.setdefault(group, set()).add(place)
    return sorted(map(sorted, found.values()))


def test_equal_answers_are_one_candidate(same):
    r"""Catches grouping by text, where 1/2, 0.5 and \frac{1}{2} lose to two 3s."""
    items = votes(["1/2", "3", "0.5", "3", "\\frac{1}{2}", None], type="auto")
    (groups,) = candidate_groups(items, same)
    assert classes(groups) == [[0, 2, 4], [1, 3]]
    correct = np.array([r.correct for r in items[0].records])
    assert majority_at_k(groups, correct, 6) == 1.0
    (texts,) = candidate_groups(items, same_text)
    assert majority_at_k(texts, correct, 6) == 0.0


def test_options_are_compared_with_their_texts(same):
    """Catches a comparison without the options: B and its text are one vote, against two for C."""
    choices = ("10 cm", "15 cm", "20 cm")
    answers = ["B", "15 cm", "(B) 15 cm", "C", "C"]
    (groups,) = candidate_groups(votes(answers, gold="B", type="mcq", choices=choices), same)
    assert classes(groups) == [[0, 1, 2], [3, 4]]


@pytest.mark.parametrize(
    "left, right, equal",
    [
        ("0.333", "1/3", False),  # 1/3 rounds to 0.333, but 0.333 is not 1/3
        ("2x+2", "2(x+1)", True),
        ("a}{b", "a}{b", False),  # cannot be boxed; equal texts never come here
        ("", "", False),
    ],
)
def test_equality_holds_both_ways(same, left, right, equal):
    """Catches an equality that takes the one answer as the gold: one group could then hold right and wrong answers."""
    assert same([Pair(left, right, "auto", ())]) == same([Pair(right, left, "auto", ())]) == [equal]


def brute_force(groups, correct, k):
    credits = []
    for subset in itertools.combinations(range(len(groups)), k):
        counts = {}
        for place in subset:
            if groups[place] != NONE:
                counts.setdefault(groups[place], []).append(correct[place])
        most = max(map(len, counts.values()), default=0)
        tied = [flags for flags in counts.values() if len(flags) == most]
        credits.append(sum(sum(flags) / len(flags) for flags in tied) / len(tied) if tied else 0.0)
    return sum(credits) / len(credits)


@pytest.mark.parametrize(
    "groups, right, k, expected",
    [
        ([0, 0, 1], [0], 3, 1.0),
        ([0, 1, 2], [0], 3, 1 / 3),  # three tie
        ([NONE, NONE, 0], [0], 3, 1.0),  # no answer is no candidate, however often
        ([NONE, NONE], [0], 2, 0.0),
        ([0, 0, 1, 1], [0], 4, 0.5),
        ([0, 1, 1], [0], 2, 1 / 3),  # {0,1}: 1/2, {0,1}: 1/2, {1,1}: 0
        ([0, 1, NONE], [0], 1, 1 / 3),  # maj@1 is the accuracy
    ],
)
def test_majority_by_hand(groups, right, k, expected):
    """Catches ties that go to the first, "no answer" as a winner, and subsets with replacement."""
    correct = np.isin(groups, right)
    assert majority_at_k(np.array(groups), correct, k) == pytest.approx(expected)
    assert brute_force(groups, correct, k) == pytest.approx(expected)


@pytest.mark.parametrize("k", [1, 2, 4, 7, 9])
def test_majority_is_the_mean_over_subsets(k):
    """Catches a wrong count of ties or of subsets on nine samples with three candidates and two without an answer."""
    groups = np.array([0, 1, 0, 2, NONE, 1, 0, NONE, 2])
    correct = groups == 0
    assert majority_at_k(groups, correct, k) == pytest.approx(brute_force(groups, correct, k))


def test_many_samples_are_subsampled_near_the_truth():
    """Catches drawn subsets that repeat samples. n = 40, 22 right of two candidates, k = 5: at least 3 right of 5."""
    groups = np.array([0] * 22 + [1] * 18)
    truth = sum(math.comb(22, i) * math.comb(18, 5 - i) for i in range(3, 6)) / math.comb(40, 5)
    found = majority_at_k(groups, groups == 0, 5)
    assert found == majority_at_k(groups, groups == 0, 5)
    assert found == pytest.approx(truth, abs=0.05)  # 1,000 subsets: three standard errors are 0.047


def test_a_group_that_the_verifier_contradicts_is_credited_in_part():
    """Catches a credit by whichever record of the group comes first."""
    assert majority_at_k(np.array([0, 0, 0]), np.array([True, False, True]), 3) == pytest.approx(2 / 3)


def test_agreement_and_entropy():
    """Catches bits for nats, and answers that are missing counted as one more answer."""
    groups = np.array([3, 3, 5, NONE])
    assert agreement(groups) == 0.5
    shares = (2 / 3, 1 / 3)
    assert answer_entropy(groups) == pytest.approx(-sum(p * math.log(p) for p in shares))
    assert answer_entropy(np.array([4, 4])) == 0
    assert answer_entropy(np.array([NONE])) is None
    assert agreement(np.array([NONE])) == 0


def test_items_are_grouped_apart():
    """Catches an answer of one item in the candidates of another."""
    items = group_records(samples("a", "+-") + samples("b", "00") + samples("c", "-+"))
    first, second, third = candidate_groups(items, same_text)
    assert classes(first) == classes(third) == [[0], [1]]
    assert classes(second) == []


def test_many_different_answers_cost_few_comparisons():
    """Catches a million comparisons for one item of 1,024 samples that all say something else."""
    asked = []

    def counting(pairs):
        asked.extend(pairs)
        return same_text(pairs)

    records = [record("q", i, "wrong", str(i // 2) if i < 200 else f"x{i}") for i in range(1024)]
    (groups,) = candidate_groups(group_records(records), counting)
    # 100 answers that two samples gave come first; all stay apart.
    assert len(np.unique(groups)) == 100 + 824
    assert len(asked) <= 64 * 924
    assert all(groups[2 * i] == groups[2 * i + 1] for i in range(100))
