r"""False positives that an adversarial review found in formulas, lists and boxes, with right answers beside them.

Each line is (gold, answer, right?, why). A wrong line was `correct` once (or crashed, or took a second); the right ones
of its group are what a too strict repair would lose.
"""

import time

import pytest

from rethinker_jax.verify.extract import extract
from rethinker_jax.verify.judge import judge

APPROXIMATIONS = [
    ("5", r"5 \approx 6", False, "the parser drops the tail"),
    (r"\frac{1}{3}", r"\frac13 \approx \frac23", False, "no rounding of the head"),
    ("x+1", r"x+1 \approx x+2", False, "of an expression"),
    ("0.25", r"0.25 \approx 0.35", False, "of a decimal"),
    (r"2\pi", r"2\pi \approx 7", False, "too coarse for a rounding"),
    (r"2\pi", r"2\pi \approx 6.28", True, "the exact value and its rounding"),
    (r"2\pi", r"2\pi \approx 6.283 \approx 6.28", True, "in two steps"),
    ("6.28", r"2\pi \approx 6.28", True, "for the rounded gold"),
    (r"\frac{1}{3}", r"\frac13 \approx 0.33", True, "of a fraction"),
]
DROPPED = [
    *(
        (gold, f"{gold} {sign} {other}", False, "the parser drops what follows")
        for gold, other in (("5", "6"), ("x+1", "x+2"), (r"\sqrt{2}", "3"), ("2x+y=3", "2x+y=4"))
        for sign in (
            *(r"\sim", r"\simeq", r"\cong", r"\equiv", r"\propto", r"\mod", r"\bmod", r"\ne", r"\mid", r"\parallel"),
            *(r"\perp", r"\to", r"\Rightarrow", r"\iff", r"\pm", r"\mp", r"\circ", r"\oplus", r"\dots", r"\ldots"),
            *(r"\infty", r"\nabla", r"\asymp", r"\therefore", r"\lor", r"\land", r"\star", "!"),
        )
    ),
    ("e^{2x}", "e^{2x} _{e^x}", False, "an index is dropped"),
    (r"\frac{dy}{dx}=2x", r"\frac{dy}{dx}=2x \infty 3x", False, "infinity swallows the rest"),
    ("0.25", r"0.25 \mod 0.35", False, "raised a TypeError"),
    (r"3 \mod 7", r"4 \mod 7", False, "raised a TypeError"),
    (r"3 \mod 7", r"3\mod 7", True, "the same text"),
    (r"x \equiv 3 \pmod 7", r"x\equiv 4\pmod{7}", False, "another class"),
    (r"x \equiv 3 \pmod 7", r"x\equiv 3\pmod{7}", True, "its braces"),
    (r"x \equiv 3 \pmod 7", r"x\equiv 3 (\text{mod } 7)", True, "in words"),
    ("x=2", r"x=2 \pm 0", False, "two values"),
    (r"2\pm\sqrt{3}", r"2\mp\sqrt{3}", False, "another sign is not the same text"),
    (r"2\pm\sqrt{3}", r"\pm\sqrt{3}+2", True, "plus-minus where the gold has it"),
    ("45°", r"45\circ", True, "a degree without its caret"),
    (r"x\geq 3", r"[3,\infty)", True, "infinity as an end"),
]
DERIVATIVES = [
    (r"\frac{dy}{dx}=2x", r"\frac{dy}{dx}=3x", False, "another factor"),
    (r"\frac{dy}{dx}=2x", r"\frac{dy}{dx}=x", False, "no factor"),
    (r"\frac{dy}{dx}=2x", r"\frac{y}{x}=2x", False, "a derivative is no quotient"),
    (r"\frac{dV}{dt}=4\pi r^2", r"\frac{dV}{dt}=2\pi r^2", False, "half of it"),
    (r"\frac{\partial f}{\partial x}=2x", r"\frac{\partial f}{\partial x}=3x", False, "a partial one"),
    (r"\frac{d}{dx}x^2=2x", r"\frac{d}{dx}x^2=3x", False, "an operator"),
    (r"\frac{dy}{dx}=2x", r"\frac{dx}{dy}=2x", False, "the other way round"),
    (r"\frac{dy}{dx}=2x", r"2\frac{dy}{dx}=4x", True, "proportional"),
    (r"\frac{dV}{dt}=4\pi r^2\frac{dr}{dt}", r"\frac{dV}{dt}=4\pi\frac{dr}{dt}r^2", True, "a product of two"),
    (r"\frac{d^2y}{dx^2}=2", r"2=\frac{d^2 y}{dx^2}", True, "the second"),
    ("dy/dx=2x", r"\frac{dy}{dx}=x\cdot 2", True, "in one line"),
    (r"\frac{d}{2}", "0.5d", True, "d alone is a variable"),
]
JOINTS = [
    ("3 and 5", "3 or 5", False, "one of them is not both"),
    ("Alice and Bob", "Alice or Bob", False, "nor of words"),
    ("Alice, Bob", "Alice or Bob", False, "a hedge"),
    (r"p \land q", r"p \lor q", False, "another formula"),
    (r"p \land q", r"q \land p", True, "which commutes"),
    (r"2 \text{ or } 3", "2 and 3", True, "two solutions"),
    ("3 and 5", "5, 3", True, "a list without words"),
    ("Alice and Bob", "Bob, Alice", True, "nor in words"),
    ("2, 3", r"x=2 \text{ or } x=3", True, "solutions are joined by `or`"),
    ("x=2 and x=3", "x=3 or x=2", True, "on both sides"),
    (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", r"\begin{vmatrix}1&2\\3&4\end{vmatrix}", False, "a determinant"),
    (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", r"\begin{bmatrix}1&2\\3&4\end{bmatrix}", True, "another bracket"),
    (r"\begin{vmatrix}1&2\\3&4\end{vmatrix}", r"\begin{vmatrix} 1&2\\3&4 \end{vmatrix}", True, "the same text"),
]
SPELLINGS = [
    ("a<b<c", "c>b>a", True, "read from the right"),
    ("a<b<c", "c<b<a", False, "another order"),
    ("-1<x<3", "|x-1|<2", True, "a distance"),
    ("-1<x<3", "|x+1|<2", False, "from another centre"),
    ("-1<x<3", "x>-1 and x<3", True, "two bounds"),
    ("-1<x<3", "x>-1 or x<3", False, "which is everything"),
    ("-1<x<3", "x>-1 and y<3", False, "of two variables"),
    ("(1,2]", "]1,2]", True, "open at the left"),
    ("(1,2]", "[1,2[", False, "open at the right"),
    (r"A\cup B", r"B\cup A", True, "a union commutes"),
    (r"A\cup B", r"A\cap B", False, "an intersection"),
    (r"\infty", "infinity", True, "in words"),
    (r"\infty", "-infinity", False, "the other one"),
    ("100!", "100!", True, "large, but the gold's text"),
    ("100!", "101!", False, "not quite"),
    ("3^{1000}", "3^{1000}", True, "a large power"),
    ("3^{1000}", "3^{1001}", False, "not quite"),
]


@pytest.mark.parametrize(
    ("gold", "answer", "right", "why"), [*APPROXIMATIONS, *DROPPED, *DERIVATIVES, *JOINTS, *SPELLINGS]
)
def test_verdicts_of_the_review(gold: str, answer: str, right: bool, why: str) -> None:
    verdict = judge(rf"\boxed{{{answer}}}", gold)
    assert verdict.verdict == ("correct" if right else "wrong"), (why, verdict.rule)


SEPARATORS = (
    *("\\\\", "，", "、", "。", "和", "或者", " - ", " + ", "<br>", r"\newline", r"\hspace{1cm}", r"\mathrm{or}"),
    *(r"\textbf{ or }", " or maybe ", "; or else ", "\n\n---\n\n", " (2) ", "\n2. ", r" \hspace{1cm}\text{or}\quad "),
)


@pytest.mark.parametrize("gap", SEPARATORS)
def test_boxes_stated_together_are_one_list(gap: str) -> None:
    """Catches a rewarded listing of all options: the last one passed as the answer."""
    listed = rf"(1) \boxed{{5}}{gap}\boxed{{6}}"
    assert judge(listed, "6").verdict == judge(listed, "5").verdict == "wrong"
    assert judge(listed, "5, 6").verdict == "correct"


@pytest.mark.parametrize(
    "gap", ["? No, the answer is ", "</think> ", "? Wait: ", "。答案是", r" \text{, so finally } ", " = 2+2 is wrong; "]
)
def test_words_between_two_boxes_take_the_first_back(gap: str) -> None:
    """Catches a list made of a draft and the answer."""
    assert extract(rf"<think>\boxed{{3}}{gap}\boxed{{4}}").text == "4"


def test_boxes_of_a_chain_must_be_equal() -> None:
    """Catches two options around an equality sign, and a result that is refused for its working."""
    assert judge(r"\boxed{2+3} = \boxed{5}", "5").verdict == "correct"
    assert judge(r"\boxed{2\pi} \approx \boxed{6.28}", r"2\pi").verdict == "correct"
    assert judge(r"\boxed{6} = \boxed{5}", "5").verdict == "wrong"


def test_many_arguments_are_refused_at_once() -> None:
    """Catches 1.4 seconds of parsing; the bound is far above what the refusal takes."""
    started = time.process_time()
    answer = f"f({','.join('A' * 251)})"
    assert judge(rf"\boxed{{{answer}}}", "x>3").verdict == "wrong"
    assert time.process_time() - started < 0.2
