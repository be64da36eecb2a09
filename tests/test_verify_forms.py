r"""Forms of right answers and near misses that each cost a rule: (gold, answer, right?, why), and the formula reader.

Beside `test_verify_cases` these are the later finds: products of letters, bare logarithms, domain and range, spoken
numbers and times, glued units, lost LaTeX commands; and what the exact path must neither take nor choke on.
"""

import time
from fractions import Fraction

import pytest

from rethinker_jax.verify.formulas import Unread, names_in, read_formula
from rethinker_jax.verify.guards import refusal
from rethinker_jax.verify.judge import judge
from rethinker_jax.verify.normalize import clean
from rethinker_jax.verify.values import constant_value

PRODUCTS = [
    ("ab", "ba", True, "a product commutes"),
    ("ab", r"a \cdot b", True, "with its sign"),
    ("xyz", "zyx", True, "three letters"),
    ("2ab", "2ba", True, "`ab` is no noun"),
    ("F=ma", "am", True, "the value of a name is a product"),
    ("V=IR", "V=RI", True, "capitals too"),
    ("F=ma", "a=F/m", True, "rearranged"),
    ("no", "on", False, "words do not commute"),
    ("saw", "was", False, "nor do longer ones"),
    ("ABDC", "ADBC", False, "nor do the names of figures"),
    (r"AB\cdot CD", r"AC\cdot BD", False, "nor the letters of segments"),
    (r"\frac{AB}{CD}", r"\frac{BA}{DC}", True, "but a segment has two ends"),
    (r"\overline{AB}", "AB", True, "the mark left out"),
    (r"\overrightarrow{AB}", r"\overrightarrow{BA}", False, "a ray has one end"),
    (r"\pi r^2h", r"\pi hr^2", True, "`hr` is no hour here"),
    (r"\frac{1}{ab}", r"\frac{1}{ba}", True, "braces around two letters are no lost unit"),
]

LOGARITHMS = [
    (r"\ln 2", r"\log 2", True, "natural, as the gold is"),
    (r"\log 2", r"\ln 2", False, "the gold's has base ten"),
    (r"\log 100", "2", True, "base ten"),
    (r"\ln 2", r"\log_e 2", True, "its base written"),
    ("3", r"\log_2 8", True, "an exact logarithm"),
    (r"2\ln x", r"\ln x^2", True, "equal where the gold has a value"),
    (r"\ln|x|", r"\ln x", False, "no value for negative x"),
    (r"\sqrt{\frac{2h}{g}}", r"\frac{\sqrt{2h}}{\sqrt{g}}", True, "roots of negative numbers say nothing"),
    (r"\sqrt{x^2}", "x", False, "another value for negative x"),
    (r"\frac{n(n-1)}{2}", r"\binom{n}{2}", True, "a binomial in a variable"),
    (r"\frac{dy}{dx}", r"\frac{y}{x}", False, "a derivative is no quotient"),
    ("f(x+1)", "f(x)+f", False, "a function is no factor"),
    (r"\sin^{-1}x", r"\frac{1}{\sin x}", False, "the inverse function"),
    ("y=1/2x+3", r"y=\frac{1}{2}x+3", True, "half of x"),
    ("5", "101_2", False, "another base is not read away"),
    ("120", "12°0", False, "a sign in the middle of a number"),
    (r"x+\ln 2^{194}", r"x+194\ln 2", True, "a letter before makes no exponent symbolic"),
]

PAIRS = [
    (r"Domain: $[0, \infty)$, Range: $[1, \infty)$", r"[0,\infty), [1,\infty)", True, "labels left out"),
    ("Domain: [0,∞), Range: [1,∞)", "Domain: x≥0, Range: y≥1", True, "inequalities"),
    ("Domain: [0,∞), Range: [1,∞)", r"[1,\infty), [0,\infty)", False, "an order"),
    ("$D=[-3,3]$ and $R=[0,3]$", "Domain: [-3, 3]; Range: [0, 3]", True, "letters for labels"),
    ("all real numbers", r"(-\infty,\infty)", True, "in words"),
    ("-2<x<2", "|x|<2", True, "a size"),
    (r"x\ne2", r"(-\infty,2)\cup(2,\infty)", True, "a hole"),
    ("[1,3]", r"1\le x\le 3", True, "brackets may be an interval"),
    ("(3,4)", "(x,y)=(3,4)", True, "both names before"),
    ("(3,4)", r"\begin{pmatrix}3\\4\end{pmatrix}", True, "a column"),
    ("(3,4)", "The point is (3,4)", True, "announced"),
    (r"\emptyset", "no solution", True, "in words"),
    (r"\emptyset", r"\{\emptyset\}", False, "a set with one member"),
    ("Mean: 3, Median: 4", "Mean = 3, Median = 4", True, "names with a colon"),
    ("max = 5, min = -3", "max=-3, min=5", False, "names are kept"),
    ("12", "12=x", True, "the name on the right"),
    (r"y=\frac{k}{x}", "xy=k", True, "but a letter may be a side"),
    (r"$\angle 1=30^{\circ}$", "30", True, "a numbered angle"),
    (r"\left[\begin{array}{cc}1&2\\3&4\end{array}\right]", "[[1,2],[3,4]]", True, "an array in brackets"),
]

WORDS = [
    ("3.5", "three and a half", True, "a half in words"),
    (r"\frac{3}{4}", "three quarters", True, "a fraction in words"),
    ("-3", "minus 3", True, "a sign in words"),
    (r"\frac{1}{6}", "0.1666...", True, "dots that repeat"),
    ("3 m/s^2", "3 ms^{-2}", True, "units glued before a negative power"),
    ("3 m/s^2", "3 meters per second squared", True, "in words"),
    ("15 cm^2", "15 squared cm", True, "the power first"),
    ("60 km/h", "60 kilometres an hour", True, "an hour"),
    ("45°30'", "45.5°", True, "minutes of arc"),
    ("100 kPa", "10^5 Pa", True, "a power of ten before a unit"),
    ("8 people", "8 persons", True, "an irregular plural"),
    (r"8\sqrt{3}{squareinches}", r"8\sqrt{3} \text{ in}", False, "a length for an area"),
    (r"\frac{3}{4}\pi{inches}", r"\frac{3\pi}{4}", True, "a lost text command behind pi"),
    ("3:30", "half past 3", True, "spoken"),
    ("9:45", "quarter to ten", True, "spoken"),
    ("3 to 4", "3:4", True, "a ratio, no time"),
    ("northeast", "NE", True, "a compass point"),
    ("1995", "the year 1995", True, "a year"),
    (r"\text{Co}", r"\text{CO}", False, "an element is no oxide, marked or not"),
    ("5:2", r"5\mathbin{:}2", True, "a LaTeX colon"),
    (">", r"\gt", True, "a sign alone"),
    ("[100, 120, 300, 400]", "[105, 118, 296, 405]", True, "four numbers that can only be a box"),
    ("[1, 2, 3, 4]", "[1, 2, 3, 5]", False, "a sequence is no box"),
]


@pytest.mark.parametrize(("gold", "answer", "right", "why"), PRODUCTS + LOGARITHMS + PAIRS + WORDS)
def test_forms(gold: str, answer: str, right: bool, why: str) -> None:
    verdict = judge(rf"So \boxed{{{answer}}}.", gold)
    assert verdict.verdict == ("correct" if right else "wrong"), f"{why}: {verdict}"


CHOICES = ("12 cm", "15 cm", "18 cm", "20 cm")


@pytest.mark.parametrize(
    ("answer", "right", "why"),
    [
        ("15 cm (B)", True, "the text first"),
        (r"\{B\}", True, "set braces"),
        ("A. 15 cm", False, "another letter with the text: `A.` is no article"),
        ("A 15 cm", False, "the same without a stop"),
        ("15 cm (A)", False, "and behind it"),
    ],
)
def test_options(answer: str, right: bool, why: str) -> None:
    assert judge(rf"\boxed{{{answer}}}", "B", CHOICES).correct == right, why


def test_named_boxes_are_one_list() -> None:
    """Catches a judge that takes the last of two values that were stated together."""
    response = r"Hence $x = \boxed{2}$ and $y = \boxed{3}$."
    assert judge(response, "x=2, y=3").correct and judge(response, "(2,3)").correct
    assert not judge(response, "3").correct


@pytest.mark.parametrize(
    ("text", "value"),
    [
        (r"2\frac{1}{3}", Fraction(7, 3)),
        ("2(3)", Fraction(6)),  # a peer's parser makes 5 of it
        ("-2^2", Fraction(-4)),
        (r"\sqrt[3]{-8}", Fraction(-2)),
        (r"\sin 30°", Fraction(1, 2)),
        (r"\binom{5}{2}", Fraction(10)),
        ("||-3|-1|", Fraction(2)),
        (r"(\sqrt{2})^2-2", Fraction(0)),
        (r"\lfloor -2.5\rfloor", Fraction(-3)),
        ("1/2*4", Fraction(2)),
        (r"\log_{\frac{1}{2}} 8", Fraction(-3)),
        ("5\\%", Fraction(1, 20)),
    ],
)
def test_closed_forms_are_read_exactly(text: str, value: Fraction) -> None:
    read = constant_value(clean(text))
    assert read is not None and abs(read - value) <= abs(value) * Fraction(1, 10**40)


@pytest.mark.parametrize(
    "text", [r"\sin x/2", "3 4", "x2", r"\frac{d}{dx}x", r"\sum x", "x<3", "(1, 2)", "1=2=3", "", "("]
)
def test_what_can_be_read_in_two_ways_is_not_read(text: str) -> None:
    """Catches a parser that guesses: these go to the slow path or are wrong."""
    with pytest.raises(Unread):
        read_formula(text)


def test_names_are_variables_figures_and_subscripted_letters() -> None:
    assert names_in(r"2x_1+\theta AB-\overline{BA}e^{i\pi}") == ("AB", "overline AB", "theta", "x_1")
    assert names_in("AB", segments=False) == ("A", "B")


def test_chains_without_brackets_are_refused_too() -> None:
    """Catches an exhausted stack: a worker that dies of one answer is a crash, not a verdict."""
    for text in (r"\sin" * 100 + "x", "|" * 300, r"\sqrt" * 60 + "2", "x^" + "-" * 300 + "1"):
        assert refusal(text)
    for text in ("x" + "^x" * 110, "2*" + "-" * 100 + "5", r"\sin^2" * 60 + "x", "5" + "!" * 200, "x" + "'" * 300):
        assert not judge(rf"\boxed{{{text}}}", "x^2+1").correct


def test_large_values_have_no_value_and_cost_nothing() -> None:
    started = time.process_time()
    for text in (r"e^{399^{399}}", r"\sin(10^{300})", r"\sqrt{2}^{399!}", r"i^{i^{i^{9}}}", r"\binom{199}{99}^{40}"):
        assert not judge(rf"\boxed{{{text}}}", r"\sqrt{2}").correct
    assert time.process_time() - started < 1.0
