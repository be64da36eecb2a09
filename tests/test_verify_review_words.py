r"""Words that turn a right answer into another one: (gold, choices, answer, right?), found by an adversarial review.

Each false line passed once. The right ones beside it are neighbours that the rule against it must not take along.
"""

import pytest

from rethinker_jax.verify.judge import judge

LABELS = [
    *[("5", answer, False) for answer in (
        "5 hundred", "5 dozen", "5 score", "5 lakh", "5 crore", "5 bn", "5 mln", "5 squared", "5 cubed", "5 halves",
        "5 tenths", "5 hundredths", "5 times two", "5 divided by two", "5 multiplied by two", "5 mod two",
        "5 factorial", "5 point three", "5 negative", "5 six", "5 then six", "5 perhaps six", "5 perhaps", "5 is a lie",
        "5 otherwise", "5 instead", "5 doubled", "5 inverse", "5 root", "5 to the power two", "5 sin x", "5 don't know",
        "five dozen", "5 rather not", "5 apples. Wrong", "5 that they say would do for me",
    )],
    ("1998", "1998 BC", False),
    ("1998", "1998 BCE", False),
    ("1998", "1998 AD", True),
    ("5", "5 apples", True),
    ("5", "5 red apples in total", True),
    ("5", "5 times", True),
    ("5", "5 points", True),
    ("5", "5 real roots", True),
    ("5", "5 students per class", True),
    ("5 apples", "5", True),
    ("5000", "5 thousand", True),
]  # fmt: skip

INTEGERS = [
    ("1000000000000", "10^{12}+1", False),
    ("1000000000000", "999999999999+0.5", False),
    ("10^{20}", "10^{20}+1", False),
    ("10^{50}", "10^{50}+1", False),
    ("1000000000000", "10^{12}", True),
    ("1000000000001", "10^{12}+1", True),
    ("10^{20}", r"10^{19}\cdot 10", True),
    ("2", r"\sqrt{2}\cdot\sqrt{2}", True),
    (r"\frac{1}{2}", r"\sin 30°", True),
    ("1.5", "1+0.5", True),
]

YES_NO = [
    *[("No", answer, False) for answer in (
        "No idea", "No comment", "no answer", "no solution", "No information given", "no way to tell", "No one knows",
        "No-one knows", "No, I have no idea", "No, maybe", "No. 5", "No or yes", "No, I am not sure", "No clue",
    )],
    ("Yes", "yes if x>3", False),
    ("yes", "yes, unless it is not", False),
    ("yes", "yes, but only when x > 3", False),
    ("yes", "Yes we can ask them", False),
    ("True", "true north", False),
    ("No", "No, it is not", True),
    ("No", "No.", True),
    ("No", "no because the sides differ", True),
    ("yes", "Yes, because it is a square", True),
    ("yes", "Yes, since the square is zero only when x is", True),
    ("yes", "yes, it is", True),
    ("No", "No, only two sides are equal", True),
    ("No", "No, 5 is odd", True),
    ("No", "No — the sides differ", True),
    ("yes", "Yes: the triangles are congruent", True),
    ("True", "true", True),
]  # fmt: skip

NAMES = [
    ("Paris", "London = Paris", False),
    ("Paris", "London: Paris", False),
    ("Paris", "wrong: Paris", False),
    ("Paris", "not the answer: Paris", False),
    ("red", "not red = red", False),
    *[("5", answer, False) for answer in (
        "not: 5", "wrong: 5", "seven: 5", "wrong answer: 5", "incorrect result = 5", "twice the value = 5", "NOT = 5",
    )],
    ("2:3", "wrong: 2:3", False),
    (r"\{1, 2\}", r"wrong: \{1, 2\}", False),
    ("(1, 2)", "wrong: (1, 2)", False),
    ("Paris", "answer: Paris", True),
    ("Paris", "Final answer: Paris", True),
    ("5", "The final answer = 5", True),
    ("5", "Area: 5", True),
    ("5", "Number of apples: 5", True),
    ("5", "x_1 = 5", True),
    ("5", "k = 5", True),
    ("0.6", "P(A) = 0.6", True),
    ("0.6", "cos A = 0.6", True),
    ("5", "Length of AB = 5", True),
    ("Girth = 5", "girth = 5", True),
    ("2:3", "ratio: 2:3", True),
    (r"\{1, 2\}", r"Solutions: \{1, 2\}", True),
]  # fmt: skip

DIFFERENT_NAMES = [
    ("P = 5", "A = 5", False),
    ("P = 5", "Area = 5", False),
    ("Area = 5", "Perimeter = 5", False),
    ("Area = 5", "P = 5", False),
    ("r=3", "R=3", False),
    ("P = 2(l+w)", "A=2(l+w)", False),
    (r"\overline{AB} = 5", r"\overline{CD} = 5", False),
    ("Volume $=5$", "V = 5", True),
    ("Volume $=5$", "5", True),
    ("Angle A = 5", "Angle B = 5", False),
    ("Length AB = 5", "CD = 5", False),
    ("Length = 5", "AB = 5", True),
    ("Length AB = 5", "BA = 5", True),
    ("P = 5", "Perimeter = 5", True),
    ("Area = 5", "A = 5", True),
    ("Area = 5", "Area of the square = 5", True),
    ("Surface Area = 5", "SA = 5", True),
    ("Slope = 2", "m = 2", True),
    ("Current = 2 A", "I = 2 A", True),
    ("AB = 5", "BA = 5", True),
    ("P = 2(l+w)", "P = 2l+2w", True),
    ("Area = 5", "Answer = 5", True),
]

LETTERS = [
    *[("B", answer, False) for answer in (
        "B. C", "B: C", "B)C", "(B)C", "B. C is correct", "B. I mean C", "B: both", "B. none", "B. neither",
        "B. either", "B. maybe", "B. Option C", "B. wrong", "B. or rather C",
    )],
    ("B", "B. 15 cm", True),
    ("B", "(B) triangle ABC", True),
    ("B", "B: B", True),
    ("B", "B. Triangle ABC is not isosceles", True),
    ("B", "B. h", True),
    ("B", "B. C instead", False),
    ("B", "B. 15 cm but C is right", False),
    ("B", "B. x + C", True),
    ("E", "E. None of the above", True),
]  # fmt: skip

OPTIONS = [
    ("C", ("A", "B", "A and B", "neither"), "A and B", True),
    ("A", ("A", "B", "A and B", "neither"), "A and B", False),
    ("B", ("3 cm", "4 cm", "5 cm"), "B, 4 cm", True),
    ("B", ("3 cm", "4 cm", "5 cm"), "B, 5 cm", False),
    ("B", ("3 cm", "4 cm", "5 cm"), "B, C", False),
]

UNITS = [
    ("5 mg", "5 Mg", False),
    ("5 ms", "5 Ms", False),
    ("5 mm", "5 Mm", False),
    ("5 mL", "5 ML", False),
    ("5 mW", "5 MW", False),
    ("5 mg", "5 mg", True),
    ("5 mL", "5 ml", True),
    ("5 km", "5 KM", True),
    ("5 kg", "5 Kg", True),
    ("5 meters", "5 Meters", True),
    ("5 grams", "5 GRAMS", True),
    ("5 ft 6 in", "5'6\"", True),
    ("5 ft 6 in", "5' 6\"", True),
    ("5 ft 6 in", "6'5\"", False),
    ("5", "exactly 5", True),
    ("5 cm", "exactly 5 cm", True),
    ("5", "exactly 6", False),
]

CASES = [
    (gold, (), answer, right)
    for table in (LABELS, INTEGERS, YES_NO, NAMES, DIFFERENT_NAMES, LETTERS, UNITS)
    for gold, answer, right in table
] + OPTIONS


@pytest.mark.parametrize(("gold", "choices", "answer", "right"), CASES)
def test_words_that_change_an_answer(gold: str, choices: tuple[str, ...], answer: str, right: bool) -> None:
    """Catches a word taken for a harmless label, name or reason, and a rule against it that takes right answers."""
    verdict = judge(rf"\boxed{{{answer}}}", gold, choices)
    assert verdict.correct == right, verdict
    assert verdict.verdict != "bad_gold"
