"""Values of formula trees, exact where they are rational and to 50 digits where not, and equality by values.

Two formulas are the same when they have the same value wherever the first has one, at fixed points: rational ones that
are no zeros of anything a problem asks about, in and outside the unit interval and of both signs. Rational arithmetic
is exact; the rest agrees to 35 relative digits, and a sum that cancels to less than 40 digits is zero. So `1/2^60` and
`1/2^61` differ, and `(\\sqrt{2})^2 - 2` is 0. Everything is bounded: what would get too large has no value.
"""

from collections.abc import Callable, Sequence
from fractions import Fraction
from functools import lru_cache
from math import isqrt
from typing import Any

from rethinker_jax.verify.formulas import BARE_LOG, Tree, has, names_in, read_formula

POINTS = tuple(
    tuple(Fraction(text) for text in line.split())
    for line in (
        "17/13 29/11 37/23 43/31 53/47 61/19",
        "5/31 11/37 7/41 13/29 3/23 8/19",
        "71/29 19/17 83/37 23/7 41/53 67/59",
        "-31/17 47/29 -13/19 59/23 -61/43 73/41",
        "7/17 -13/31 11/19 -17/41 29/37 -19/47",
    )
)
MIN_POINTS = 2  # at which both sides must have a value
MAX_BITS = 4096  # of an exact number
MAX_EXPONENT = 8 * MAX_BITS  # binary, of an inexact number
_DIGITS = 50
_SAME = 35  # relative digits of two equal values
_CANCELLED = 40

UNDEFINED, NOT_REAL = "undefined", "not_real"  # instead of a value
Value = Any  # Fraction, or mpmath's mpf or mpc


class Undefined(Exception):
    """No value here: division by zero, a logarithm of zero, a number that would be too large."""


class NotReal(Undefined):
    """No real value here, where only those count: an even root of a negative number, a factorial of 1/3."""


@lru_cache(maxsize=1)
def _mp() -> Any:
    """A context of our own, so that no other user of mpmath sets its precision."""
    from mpmath.ctx_mp import MPContext

    context = MPContext()
    context.dps = _DIGITS
    return context


def same_values(gold: str, answer: str, names: tuple[str, ...], segments: bool, natural: bool) -> bool | None:
    """Whether two formulas in the same variables (cleaned texts) are equal; None where too few points could tell.

    `natural`: a logarithm without a base is the natural one. Points at which the gold has no value, or the answer none
    that is real, do not count; elsewhere an answer without a value is another one.
    """
    points = range(len(POINTS) if names else 1)
    compared = 0
    for number in points:
        left = value_at(gold, names, number, segments, natural)
        if isinstance(left, str):
            continue
        right = value_at(answer, names, number, segments, natural)
        if isinstance(right, str):
            if right == UNDEFINED:
                return False
            continue
        if not agree(left, right):
            return False
        compared += 1
    return True if compared >= min(MIN_POINTS, len(points)) else None


def same_equations(gold: str, answer: str, names: tuple[str, ...], segments: bool) -> tuple[bool | None, str]:
    """Whether two equations in the same variables say the same, and why; None where these checks leave it open.

    Proportional differences of the sides do. An identity never does, nor does one that misses a solution of the other.
    """
    pairs = [tuple(value_at(text, names, k, segments, False) for text in (gold, answer)) for k in range(len(POINTS))]
    defined = [(g, a) for g, a in pairs if not isinstance(g, str) and not isinstance(a, str)]
    if len(defined) < 3:
        return None, "undefined"
    if all(a == 0 for _, a in defined) or all(g == 0 for g, _ in defined):
        return False, "identity"
    g0, a0 = next((g, a) for g, a in defined if a != 0)
    if g0 != 0 and all(agree(_product([g, a0]), _product([a, g0])) for g, a in defined):
        return True, "proportional"
    left, right = read_formula(gold, segments), read_formula(answer, segments)
    if _misses_a_solution(left, right, names) or _misses_a_solution(right, left, names):
        return False, "solutions"
    return None, "open"


def _misses_a_solution(left: Tree, right: Tree, names: tuple[str, ...]) -> bool:
    """Is there a solution of the first equation, found by secants along a variable, that the second does not have?"""
    for name in names[:2]:
        for number in (0, 3):
            point: dict[str, Value] = point_of(names, number)
            try:
                point[name] = _secant(left, point, name)
                missed = evaluate(right, point, False, True)
                scale = evaluate(right, {**point, name: point[name] + 1}, False, True)
            except (Undefined, ZeroDivisionError, OverflowError, ValueError):
                continue
            if abs(_inexact(missed)) > _mp().mpf(10) ** -25 * max(1, abs(_inexact(scale))):
                return True
    return False


def _secant(tree: Tree, point: dict[str, Value], name: str) -> Value:
    """A zero along one variable, exact for a linear tree; raises Undefined where 60 steps do not find one."""

    def height(x: Value) -> Value:
        return evaluate(tree, {**point, name: x}, False, True)

    x0, x1 = point[name], point[name] + Fraction(3, 7)
    y0, y1 = height(x0), height(x1)
    start = max(abs(_inexact(y0)), abs(_inexact(y1)), _mp().mpf(10) ** -3)
    for step in range(60):
        if y1 == 0 or abs(_inexact(y1)) < start * _mp().mpf(10) ** -(_SAME + 5):
            return x1
        if y1 == y0:
            raise Undefined
        x2 = _sum([x1, _product([-1 * y1, _sum([x1, -1 * x0]), 1 / _sum([y1, -1 * y0])])])
        x0, y0, x1 = x1, y1, x2 if step == 0 else _inexact(x2)
        y1 = height(x1)
    raise Undefined


def point_of(names: tuple[str, ...], number: int) -> dict[str, Value]:
    return {name: POINTS[number][k % 6] + k // 6 for k, name in enumerate(names)}


@lru_cache(maxsize=8192)
def value_at(text: str, names: tuple[str, ...], number: int, segments: bool, natural: bool) -> Value | str:
    """A formula's value at a point, or UNDEFINED, or NOT_REAL."""
    tree = read_formula(text, segments)
    real = bool(names) and not has(tree, "constant", "i")
    try:
        return evaluate(tree, point_of(names, number), natural, real)
    except NotReal:
        return NOT_REAL
    except (Undefined, ZeroDivisionError, OverflowError, ValueError):
        return UNDEFINED


def constant_value(text: str) -> Fraction | None:
    """The value of a closed form that is real; None for one with variables, a complex one or one without a value."""
    value = UNDEFINED if names_in(text) else value_at(text, (), 0, True, False)
    if isinstance(value, (str, Fraction)):
        return value if isinstance(value, Fraction) else None
    if _is_complex(value):
        if value.imag != 0:
            return None
        value = value.real
    sign, mantissa, exponent, _ = value._mpf_
    return Fraction(-mantissa if sign else mantissa) * Fraction(2) ** exponent if abs(exponent) < MAX_BITS else None


def agree(left: Value, right: Value) -> bool:
    """Equal: exactly for rational values, else to 35 relative digits. Zero agrees with zero alone."""
    if isinstance(left, Fraction) and isinstance(right, Fraction):
        return left == right
    mp = _mp()
    a, b = _inexact(left), _inexact(right)
    return bool(abs(a - b) <= max(abs(a), abs(b)) * mp.mpf(10) ** -_SAME)


def _inexact(value: Value) -> Any:
    if isinstance(value, Fraction):
        mp = _mp()
        return mp.mpf(value.numerator) / value.denominator
    return value


def evaluate(tree: Tree, point: dict[str, Value], natural: bool, real: bool) -> Value:
    """The value of a tree. Raises Undefined, ZeroDivisionError, OverflowError or ValueError where it has none."""
    kind = tree[0]
    if kind == "number":
        return tree[1]
    if kind == "name":
        return point[tree[1]]
    if kind == "constant":
        mp = _mp()
        return {"pi": mp.pi, "e": mp.e, "i": mp.mpc(0, 1)}[tree[1]] * 1
    if kind in ("sum", "product"):
        values = [evaluate(part, point, natural, real) for part in tree[1]]
        return _bounded(_sum(values) if kind == "sum" else _product(values))
    if kind == "call":
        return _bounded(_call(tree[1], [evaluate(part, point, natural, real) for part in tree[2]], natural, real))
    left, right = (evaluate(part, point, natural, real) for part in tree[1:])
    if kind == "quotient":
        if right == 0:
            raise Undefined
        return _bounded(left / right if isinstance(left, type(right)) else _inexact(left) / _inexact(right))
    if kind == "root":
        if right == 0:
            raise Undefined
        exponent = Fraction(1) / right if isinstance(right, Fraction) else 1 / right
        return _bounded(_power(left, exponent, real))
    return _bounded(_power(left, right, real))


def _bounded(value: Value) -> Value:
    if isinstance(value, Fraction):
        if max(value.numerator.bit_length(), value.denominator.bit_length()) > MAX_BITS:
            return _bounded(_inexact(value))
        return value
    mp = _mp()
    if _is_complex(value):  # e^{i pi} is real but for its last digits
        small = abs(value) * mp.mpf(10) ** -_CANCELLED
        if abs(value.imag) <= small:
            value = value.real
        elif abs(value.real) <= small:
            value = mp.mpc(0, value.imag)
    if mp.isnan(value) or mp.isinf(value) or (value != 0 and abs(mp.mag(value)) > MAX_EXPONENT):
        raise Undefined
    return value


def _sum(values: Sequence[Value]) -> Value:
    if all(isinstance(value, Fraction) for value in values):
        return sum(values, Fraction(0))
    mp = _mp()
    terms = [_inexact(value) for value in values]
    total = mp.fsum(terms)
    return Fraction(0) if abs(total) <= max(map(abs, terms)) * mp.mpf(10) ** -_CANCELLED else total


def _product(values: Sequence[Value]) -> Value:
    product: Value = Fraction(1)
    for value in values:
        if value == 0:
            return Fraction(0)
        exact = isinstance(value, Fraction) and isinstance(product, Fraction)
        product = product * value if exact else _inexact(product) * _inexact(value)
    return product


def _power(base: Value, exponent: Value, real: bool) -> Value:
    """Odd roots of negative numbers are negative; even ones are imaginary, or NotReal where `real`."""
    if base == 0:
        if not isinstance(exponent, Fraction) or exponent <= 0:
            raise Undefined
        return Fraction(0)
    negative = not _is_complex(base) and base < 0
    if isinstance(exponent, Fraction):
        if abs(exponent) > MAX_BITS:
            raise Undefined
        if exponent.denominator == 1:
            return _whole_power(base, int(exponent))
        if negative and exponent.denominator % 2:
            size = _power(-base, exponent, real)
            return size if exponent.numerator % 2 == 0 else -size
        if exponent.denominator == 2 and isinstance(base, Fraction) and base > 0:
            root = _exact_root(base)
            if root is not None:
                return _whole_power(root, exponent.numerator)
    if negative and real:
        raise NotReal
    mp = _mp()
    base, exponent = _inexact(base), _inexact(exponent)
    if abs(exponent) * (abs(mp.mag(base)) + 1) > MAX_EXPONENT:
        raise Undefined
    return mp.sqrt(base) if exponent == 0.5 else mp.power(base, exponent)


def _whole_power(base: Value, exponent: int) -> Value:
    if isinstance(base, Fraction):
        bits = max(base.numerator.bit_length(), base.denominator.bit_length())
        if bits * abs(exponent) <= 2 * MAX_BITS:
            return base**exponent
    return _inexact(base) ** exponent


def _is_complex(value: Value) -> bool:
    return isinstance(value, _mp().mpc)


def _exact_root(value: Fraction) -> Fraction | None:
    top, bottom = isqrt(value.numerator), isqrt(value.denominator)
    return Fraction(top, bottom) if top**2 == value.numerator and bottom**2 == value.denominator else None


def _call(name: str, values: Sequence[Value], natural: bool, real: bool) -> Value:
    if name == BARE_LOG:
        name, values = ("ln", values) if natural else ("log", [*values, Fraction(10)])
    first = values[0]
    if name in ("factorial", "binomial"):
        return _count(name, values)
    if name == "abs":
        return abs(first)
    if name in ("floor", "ceil"):
        if _is_complex(first):
            raise Undefined
        rounded = int(_mp().floor(_inexact(first))) if not isinstance(first, Fraction) else first.__floor__()
        return Fraction(rounded + (name == "ceil" and rounded != first))
    if name in ("ln", "log"):
        if any(value == 0 for value in values) or (real and any(value < 0 for value in values)):
            raise Undefined
        if name == "ln":
            return Fraction(0) if first == 1 else _mp().ln(_inexact(first))
        return _logarithm(first, values[1])
    if name.endswith("()"):
        return _opaque(name, first)
    return _trigonometric(name, _inexact(first), real)


def _logarithm(value: Value, base: Value) -> Value:
    if base == 1:
        raise Undefined
    mp = _mp()
    quotient = mp.ln(_inexact(value)) / mp.ln(_inexact(base))
    if isinstance(value, Fraction) and isinstance(base, Fraction) and not _is_complex(quotient):
        whole = int(mp.nint(quotient))
        if abs(whole) < 400 and base**whole == value:  # log_2 8 is 3 exactly
            return Fraction(whole)
    return quotient


def _count(name: str, values: Sequence[Value]) -> Value:
    count = values[-1]
    if not isinstance(count, Fraction) or count.denominator != 1 or not 0 <= count <= 200:
        raise NotReal  # not at this point
    product: Value = Fraction(1)
    for k in range(int(count)):
        factor = Fraction(k + 1) if name == "factorial" else _sum([values[0], Fraction(-k)]) / (k + 1)
        product = _product([product, factor])
    return product


def _opaque(name: str, value: Value) -> Value:
    """Some value for f(x) of an unknown f: the same for the same argument, without any identity of its own."""
    code = sum(ord(c) * 31**k for k, c in enumerate(name)) % 997
    mp = _mp()
    return mp.cos(_inexact(value) * (1 + code) / 89) + mp.sqrt(2 + code) * mp.sin(_inexact(value) + code)


def _trigonometric(name: str, value: Any, real: bool) -> Value:
    mp = _mp()
    if mp.mag(value) > 60 or (name.endswith("h") and mp.mag(value) > 18):
        raise Undefined
    reciprocals = {"cot": "tan", "sec": "cos", "csc": "sin"}
    if name in reciprocals:
        if name == "cot":
            return _ratio(_zeroed(mp.cos(value)), _zeroed(mp.sin(value)))
        return _ratio(mp.mpf(1), _zeroed(_function(mp, reciprocals[name])(value)))
    if name == "tan":
        return _ratio(_zeroed(mp.sin(value)), _zeroed(mp.cos(value)))
    if name in ("arcsin", "arccos"):
        if real and abs(value) > 1:
            raise Undefined
        return _zeroed((mp.asin if name == "arcsin" else mp.acos)(value))
    return _zeroed(_function(mp, name)(value))


def _function(mp: Any, name: str) -> Callable[[Any], Any]:
    return {
        "sin": mp.sin, "cos": mp.cos, "arctan": mp.atan, "sinh": mp.sinh, "cosh": mp.cosh, "tanh": mp.tanh,
    }[name]  # fmt: skip


def _zeroed(value: Any) -> Value:
    """sin(pi) to 50 digits is not quite zero."""
    return Fraction(0) if abs(value) < _mp().mpf(10) ** -_CANCELLED else value


def _ratio(top: Value, bottom: Value) -> Value:
    if bottom == 0:
        raise Undefined
    return _inexact(top) / _inexact(bottom)
