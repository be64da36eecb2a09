"""Hostile and broken inputs for the verifier, each made from a seed and a number alone (scripts/fuzz_verifier.py)."""

import random
from collections.abc import Callable

from rethinker_jax.types import Verdict
from rethinker_jax.verify.judge import JudgeItem
from rethinker_jax.verify.kinds import KINDS
from rethinker_jax.verify.pool import DEADLINE

GOOD: tuple[tuple[str, str, tuple[str, ...]], ...] = (  # gold, a right answer, choices
    ("7", "7.0", ()),
    ("-12", "−12", ()),
    ("1/2", "0.5", ()),
    (r"\frac{3}{4}", r"\dfrac{6}{8}", ()),
    ("2 1/3", r"2\frac{1}{3}", ()),
    ("0.333", r"\frac{1}{3}", ()),
    ("6.02e23", r"6.02\times 10^{23}", ()),
    ("1,234,567", "1234567", ()),
    ("25%", r"25\%", ()),
    ("15 cm^2", r"15\ \text{cm}^2", ()),
    ("9.8 m/s^2", r"9.8\,\mathrm{m/s^2}", ()),
    ("45°", r"45^{\circ}", ()),
    (r"2\sqrt{3}", r"\sqrt{12}", ()),
    (r"x^2-1", "(x-1)(x+1)", ()),
    (r"9\pi", r"\pi\cdot 9", ()),
    ("2x+4y=6", "x+2y=3", ()),
    ("x=3", "3", ()),
    (r"x\geq 3", r"[3,\infty)", ()),
    (r"(-\infty,2)\cup(3,\infty)", r"x<2\text{ or }x>3", ()),
    (r"\{1,2,3\}", r"\{3,2,1\}", ()),
    ("(3,4)", r"\left(3,4\right)", ()),
    (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", r"\begin{bmatrix}1&2\\3&4\end{bmatrix}", ()),
    ("yes", "Yes.", ()),
    ("isosceles triangle", "an isosceles triangle", ()),
    (r"\mathrm{H_2O}", "H2O", ()),
    ("2H2 + O2 -> 2H2O", r"2H_2+O_2\rightarrow 2H_2O", ()),
    ("3:4", r"3\colon 4", ()),
    ("10:30 am", "10:30", ()),
    ("March 4, 2021", "4 March 2021", ()),
    ("N30°E", "N 30° E", ()),
    ("[10, 20, 110, 220]", "[10, 20, 110, 220]", ()),
    (r"Area $=904.78 \mathrm{~cm}^{3}$", "904.78", ()),
    ("B", r"\text{B}", ("1 cm", "2 cm", "3 cm", "4 cm")),
    ("red", "(C)", ("blue", "green", "red")),
    ("A, C", "A and C", ("1", "2", "3", "4")),
)
PIECES = (
    r"\frac{", "}", "{", r"\sqrt", r"\sqrt[", "^", "_", "1", "23", "0", "x", "y", "n", "(", ")", "[", "]", ",", ";",
    "=", "<", ">", r"\le", r"\pi", "+", "-", "!", "°", "½", "%", r"\text{", "cm", "or", "and", "A", "B", "C",
    r"\boxed{", ".", "/", r"\infty", r"\cup", "e", "i", "\\\\", "\\", "$", "²", ":", "→", r"\to", r"\{", r"\}", "|",
    r"\left(", r"\right)", r"\begin{matrix}", r"\end{matrix}", "&", r"\pm", r"\sin", r"\log", r"\cdot", r"\times",
    "∪", "∅", "√", "'", "<answer>", "</answer>", "<think>", r"\dfrac", r"\binom{", r"\mathrm{", "~", "#", "@",
    r"\\boxed", r"\mod", r"\ne", r"\approx", r"\dots",
    "None", "nan", "inf", "True", "yes", "no", "N30°E", "->", "H_2", "O_2", "1e", "10^", "\n",
)  # fmt: skip
ALPHABETS = (
    (0x20, 0x7E), (0x00, 0x1F), (0x80, 0xFF), (0x300, 0x36F), (0x370, 0x3FF), (0x590, 0x6FF), (0x966, 0x96F),
    (0x2000, 0x206F), (0x2070, 0x209C), (0x2150, 0x218B), (0x2190, 0x22FF), (0x2460, 0x24FF), (0x3000, 0x303F),
    (0x4E00, 0x4FFF), (0xD800, 0xDFFF), (0xE000, 0xE0FF), (0xFE00, 0xFEFF), (0xFF00, 0xFFEF), (0x1D400, 0x1D7FF),
    (0x1F300, 0x1F6FF), (0xE0000, 0xE007F), (0, 0x10FFFF),
)  # fmt: skip


def make_item(seed: int, number: int) -> tuple[str, JudgeItem]:
    """The name of what made the answer, and the item. The same for the same seed and number."""
    rng = random.Random(f"{seed} {number}")
    gold, good, choices = rng.choice(GOOD)
    name = rng.choice((*MAKERS, "latex", "mutation"))
    answer = mutated(rng, good) if name == "mutation" else MAKERS[name](rng)
    source = rng.random()  # of a gold that is no usual one
    if source < 0.25:
        gold = MAKERS[name](rng)
    elif source < 0.35:
        gold = mutated(rng, gold)
    elif source < 0.45:
        gold = rng.choice(list(MAKERS.values()))(rng)
    if rng.random() < 0.1:
        choices = tuple(rng.choice(list(MAKERS.values()))(rng)[:400] for _ in range(rng.randint(1, 9)))
    kind = "auto" if rng.random() < 0.7 else rng.choice((*KINDS, "no such type"))
    return name, JudgeItem(_in_response(rng, answer), gold, choices, kind)


def problem_of(verdict: Verdict) -> str:
    """What is wrong with a verdict whatever the item was, or ""."""
    if verdict.verdict == "crash":
        return f"crash ({verdict.rule})"
    if verdict.rule == DEADLINE:
        return "past the wall clock"
    return "" if verdict.reward == float(verdict.verdict == "correct") else f"reward {verdict.reward}"


def mutated(rng: random.Random, text: str) -> str:
    for _ in range(rng.randint(1, 4)):
        at, to = sorted((rng.randint(0, len(text)), rng.randint(0, len(text))))
        piece = rng.choice(PIECES) if rng.random() < 0.7 else _unicode(rng)[:3]
        change = rng.randrange(7)
        if change == 0:
            text = text[:at] + text[at + 1 :]
        elif change == 1:
            text = text[:at] + piece + text[at:]
        elif change == 2:
            text = text[:at] + piece + text[at + 1 :]
        elif change == 3:
            text = text[:at] + text[at:to] * rng.choice((2, 3, 9, 200)) + text[to:]
        elif change == 4:
            text = text[:at] + text[at:to][::-1] + text[to:]
        elif change == 5:
            text = text + piece + rng.choice(GOOD)[1]
        else:
            text = rng.choice(("\\text{%s}", "\\left(%s\\right)", "(%s)", "{%s}", "$%s$", "-%s", "\\sqrt{%s}")) % text
    return text[:30_000]


def _in_response(rng: random.Random, answer: str) -> str:
    form = rng.random()
    if form < 0.85:
        return rf"so it is \boxed{{{answer}}}."
    if form < 0.88:
        return rf"\boxed{{{answer}"
    if form < 0.91:
        return rf"<think>\boxed{{1}}</think><answer>{answer}</answer>"
    if form < 0.94:
        return rf"\boxed{{{answer}}} and \boxed{{{rng.choice(GOOD)[1]}}}"
    if form < 0.97:
        return answer
    return (
        rng.choice((r"\boxed{", "}", r"\boxed{}", "<answer>", "{ ", "\\", r"\fbox{1},")) * rng.choice((3, 500, 20_000))
        + answer
    )


def _size(rng: random.Random, largest: int) -> int:
    """1 to `largest`, small ones as often as large ones."""
    return min(largest, int(2 ** rng.uniform(0, largest.bit_length())))


def _bytes(rng: random.Random) -> str:
    return rng.randbytes(_size(rng, 2000)).decode(rng.choice(("utf-8", "utf-16", "latin-1")), "replace")


def _unicode(rng: random.Random) -> str:
    ranges = rng.choices(ALPHABETS, k=3)
    return "".join(chr(rng.randint(*rng.choice(ranges))) for _ in range(_size(rng, 200)))


def _soup(rng: random.Random) -> str:
    return "".join(rng.choices(PIECES, k=_size(rng, 60)))


def _number(rng: random.Random) -> str:
    digits = "".join(rng.choices("0123456789", k=_size(rng, 6)))
    return rng.choice((digits, digits, f"0.{digits}", f"{digits}.{digits}", f"-{digits}"))


def _latex(rng: random.Random, depth: int = 0) -> str:
    if depth > 5 or rng.random() < 0.25:
        return rng.choice((_number(rng), *"xyzabntkei", r"\pi", r"\theta", r"\infty", "AB", r"x_{1}"))
    one, two = _latex(rng, depth + 1), _latex(rng, depth + 1)
    form = rng.choice((
        "%s+%s", "%s-%s", r"%s\cdot %s", "%s%s", r"\frac{%s}{%s}", "{%s}^{%s}", "(%s)^{%s}", r"\log_{%s}(%s)",
        "%s=%s", "%s<%s", r"%s\le %s", r"%s\ne %s", r"%s\approx %s", r"%s\mod %s", r"%s\equiv %s\pmod{%s}",
        r"%s\land %s", r"\frac{d}{dx}(%s)=%s", r"\frac{d%s}{dx}=%s", "f(%s,%s)",
        "(%s,%s)", r"[%s,%s)", r"\{%s,%s\}", r"%s\cup %s", r"\sqrt[%s]{%s}", r"\sin(%s)+\cos{%s}", r"|%s|-%s",
        r"%s\pm %s", r"\binom{%s}{%s}",
        r"\begin{pmatrix}%s\\%s\end{pmatrix}", r"%s\,\text{cm}+%s", r"\left(%s\right)%s", r"e^{%s}\ln %s", r"%s!%s",
        r"%s:%s", r"%s\%%%s",
    ))  # fmt: skip
    return form % ((one, two) if form.count("%s") == 2 else (one, two, two))


def _nesting(rng: random.Random) -> str:
    left, right = rng.choice((
        ("{", "}"), ("(", ")"), ("[", "]"), (r"\frac{1}{", "}"), (r"\sqrt{", "}"), (r"\left(", r"\right)"),
        (r"\text{", "}"), (r"\boxed{", "}"),
        ("x^{", "}"), ("x_{", "}"), (r"\sin(", ")"), ("-", ""), ("|", "|"), (r"\{", r"\}"),
        (r"\begin{matrix}", r"\end{matrix}"), ("1+", ""), ("$", "$"),
    ))  # fmt: skip
    depth = _size(rng, 3000)
    missing = rng.choice((0, 0, 0, 1, depth))
    return left * depth + rng.choice(("1", "", "x", _latex(rng, 4))) + right * (depth - missing)


def _tower(rng: random.Random) -> str:
    big = rng.choice(("9", "10", "99", "10^9", "10^{10}", "1000000", "x", "i", "(x+1)", "e", "0.1", "(1+i)"))
    height = _size(rng, 30)
    count = _size(rng, 10**9)
    return rng.choice((
        (big + "^{") * height + big + "}" * height,
        (big + "^") * height + big,
        ("(" * height + big + ")^{9}" * height),
        f"{count}!", f"(({rng.randint(3, 30)}!)!)!", f"{big}!", rf"\binom{{{count}}}{{{count // 2}}}",
        rf"\sum_{{k=1}}^{{{count}}} k^{{{height}}}", rf"\prod_{{k=1}}^{{{count}}} k",
        rf"\int_0^{{{count}}} e^{{-x^2}}dx",
        rf"\lim_{{n\to\infty}} n^{{{big}}}", rf"\sin({big}^{{{count}}})", f"({big}+y)^{{{count}}}",
        f"x^{{{count}}}=1", f"{big}e{count}", f"1e-{count}",
        rf"\sqrt[{count}]{{{big}}}", rf"\log_{{{big}}}({big}^{{{count}}})", f"{big}^{{-{count}}}",
        f"{big}^{{1/{count}}}", f"{big} mod {count}",
        rf"\gcd({big}^{{{count}}}, 6)", rf"e^{{e^{{e^{{{big}}}}}}}", f"x^{{7}}+3x^{{5}}\\sin x+e^x={big}^x",
        rf"\Gamma({count})", f"0^{{-{count}}}",
    ))  # fmt: skip


def _digits(rng: random.Random) -> str:
    run = "".join(rng.choices("0123456789", k=_size(rng, 30_000)))
    short = run[: _size(rng, 300)]
    return rng.choice((
        run, f"0.{run}", f"{short}.{short}", rf"\frac{{{short}}}{{{short[::-1]}}}", f"{short}e{short[:4]}",
        f"{short}%", f"{short} cm", f"-{short}/{short}",
        f"{short}^{{{short[:5]}}}", ",".join(short), f"{short[:9]}:{short[9:18]}", f"0x{short}",
        "0" * len(short) + "7", f"1.{'3' * len(short)}...", f"{short}\\times10^{{{short[:6]}}}",
    ))  # fmt: skip


def _list(rng: random.Random) -> str:
    maker = rng.choice(
        (
            _number,
            _number,
            _latex,
            lambda rng: rng.choice("ABCDEFGHIJ"),
            lambda rng: rng.choice(("cat", "a dog", "no", "the")),
        )
    )
    parts = [maker(rng) for _ in range(_size(rng, rng.choice((5, 80, 1500))))]
    left, separator, right = rng.choice((
        ("", ", ", ""), ("(", ",", ")"), (r"\{", ",", r"\}"), ("[", ",", "]"), ("", " and ", ""), ("", " or ", ""),
        ("", ";", ""), ("", " ", ""), ("", "=", ""), ("", "<", ""),
        (r"\begin{pmatrix}", "&", r"\end{pmatrix}"), (r"\begin{bmatrix}", r"\\", r"\end{bmatrix}"),
        ("[[", "],[", "]]"), ("", r"\cup", ""), ("", "\n", ""), ("", "+", ""), ("", "-", ""),
    ))  # fmt: skip
    return left + separator.join(parts) + right


MAKERS: dict[str, Callable[[random.Random], str]] = {
    "bytes": _bytes,
    "unicode": _unicode,
    "soup": _soup,
    "latex": _latex,
    "nesting": _nesting,
    "tower": _tower,
    "digits": _digits,
    "list": _list,
    "mutation": lambda rng: mutated(rng, rng.choice(GOOD)[1]),
}
