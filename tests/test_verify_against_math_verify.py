r"""Our judge and math-verify on a generated population where both should agree, and the named places where they do not.

Every gold comes with an answer that is the same value written another way, one that is near but wrong, and its own
text. A disagreement must be in `KNOWN` with its reason; the truth that the generator knows must be ours throughout.
"""

import random
from fractions import Fraction

import pytest

from rethinker_jax.verify.judge import judge

Pair = tuple[str, str, bool]  # gold, answer, are they the same
SEEDS = range(8)


def fraction(value: Fraction) -> str:
    sign = "-" if value < 0 else ""
    return rf"{sign}\frac{{{abs(value.numerator)}}}{{{value.denominator}}}"


def integers(r: random.Random) -> list[Pair]:
    n = r.randrange(-2000, 2000)
    return [
        (f"{n}", f"{n}.0", True),
        (f"{n}", f"{2 * n}/2", True),
        (f"{n}", f"{n + 1}", False),
        (f"{n}", f"{-n}", not n),
    ]


def decimals(r: random.Random) -> list[Pair]:
    n = r.randrange(1001, 9999, 2)
    gold = f"{n / 1000:.3f}"
    return [(gold, f"{gold}0", True), (gold, rf"\frac{{{n}}}{{1000}}", True), (gold, f"{(n + 20) / 1000:.3f}", False)]


def fractions(r: random.Random) -> list[Pair]:
    a, b, k = r.randrange(1, 50), r.choice((3, 7, 9, 11, 13)), r.randrange(2, 9)
    value = Fraction(a, b) * r.choice((1, -1)) + (a % b == 0) * Fraction(1, b)
    gold = fraction(value)
    unreduced = rf"\frac{{{value.numerator * k}}}{{{value.denominator * k}}}"
    return [(gold, unreduced, True), (gold, f"{value}", True), (gold, fraction(value + Fraction(1, b)), False)]


def radicals(r: random.Random) -> list[Pair]:
    a, b, c = r.randrange(2, 9), r.choice((2, 3, 5, 7)), r.randrange(1, 20)
    return [
        (rf"{a}\sqrt{{{b}}}", rf"\sqrt{{{a * a * b}}}", True),
        (rf"{c}+{a}\sqrt{{{b}}}", rf"\sqrt{{{b}}}\cdot {a}+{c}", True),
        (rf"\frac{{{a}\sqrt{{{b}}}}}{{{c}}}", rf"\frac{{{a * b}}}{{{c}\sqrt{{{b}}}}}", True),
        (rf"\frac{{{c}}}{{{a}+\sqrt{{{b}}}}}", rf"\frac{{{c}({a}-\sqrt{{{b}}})}}{{{a * a - b}}}", a * a != b),
        (rf"{a}\sqrt{{{b}}}", rf"{a + 1}\sqrt{{{b}}}", False),
        (rf"{c}+{a}\sqrt{{{b}}}", rf"{c}-{a}\sqrt{{{b}}}", False),
        (rf"{a}\pi", rf"\frac{{{2 * a}\pi}}{{2}}", True),
        (rf"{a}\pi", rf"{a}\pi+1", False),
    ]


def polynomials(r: random.Random) -> list[Pair]:
    a, b, k = r.randrange(1, 9), r.randrange(1, 9), r.randrange(2, 5)
    gold = f"x^2+{a + b}x+{a * b}"
    return [
        (gold, f"(x+{a})(x+{b})", True),
        (gold, f"{a * b}+{a + b}x+x^{{2}}", True),
        (gold, f"(x+{a})(x-{b})", False),
        (f"{k}x^3-{a}y", f"-{a}y+{k}x^3", True),
        (f"{k}x^3-{a}y", f"{k}y^3-{a}x", False),
        (rf"\frac{{x}}{{{k}}}+{a}", rf"\frac{{x+{a * k}}}{{{k}}}", True),
        (f"(x+{a})^{k}", f"(x-{a})^{k}", False),
    ]


def structures(r: random.Random) -> list[Pair]:
    a, b, c = r.sample(range(-20, 20), 3)
    half = fraction(Fraction(2 * abs(a) + 1, 2))
    low, high = sorted((b, c))
    return [
        (rf"\{{{a},{b},{half}\}}", rf"\{{{half},{b},{a}\}}", True),
        (rf"\{{{a},{b},{c}\}}", rf"\{{{a},{b}\}}", False),
        (rf"\{{{a},{b}\}}", rf"\{{{a},{c}\}}", False),
        (f"({a},{b})", rf"\left({a}, {b}\right)", True),
        (f"({half},{b})", f"({abs(a) + 0.5},{b})", True),
        (f"({a},{b})", f"({b},{a})", False),
        (f"({a},{b},{c})", f"({a},{b},{c + 1})", False),
        (f"[{low},{high}]", rf"\left[{low}, {high}\right]", True),
        (f"[{low},{high})", f"[{low},{high + 1})", False),
        (f"[{low},{high})", f"[{low},{high}]", False),
        (rf"({low},\infty)", rf"(-\infty,{low})", False),
        (rf"(-\infty,{low})\cup({high},\infty)", rf"({high},\infty)\cup(-\infty,{low})", True),
    ]


KINDS = (integers, decimals, fractions, radicals, polynomials, structures)
# (gold, answer, is it right) where math-verify errs, and why.
KNOWN = [
    ("0.0000001", "0.0000004", False, "compared at six decimals"),
    (r"6.63\times 10^{-34}", r"1.6\times 10^{-19}", False, "differences below 1e-16 are chopped"),
    (r"\frac{1}{2^{60}}", r"\frac{1}{2^{61}}", False, "the same"),
    (r"12 \text{ cm}", r"12 \text{ m}", False, "units are dropped"),
    ("listen", "silent", False, "words are products of letters"),
    (r"\angle ABC", r"\angle ACB", False, "names of figures are products of letters"),
    ("204_5", "204_6", False, "the base of a number is dropped"),
    ("1:2:3", "1:3:2", False, "ratios are read as a set"),
    ("3", "5 (or 3)", False, "a hedge counts as an answer"),
    (r"\text{Co}", r"\text{CO}", False, "case is dropped"),
    ("15 cm^2", "15", True, "a unit in plain text is a product of letters"),
    ("1000", "1e3", True, "e-notation is read as a product"),
    ("12", "12.", True, "a trailing point"),
    ("1/2", "½", True, "Unicode fractions"),
    (r"\emptyset", r"\varnothing", True, "one of two commands for the empty set"),
    ("(1,3)", "3>x>1", True, "falling chains of relations"),
    ("21", "twenty-one", True, "number words"),
]


def math_verify_says(gold: str, answer: str) -> bool:
    from math_verify import parse, verify

    return bool(verify(parse(rf"\boxed{{{gold}}}"), parse(rf"The answer is $\boxed{{{answer}}}$.")))


def our_verdict(gold: str, answer: str) -> bool:
    return judge(rf"The answer is $\boxed{{{answer}}}$.", gold).correct


@pytest.mark.parametrize("make", KINDS, ids=lambda make: make.__name__)
def test_both_agree_with_each_other_and_with_the_truth(make) -> None:
    """Catches a fast path that takes near misses or refuses another form where the two readings should not differ."""
    pairs = [pair for seed in SEEDS[: 4 if make is structures else None] for pair in make(random.Random(seed))]
    pairs += [(gold, gold, True) for gold, _, _ in pairs[::7]]
    ours = [pair for pair in pairs if our_verdict(pair[0], pair[1]) != pair[2]]
    assert ours == []
    theirs = [pair for pair in pairs if math_verify_says(pair[0], pair[1]) != pair[2]]
    assert theirs == []


@pytest.mark.parametrize(("gold", "answer", "right", "why"), KNOWN)
def test_known_errors_of_math_verify_are_not_ours(gold: str, answer: str, right: bool, why: str) -> None:
    assert our_verdict(gold, answer) == right, why
    assert math_verify_says(gold, answer) != right, f"math-verify has learned it: {why}"
