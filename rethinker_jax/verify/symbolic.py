"""Expressions and equations: by our own parser and arithmetic, and by math-verify (sympy) where those do not decide.

The size guards come first. `formulas` reads what pupils write and `values` compares it at fixed points. What they do
not read (relations of several variables, plus-minus) or leave open (equations that are not
proportional) goes to math-verify, gold first (the comparison is not symmetric), with a check by values that may veto:
math-verify alone takes `1/2^60` for `1/2^61`, and drops the tail after commands it does not know, so only known ones go
there. Its own alarms are off: a worker's limits decide, and sympy is only ever
called under them. Sympy objects never leave this module, and are never turned into text.
"""

import re
from fractions import Fraction
from functools import lru_cache
from typing import Any

from rethinker_jax.verify.formulas import BARE_LOG, FUNCTIONS, GREEK, Unread, has, names_in, read_formula
from rethinker_jax.verify.guards import MAX_PARSER_NESTING, nesting, refusal
from rethinker_jax.verify.normalize import plain
from rethinker_jax.verify.numbers import Number, parse_number
from rethinker_jax.verify.values import constant_value, point_of, same_equations, same_values

MAX_DEGREE = 12  # of polynomials whose zeros are compared
# What every item that comes here needs; more would be paid by each worker that starts.
_WARM_UP = ((r"\frac{1}{2}+\sqrt{2}", "(x-1)^2"), ("2x+4y=6", "x+2y=3"))
_FUNCTIONS = {*FUNCTIONS, "sqrt", "abs", "asin", "acos", "atan"}
_HEDGES = {
    *("or", "and", "not", "if", "is", "to", "no", "so", "it", "as", "be", "by", "in", "of", "on", "vs", "nor", "but"),
    "may",
}
_TRIGONOMETRY = re.compile(r"(?:sin|cos|tan|cot|sec|csc)(?![a-z])")
# Feet, a derivative of a constant, a number in another base, degrees before a digit, two numbers side by side.
_AMBIGUOUS = re.compile(r"[\d°]\s*['_]|(?<![a-zA-Z})'])'|°\s*\d|^\s*°|(?<![_\d])\d+\s+\d")
_SEGMENT = re.compile("[A-Z]{2}")
_RUN = re.compile(r"(?<![\\a-zA-Z])[a-zA-Z]{2,}")
# What the parser knows and keeps. It drops the tail after most others without a word: `5 \\approx 6` would be 5.
_COMMANDS = {
    *(FUNCTIONS | GREEK),
    *("frac", "binom", "sqrt", "pi", "infty", "cdot", "times", "div", "pm", "mp", "le", "ge", "ne", "cup", "cap"),
    *("emptyset", "lfloor", "rfloor", "lceil", "rceil", "lvert", "rvert"),
}
_COMMAND = re.compile(r"\\([a-zA-Z]+)")
_OPERATOR = re.compile(
    r"(?<![a-zA-Z\\])d\s*/\s*d[a-zA-Z]|\\frac\s*\{\s*(?:d|\\partial)\s*(?:\^[^{}]*|\^\{\d\})?\s*\}\s*\{\s*(?:d|\\partial)\s*[a-zA-Z\\]"
)
_RELATION = re.compile(r"\\(?:le|ge|ne)(?![a-zA-Z])|[<>]=?|!=|=")
_INDEXED = re.compile(r"[})\]\d!°|]\s*_")  # a value with an index
_INFINITY = re.compile(r"[-+]?\s*\\infty\s*")
_ABOUT = re.compile(r"\\approx(?![a-zA-Z])")
_UNION = re.compile(r"[A-Z]'?(?: ?\\(cup|cap) ?[A-Z]'?)(?: ?\\\1 ?[A-Z]'?)*")
_SAFE = re.compile(r"[^\"'`@#$;:?_~]*|(?:[^\"`@#$;:?~]|_(?!_))*")


class Unparsed(Exception):
    """The text is no mathematics that the parser knows."""


def import_libraries() -> None:
    """Loads sympy and math-verify and builds the parser's commonest tables now, so that no item pays for it."""
    for gold, answer in _WARM_UP:
        same_expression(gold, answer)
        _by_sympy(gold, answer)


def has_words(text: str) -> bool:
    """Does the text hold letter runs that are neither functions nor products of two or three variables?"""
    bare = re.sub(r"\\begin\{\w+\}|\\end\{\w+\}", " ", plain(text))
    runs = [run for run in _RUN.findall(bare) if run not in _FUNCTIONS]
    if not runs:
        return False
    if any(len(run) > 3 or run.lower() in _HEDGES for run in runs):
        return True
    return not re.search(r"[\d+*/^=<>|]|-|\\(?!angle|triangle|text)[a-z]", bare)


@lru_cache(maxsize=512)
def _parse(text: str) -> Any:
    if _misread(text):
        raise Unparsed
    if nesting(text) > MAX_PARSER_NESTING or sum(map(text.count, "([{")) != sum(map(text.count, ")]}")):
        raise Unparsed  # it would be refused there too, after a second
    from latex2sympy2_extended.latex2sympy2 import NormalizationConfig, latex2sympy, normalize_latex
    from math_verify.grader import should_treat_as_complex

    config = NormalizationConfig(
        basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="none", equations=False
    )
    try:
        text = normalize_latex(text, config=config)
        parsed = latex2sympy(
            text, is_real=not should_treat_as_complex(text), convert_degrees=False, normalization_config=None
        )
    except (MemoryError, RecursionError):
        raise
    except Exception as error:  # a grammar generated from a file: it raises whatever it likes
        raise Unparsed from error
    if parsed is None:
        raise Unparsed
    return parsed


def _for_parser(text: str) -> str:
    text = plain(text)
    if _TRIGONOMETRY.search(text):
        text = re.sub(r"(\d+(?:\.\d+)?)\s*°", r"(\1\\cdot \\frac{\\pi}{180})", text)
    text = text.replace("°", "")
    text = re.sub(r"(?<![\\a-zA-Z])(sqrt|sin|cos|tan|log|ln|exp|arcsin|arccos|arctan)(?![a-zA-Z])", r"\\\1", text)
    text = re.sub(r"(?<![\\a-zA-Z])pi(?![a-zA-Z])", r"\\pi ", text)
    text = re.sub(r"\\sqrt\s*\(((?:[^()]|\([^()]*\))*)\)", r"\\sqrt{\1}", text)
    text = re.sub(r"\^\s*\(((?:[^()]|\([^()]*\))*)\)", r"^{\1}", text)
    return text.replace("*", r"\cdot ")


def _unsafe(text: str) -> bool:
    """Characters that no answer needs, and what can be read in two ways."""
    return not _SAFE.fullmatch(text) or bool(_AMBIGUOUS.search(text))


def _misread(text: str) -> bool:
    """Does math-verify drop a part of this without a word: commands that it does not know, relations in a chain?"""
    relations = _RELATION.findall(text)
    chained = len(relations) > 1 and not {"=", "!=", r"\ne"}.isdisjoint(relations)
    if "..." in text or _INDEXED.search(text) or (r"\infty" in text and not _INFINITY.fullmatch(text)):
        return True
    return chained or bool(_OPERATOR.search(text)) or any(name not in _COMMANDS for name in _COMMAND.findall(text))


def _exact_part(text: str) -> str:
    """`2\\pi` of `2\\pi \\approx 6.28`, where every part after the first is a decimal that the first rounds to."""
    head, *tail = (part.strip() for part in _ABOUT.split(text))
    value = number_value(head) if tail else None
    if value is None:
        return text
    numbers = [parse_number(part) for part in tail]
    return head if all(number is not None and _rounds_to(value, number) for number in numbers) else text


def _rounds_to(value: Fraction, number: Number) -> bool:
    """Is the number written as a decimal, or whole, and within half of its last digit?"""
    if number.decimals is None and number.value.denominator != 1:
        return number.value == value
    return abs(value - number.value) * 2 <= Fraction(10) ** -(number.decimals or 0)


def same_expression(gold: str, answer: str) -> tuple[bool, str]:
    """Whether two expressions or equations (cleaned, without units and names) are equal, and what decided."""
    answer = _exact_part(answer)
    guard = refusal(answer) or ("characters" if _unsafe(answer) else None)
    if guard:
        return False, f"guard_{guard}"
    if refusal(gold):
        return False, "guard_gold"
    if has_words(answer):
        return False, "words"
    if _UNION.fullmatch(gold) and _UNION.fullmatch(answer):  # sets may change places, operators not
        return sorted(gold.replace(" ", "")) == sorted(answer.replace(" ", "")), "sets"
    return _by_values(gold, answer) or _by_sympy(gold, answer)


def _by_values(gold: str, answer: str) -> tuple[bool, str] | None:
    """The verdict of our own parser and arithmetic, or None where they do not decide."""
    gold, answer = _with_one_constant(gold, answer)
    try:
        left, right = read_formula(gold), read_formula(answer)
        names, segments = names_in(gold), True
        differing = set(names) ^ set(names_in(answer))
        if differing:
            if all(any(_SEGMENT.match(name) for name in differing & set(names_in(text))) for text in (gold, answer)):
                return False, "variables"  # AB times CD is not AC times BD
            names, segments = names_in(gold, segments=False), False
            if names != names_in(answer, segments=False):
                return False, "variables"
    except Unread:
        return None
    if ("=" in gold) != ("=" in answer):
        return False, "equation_for_value" if "=" in answer else "value_for_equation"
    if "=" in gold:
        same, why = same_equations(gold, answer, names, segments) if names else (False, "identity")
        return None if same is None else (same, why)
    natural = has(left, "call", "ln") and not has(left, "call", BARE_LOG) and has(right, "call", BARE_LOG)
    same = same_values(gold, answer, names, segments, natural)
    return None if same is None else (same, "value")


def _with_one_constant(gold: str, answer: str) -> tuple[str, str]:
    """The constant of integration may be called C or c."""
    if re.search(r"\+\s*C$", gold) and re.search(r"\+\s*c$", answer):
        return gold, answer[:-1] + "C"
    return gold, answer


def _by_sympy(gold: str, answer: str) -> tuple[bool, str]:
    try:
        left = _parse(_for_parser(gold))
    except Unparsed:
        return False, "gold_unparsed"
    try:
        right = _parse(_for_parser(answer))
    except Unparsed:
        return False, "answer_unparsed"
    try:
        return _compare(left, right)
    except (TypeError, NotImplementedError, AttributeError, ValueError):  # sympy: on objects that do not go together
        return False, "sympy_error"


def number_value(text: str) -> Fraction | None:
    """The value of a closed form to 30 digits, or None for what is none (variables, complex, refused by a guard)."""
    text = _exact_part(text)
    if refusal(text) or _unsafe(text) or has_words(text):
        return None
    try:
        return constant_value(text)
    except Unread:
        return _sympy_value(text)


def _sympy_value(text: str) -> Fraction | None:
    try:
        parsed = _parse(_for_parser(text))
    except Unparsed:
        return None
    import sympy

    if not isinstance(parsed, sympy.Expr) or parsed.free_symbols:
        return None
    value = _at(parsed, {})
    if value is None or not value.is_real or not value.is_finite:
        return None
    if abs(value) > 10**60 or (value != 0 and abs(value) < sympy.Float(10) ** -60):
        return None
    return Fraction(int(sympy.Integer((value * sympy.Integer(10) ** 60).round()))) / 10**60


def _compare(gold: Any, answer: Any) -> tuple[bool, str]:
    import sympy
    from sympy.core.relational import Relational

    if isinstance(gold, sympy.Expr) and isinstance(answer, sympy.Expr):
        return _same_value(gold, answer)
    if isinstance(gold, sympy.Eq) and isinstance(answer, sympy.Eq):
        return _same_equation(gold, answer)
    if isinstance(answer, (sympy.Eq, sympy.logic.boolalg.BooleanTrue)) and not isinstance(gold, Relational):
        return False, "equation_for_value"
    if isinstance(gold, sympy.Eq):
        return False, "value_for_equation"
    return _math_verify(gold, answer), "math_verify"


def _math_verify(gold: Any, answer: Any) -> bool:
    from math_verify import verify

    return bool(verify(gold, answer, strict=True, timeout_seconds=None))


def _same_value(gold: Any, answer: Any) -> tuple[bool, str]:
    names = {symbol.name for symbol in gold.free_symbols}
    if names != {symbol.name for symbol in answer.free_symbols} and not names <= {"i"}:
        return False, "variables"
    verdicts = [_agree(_at(gold, point), _at(answer, point)) for point in _assignments(gold, answer)]
    if verdicts[0] is False or verdicts[1] is False:
        return False, "value"
    if all(verdict is True for verdict in verdicts):
        return True, "value"
    return _math_verify(gold, answer), "math_verify"


def _same_equation(gold: Any, answer: Any) -> tuple[bool, str]:
    """Proportional differences of the two sides are one equation; an identity is none; the rest is solved."""
    left, right = gold.lhs - gold.rhs, answer.lhs - answer.rhs
    names = {symbol.name for symbol in gold.free_symbols}
    if names != {symbol.name for symbol in answer.free_symbols} or not names:
        return False, "variables"
    values = [(_at(left, point), _at(right, point)) for point in _assignments(gold, answer)]
    if all(a is not None and _agree(a, 0) for _, a in values):
        return False, "identity"
    if all(g is not None and a is not None for g, a in values):
        (g0, a0), rest = values[0], values[1:]
        if all(_agree(g * a0, a * g0) for g, a in rest) and not _agree(a0, 0) and not _agree(g0, 0):
            return True, "proportional"
    solutions = _same_zeros(left, right)
    if solutions is not None:
        return solutions, "zeros"
    return _math_verify(gold, answer), "math_verify"


def _same_zeros(left: Any, right: Any) -> bool | None:
    """Do two polynomials, or quotients of them, have the same complex zeros? None for other functions.

    Two polynomials do exactly when their square-free parts differ by a constant factor.
    """
    import sympy

    parts = []
    for expression in (left, right):
        symbols = sorted(expression.free_symbols, key=lambda symbol: symbol.name)
        expression = expression.subs({symbol: sympy.Symbol(symbol.name) for symbol in symbols})
        numerator = sympy.fraction(sympy.together(expression))[0]
        names = [sympy.Symbol(symbol.name) for symbol in symbols]
        if not numerator.is_polynomial(*names):
            return None
        polynomial = sympy.Poly(numerator, *names)
        if polynomial.total_degree() > MAX_DEGREE:
            return False  # solving would take minutes; only a proportional answer is accepted
        if not polynomial.domain.is_Exact:
            return None
        parts.append(polynomial.sqf_part().monic().as_expr())
    return bool(sympy.expand(parts[0] - parts[1]) == 0)


def _assignments(gold: Any, answer: Any) -> list[dict[str, Fraction]]:
    """Three points, one with negative values: a value for every name but `i`, the same on both sides."""
    names = sorted({s.name for s in gold.free_symbols | answer.free_symbols} - {"i"})
    return [point_of(tuple(names), number) for number in (0, 2, 3)]


def _at(expression: Any, point: dict[str, Fraction]) -> Any:
    """The value at a point to 30 digits, or None where it has none."""
    import sympy

    values = {}
    for symbol in expression.free_symbols:
        if symbol.name in point:
            values[symbol] = sympy.Rational(point[symbol.name].numerator, point[symbol.name].denominator)
        elif symbol.name == "i":
            values[symbol] = sympy.I
    try:
        value = sympy.N(expression.subs(values) if values else expression, 30)
    except (MemoryError, RecursionError):
        raise
    except Exception:  # sympy has no list of what evaluating may raise
        return None
    if not value.is_number or value.has(sympy.nan, sympy.zoo, sympy.oo, -sympy.oo):
        return None
    real, imaginary = value.as_real_imag()
    return value if real.is_Float or real.is_Rational or imaginary.is_Float or imaginary.is_Rational else None


def _agree(left: Any, right: Any) -> bool | None:
    """Equal to 12 relative digits; None where one side has no value."""
    if left is None or right is None:
        return None
    size = max(abs(left), abs(right))
    if size < 1e-100:
        return True
    return bool(abs(left - right) <= size * 1e-12)
