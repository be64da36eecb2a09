"""pass@k against whole-number arithmetic, and against what others report under that name."""

import math
from fractions import Fraction

import numpy as np
import pytest
from benchmark_cases import samples

from rethinker_jax.benchmarks.groups import group_records
from rethinker_jax.benchmarks.pass_at_k import pass_at_k_curve, pass_at_k_values, sizes


def exact(n: int, c: int, k: int) -> Fraction:
    return 1 - Fraction(math.comb(n - c, k), math.comb(n, k))


def with_replacement(n: int, c: int, k: int) -> float:
    """The biased estimate for comparison: k draws with replacement (verl's best@N, its bootstrap's limit)."""
    return 1 - (1 - c / n) ** k


@pytest.mark.parametrize(
    "n, expected",
    [(1, (1,)), (2, (1, 2)), (5, (1, 2, 4, 5)), (8, (1, 2, 4, 8)), (1000, (*(2**i for i in range(10)), 1000))],
)
def test_sizes(n, expected):
    """Catches a curve that stops before all samples, and one that names a k twice."""
    assert sizes(n) == expected


@pytest.mark.parametrize("n", [1, 3, 8, 64, 1024])
def test_the_curve_is_the_closed_form(n):
    """Catches rounding at n = 1024, where C(1024, 512) has 307 digits, and n - c < k."""
    for c in sorted({0, 1, 2, n // 3, n // 2, n - 1, n} & set(range(n + 1))):
        items = group_records(samples("q", "+" * c + "-" * (n - c)))
        ks = sizes(n)
        found = pass_at_k_values(items, ks)[0]
        assert found == pytest.approx([float(exact(n, c, k)) for k in ks], rel=1e-11, abs=1e-14)


@pytest.mark.parametrize("c, k, biased", [(1, 8, 0.656), (1, 4, 0.414), (2, 8, 0.900)])
def test_drawing_with_replacement_is_another_number(c, k, biased):
    """Catches a bootstrap in the place of the estimate: 0.656 for an item that was solved in one of its 8 samples."""
    items = group_records(samples("q", "+" * c + "-" * (8 - c)))
    assert with_replacement(8, c, k) == pytest.approx(biased, abs=5e-4)
    assert pass_at_k_values(items, [k])[0, 0] == pytest.approx({(1, 8): 1.0, (1, 4): 0.5, (2, 8): 1.0}[c, k])


def test_the_unbiased_estimate_is_nearer_to_the_truth():
    """Catches a biased estimate: with p = 0.1, pass@8 is 1 - 0.9^8 = 0.5695."""
    truth = 1 - 0.9**8
    counts = np.random.default_rng(0).binomial(16, 0.1, size=4000)
    unbiased = np.mean([float(exact(16, int(c), 8)) for c in counts])
    items = group_records([r for i, c in enumerate(counts[:400]) for r in samples(f"{i:04}", "+" * c + "-" * (16 - c))])
    ours = pass_at_k_values(items, [8])[:, 0]
    assert ours == pytest.approx([float(exact(16, int(c), 8)) for c in counts[:400]])
    biased = np.mean([with_replacement(16, int(c), 8) for c in counts])
    assert abs(unbiased - truth) < 0.015 < 0.03 < truth - biased


def test_items_with_fewer_samples_end_the_curve():
    """Catches a k that some item cannot answer, which would leave that item out in silence."""
    items = group_records(samples("a", "+---") + samples("b", "--"))
    curve = pass_at_k_curve(items, np.arange(2))
    assert list(curve) == [1, 2]
    # a: 1/4 and 1 - C(3,2)/C(4,2) = 1/2; b: 0
    assert [interval.value for interval in curve.values()] == [0.125, 0.25]
