"""Hostile and broken texts against the pool: none passes, lasts, crashes a worker or reaches the caller."""

from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from verifier_fuzz import GOOD, MAKERS, PIECES, make_item, problem_of

from rethinker_jax.config import VerifierConfig
from rethinker_jax.verify.judge import JudgeItem
from rethinker_jax.verify.pool import VerifierPool


@pytest.fixture(scope="module")
def pool() -> Iterator[VerifierPool]:
    with VerifierPool(VerifierConfig(num_workers=1)) as opened:
        yield opened


def test_three_thousand_inputs(pool: VerifierPool) -> None:
    """The first of those that scripts/fuzz_verifier.py draws. Catches an exception of a parser that is called `crash`,
    an input that hangs, and one that the caller's process cannot take."""
    made = [make_item(0, number) for number in range(3000)]
    assert {name for name, _ in made} == set(MAKERS)
    before = pool.counts
    verdicts = pool.judge_many([item for _, item in made])
    problems = [(number, problem_of(verdict)) for number, verdict in enumerate(verdicts) if problem_of(verdict)]
    assert problems == []
    assert pool.counts["items"] - before.get("items", 0) == 3000
    assert pool.counts["cpu_timeouts"] - before.get("cpu_timeouts", 0) <= 10


def test_the_good_answers_of_the_fuzzer_are_good(pool: VerifierPool) -> None:
    """Otherwise its mutations would start from junk and reach little."""
    verdicts = pool.judge_many([JudgeItem(rf"\boxed{{{good}}}", gold, choices) for gold, good, choices in GOOD])
    assert [(gold, v.rule) for (gold, _, _), v in zip(GOOD, verdicts, strict=True) if not v.correct] == []


def test_inputs_are_the_same_for_the_same_seed() -> None:
    """Catches a generator whose findings nobody can look at again."""
    assert [make_item(3, n) for n in range(50)] == [make_item(3, n) for n in range(50)]
    assert [make_item(3, n) for n in range(50)] != [make_item(4, n) for n in range(50)]


ATTACKS = [
    "9^{9^{9^9}}",
    "10^{10^{10}}",
    "2^{10^9}",
    "1000000!",
    "((10!)!)!",
    r"\binom{10^9}{5\cdot 10^8}",
    r"\sum_{k=1}^{10^9} 1/k^2",
    r"\prod_{k=1}^{10^7} k",
    r"\sin(10^{10^8})",
    "(x+1)^{10^6}",
    "(1+i)^{1000001}",
    "x^{10^9}=1",
    "{" * 2000 + "1" + "}" * 2000,
    "(" * 800 + "1" + ")" * 800,
    r"\sin(" * 100 + "1" + ")" * 100,
    "1+" * 30000 + "1",
    "a" * 100000,
    r"\frac{" * 3000,
    "1 " * 30000,
    "9" * 100000,
    "9" * 4301,
    r"\boxed{" * 1000 + "1" + "}" * 1000,
    "\x00\x01",
    r"e^{e^{e^{e^{10}}}}",
    "1e999999999",
    "10^{999999}",
    r"\frac{1}{0}",
    "0^{-1}",
    "x^{x^{x^{x}}}",
    "a," * 9000,
    r"10^{(5^{5^{5^{5^5}}} \cdot \log_{10}(5)} - 4)}",
    "(((2^{400})^{400})^{400})^{400}",
]


def test_no_attack_passes_or_lasts(pool: VerifierPool) -> None:
    """Towers, factorials, nesting, length: all false, and nearly all within the limit of CPU time."""
    golds = ("5", "x^2+1", "B", "1, 2", "x=3", "3 cm", "cat")
    before = pool.counts
    verdicts = pool.judge_many([JudgeItem(rf"\boxed{{{attack}}}", gold) for attack in ATTACKS for gold in golds])
    assert [v.extracted for v in verdicts if v.correct] == []
    assert {v.verdict for v in verdicts} <= {"wrong", "no_answer", "timeout"}
    assert pool.counts["cpu_timeouts"] - before.get("cpu_timeouts", 0) <= 10


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    answer=st.one_of(st.lists(st.sampled_from(PIECES), max_size=14).map("".join), st.text(max_size=30)),
    gold=st.sampled_from(["7", "x+1", "B", "1,2", "5 cm", "cat", "x<3"]),
)
def test_nonsense_gets_a_verdict(pool: VerifierPool, answer: str, gold: str) -> None:
    """The same by hypothesis, which shrinks what fails."""
    verdict = pool.judge_many([JudgeItem(rf"\boxed{{{answer}}}", gold)])[0]
    assert verdict.verdict in ("correct", "wrong", "no_answer", "timeout"), verdict
